"""How often "match" and "no good match" are right, on held-out queries of a run's test split.

`python benchmarks/verdicts.py runs/demo`. The queries are the captions of the test images. Once the picture is
in the gallery: the verdict should be that there is a match (and that picture should come first). Once it, and every
picture with the same caption, is taken out: the verdict should be "no good match". The threshold comes from the
validation split alone; smaller galleries are drawn from the test images, 20 of each size. Which criterion to use was
decided on the validation images alone: one half chooses the threshold, the other half measures, and exchanged.
"""

import sys

from common import report

SIZES = (10, 50, 200)


def verdicts(scores, belongs, least):
    """Shares (%) of right verdicts: with the right picture in the gallery, and without it."""
    best_right = scores.masked_fill(~belongs, -2).amax(1)
    best_wrong = scores.masked_fill(belongs, -2).amax(1)
    present = 100 * (scores.amax(1) >= least).double().mean().item()
    first = 100 * ((best_right >= least) & (best_right > best_wrong)).double().mean().item()
    absent = 100 * (best_wrong < least).double().mean().item()
    return present, first, absent


def split_scores(runs, split):
    """(T, N) mean cosines of a split's captions and images, and which belong together."""
    from calibration import belonging
    from dataset import load_splits
    from index import embed_captions, embed_images

    pairs = load_splits(runs[0].model.config)[split]
    scores = sum(embed_captions(run.model, pairs.captions) @ embed_images(run.model, pairs.files).T for run in runs)
    return scores.cpu() / len(runs), belonging(pairs.captions, pairs.image_index, len(pairs.files)), pairs


def criteria(scores, belongs, pairs):
    """{criterion: share of right verdicts (%)} by cross-validation on two halves of the validation images."""
    import torch

    half = torch.from_numpy(pairs.image_index % 2)
    values = {}
    for present in (True, False):
        s = scores if present else scores.masked_fill(belongs, torch.nan)
        best, mean = s.nan_to_num(-2).amax(1), s.nanmean(1)
        deviation = ((s - mean[:, None]) ** 2).nanmean(1).sqrt()
        second = s.nan_to_num(-2).topk(2, 1).values[:, 1]
        values[present] = {
            "cosine": best,
            "standard deviations above the query's mean": (best - mean) / deviation,
            "lead over the second": best - second,
        }
    found = {}
    for name in values[True]:
        right = 0.0
        for part in (0, 1):
            a, b = (values[present][name] for present in (True, False))
            candidates = torch.cat([a[half == part], b[half == part]]).unique()
            quality = (a[half == part][:, None] >= candidates).double().mean(0)
            quality += (b[half == part][:, None] < candidates).double().mean(0)
            least = candidates[quality.argmax()]
            right += 25 * ((a[half != part] >= least).double().mean() + (b[half != part] < least).double().mean())
        found[name] = round(float(right), 1)
    return found


COLUMNS = (
    "gallery",
    "threshold",
    "right when it is there %",
    "and it comes first %",
    "right when it is not %",
    "right verdicts %",
)


def main():
    import numpy as np
    import torch

    from calibration import calibration_of, threshold
    from index import open_run

    runs = [open_run(folder) for folder in sys.argv[1:] or ["runs/demo"]]
    calibration, rows = calibration_of(runs), []
    scores, belongs, pairs = split_scores(runs, "test")
    rng = np.random.default_rng(0)
    for size in [n for n in SIZES if n < len(pairs.files)] + [len(pairs.files)]:
        results = []
        for _ in range(1 if size == len(pairs.files) else 20):
            images = torch.from_numpy(np.sort(rng.permutation(len(pairs.files))[:size]))
            captions = torch.from_numpy(np.flatnonzero(np.isin(pairs.image_index, images.numpy())))
            least = threshold(calibration, "text_to_image", size)
            part = scores[captions][:, images], belongs[captions][:, images]
            results.append(None if least is None else verdicts(*part, least))
        if None in results:  # so many pictures that verdicts would be little better than a coin's: none are given
            rows.append(dict.fromkeys(COLUMNS, "none given") | {"gallery": size})
            continue
        present, first, absent = (sum(values) / len(results) for values in zip(*results, strict=True))
        values = [least, present, first, absent, (present + absent) / 2]
        rows.append(dict(zip(COLUMNS, [size, *(round(value, 3 if value < 1 else 1) for value in values)], strict=True)))
    compared = criteria(*split_scores(runs, "validation"))
    queries = {"queries": len(pairs.captions), "runs": [str(run.folder.parent) for run in runs]}
    report("verdicts" if len(runs) == 1 else "verdicts_ensemble", rows, criteria_on_validation=compared, **queries)


if __name__ == "__main__":
    main()

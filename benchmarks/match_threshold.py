"""Accuracy of match decisions on the test split: `python benchmarks/match_threshold.py runs/demo`.

Several runs are evaluated as an ensemble. The queries are the captions of the test images. With its own image in the
gallery, a query should have a match (and that image should rank first). Without it, and without all images that share
the caption, the decision should be "no good match". The threshold is fitted to the validation split; smaller galleries
are sampled from the test images, 20 of each size. The criterion was chosen on the validation images: the threshold
is fitted to one half and measured on the other, and vice versa.
"""

import argparse

from common import report

from utils.cli import exit_on_input_error

GALLERY_SIZES = (10, 50, 200)


def decision_rates(scores, matches, threshold):
    """Correct decisions (%): with the matching image, with it ranked first too, and without it (true negatives)."""
    best_match = scores.masked_fill(~matches, -2).amax(1)
    best_other = scores.masked_fill(matches, -2).amax(1)
    positive = 100 * (scores.amax(1) >= threshold).double().mean().item()
    first = 100 * ((best_match >= threshold) & (best_match > best_other)).double().mean().item()
    negative = 100 * (best_other < threshold).double().mean().item()
    return positive, first, negative


def split_scores(runs, split):
    """Mean cosines (T, N) of a split's captions and images, which of them match (T, N), and the `Pairs`."""
    from dataset import load_splits
    from inference import embed_images
    from utils.embed import embed_captions
    from utils.match_rates import matching_pairs

    pairs = load_splits(runs[0].model.config)[split]
    scores = sum(embed_captions(run.model, pairs.captions) @ embed_images(run.model, pairs.files).T for run in runs)
    return scores.cpu() / len(runs), matching_pairs(pairs, *scores.shape), pairs


def compare_criteria(scores, matches, pairs):
    """{criterion: balanced accuracy (%)} by cross-validation on two halves of the validation images."""
    import torch

    half = torch.from_numpy(pairs.image_index % 2)
    values = {}
    for with_match in (True, False):
        s = scores if with_match else scores.masked_fill(matches, torch.nan)
        best, mean = s.nan_to_num(-2).amax(1), s.nanmean(1)
        std = ((s - mean[:, None]) ** 2).nanmean(1).sqrt()
        second = s.nan_to_num(-2).topk(2, 1).values[:, 1]
        values[with_match] = {
            "cosine": best,
            "z-score": (best - mean) / std,
            "margin to the second result": best - second,
        }
    found = {}
    for name in values[True]:
        correct = 0.0
        for part in (0, 1):
            a, b = (values[with_match][name] for with_match in (True, False))
            candidates = torch.cat([a[half == part], b[half == part]]).unique()
            quality = (a[half == part][:, None] >= candidates).double().mean(0)
            quality += (b[half == part][:, None] < candidates).double().mean(0)
            threshold = candidates[quality.argmax()]
            a, b = a[half != part], b[half != part]
            correct += 25 * ((a >= threshold).double().mean() + (b < threshold).double().mean())
        found[name] = round(float(correct), 1)
    return found


COLUMNS = (
    "gallery",
    "threshold",
    "correct with the image %",
    "correct and ranked first %",
    "correct without the image %",
    "balanced accuracy %",
)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0].replace("`", ""))
    parser.add_argument("runs", nargs="*", default=["runs/demo"], help="run folders (default: runs/demo)")
    folders = parser.parse_args(argv).runs

    import numpy as np
    import torch

    from extras.match_threshold import choose_threshold, load_match_rates
    from extras.search_index import open_run

    runs = [open_run(folder) for folder in folders]
    rates, rows = load_match_rates(runs), []
    scores, matches, pairs = split_scores(runs, "test")
    rng, num_images = np.random.default_rng(0), len(pairs.files)
    for size in [n for n in GALLERY_SIZES if n < num_images] + [num_images]:
        threshold = choose_threshold(rates, "text_to_image", size)
        if threshold is None:  # no decision is made
            rows.append(dict.fromkeys(COLUMNS, "no decision") | {"gallery": size})
            continue
        results = []
        for _ in range(1 if size == num_images else 20):
            images = torch.from_numpy(np.sort(rng.permutation(num_images)[:size]))
            captions = torch.from_numpy(np.flatnonzero(np.isin(pairs.image_index, images.numpy())))
            results.append(decision_rates(scores[captions][:, images], matches[captions][:, images], threshold))
        positive, first, negative = (sum(values) / len(results) for values in zip(*results, strict=True))
        values = [threshold, positive, first, negative, (positive + negative) / 2]
        rows.append(dict(zip(COLUMNS, [size, *(round(value, 3 if value < 1 else 1) for value in values)], strict=True)))
    compared = compare_criteria(*split_scores(runs, "validation"))
    queries = {"queries": len(pairs.captions), "runs": folders}
    name = "match_threshold" if len(runs) == 1 else "match_threshold_ensemble"
    report(name, rows, criteria_on_validation=compared, **queries)


if __name__ == "__main__":
    exit_on_input_error(main)()

"""Search, match decisions and zero-shot classification on photographs: `python benchmarks/photographs.py RUN...`.

Several runs are evaluated one by one and as an ensemble. All numbers are from the validation images of the first run's
data set, with their captions as ground truth: an image shows what at least two of its captions mention. The labels and
short queries are fixed lists of words that are frequent in captions of photographs. Match thresholds are fitted on one
half of the images and evaluated on the other, and vice versa. Every gallery size has 20 random galleries.
"""

import argparse
import re

from common import print_table, report

from utils.cli import exit_on_input_error

# A label or query, and the words that mention it
LABELS = {
    "dog": "dog dogs puppy puppies",
    "child": "child children boy boys girl girls kid kids toddler baby",
    "bicycle": "bicycle bicycles bike bikes bicyclist biker cyclist",
    "water": "water ocean sea lake river pool waves",
    "snow": "snow snowy snowboard snowboarder skier skiing",
    "football": "football soccer",
    "climbing": "climbing climber climbs climb",
    "car": "car cars truck",
    "motorcycle": "motorcycle motorcyclist motorbike",
    "basketball": "basketball",
}
QUERIES = {
    "a dog": [LABELS["dog"]],
    "a bicycle": [LABELS["bicycle"]],
    "snow": [LABELS["snow"]],
    "a swimming pool": ["pool"],
    "a beach": ["beach"],
    "a car": ["car cars"],
    "a ball": ["ball balls"],
    "a mountain": ["mountain mountains"],
    "a horse": ["horse horses"],
    "two men": ["two", "men"],
    "a little girl": ["girl"],
    "a black dog": ["black", LABELS["dog"]],
    "a brown dog": ["brown", LABELS["dog"]],
    "a red shirt": ["red", "shirt"],
    "a dog in the snow": [LABELS["dog"], LABELS["snow"]],
    "children on a swing": ["swing swings swinging"],
}
PLUS = (("a dog", "snow"), ("a dog", "water"), ("a man", "a bicycle"), ("a child", "water"), ("a dog", "a ball"))
MINUS = (
    ("a dog in the snow", "snow"),
    ("a dog running in the grass", "grass"),
    ("a child playing in the water", "water"),
    ("a man on a bicycle", "a bicycle"),
    ("a boy with a ball", "a ball"),
)
WORDS = LABELS | {"man": "man men", "boy": "boy boys", "ball": "ball balls", "grass": "grass grassy field"}
GALLERY_SIZES = (10, 50, 100, 200, 500)
FIXED_SIZE = 100  # gallery size at which the fixed threshold is fitted
TOP = 10


def shown(pairs, words, minimum=2):
    """(N,) booleans: the images with at least `minimum` captions that contain a word of each string."""
    import numpy as np

    patterns = [re.compile(rf"\b({'|'.join(w.split())})\b") for w in words]
    hits = np.array([all(p.search(caption.lower()) for p in patterns) for caption in pairs.captions])
    return np.bincount(pairs.image_index, hits, len(pairs.files)) >= minimum


def shown_word(pairs, query):
    """`shown` for a query such as "a dog"."""
    word = query.split()[-1]
    return shown(pairs, [WORDS.get(word, word)])


def text_scores(runs, vectors, texts):
    """(T, N) mean cosines of texts and images over the runs."""
    from utils.embed import embed_captions

    scores = [embed_captions(run.model, texts) @ images.T for run, images in zip(runs, vectors, strict=True)]
    return sum(scores) / len(scores)


# ---- match decisions --------------------------------------------------------------------------------------------


def decision_rates(scores, matches, threshold, rng, size):
    """Correct decisions (%) in random galleries with a matching image and without one; scores (T, N)."""
    import numpy as np

    found = []
    for _ in range(20):
        chosen = rng.permutation(scores.shape[1])[:size]
        s, m = scores[:, chosen], matches[:, chosen]
        positive, others = m.any(1), np.where(m, -2, s).max(1)  # without: the matching images are removed
        if positive.any():
            found.append(((s[positive].max(1) >= threshold).mean(), (others < threshold).mean()))
    return 100 * np.mean(found, 0)


def best_fixed_threshold(scores, matches, rng):
    """The cosine with the highest balanced accuracy in galleries of FIXED_SIZE images."""
    import numpy as np

    best, others = [], []
    for _ in range(20):
        chosen = rng.permutation(scores.shape[1])[:FIXED_SIZE]
        s, m = scores[:, chosen], matches[:, chosen]
        own = m.any(1)
        best.append(s[own].max(1))
        others.append(np.where(m, -2, s).max(1))
    best, others, grid = np.sort(np.concatenate(best)), np.sort(np.concatenate(others)), np.linspace(-1, 1, 401)
    accuracy = 1 - np.searchsorted(best, grid) / len(best) + np.searchsorted(others, grid) / len(others)
    return grid[accuracy.argmax()]


def evaluate_decisions(runs, vectors, pairs):
    """Rows: the balanced accuracy of the program's match decision and of a fixed threshold, by gallery size."""
    import numpy as np
    import torch

    from extras.match_threshold import choose_threshold
    from utils.match_rates import fit_rates, matching_pairs

    captions = text_scores(runs, vectors, pairs.captions)
    sets = {"captions": (captions.numpy(), matching_pairs(pairs, *captions.shape).numpy())}
    relevant = np.stack([shown(pairs, words) for words in QUERIES.values()])
    sets["short queries"] = text_scores(runs, vectors, list(QUERIES)).numpy(), relevant
    values = {}
    for half in (0, 1):
        fit, test = (np.flatnonzero(np.arange(len(pairs.files)) % 2 == part) for part in (half, 1 - half))
        rows = {part: np.isin(pairs.image_index, part_images) for part, part_images in (("fit", fit), ("test", test))}
        scores, matches = (x[rows["fit"]][:, fit] for x in sets["captions"])
        rates = fit_rates(torch.from_numpy(scores), torch.from_numpy(matches))
        rng = np.random.default_rng(half)
        fixed = best_fixed_threshold(scores, matches, rng)
        for kind, (all_scores, all_matches) in sets.items():
            chosen = rows["test"] if kind == "captions" else slice(None)
            scores, matches = all_scores[chosen][:, test], all_matches[chosen][:, test]
            for size in GALLERY_SIZES:
                adaptive = choose_threshold(rates, "text_to_image", size)
                for name, threshold in (("match decision", adaptive), ("fixed threshold", fixed)):
                    found = None if threshold is None else decision_rates(scores, matches, threshold, rng, size)
                    values.setdefault((kind, size, name), []).append(found)
    table = []
    for (kind, size, name), found in values.items():
        undecided = any(rates is None for rates in found)
        positive, negative = (0, 0) if undecided else np.mean(found, 0).round(1)
        cells = ["no decision"] * 3 if undecided else [positive, negative, round((positive + negative) / 2, 1)]
        columns = ("with a match, % correct", "without, % correct", "balanced accuracy %")
        table.append({"queries": kind, "gallery": size, "criterion": name, **dict(zip(columns, cells, strict=True))})
    return table


# ---- search and labels ------------------------------------------------------------------------------------------


def share_shown(scores, shown_images):
    """The percentage of the TOP results that show something."""
    return round(100 * shown_images[scores.topk(TOP).indices.numpy()].mean().item(), 1)


def evaluate_search(runs, vectors, pairs):
    """Rows: percentages of the first results that fit short queries, sums and differences."""
    from inference import build_query, mean_scores, query_vector

    def search(text, **parts):
        query = build_query(text, **parts)
        return mean_scores(vectors, [query_vector(run.model, query) for run in runs])

    rows = []
    for text, words in QUERIES.items():
        fits = shown(pairs, words)
        rows.append(search_row(text, text, share_shown(search(text), fits), fits))
    for first, second in PLUS:
        fits = shown_word(pairs, first) & shown_word(pairs, second)
        what = f"{first} and {second}"
        rows.append(search_row(first, what, share_shown(search(first), fits), fits))
        rows.append(search_row(f"{first} --plus {second}", what, share_shown(search(first, plus=[second]), fits), fits))
    for text, second in MINUS:
        first = " ".join(text.split()[:2])
        fits = shown_word(pairs, first) & ~shown(pairs, [WORDS.get(second.split()[-1], second)], minimum=1)
        what = f"{first} and not {second}"
        rows.append(search_row(text, what, share_shown(search(text), fits), fits))
        rows.append(search_row(f"{text} --minus {second}", what, share_shown(search(text, minus=[second]), fits), fits))
    return rows


def search_row(query, what, found, fits):
    return {"query": query, "images that show": what, f"of the first {TOP} %": found, "of all %": share(fits)}


def share(values):
    return round(100 * values.mean().item(), 1)


def evaluate_labels_of(runs, vectors, pairs):
    """Zero-shot accuracy on the images that show one of the labels, and mention no other."""
    import numpy as np

    from extras.zero_shot import embedding_logits, evaluate_labels

    labels = list(LABELS)
    clear = np.stack([shown(pairs, [words]) for words in LABELS.values()], 1)  # (N, K)
    mentioned = np.stack([shown(pairs, [words], minimum=1) for words in LABELS.values()], 1)
    single = np.flatnonzero((mentioned.sum(1) == 1) & (clear.sum(1) == 1))
    truth = [labels[k] for k in clear[single].argmax(1)]
    logits = embedding_logits([run.model for run in runs], [v[single] for v in vectors], labels)
    found = evaluate_labels(logits, truth, labels)
    return {
        "images": len(single),
        "accuracy %": round(found["accuracy"], 1),
        "mean over labels %": round(found["mean_label_accuracy"], 1),
        "most frequent label %": round(100 * max(truth.count(label) for label in labels) / len(truth), 1),
    }


def evaluate_recalls(runs, vectors, pairs):
    """The recalls of a run or an ensemble, with the half widths of their 95% confidence intervals."""
    import torch

    from clip import retrieval_metrics
    from utils.embed import embed_captions

    texts = torch.cat([embed_captions(run.model, pairs.captions) for run in runs], 1) / len(runs) ** 0.5
    metrics = retrieval_metrics(torch.cat(vectors, 1) / len(runs) ** 0.5, texts, pairs.image_index, num_draws=1000)
    return {name: f"{metrics[name]:.1f} ± {metrics['ci95'][name]:.1f}" for name in metrics["ci95"]}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0].replace("`", ""))
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--name", default="photographs", help="name of the results file")
    arguments = parser.parse_args(argv)

    from dataset import load_splits
    from extras.search_index import open_run
    from inference import embed_images

    runs = [open_run(folder) for folder in arguments.runs]
    pairs = load_splits(runs[0].model.config)["validation"]
    vectors = [embed_images(run.model, pairs.files) for run in runs]
    groups = {folder: ([run], [v]) for folder, run, v in zip(arguments.runs, runs, vectors, strict=True)}
    if len(runs) > 1:
        groups["ensemble"] = runs, vectors
    rows = [
        {"run": name, **evaluate_recalls(*group, pairs), **evaluate_labels_of(*group, pairs)}
        for name, group in groups.items()
    ]
    first = groups[arguments.runs[0]]
    details = {"decisions": evaluate_decisions(*first, pairs), "search": evaluate_search(*first, pairs)}
    for name, table in details.items():
        print_table(table, f"{name} of {arguments.runs[0]}")
    report(arguments.name, rows, details=details)


if __name__ == "__main__":
    exit_on_input_error(main)()

"""What averaging the similarities of several runs brings: `python benchmarks/ensemble.py runs/a runs/b runs/c`.

Retrieval metrics of each run and of all together, on the test split of the first run's data; the runs differ in
nothing but their seed.
"""

import sys

from common import report


def main():
    import torch

    from clip import retrieval_metrics
    from dataset import load_splits
    from index import embed_captions, embed_images, open_run

    runs = [open_run(folder) for folder in sys.argv[1:]]
    pairs = load_splits(runs[0].model.config)["test"]
    images = [embed_images(run.model, pairs.files) for run in runs]
    texts = [embed_captions(run.model, pairs.captions) for run in runs]
    rows = []
    for name, members in [(folder, [i]) for i, folder in enumerate(sys.argv[1:])] + [
        ("all together", range(len(runs)))
    ]:
        sides = [torch.cat([vectors[i] for i in members], 1) / len(members) ** 0.5 for vectors in (images, texts)]
        metrics = retrieval_metrics(*sides, pairs.image_index)
        chosen = [key for key in metrics if "R@1" in key or "R@5" in key or key == "rsum"]
        rows.append({"run": name, **{key: round(metrics[key], 2) for key in chosen}})
    report("ensemble", rows, images=len(pairs.files), captions=len(pairs.captions))


if __name__ == "__main__":
    main()

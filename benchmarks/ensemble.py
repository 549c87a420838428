"""Retrieval metrics of single runs and of their ensemble: `python benchmarks/ensemble.py runs/a runs/b runs/c`.

The ensemble averages the similarities of the runs, which differ only in their seed. The images are the test split of
the first run's data set.
"""

import argparse

from common import report

from utils.cli import exit_on_input_error


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0].replace("`", ""))
    parser.add_argument("runs", nargs="+", help="run folders")
    folders = parser.parse_args(argv).runs

    import torch

    from clip import load_model, retrieval_metrics
    from dataset import load_splits
    from inference import embed_images
    from utils.embed import embed_captions

    models = [load_model(folder) for folder in folders]
    pairs = load_splits(models[0].config)["test"]
    images = [embed_images(model, pairs.files) for model in models]
    texts = [embed_captions(model, pairs.captions) for model in models]
    rows = []
    for name, members in [*((folder, [i]) for i, folder in enumerate(folders)), ("ensemble", range(len(models)))]:
        towers = [torch.cat([vectors[i] for i in members], 1) / len(members) ** 0.5 for vectors in (images, texts)]
        metrics = retrieval_metrics(*towers, pairs.image_index)
        chosen = [key for key in metrics if "R@1" in key or "R@5" in key or key == "rsum"]
        rows.append({"run": name, **{key: round(metrics[key], 2) for key in chosen}})
    report("ensemble", rows, images=len(pairs.files), captions=len(pairs.captions))


if __name__ == "__main__":
    exit_on_input_error(main)()

"""Zero-shot classification on the synthetic data set: backgrounds, colours and shapes, by prompts.

`python benchmarks/zero_shot_shapes.py runs/demo` after `python main.py --preset demo --run runs/demo`; with several
runs the logits are averaged.

The prompts are those of the search command ("a photo of a red", "a red", ...). None is a caption: captions name two
objects and a background. An image shows two objects, so "which colour?" has a single answer only if both have the same
colour. There are three tasks:
- single answer: the test images with a single answer (for the background, all);
- all answers: every image; as many labels are predicted as the image has distinct colours (or shapes), and the metric
  is the share of its labels among them;
- new images: up to 400 images with a single answer, of scenes outside the training set (the test split has few).
"""

import argparse
import tempfile
from pathlib import Path

from common import parse_caption, report

SPLITS = ("validation", "test")


def labels_of(caption, kind):
    """The colours, shapes or background named by a caption of a synthetic image, a list; None for other captions."""
    scene = parse_caption(caption)
    if scene is None:
        return None
    background, objects = scene
    return {"background": [background], "color": [c for c, _ in objects], "shape": [s for _, s in objects]}[kind]


def render_new_images(folder, config, kind, number=400):
    """Files and labels of images of scenes outside the training set whose two objects share the `kind`."""
    import numpy as np

    from dataset import load_splits
    from utils.synthetic import all_scenes, render_scene, scene_captions

    known, rng = set(load_splits(config)["train"].captions), np.random.default_rng(1)
    part = {"color": 0, "shape": 1}[kind]
    scenes = [s for s in all_scenes() if s[1][part] == s[3][part] and scene_captions(s)[0] not in known]
    chosen = [scenes[i] for i in rng.permutation(len(scenes))[:number]]
    files = [Path(folder) / f"{kind}_{i:04d}.png" for i in range(len(chosen))]
    for file, scene in zip(files, chosen, strict=True):
        render_scene(scene, rng).save(file)
    return files, [scene[1][part] for scene in chosen]


def share_named(logits, truth, labels):
    """The share (%) of true labels among the predicted ones, as many as an image has distinct labels; and chance (%).

    logits: (N, K). truth: N lists of labels.
    """
    shares = chances = 0
    for values, scores in zip(truth, logits, strict=True):
        predicted = {labels[k] for k in scores.topk(len(set(values))).indices}
        shares += 100 * len(predicted & set(values)) / len(set(values)) / len(truth)
        chances += 100 * len(set(values)) / len(labels) / len(truth)
    return shares, chances


def evaluate_kind(models, kind, labels):
    """The table rows of one kind of label, and the result that is plotted."""
    from dataset import load_splits
    from extras.zero_shot import evaluate_labels, label_logits

    rows = []
    for split in SPLITS:
        pairs = load_splits(models[0].config)[split]
        truth = [labels_of(pairs.captions[first], kind) for first in pairs.caption_offsets[:-1]]
        logits = label_logits(models, pairs.files, labels)
        single = [i for i, values in enumerate(truth) if len(set(values)) == 1]
        found = evaluate_labels(logits[single], [truth[i][0] for i in single], labels)
        rows.append(make_row(kind, split, "single answer", found["accuracy"], len(single), 100 / len(labels)))
        if kind != "background":
            share, chance = share_named(logits, truth, labels)
            rows.append(make_row(kind, split, "all answers", share, len(truth), chance))
    if kind != "background":
        with tempfile.TemporaryDirectory() as folder:
            files, values = render_new_images(folder, models[0].config, kind)
            found = evaluate_labels(label_logits(models, files, labels), values, labels)
        rows.append(make_row(kind, "new images", "single answer", found["accuracy"], len(files), 100 / len(labels)))
    return rows, found


def make_row(kind, images, task, accuracy, number, chance):
    named = {"what": kind, "images": images, "task": task}
    return {**named, "accuracy %": round(accuracy, 1), "of": number, "chance %": round(chance, 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", default=["runs/demo"], help="run folders (default: runs/demo)")
    folders = parser.parse_args().runs

    from clip import load_model
    from utils.plotting import plot_confusion
    from utils.synthetic import BACKGROUNDS, COLORS, SHAPES

    models, rows = [load_model(folder) for folder in folders], []
    for kind, names in (("color", COLORS), ("shape", SHAPES), ("background", BACKGROUNDS)):
        labels = list(names)
        kind_rows, found = evaluate_kind(models, kind, labels)
        rows += kind_rows
        heading = f"{kind}: accuracy {found['accuracy']:.1f}% on {found['images']} images"
        plot_confusion(found["confusion"], labels, Path(folders[0]) / f"{kind}.png", heading)
    report("zero_shot", rows, runs=folders, epochs=[model.config.epochs for model in models])


if __name__ == "__main__":
    main()

"""Zero-shot classification on the drawn data set: grounds, colours and shapes told apart by prompts.

`python benchmarks/zero_shot_shapes.py runs/demo` after `python main.py --preset demo --run runs/demo`; several runs are
averaged.

The prompts are the search command's own ("a photo of a red", "a red", ...): none is a caption, for captions name two
objects and a ground. A drawn picture shows two objects, so the question "which colour?" has one answer only where both
have the same. Three tasks follow, each for the test images:
- one answer: the pictures that have one (for the ground, all);
- all answers: every picture; as many labels are named as it has different colours (or shapes), and the share of its
  labels that are among them counts;
- drawn anew: up to 400 pictures of the first kind, of scenes not in the training set (the test images have few).
"""

import sys
import tempfile
from pathlib import Path

from common import report

SPLITS = ("validation", "test")


def labels_of(caption, kind):
    """The colours, the shapes or the ground that a drawn picture's caption names, a list; None for other captions."""
    from shapes import read_caption

    scene = read_caption(caption)
    if scene is None:
        return None
    ground, objects = scene
    return {"ground": [ground], "colour": [c for c, _ in objects], "shape": [s for _, s in objects]}[kind]


def draw_anew(folder, config, kind, number=400):
    """Pictures of scenes the run never trained on, whose two objects share the `kind`; files and labels."""
    import numpy as np

    from dataset import load_splits
    from shapes import all_scenes, captions_of, draw_scene

    known, rng = set(load_splits(config)["train"].captions), np.random.default_rng(1)
    part = {"colour": 0, "shape": 1}[kind]
    scenes = [s for s in all_scenes() if s[1][part] == s[3][part] and captions_of(s)[0] not in known]
    chosen = [scenes[i] for i in rng.permutation(len(scenes))[:number]]
    files = [Path(folder) / f"{kind}_{i:04d}.png" for i in range(len(chosen))]
    for file, scene in zip(files, chosen, strict=True):
        draw_scene(scene, rng).save(file)
    return files, [scene[1][part] for scene in chosen]


def share_named(logits, truth, labels):
    """Per cent of the pictures' labels that are among the model's: as many are named as a picture has different ones.

    logits (N, K); truth: N lists of labels. Also what chance would give.
    """
    shares = chances = 0
    for values, scores in zip(truth, logits, strict=True):
        named = {labels[k] for k in scores.topk(len(set(values))).indices}
        shares += 100 * len(named & set(values)) / len(set(values)) / len(truth)
        chances += 100 * len(set(values)) / len(labels) / len(truth)
    return shares, chances


def main():
    from dataset import load_splits
    from index import open_run
    from pictures import draw_confusion
    from shapes import COLOURS, GROUNDS, SHAPES
    from zero_shot import evaluate_labels, label_logits

    runs = [open_run(folder) for folder in sys.argv[1:] or ["runs/demo"]]
    models = [run.model for run in runs]
    rows = []
    for kind, names in (("colour", COLOURS), ("shape", SHAPES), ("ground", GROUNDS)):
        labels = list(names)
        for split in SPLITS:
            pairs = load_splits(models[0].config)[split]
            truth = [labels_of(pairs.captions[first], kind) for first in pairs.first[:-1]]
            logits = label_logits(models, pairs.files, labels)
            single = [i for i, values in enumerate(truth) if len(set(values)) == 1]
            found = evaluate_labels(logits[single], [truth[i][0] for i in single], labels)
            rows.append(row(kind, split, "one answer", found["accuracy"], len(single), 100 / len(labels)))
            if kind == "ground":
                draw = found if split == "test" else None
                continue
            share, chance = share_named(logits, truth, labels)
            rows.append(row(kind, split, "all answers", share, len(truth), chance))
        if kind != "ground":
            with tempfile.TemporaryDirectory() as folder:
                files, values = draw_anew(folder, models[0].config, kind)
                draw = evaluate_labels(label_logits(models, files, labels), values, labels)
            rows.append(row(kind, "drawn anew", "one answer", draw["accuracy"], len(files), 100 / len(labels)))
        heading = f"{kind}: {draw['accuracy']:.1f}% of {draw['images']} pictures right"
        draw_confusion(
            draw["confusion"], labels, Path(sys.argv[1] if sys.argv[1:] else "runs/demo") / f"{kind}.png", heading
        )
    metrics = {"runs": [str(run.folder.parent) for run in runs], "epochs": [model.config.epochs for model in models]}
    report("zero_shot", rows, **metrics)


def row(kind, split, task, accuracy, pictures, chance):
    named = {"what": kind, "pictures": split, "task": task}
    return {**named, "accuracy %": round(accuracy, 1), "of": pictures, "chance %": round(chance, 1)}


if __name__ == "__main__":
    main()

"""Zero-shot classification (Radford et al. 2021, section 3.1): labels become sentences, the nearest sentence wins."""

import csv
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from config import InputError
from index import PICTURES, embed_captions, embed_readable, scan_pictures

TEMPLATES = ("a photo of a {}", "a picture of a {}", "a {}", "{}")


def label_embeddings(model, labels, templates=TEMPLATES):
    """(K, D) unit vectors of K labels: the mean over the templates' sentences (prompt ensembling, section 3.1.4)."""
    for template in templates:
        if "{}" not in template:
            raise InputError(f"template is {template!r}: it should hold {{}} where the label goes")
    sentences = [template.replace("{}", label) for label in labels for template in templates]
    embeddings = embed_captions(model, sentences).view(len(labels), len(templates), -1)
    return F.normalize(embeddings.mean(1), dim=-1)


def label_logits(models, image_files, labels, templates=TEMPLATES):
    """(N, K) logits of pictures and labels, exp(t) times the cosine, averaged over the models.

    Those of a picture that cannot be read are NaN.
    """
    return embedding_logits(models, [embed_readable(model, image_files) for model in models], labels, templates)


def embedding_logits(models, images, labels, templates=TEMPLATES):
    """As `label_logits`, from the pictures' unit vectors (N, D), one tensor for each model."""
    logits = []
    for model, vectors in zip(models, images, strict=True):
        scores = vectors @ label_embeddings(model, labels, templates).T
        logits.append((model.logit_scale.exp() * scores).detach().cpu())
    return torch.stack(logits).mean(0)


def parse_labels(text):
    """The different labels of a comma-separated list; raises InputError."""
    labels = list(dict.fromkeys(label.strip() for label in text.split(",") if label.strip()))
    if len(labels) < 2:
        raise InputError(f'labels is {text!r}: give two or more, separated by commas: "dog,cat,horse"')
    return labels


def read_labelled(source, image_path=None):
    """Picture files and their labels from a folder with one folder per label, or a CSV with `image,label`."""
    source = Path(source)
    if source.is_dir():
        names = [name for name in scan_pictures(source)[0] if "/" in name]
        if not names:
            raise InputError(f"{source} holds no folders with pictures: give one folder per label")
        return [source / name for name in names], [name.split("/")[0].replace("_", " ") for name in names]
    if not source.is_file():
        raise InputError(f"zero_shot is {source}: give a folder with one folder per label, or a CSV file image,label")
    folder = Path(image_path) if image_path else source.parent
    try:
        with open(source, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{source} cannot be read as CSV ({error})") from None
    if not rows or not {"image", "label"} <= set(rows[0]):
        raise InputError(f"{source} should start with a header that names the columns `image` and `label`, then rows")
    for number, row in enumerate(rows, 2):
        if not (row["image"] or "").strip() or not (row["label"] or "").strip():
            raise InputError(f"{source} row {number} lacks an image or a label")
        if Path(row["image"].strip()).suffix.lower() not in PICTURES:
            raise InputError(f"{source} row {number}: {row['image']!r} is not a picture's name")
    return [folder / row["image"].strip() for row in rows], [row["label"].strip() for row in rows]


def evaluate_labels(logits, truth, labels):
    """Accuracy over the pictures, its mean over the labels (both in per cent), and the confusion counts (K, K).

    Args:
        logits: (N, K). truth: N labels.
    """
    rows = np.array([labels.index(label) for label in truth])
    given = logits.argmax(1).numpy()
    confusion = np.zeros((len(labels), len(labels)), dtype=int)
    np.add.at(confusion, (rows, given), 1)
    present = confusion.sum(1) > 0
    return {
        "images": len(rows),
        "labels": labels,
        "accuracy": 100 * float((rows == given).mean()),
        "mean_label_accuracy": 100 * float((confusion.diagonal()[present] / confusion.sum(1)[present]).mean()),
        "confusion": confusion.tolist(),
    }

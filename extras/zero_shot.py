"""Zero-shot classification (Radford et al. 2021, section 3.1): the label with the most similar prompt is predicted."""

import csv
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from config import InputError
from extras.search_index import embed_readable, scan_images
from inference import is_image_name
from utils.embed import embed_captions

TEMPLATES = ("a photo of a {}", "a picture of a {}", "a {}", "{}")


def label_embeddings(model, labels, templates=TEMPLATES):
    """(K, D) unit vectors of K labels: the mean over the prompts (prompt ensembling, section 3.1.4)."""
    for template in templates:
        if "{}" not in template:
            raise InputError(f"template is {template!r}: it should contain {{}} in place of the label")
    prompts = [template.replace("{}", label) for label in labels for template in templates]
    embeddings = embed_captions(model, prompts).view(len(labels), len(templates), -1)
    return F.normalize(embeddings.mean(1), dim=-1)


def label_logits(models, image_files, labels, templates=TEMPLATES):
    """(N, K) logits of images and labels, exp(t) times the cosine, the mean over the models; NaN if unreadable."""
    return embedding_logits(models, [embed_readable(model, image_files) for model in models], labels, templates)


def embedding_logits(models, image_embeddings, labels, templates=TEMPLATES):
    """As `label_logits`, from the unit vectors (N, D) of each model."""
    logits = []
    for model, images in zip(models, image_embeddings, strict=True):
        cosines = images @ label_embeddings(model, labels, templates).T
        logits.append((model.logit_scale.exp() * cosines).detach().cpu())
    return torch.stack(logits).mean(0)


def parse_labels(text):
    """The distinct labels of a comma-separated list; raises InputError."""
    labels = list(dict.fromkeys(label.strip() for label in text.split(",") if label.strip()))
    if len(labels) < 2:
        raise InputError(f'labels is {text!r}: give two or more, separated by commas: "dog,cat,horse"')
    return labels


def read_labelled_images(source, image_path=None):
    """Image files and labels, from a folder with one subfolder per label or a CSV file `image,label`."""
    source = Path(source)
    if source.is_dir():
        names = [name for name in scan_images(source)[0] if "/" in name]
        if not names:
            raise InputError(f"{source} has no subfolders with images: give one subfolder per label")
        return [source / name for name in names], [name.split("/")[0].replace("_", " ") for name in names]
    if not source.is_file():
        raise InputError(f"zero_shot is {source}: give a folder with one subfolder per label, or a CSV file")
    try:
        with open(source, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{source} cannot be read as CSV ({error})") from None
    if not rows or not {"image", "label"} <= set(rows[0]):
        raise InputError(f"{source} should start with a header with the columns `image` and `label`, then rows")
    rows = [((row["image"] or "").strip(), (row["label"] or "").strip()) for row in rows]
    for number, (image, label) in enumerate(rows, 2):
        if not image or not label:
            raise InputError(f"{source} row {number} lacks an image or a label")
        if not is_image_name(image):
            raise InputError(f"{source} row {number}: {image!r} is not the name of an image file")
    return [Path(image_path or source.parent) / image for image, _ in rows], [label for _, label in rows]


def evaluate_labels(logits, truth, labels):
    """Accuracy over N images and its mean over K labels (per cent), and the confusion counts (K, K); logits (N, K)."""
    rows = np.array([labels.index(label) for label in truth])
    predicted = logits.argmax(1).numpy()
    confusion = np.zeros((len(labels), len(labels)), dtype=int)
    np.add.at(confusion, (rows, predicted), 1)
    present = confusion.sum(1) > 0
    return {
        "images": len(rows),
        "labels": labels,
        "accuracy": 100 * float((rows == predicted).mean()),
        "mean_label_accuracy": 100 * float((confusion.diagonal()[present] / confusion.sum(1)[present]).mean()),
        "confusion": confusion.tolist(),
    }

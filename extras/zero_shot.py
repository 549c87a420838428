"""Zero-shot classification (Radford et al. 2021, section 3.1): the label with the most similar prompt is predicted."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from config import InputError
from dataset import check_files
from extras.search_index import embed_readable, scan_images
from utils.embed import embed_captions
from utils.formats import IMAGE_COLUMNS, clean_text, read_columns
from utils.image_files import find_images, is_image_name
from utils.plotting import MATCH, WEAK, plot_bars, plot_confusion, report_plot

LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category")
TEMPLATES = ("a photo of a {}", "a picture of a {}", "a {}", "{}")


def label_embeddings(model, labels, templates=TEMPLATES):
    """(K, D) unit vectors of K labels: the mean over the prompts (prompt ensembling, section 3.1.4)."""
    if not all("{}" in template for template in templates):
        raise InputError(f"template is {', '.join(templates)}: it should contain {{}} in place of the label")
    templates = [clean_text(template) for template in templates]
    prompts = [template.replace("{}", label) for label in labels for template in templates]
    embeddings = embed_captions(model, prompts).view(len(labels), len(templates), -1)
    return F.normalize(embeddings.mean(1), dim=-1)


def label_logits(models, image_files, labels, templates=TEMPLATES):
    """(N, K) logits of images and labels, exp(t) times the cosine, the mean over the models; NaN if unreadable."""
    return embedding_logits(models, [embed_readable(model, image_files) for model in models], labels, templates)


def embedding_logits(models, image_embeddings, labels, templates=TEMPLATES):
    """Like `label_logits`, from the unit vectors (N, D) of each model."""
    text_embeddings = [label_embeddings(model, labels, templates) for model in models]
    parts = zip(models, image_embeddings, text_embeddings, strict=True)
    return torch.stack([(m.logit_scale.exp() * (images @ texts.T)).detach().cpu() for m, images, texts in parts]).mean(
        0
    )


def parse_labels(text):
    """The distinct labels of a comma-separated list; raises InputError."""
    labels = list(dict.fromkeys(label.strip() for label in clean_text(text).split(",") if label.strip()))
    if len(labels) < 2:
        raise InputError(f'labels is {text!r}: use two or more, separated by commas: "dog,cat,horse"')
    return labels


def read_labelled_images(source, image_path=None):
    """Image files and labels, from a folder with one subfolder per label or a CSV file `image,label`."""
    source = Path(source)
    if source.is_dir():
        names = [name for name in scan_images(source)[0] if "/" in name]
        if not names:
            raise InputError(f"{source} has no subfolders with images: use one subfolder per label")
        return [source / name for name in names], [name.split("/")[0].replace("_", " ") for name in names]
    if not source.is_file():
        raise InputError(f"zero_shot is {source}: use a folder with one subfolder per label, or a CSV file")
    frame = read_columns(source, image=IMAGE_COLUMNS, label=LABEL_COLUMNS)
    if frame is None or frame.empty:
        raise InputError(f"{source} should start with a header with the columns `image` and `label`, then rows")
    images, labels = frame["image"].str.strip().tolist(), frame["label"].str.strip().tolist()
    for number, image, label in zip(frame.index, images, labels, strict=True):
        if not image or not label:
            raise InputError(f"{source} row {number} lacks an image or a label")
        if not is_image_name(image):
            raise InputError(f"{source} row {number}: {image!r:.99} is not the name of an image file")
    return find_images(image_path or source.parent, images), labels


def evaluate_labels(logits, truth, labels):
    """Accuracy over N images and its mean over K labels (percent), and the confusion counts (K, K); logits (N, K)."""
    rows, predicted = np.array([labels.index(label) for label in truth]), logits.argmax(1).numpy()
    confusion = np.zeros((len(labels), len(labels)), dtype=int)
    np.add.at(confusion, (rows, predicted), 1)
    shares = confusion.diagonal() / np.maximum(confusion.sum(1), 1)
    return {
        "images": len(rows),
        "labels": labels,
        "accuracy": 100 * float((rows == predicted).mean()),
        "mean_label_accuracy": 100 * float(shares[confusion.sum(1) > 0].mean()),
        "confusion": confusion.tolist(),
    }


def classify(models, arguments):
    """Print and plot the probability of each label for an image."""
    image, labels = Path(arguments.image), parse_labels(arguments.labels)
    logits = label_logits(models, [image], labels, arguments.template or TEMPLATES)[0]
    probabilities, order = (values.tolist() for values in logits.softmax(0).sort(descending=True))
    labels = [labels[i] for i in order]
    results = [{"label": label, "probability": p} for label, p in zip(labels, probabilities, strict=True)]
    lines = "\n".join(f"{result['probability']:.4f}\t{result['label']}" for result in results)
    print(json.dumps({"image": image.as_posix(), "labels": results}) if arguments.json else lines)
    colors, path = [MATCH] + [WEAK] * (len(labels) - 1), arguments.output
    if path != "none":
        report_plot("labels", path, plot_bars(image, image.name, labels, probabilities, colors, path))


def evaluate_zero_shot(models, arguments):
    """Print the accuracy on labelled images, and plot the confusion matrix."""
    files, truth = read_labelled_images(arguments.zero_shot, arguments.images)
    check_files(files)
    known = sorted(set(truth))
    labels = parse_labels(arguments.labels) if arguments.labels else known
    if len(labels) < 2 or not set(known) <= set(labels):
        given = ", ".join(labels)
        raise InputError(f"labels are {given}: use two or more, with all labels of the images ({', '.join(known)})")
    logits = label_logits(models, files, labels, arguments.template or TEMPLATES)
    readable = (~logits[:, 0].isnan()).nonzero()[:, 0]
    results = evaluate_labels(logits[readable], [truth[i] for i in readable], labels)
    summary = f"accuracy {results['accuracy']:.1f}% on {len(readable)} images"
    mean = f"mean over the {len(labels)} labels {results['mean_label_accuracy']:.1f}%"
    print(json.dumps(results) if arguments.json else f"{summary} ({mean})")
    if arguments.output != "none":
        plot_confusion(results["confusion"], labels, arguments.output, summary)
        report_plot("confusion matrix", arguments.output)

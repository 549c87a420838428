"""`inference.py --evaluate`: the retrieval metrics of a split."""

import dataclasses
import json

import torch

from clip import format_metrics, retrieval_metrics
from config import InputError
from dataset import captions_by_image, load_splits, make_pairs
from inference import embed_images
from utils.captions import read_pairs
from utils.embed import embed_captions
from utils.image_files import check_files, find_images

PROTOCOL = "every caption is a query for its one image; ties count against the model"


def evaluate(models, arguments):
    """Print the metrics of a split of the first run's data set, or of another data set."""
    split, pairs = choose_pairs(models[0].config, arguments)
    check_files(pairs.files)
    # Concatenated embeddings, divided by sqrt(models): dot products are mean similarities over the models.
    images = torch.cat([embed_images(model, pairs.files) for model in models], 1) / len(models) ** 0.5
    texts = torch.cat([embed_captions(model, pairs.captions) for model in models], 1) / len(models) ** 0.5
    metrics = retrieval_metrics(images, texts, pairs.image_index, num_draws=1000, text_ids=pairs.text_ids)
    counts = {"split": split, "images": len(pairs.files), "captions": len(pairs.captions), "protocol": PROTOCOL}
    if arguments.json:
        print(json.dumps({**counts, **metrics}))
        return
    heading = "all images" if split == "all" else f"{split} split"
    print(f"{heading}: {len(pairs.files):,} images, {len(pairs.captions):,} captions; {PROTOCOL}")
    print(format_metrics(metrics))


def choose_pairs(config, arguments):
    """The name of the split and its `Pairs`; raises InputError."""
    other = arguments.captions_path is not None
    if other:
        paths = {"image_path": arguments.images, "captions_path": arguments.captions_path}
        config = dataclasses.replace(config, **paths, run="")  # a run keeps its own split
    split = arguments.split or ("all" if other else None)
    if split == "all":
        pairs = make_pairs(captions_by_image(read_pairs(config.captions_path, config.image_path)), config.image_path)
        pairs.files = find_images(config.image_path, pairs.names)
        return split, pairs
    splits = load_splits(config)
    split = split or ("test" if splits["test"].files else "validation")
    if not splits[split].files:
        raise InputError(f"split is {split}, which has no images here: pass another --split")
    return split, splits[split]

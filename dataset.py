"""Turns a captions file and an image folder into batches: captions, splits, transforms, data set, sampler, loader.

Images are loaded as uint8 and normalised on the device. Captions are tokenised once and padded to the batch.
"""

import dataclasses
import os
import random
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # no network request at import

import albumentations as A
import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from config import InputError
from utils.captions import (
    FLICKR8K_HELP,
    find_captions_file,
    read_captions,
    read_pairs,
    shared_captions,
    text_ids,
    train_tokenizer,
)
from utils.device_augmentation import draw_augmentation
from utils.image_cache import EvaluationImages, ImageStore, open_images, prepare_worker, resize_image
from utils.image_files import check_files, find_images
from utils.shards import find_shards
from utils.splits import choose_splits, describe_splits, split_images
from utils.tokens import TokenStore, encode_captions, pad_tokens

# Captions that match mention left or right, so their images must not be flipped: English, German and Dutch, French,
# Spanish and Portuguese, Italian, Scandinavian languages, Polish, Russian, Chinese and Japanese, Korean.
SIDED = re.compile(
    r"\b(?=[lrgdiesvhpлспв])(left|right|(left|right)(hand|most|ward)|links|rechts|(link|recht)(s?e|e[rnsm])|gauches?"
    r"|droite?s?|izquierd[ao]s?|derech[ao]s?|esquerd[ao]s?|direit[ao]s?|sinistr[aoe]|destr[aoe]|vänstra?|högra?|höger"
    r"|vänster|venstre|højre|høyre|(lew|praw)(a|y|o|ej|ą|ym|ego)|слева|справа|влево|вправо|лев\w{2,3}|прав\w{2,3})\b"
    r"|[左右]|왼|오른",
    re.IGNORECASE,
)


# ---- splits -----------------------------------------------------------------------------------------------------


@dataclass
class Pairs:
    """The (image, caption) pairs of one split: N images, T captions; the captions of an image are contiguous."""

    names: list[str]  # (N,) image names, as in the captions file
    files: list[Path]  # (N,)
    captions: list[str]  # (T,)
    image_index: np.ndarray  # (T,) the image of each caption
    caption_offsets: np.ndarray  # (N + 1,) the first caption of each image, and T
    images: ImageStore | None = None  # set by `open_images`
    image_features: torch.Tensor | None = None  # (N, F) of a frozen image encoder
    text_features: torch.Tensor | None = None  # (T, F) of a frozen text encoder
    source: list[str] = field(default_factory=list)  # lines about the captions file and the split

    @cached_property
    def text_ids(self):
        """(T,) ids of equal captions, see `captions.text_ids`; None if no two images have an equal caption."""
        ids = text_ids(self.captions)
        return ids if len(ids) and shared_captions(ids, self.image_index).any() else None

    def captions_of(self, image):
        """The indices of an image's captions, as a range."""
        return range(*self.caption_offsets[image : image + 2].tolist())


def make_pairs(captions_by_name, folder, names=None, files=None, source=()):
    """Build the `Pairs` of the named images (default: all), in that order, from {name: captions}.

    files: {name: file}; default: the names, in the folder.
    """
    names = list(captions_by_name) if names is None else names
    counts = np.array([len(captions_by_name[name]) for name in names], dtype=np.int64)
    return Pairs(
        names=names,
        files=[files[name] if files else Path(folder) / name for name in names],
        captions=[caption for name in names for caption in captions_by_name[name]],
        image_index=np.repeat(np.arange(len(names)), counts),
        caption_offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        source=list(source),
    )


def captions_by_image(frame):
    """Group a DataFrame from `read_captions` into {image: captions}, keeping its order."""
    found = {}
    for image, caption in zip(frame["image"].tolist(), frame["caption"].tolist(), strict=True):
        found.setdefault(image, []).append(caption)
    return found


def subset_pairs(pairs, images):
    """The `Pairs` of the images with these indices."""
    captions = {pairs.names[i]: [pairs.captions[j] for j in pairs.captions_of(i)] for i in images}
    return dataclasses.replace(make_pairs(captions, ""), files=[pairs.files[i] for i in images])


def mentions(caption, words):
    """True if the caption contains one of the comma-separated words, or if `words` is empty."""
    wanted = {word.strip().lower() for word in words.split(",")} - {""}
    return not wanted or not wanted.isdisjoint(re.findall(r"\w+", caption.lower()))


def filter_pairs(pairs, words):
    """The `Pairs` of the images with a caption that contains one of the comma-separated words; raises InputError."""
    matching = [mentions(caption, words) for caption in pairs.captions]
    kept = np.unique(pairs.image_index[matching]).tolist()
    if words and len(kept) < 2:
        raise InputError(f"gan_subset is {words!r}, which matches the captions of {len(kept)} images: change the words")
    return subset_pairs(pairs, kept)


def load_splits(config):
    """The splits of the configured data set, {"train": Pairs, "validation": ..., "test": ...}; raises InputError.

    A run that has been started keeps its split, whatever has been added to the captions file.
    """
    folder = Path(config.image_path)
    if not folder.is_dir():
        raise InputError(f"image_path is {folder}, which is not a folder. {FLICKR8K_HELP}")
    captions_file = find_captions_file(folder if find_shards(folder) else config.captions_path)
    frame = read_pairs(captions_file, folder)
    captions_by_name = captions_by_image(frame)
    splits, source = choose_splits(config, frame, list(captions_by_name), captions_file)
    names = [name for split in splits.values() for name in split]
    files = dict(zip(names, find_images(folder, names), strict=True))
    check_files(files.values())
    if len(splits["train"]) < 2 or not splits["validation"]:
        raise InputError(
            f"{captions_file} yields {len(splits['train'])} training and {len(splits['validation'])} validation "
            "images: training needs at least 2, validation 1"
        )
    notes = [source, f"captions: {captions_file.name}, {frame.attrs['format']}", *frame.attrs["notes"]]
    return {split: make_pairs(captions_by_name, folder, names, files, notes) for split, names in splits.items()}


# ---- transforms -------------------------------------------------------------------------------------------------


class TrainTransform:
    """Random crop, color jitter and flip of one image, (S, S, 3) -> (size, size, 3), determined by a seed."""

    def __init__(self, size, crop_scale, color_jitter):
        steps = []
        if crop_scale < 1:
            steps.append(A.RandomResizedCrop(size=(size, size), scale=(crop_scale, 1.0)))
        else:
            steps.append(A.Resize(size, size, interpolation=cv2.INTER_AREA))
        if color_jitter:
            change = (1 - color_jitter, 1 + color_jitter)
            # No hue jitter: captions name colors.
            steps.append(A.ColorJitter(change, change, change, hue=(0, 0), p=0.8))
        self.plain = A.Compose(steps)
        self.flipping = A.Compose([*steps, A.HorizontalFlip(p=0.5)])

    def __call__(self, image, seed, flip):
        pipeline = self.flipping if flip else self.plain
        generator = np.random.default_rng(seed)
        pipeline.set_random_state(generator, random.Random(int(generator.integers(2**63))))
        return pipeline(image=image)["image"]


# ---- batches ----------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """B images with their T captions, or precomputed features of frozen encoders in their place."""

    image_index: torch.Tensor  # (T,) the row of each caption's image in this batch
    image_ids: torch.Tensor  # (B,) an image and a caption of the same id are never negatives
    images: torch.Tensor | None = None  # (B, 3, H, W) uint8, or float in [0, 1]
    image_features: torch.Tensor | None = None  # (B, F), in place of `images`
    input_ids: torch.Tensor | None = None  # (T, L)
    attention_mask: torch.Tensor | None = None  # (T, L)
    text_features: torch.Tensor | None = None  # (T, F), in place of the tokens
    text_parts: tuple | None = None  # of (captions, tokens): captions sorted by length, for a GPU; None: one part
    weights: torch.Tensor | None = None  # (B,) loss weights; None: all 1
    augmentation: torch.Tensor | None = None  # (B, 8) parameters of `augment_images`; then `images` are as stored
    text_ids: torch.Tensor | None = None  # (T,) captions of the same id are equal and never negatives; None: all differ

    def __len__(self):
        return len(self.image_ids)

    def to(self, device):
        copied = {name: x.to(device, non_blocking=True) for name, x in vars(self).items() if torch.is_tensor(x)}
        return dataclasses.replace(self, **copied)

    def pin_memory(self):
        """Called by the DataLoader."""
        pinned = {name: x.pin_memory() for name, x in vars(self).items() if torch.is_tensor(x)}
        return dataclasses.replace(self, **pinned)


def pair_targets(batches):
    """The targets of concatenated batches for the loss: a dict of image_index, image_ids, weights and text_ids."""
    first = batches[0]
    if len(batches) == 1:
        return {name: getattr(first, name) for name in ("image_index", "image_ids", "weights", "text_ids")}
    image_index, weights, rows = [], [], 0
    for batch in batches:
        image_index.append(batch.image_index + rows)
        weights.append(
            torch.ones_like(batch.image_ids, dtype=torch.float32) if batch.weights is None else batch.weights
        )
        rows += len(batch)
    image_ids = torch.cat([batch.image_ids for batch in batches])
    texts = None if first.text_ids is None else torch.cat([batch.text_ids for batch in batches])
    targets = {"image_index": torch.cat(image_index), "image_ids": image_ids, "weights": torch.cat(weights)}
    return {**targets, "text_ids": texts}


def derive_seed(*numbers):
    """A 32-bit seed that depends on all the integers given, such as (seed, step, rank)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class PairSampler:
    """Yields micro-batches of (epoch, image, captions) keys; each of W processes gets every W-th image of a batch.

    An epoch shows every caption once, in groups of up to `captions_per_image` with their image: successive rounds over
    all images, each in a new random order. The groups of an image with more captions than others are spread
    over the epoch. Duplicate images in a batch are harmless: the loss masks by image id. The order depends on
    the seed and the epoch alone, so an epoch can be resumed at any batch (`start`).
    """

    def __init__(self, pairs, config, rank=0, world_size=1):
        self.pairs, self.config = pairs, config
        self.rank, self.world_size = rank, world_size
        self.epoch, self.start = 0, 0
        self.groups_per_image = -(-np.diff(pairs.caption_offsets) // config.captions_per_image)
        self.total = int(self.groups_per_image.sum())
        # At least two images per process: BatchNorm fails on a single one.
        self.num_batches = max(1, min(-(-self.total // config.batch_size), self.total // (2 * world_size)))

    def image_order(self, rng):
        """The image of each group of the epoch, (total,)."""
        images, positions = [], []
        for round_ in range(int(self.groups_per_image.max())):
            order = rng.permutation(np.flatnonzero(self.groups_per_image > round_))
            images.append(order)
            positions.append((round_ + np.arange(len(order)) / len(order)) / self.groups_per_image[order])
        return np.concatenate(images)[np.argsort(np.concatenate(positions), kind="stable")]

    def batches(self):
        """Yield this process's batches from `start` on, each a list of micro-batches (lists of keys)."""
        k, rng = self.config.captions_per_image, np.random.default_rng([self.config.seed, self.epoch])
        offsets, counts = self.pairs.caption_offsets, np.diff(self.pairs.caption_offsets)
        captions = np.arange(offsets[-1])
        for images in np.split(np.arange(len(counts)), np.flatnonzero(np.diff(counts)) + 1):  # with as many captions
            own = captions[offsets[images[0]] : offsets[images[-1] + 1]].reshape(len(images), -1)
            rng.permuted(own, axis=1, out=own)
        order = self.image_order(rng)
        by_image, shown = np.argsort(order, kind="stable"), np.empty_like(order)
        first = np.cumsum(self.groups_per_image) - self.groups_per_image
        shown[by_image] = np.arange(len(order)) - first[order[by_image]]  # earlier groups of the same image
        starts = offsets[order] + k * shown
        groups = np.stack([order, starts, np.minimum(starts + k, offsets[order + 1])], 1)  # (total, 3)
        for batch in split_evenly(groups, self.num_batches)[self.start :]:
            own = batch[self.rank :: self.world_size].tolist()
            keys = [(self.epoch, image, tuple(captions[a:b].tolist())) for image, a, b in own]
            yield split_evenly(keys, self.num_micro_batches(len(keys)))

    def num_micro_batches(self, count):
        size = self.config.micro_batch_size or self.config.batch_size
        return max(1, min(-(-count // size), count // 2))

    def micro_batch_counts(self):
        """The number of micro-batches of each batch of this process from `start` on, a list."""
        sizes = [len(part) for part in split_evenly(range(self.total), self.num_batches)[self.start :]]
        return [self.num_micro_batches(len(range(self.rank, size, self.world_size))) for size in sizes]

    def __iter__(self):
        for batch in self.batches():
            yield from batch


def split_evenly(sequence, parts):
    """Split a sequence into consecutive parts whose lengths differ by at most one."""
    ends = [part * len(sequence) // parts for part in range(parts + 1)]
    return [sequence[a:b] for a, b in zip(ends, ends[1:], strict=False)]


class TrainingPairs(Dataset):
    """Training items keyed by (epoch, image, captions); the crop depends only on the seed and the key.

    `image_features` (N, F) or `text_features` (T, F), if given, are used in place of the input of a frozen encoder.
    on_device: images stay as stored, to be augmented on the device with parameters that are drawn here. Without a
    `store` they are there already.
    """

    def __init__(self, pairs, store, tokens, pad_id, config, image_features=None, text_features=None, on_device=False):
        self.on_device, self.config = on_device, config
        self.store, self.tokens, self.pad_id, self.seed = store, tokens, pad_id, config.seed
        self.image_features, self.text_features = image_features, text_features
        self.transform = TrainTransform(config.size, config.crop_scale, config.color_jitter)
        self.keep_sides = np.array([not config.flip or bool(SIDED.search(caption)) for caption in pairs.captions])
        self.text_ids = pairs.text_ids

    def __getitem__(self, key):
        epoch, image, captions = key
        if self.image_features is not None:
            return image, captions, self.image_features[image]
        flip = not self.keep_sides[list(captions)].any()  # a flipped image would contradict "left"
        seed = [self.seed, epoch, image, captions[0]]
        if self.on_device:
            drawn = draw_augmentation(seed, flip, self.config.crop_scale, self.config.color_jitter)
            return image, captions, (self.store[image] if self.store else None, drawn)
        return image, captions, self.transform(self.store[image], seed, flip)

    def collate(self, items):
        """The `Batch` of a list of items."""
        images, groups, inputs = zip(*items, strict=True)
        captions = [caption for group in groups for caption in group]
        counts = torch.tensor([len(group) for group in groups])
        batch = Batch(torch.repeat_interleave(torch.arange(len(items)), counts), torch.tensor(images))
        if self.text_ids is not None:
            batch.text_ids = torch.from_numpy(self.text_ids[captions])
        if self.image_features is None:
            if self.on_device:
                inputs, drawn = zip(*inputs, strict=True)
                batch.augmentation = torch.from_numpy(np.stack(drawn))
            if self.store:
                batch.images = torch.from_numpy(np.stack(inputs)).permute(0, 3, 1, 2)  # (B, H, W, 3) -> (B, 3, H, W)
        else:
            batch.image_features = torch.stack(inputs)
        if self.text_features is not None:
            batch.text_features = self.text_features[captions]
        else:
            arrays = [self.tokens[caption] for caption in captions]
            if self.on_device:
                order = sorted(range(len(arrays)), key=lambda row: len(arrays[row]))
                arrays, batch.image_index = [arrays[row] for row in order], batch.image_index[order]
                batch.text_ids = None if batch.text_ids is None else batch.text_ids[order]
                batch.text_parts = split_by_length([len(ids) for ids in arrays])
            batch.input_ids, batch.attention_mask = pad_tokens(arrays, self.pad_id)
        return batch


def split_by_length(lengths):
    """Parts of captions sorted by length, a tuple of (captions, tokens); tokens are a multiple of 8 or the maximum.

    At most four parts of at least 32 captions: a smaller one would not fill a GPU.
    """
    parts = split_evenly(lengths, min(4, max(1, len(lengths) // 32)))
    return tuple((len(part), min(-(-part[-1] // 8) * 8, lengths[-1])) for part in parts)


def make_loader(dataset, num_workers, num_batches=1, **options):
    """A DataLoader that does not touch the global random state and keeps its workers between epochs.

    num_batches: the (micro-)batches of a step, which are loaded during the step before.
    """
    return DataLoader(
        dataset,
        num_workers=num_workers,
        prefetch_factor=max(2, -(-num_batches // num_workers)) if num_workers else None,
        persistent_workers=num_workers > 0,
        worker_init_fn=prepare_worker if num_workers else None,
        generator=torch.Generator(),
        **options,
    )

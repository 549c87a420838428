"""From a captions file and a folder of photographs to batches: reading, splitting, cropping, sampling.

Images travel as uint8 and are normalised on the device; captions are tokenised once and padded to the batch.
"""

import csv
import dataclasses
import io
import os
import random
import re
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network at import

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from config import InputError

CAPTION_FILES = ("captions.txt", "captions.csv", "Flickr8k.token.txt")
GHOST_IMAGES = {"2258277193_586949ec62.jpg.1"}  # in Flickr8k.token.txt with five captions, in no archive
MAX_WORDS = 1000  # a longer "caption" is a quote that was never closed
SPLIT_FILES = {"train": "*trainImages.txt", "validation": "*devImages.txt", "test": "*testImages.txt"}
SIDED = re.compile(r"\b(left|right)\b", re.IGNORECASE)
FLICKR8K_HELP = (
    "Flickr8k is on Kaggle (search for 'flickr 8k dataset'): unpack it and give "
    "--image_path .../Images --captions_path .../captions.txt. "
    "To try the program without it: python main.py --preset demo"
)


# ---- captions ---------------------------------------------------------------------------------------------------


def find_captions_file(path):
    """The captions file at `path`, which may be the file itself or the folder that holds it."""
    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        for name in CAPTION_FILES:
            if (path / name).is_file():
                return path / name
        raise InputError(f"captions_path is {path}, a folder without {', '.join(CAPTION_FILES)}. {FLICKR8K_HELP}")
    raise InputError(f"captions_path is {path}, which does not exist. {FLICKR8K_HELP}")


def read_captions(path):
    """The captions as a DataFrame with the columns `image` and `caption`, one row per pair.

    Reads a CSV with a header that names `image` and `caption` (Kaggle's captions.txt), or lines of
    `name.jpg#0<TAB>caption` (the original Flickr8k.token.txt); the first line tells which. Raises InputError.
    """
    path = find_captions_file(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text ({error})") from None
    if not text.strip():
        raise InputError(f"{path} is empty: it should hold `image,caption` lines")
    first_line = text.lstrip()[:1000].splitlines()[0]
    header = next(csv.reader([first_line]))
    names = [name.strip().lower() for name in header]
    if "image" in names and "caption" in names:
        rows = read_csv_rows(path, text, names)
    elif re.match(r"[^\t]+#\d+\t", first_line):
        rows = read_token_rows(path, text)
    else:
        raise InputError(
            f"{path} starts with {header[:4]}: it should start with a header that names the columns `image` and "
            "`caption`, or hold lines of `name.jpg#0<TAB>caption`"
        )
    frame = pd.DataFrame(check_rows(path, rows), columns=["image", "caption"])
    if frame.empty:
        raise InputError(f"{path} holds no captions")
    return frame


def read_csv_rows(path, text, names):
    image_column, caption_column = names.index("image"), names.index("caption")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header_seen = False
    try:
        for row in reader:
            if not "".join(row).strip():
                continue
            if not header_seen:
                header_seen = True
                continue
            if len(row) != len(names):
                raise InputError(
                    f"{path} line {reader.line_num}: {len(row)} columns instead of {len(names)}; "
                    "a caption with a comma needs quotes around it"
                )
            yield reader.line_num, row[image_column], row[caption_column]
    except csv.Error as error:
        raise InputError(f"{path} line {reader.line_num} cannot be read as CSV ({error})") from None


def read_token_rows(path, text):
    for number, line in enumerate(io.StringIO(text), 1):
        if line.strip():
            name, tab, caption = line.partition("\t")
            if not tab:
                raise InputError(f"{path} line {number}: no tab between the image's name and the caption")
            yield number, name.rsplit("#", 1)[0], caption


def check_rows(path, rows):
    """Stripped (image, caption) pairs, without blank captions and the known ghost of Flickr8k; raises InputError."""
    pairs, blank = [], {}
    for number, image, caption in rows:
        image, caption = image.strip(), " ".join(caption.split())
        if image in GHOST_IMAGES:
            continue
        if is_outside(image):
            raise InputError(f"{path} line {number}: the picture name {image!r} does not lie inside the image folder")
        if not caption:
            blank.setdefault(image, number)
            continue
        if caption.count(" ") >= MAX_WORDS:
            raise InputError(
                f"{path} line {number}: a caption of {caption.count(' ') + 1:,} words (at most {MAX_WORDS:,}); "
                "is a quote left open?"
            )
        pairs.append((image, caption))
    without = sorted(set(blank) - {image for image, _ in pairs})
    if without:
        more = f" ({len(without) - 1} more images have none)" if len(without) > 1 else ""
        raise InputError(f"{path} line {blank[without[0]]}: image {without[0]!r} has no caption{more}")
    return pairs


def is_outside(name):
    """True if a picture's name is empty, absolute or climbs out of its folder, on any operating system."""
    windows = PureWindowsPath(name)
    return not name or bool(windows.drive or windows.root) or ".." in windows.parts or PurePosixPath(name).is_absolute()


# ---- splits -----------------------------------------------------------------------------------------------------


@dataclass
class Pairs:
    """The (image, caption) pairs of one split, an image's captions side by side.

    `image_index[j]` is the image of caption j; the captions of image i are first[i] .. first[i + 1] - 1.
    """

    names: list[str]  # of the images, as the captions file has them
    files: list[Path]
    captions: list[str]
    image_index: np.ndarray
    first: np.ndarray


def make_pairs(captions_of, folder, names=None):
    """The `Pairs` of the images named (default: all of them), in that order; captions_of: {name: captions}."""
    names = list(captions_of) if names is None else names
    counts = np.array([len(captions_of[name]) for name in names], dtype=np.int64)
    return Pairs(
        names=names,
        files=[Path(folder) / name for name in names],
        captions=[caption for name in names for caption in captions_of[name]],
        image_index=np.repeat(np.arange(len(names)), counts),
        first=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    )


def captions_by_image(frame):
    """{image: its captions} of a DataFrame as `read_captions` returns it, in its order."""
    found = {}
    for image, caption in zip(frame["image"].tolist(), frame["caption"].tolist(), strict=True):
        found.setdefault(image, []).append(caption)
    return found


def names_one_of(caption, words):
    """True if the caption names one of the comma-separated words, or if there are none to name."""
    wanted = {word.strip().lower() for word in words.split(",")} - {""}
    return not wanted or not wanted.isdisjoint(re.findall(r"\w+", caption.lower()))


def pairs_naming(pairs, words):
    """The `Pairs` of those images of which a caption names one of the comma-separated words; raises InputError."""
    of_image = [pairs.captions[a:b] for a, b in zip(pairs.first, pairs.first[1:], strict=False)]
    kept = [i for i, captions in enumerate(of_image) if any(names_one_of(caption, words) for caption in captions)]
    if words and len(kept) < 2:
        raise InputError(f"gan_subset is {words!r}, which the captions of {len(kept)} images name: give other words")
    return pairs_of(pairs, kept)


def pairs_of(pairs, images):
    """The `Pairs` of the images with these numbers alone."""
    captions = {pairs.names[i]: pairs.captions[pairs.first[i] : pairs.first[i + 1]] for i in images}
    return dataclasses.replace(make_pairs(captions, ""), files=[pairs.files[i] for i in images])


def split_images(images, folder, seed):
    """Image names by split: {"train": [...], "validation": [...], "test": [...]}; a split is by image.

    Official split files (`*trainImages.txt`, `*devImages.txt`, `*testImages.txt`) in `folder` say which images are
    theirs. Without any, a seeded 80/10/10. With some: images in no list train if the training list is missing and
    are left out otherwise; missing validation images are a tenth of the training images; a missing test list
    leaves the test split empty. Raises InputError.
    """
    listed = read_split_files(images, folder)
    order = np.random.default_rng(seed).permutation(sorted(images)).tolist()
    if not listed:
        tenth = len(order) // 10
        return {"train": order[2 * tenth :], "validation": order[tenth : 2 * tenth], "test": order[:tenth]}
    if "train" not in listed:
        taken = {name for names in listed.values() for name in names}
        listed["train"] = [name for name in order if name not in taken]
    if "validation" not in listed:
        listed_train = set(listed["train"])
        train = [name for name in order if name in listed_train]
        listed["validation"], listed["train"] = train[: len(train) // 10], train[len(train) // 10 :]
    return {split: listed.get(split, []) for split in SPLIT_FILES}


def read_split_files(images, folder):
    known, listed, seen = set(images), {}, {}
    for split, pattern in SPLIT_FILES.items():
        for path in sorted(Path(folder).glob(pattern))[:1]:
            names = list(dict.fromkeys(read_lines(path)))
            unknown = [name for name in names if name not in known]
            if unknown:
                more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
                raise InputError(f"{path} names {unknown[0]}{more}, without a caption in the captions file")
            for name in names:
                if name in seen:
                    raise InputError(f"{name} is in two split files, {seen[name]} and {path.name}")
                seen[name] = path.name
            listed[split] = names
    return listed


def read_lines(path):
    """The lines of a text file without blanks at their ends, empty ones left out; raises InputError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text ({error})") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def load_splits(config):
    """The three splits of the configured data set as {"train": Pairs, ...}; raises InputError."""
    folder = Path(config.image_path)
    if not folder.is_dir():
        raise InputError(f"image_path is {folder}, which is not a folder. {FLICKR8K_HELP}")
    captions_file = find_captions_file(config.captions_path)
    captions_of = captions_by_image(read_captions(captions_file))
    splits = split_images(list(captions_of), captions_file.parent, config.seed)
    check_files([folder / name for split in splits.values() for name in split])
    if len(splits["train"]) < 2 or not splits["validation"]:
        raise InputError(
            f"{captions_file} gives {len(splits['train'])} training and {len(splits['validation'])} validation "
            "images: training needs at least 2, validation 1"
        )
    if config.batch_size > len(splits["train"]):
        raise InputError(
            f"batch_size is {config.batch_size}, but there are {len(splits['train'])} training images: "
            f"give --batch_size {len(splits['train'])} or less"
        )
    return {split: make_pairs(captions_of, folder, names) for split, names in splits.items()}


def check_files(files, where="image_path"):
    """Raise InputError if a picture is missing, naming the first and counting the others."""
    missing = [file for file in files if not os.path.isfile(file)]  # False, not an error, for an impossible name
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(f"picture {missing[0]} is missing{more}: is {where} right?")


# ---- transforms -----------------------------------------------------------------------------------------------


class TrainTransform:
    """Crop, colour jitter and flip of one picture, drawn from a seed alone: (side, side, 3) to (size, size, 3)."""

    def __init__(self, size, crop_scale, color_jitter):
        steps = []
        if crop_scale < 1:
            steps.append(A.RandomResizedCrop(size=(size, size), scale=(crop_scale, 1.0)))
        else:
            steps.append(A.Resize(size, size, interpolation=cv2.INTER_AREA))
        if color_jitter:
            change = (1 - color_jitter, 1 + color_jitter)
            # No change of hue: captions name colours.
            steps.append(A.ColorJitter(change, change, change, hue=(0, 0), p=0.8))
        self.plain = A.Compose(steps)
        self.flipping = A.Compose([*steps, A.HorizontalFlip(p=0.5)])

    def __call__(self, image, seed, flip):
        pipeline = self.flipping if flip else self.plain
        generator = np.random.default_rng(seed)
        pipeline.set_random_state(generator, random.Random(int(generator.integers(2**63))))
        return pipeline(image=image)["image"]


def resize_image(image, size):
    """The evaluation transform: the whole picture, (side, side, 3) to (size, size, 3)."""
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)


def to_tensor(image):
    """(H, W, 3) uint8 array -> (3, H, W) uint8 tensor; the memory stays channels-last."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)


class EvaluationImages(Dataset):
    """Pictures of a store as the model sees them in evaluation, (3, size, size) uint8.

    With a dict `failed`, a picture that cannot be read is noted there, {position: why}, and is black.
    """

    def __init__(self, store, indices, size, failed=None):
        self.store, self.indices, self.size, self.failed = store, indices, size, failed

    def __len__(self):
        return len(self.indices)

    def __getitems__(self, positions):
        """A batch, for the loader; without loader processes its pictures are decoded in threads."""
        if get_worker_info() is not None or self.store.cache is not None:
            return [self[position] for position in positions]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(self.__getitem__, positions))

    def __getitem__(self, position):
        try:
            image = resize_image(self.store[self.indices[position]], self.size)
        except InputError as error:
            if self.failed is None:
                raise
            self.failed[position] = str(error)
            image = np.zeros((self.size, self.size, 3), np.uint8)
        return to_tensor(image)


# ---- text -------------------------------------------------------------------------------------------------------


class TokenStore:
    """Captions tokenised once: all ids in one int32 array, caption j at first[j] .. first[j + 1] - 1."""

    def __init__(self, tokenizer, captions, max_length):
        lists = []
        for start in range(0, len(captions), 10_000):
            part = captions[start : start + 10_000]
            lists += tokenizer(part, truncation=True, max_length=max_length)["input_ids"]
        counts = np.array([len(ids) for ids in lists], dtype=np.int64)
        self.first = np.concatenate([[0], np.cumsum(counts)])
        self.ids = np.fromiter((i for ids in lists for i in ids), dtype=np.int32, count=int(self.first[-1]))

    def __len__(self):
        return len(self.first) - 1

    def __getitem__(self, caption):
        return self.ids[self.first[caption] : self.first[caption + 1]]


def pad_tokens(token_lists, pad_id):
    """input_ids and attention_mask, (T, L) int64, padded on the right to the longest of the T captions."""
    longest = max(len(ids) for ids in token_lists)
    input_ids = torch.full((len(token_lists), longest), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(len(token_lists), longest, dtype=torch.int64)
    for row, ids in enumerate(token_lists):
        input_ids[row, : len(ids)] = torch.from_numpy(np.asarray(ids, dtype=np.int64))
        attention_mask[row, : len(ids)] = 1
    return input_ids, attention_mask


def train_tokenizer(captions, vocab_size=30_000):
    """A lower-casing WordPiece tokenizer made from the captions alone, so that nothing has to be fetched.

    Its vocabulary is every word that occurs twice or more, the most frequent first, and the single characters that
    spell the others. (The library's own trainer breaks ties at random: two runs with one seed would differ.)
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = Counter()
    for caption in captions:
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption)))
    characters = sorted({character for word in words for character in word})
    frequent = [word for word, count in sorted(words.items(), key=lambda item: (-item[1], item[0])) if count > 1]
    pieces = [*names.values(), *characters, *(f"##{character}" for character in characters), *frequent]
    vocabulary = {piece: number for number, piece in enumerate(list(dict.fromkeys(pieces))[:vocab_size])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


# ---- batches ----------------------------------------------------------------------------------------------------


def plan_batches(groups_per_image, batch_size, rng):
    """Yield the image numbers of each batch of one epoch, an int64 array of distinct images.

    Image i appears in exactly groups_per_image[i] batches. Batches differ in size by one at the most, so none is
    left nearly empty at the end. An image that still has more groups to show goes first: with equal counts that is
    one round over all images after another, each in an order of its own.
    """
    total, most = int(groups_per_image.sum()), int(groups_per_image.max())
    number = max(-(-total // batch_size), most)
    waiting = {level: [] for level in range(most + 1)}  # pieces of images that have `level` groups left
    for level in range(1, most + 1):
        waiting[level].append(np.flatnonzero(groups_per_image == level))
    begun = set()
    for batch in range(number):
        size = even_share(total, number, batch)
        taken = []
        for level in range(most, 0, -1):
            if size and waiting[level] and level not in begun:
                begun.add(level)  # a new round: its images are shuffled once, later arrivals come at its end
                waiting[level] = [rng.permutation(np.concatenate(waiting[level]))]
            while size and waiting[level]:
                images = waiting[level].pop(0)
                if len(images) > size:
                    waiting[level].insert(0, images[size:])
                taken.append((level, images[:size]))
                size -= len(taken[-1][1])
        for level, images in taken:
            waiting[level - 1].append(images)
        yield np.concatenate([images for _, images in taken])


def even_share(total, parts, index):
    """The size of part `index` when `total` things are divided as evenly as can be."""
    return (index + 1) * total // parts - index * total // parts


class PairSampler:
    """Micro-batches of (epoch, image, captions) keys; with W processes each one gets every W-th image of a batch.

    One epoch shows every caption once, in groups of `captions_per_image` beside their image. The order depends on
    the seed and the epoch alone, so an epoch can be entered at any batch (`start`).
    """

    def __init__(self, pairs, config, rank=0, world_size=1):
        self.pairs, self.config = pairs, config
        self.rank, self.world_size = rank, world_size
        self.epoch, self.start = 0, 0
        captions = np.diff(pairs.first)
        self.groups_per_image = -(-captions // config.captions_per_image)
        self.total = int(self.groups_per_image.sum())
        self.batches = max(-(-self.total // config.batch_size), int(self.groups_per_image.max()))
        self.micro_batch_size = config.micro_batch_size or config.batch_size
        if self.total // self.batches < world_size:
            raise InputError(
                f"an image with {captions.max()} captions leaves batches of {self.total // self.batches} images for "
                f"{world_size} processes: give a larger --captions_per_image, or fewer processes"
            )

    def micro_batch_counts(self):
        """How many micro-batches each batch from `start` on has for this process, a list."""
        sizes = [even_share(self.total, self.batches, batch) for batch in range(self.start, self.batches)]
        own = [len(range(self.rank, size, self.world_size)) for size in sizes]
        return [len(self.micro_batches(range(count))) for count in own]

    def micro_batches(self, keys):
        """The keys in parts of nearly equal size: BatchNorm would stumble over a part of one image left at the end."""
        parts = -(-len(keys) // self.micro_batch_size)
        ends = [part * len(keys) // parts for part in range(parts + 1)]
        return [keys[a:b] for a, b in zip(ends, ends[1:], strict=False)]

    def plan(self):
        """Yield each batch of this process as its list of micro-batches, a list of keys each."""
        k = self.config.captions_per_image
        rng = np.random.default_rng([self.config.seed, self.epoch])
        order = rng.permuted  # an image's captions in an order of their own, each epoch anew
        captions = [order(np.arange(a, b)) for a, b in zip(self.pairs.first, self.pairs.first[1:], strict=False)]
        shown = np.zeros(len(captions), dtype=np.int64)
        for batch in plan_batches(self.groups_per_image, self.config.batch_size, rng):
            keys = []
            for image in batch.tolist():
                group = captions[image][shown[image] * k : (shown[image] + 1) * k]
                shown[image] += 1
                keys.append((self.epoch, image, tuple(group.tolist())))
            yield self.micro_batches(keys[self.rank :: self.world_size])

    def __iter__(self):
        for number, batch in enumerate(self.plan()):
            if number >= self.start:
                yield from batch


class TrainingPairs(Dataset):
    """Items of a training batch; an image's crop depends on (seed, epoch, image) alone, whoever loads it.

    `image_features` (N, F) or `text_features` (T, F), when given, stand in for what a frozen encoder would compute.
    """

    def __init__(self, pairs, store, tokens, pad_id, config, image_features=None, text_features=None):
        self.store, self.tokens, self.pad_id, self.seed = store, tokens, pad_id, config.seed
        self.image_features, self.text_features = image_features, text_features
        self.transform = TrainTransform(config.size, config.crop_scale, config.color_jitter)
        self.image_ids = torch.from_numpy(pairs.image_index)
        self.sided = np.array([bool(SIDED.search(caption)) for caption in pairs.captions])

    def __getitem__(self, key):
        epoch, image, captions = key
        if self.image_features is not None:
            return self.image_features[image], captions
        flip = not self.sided[list(captions)].any()  # a mirrored picture would make "left" a lie
        pixels = self.transform(self.store[image], [self.seed, epoch, image, captions[0]], flip)
        return to_tensor(pixels), captions

    def collate(self, items):
        """A micro-batch: B images, their T captions, image_index (T,), the row of each caption's image, and image_ids
        (B,), the number of each image in the data set."""
        counts = torch.tensor([len(captions) for _, captions in items])
        captions = [caption for _, group in items for caption in group]
        batch = {"image_index": torch.repeat_interleave(torch.arange(len(items)), counts)}
        batch["image_ids"] = self.image_ids[[group[0] for _, group in items]]
        batch["images" if self.image_features is None else "image_features"] = torch.stack([x for x, _ in items])
        if self.text_features is not None:
            batch["text_features"] = self.text_features[captions]
        else:
            ids = [self.tokens[caption] for caption in captions]
            batch["input_ids"], batch["attention_mask"] = pad_tokens(ids, self.pad_id)
        return batch


def prepare_worker(_):
    """Loader processes leave Ctrl-C to the main process and do not fight over the cores."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def make_loader(dataset, num_workers, pin_memory=False, **options):
    """A DataLoader that draws nothing from the global random state and keeps its processes between epochs."""
    return DataLoader(
        dataset,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=prepare_worker if num_workers else None,
        generator=torch.Generator(),
        **options,
    )

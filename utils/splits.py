"""The split of a data set into training, validation and test images: from its files, at random, or of a run."""

import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np

from config import InputError
from utils.captions import shared_captions
from utils.files import read_json, write_json
from utils.formats import read_lines

SPLITS = ("train", "validation", "test")
RUN_PARTS = ("best", "first", "heads", "stage1")  # folders of a run whose split is that of the run
SMALL_SPLIT = 100  # images, below which a recall depends on single ones
SPLIT_NAMES = {"train": "train", "training": "train", "restval": "train"}  # restval: Karpathy's split of COCO
SPLIT_NAMES |= dict.fromkeys(("validation", "valid", "val", "dev", "development"), "validation")
SPLIT_NAMES |= {"test": "test", "testing": "test"}
# Flickr_8k.trainImages.txt, train.txt, flickr30k_val.txt, test_images.lst
SPLIT_FILE = re.compile(
    rf"(?:(?:.*[._ -])?({'|'.join(SPLIT_NAMES)})(?:[._ -]?(?:images?|imgs|split|set|list|names|ids|files))?"
    r"|.*(train|dev|val|test)images)\.(?:txt|lst|list)"
)


def split_images(images, folder, seed, listed=None, captions_file=None):
    """Image names by split: {"train": [...], "validation": [...], "test": [...]}; raises InputError.

    `listed` (by split), or else split files in `folder`, are used where they exist; without any, a seeded 80/10/10
    split. Without a training list, all unlisted images are training images. Without a validation list, a tenth of the
    training images is used for validation. Without a test list, the test split is empty.
    """
    listed = dict(listed or read_split_files(images, folder, captions_file))
    order = np.random.default_rng(seed).permutation(sorted(images)).tolist()
    if not listed:
        tenth = max(1, len(order) // 10) if len(order) > 3 else 0
        return {"train": order[2 * tenth :], "validation": order[tenth : 2 * tenth], "test": order[:tenth]}
    if "train" not in listed:
        taken = {name for names in listed.values() for name in names}
        listed["train"] = [name for name in order if name not in taken]
    if "validation" not in listed:
        listed_train = set(listed["train"])
        train = [name for name in order if name in listed_train]
        tenth = max(1, len(train) // 10) if len(train) > 2 else 0
        listed["validation"], listed["train"] = train[:tenth], train[tenth:]
    return {split: listed.get(split, []) for split in SPLITS}


def choose_splits(config, frame, images, captions_file):
    """Image names by split, of the run if it has been started, and a line about their source; raises InputError."""
    if saved := read_split(config.run):
        unused = keep_split(saved, images, captions_file, config.run)
        return saved, "the run's split" + (f"; images not in it, which are not used: {unused}" if unused else "")
    listed, folder = split_column(frame, captions_file), captions_file
    folder = folder if folder.is_dir() else folder.parent  # shards are their own captions file
    splits = split_images(images, folder, config.seed, listed, captions_file)
    files = {} if listed else find_split_files(folder, captions_file)
    source = ", ".join(path.name for path in files.values()) or f"random split (seed {config.seed})"
    if listed:
        source = frame.attrs.get("split_source", f"column `split` of {captions_file.name}")
        if others := find_split_files(folder, captions_file):
            source += f" ({', '.join(path.name for path in others.values())} not used)"
    if hidden := sum(1 for _ in folder.glob("._*")):
        source += f"; hidden files ._* ignored: {hidden}"
    unused = len(images) - sum(map(len, splits.values()))
    return splits, source + (f"; images in no split, which are not used: {unused}" if unused else "")


# ---- split files and columns ------------------------------------------------------------------------------------


def find_split_files(folder, captions_file=None):
    """{split: its split file}, with usual names in any case; raises InputError if two list the same split.

    Hidden files (macOS writes `._name` beside `name`) and the captions file are none.
    """
    found = {}
    for path in sorted(Path(folder).glob("[!.]*")):
        match = SPLIT_FILE.fullmatch(path.name.lower())
        if match and path.is_file() and path != captions_file:
            found.setdefault(SPLIT_NAMES[match[1] or match[2]], []).append(path)
    files = {}
    for split in SPLITS:
        paths = found.get(split, [])
        paths = [path for path in paths if path.stem.lower().endswith("images")] or paths  # the official name
        if len(paths) > 1:
            raise InputError(f"{paths[0]} and {paths[1].name} both list {split} images: keep one of them")
        files |= {split: paths[0]} if paths else {}
    return files


def read_split_files(images, folder, captions_file=None):
    known, listed, seen = set(images), {}, {}
    for split, path in find_split_files(folder, captions_file).items():
        names = read_lines(path)
        if not known.issuperset(names):
            aliases = name_aliases(images)
            names = [name if name in known else find_alias(name, aliases) or name for name in names]
        names = list(dict.fromkeys(names))
        unknown = [name for name in names if name not in known]
        if unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise InputError(
                f"{path} lists {unknown[0]:.99}{more}, not found in the captions file (not a list of images? rename it)"
            )
        for name in names:
            if name in seen:
                raise InputError(f"{name:.99} is in two split files, {seen[name]} and {path.name}")
            seen[name] = path.name
        listed[split] = names
    return listed


def name_aliases(images):
    """{another form of an image name: the name}: composed characters, without folders, without suffix; if unique."""
    forms = [(form, name) for name in images for form in {*name_forms(name)}]
    counts = Counter(form for form, _ in forms)
    return {form: name for form, name in forms if counts[form] == 1}


def name_forms(name):
    whole = unicodedata.normalize("NFC", name).replace("\\", "/").removeprefix("./")
    base = whole.rsplit("/", 1)[-1]
    return whole, base, re.sub(r"\.\w{1,5}$", "", base)


def find_alias(name, aliases):
    return next((aliases[form] for form in name_forms(name) if form in aliases), None)


def split_column(frame, path):
    """{split: image names} from the column `split` of captions; empty without one; raises InputError."""
    if "split" not in frame or not (frame["split"] != "").any():
        return {}
    found = {}
    for name, value in zip(frame["image"].tolist(), frame["split"].tolist(), strict=True):
        if found.setdefault(name, value) != value:
            raise InputError(f"{path}: image {name!r:.99} is in the splits {found[name]!r:.40} and {value!r:.40}")
    listed = {}
    for name, value in found.items():
        if value and value.lower() not in SPLIT_NAMES:
            raise InputError(f"{path}: the split {value!r:.40} of {name!r:.99} should be train, validation or test")
        if value:
            listed.setdefault(SPLIT_NAMES[value.lower()], []).append(name)
    return listed


# ---- what was read ----------------------------------------------------------------------------------------------


def describe_splits(config, splits):
    """Lines about the data: images per split, captions, their sources; notes about what may surprise."""
    counts = " / ".join(f"{split} {len(pairs.files):,}" for split, pairs in splits.items())
    captions = sum(len(pairs.captions) for pairs in splits.values())
    source, *notes = splits["train"].source or ["unknown split"]
    lines = [f"data: {counts} images, {captions:,} captions, {source}", *notes]
    if shared := sum(count_shared(pairs) for pairs in splits.values()):
        lines.append(
            f"note: {shared:,} captions occur at several images of a split: there they are never negatives; recalls "
            "count only the own image as correct, and a second table all images with the caption"
        )
    small = next((split for split in ("test", "validation") if splits[split].files), None)
    if small and (count := len(splits[small].files)) < SMALL_SPLIT:
        images, points = f"{count} image{'s' * (count > 1)}", f"{100 / count:.0f} points"
        lines.append(f"note: the {small} split has {images}: each changes its recalls by up to {points}")
    if config.batch_size > len(splits["train"].files):
        lines.append(
            f"warning: batch_size is {config.batch_size}, more than the training images; one batch has all of them"
        )
    return "\n".join(lines)


def count_shared(pairs):
    """The number of captions that are also captions of another image of the split."""
    return 0 if pairs.text_ids is None else int(shared_captions(pairs.text_ids, pairs.image_index).sum())


# ---- the split of a run -----------------------------------------------------------------------------------------


def split_file(run):
    """The split.json of a run folder, or of the run it is a part of (such as stage1/)."""
    run = Path(run)
    return (run.parent if run.name in RUN_PARTS and (run.parent / "config.json").exists() else run) / "split.json"


def save_split(run, splits):
    """Write split.json, the image names of each split, unless it exists: a later change of the data is then known."""
    if not split_file(run).exists():
        write_json(split_file(run), {split: pairs.names for split, pairs in splits.items()})


def read_split(run):
    """The split saved in a run folder, {split: image names}; None if there is none; raises InputError."""
    path = split_file(run)
    if not run or not path.exists():
        return None
    content = read_json(path)
    lists = [content.get(split) for split in SPLITS]
    names = [name for each in lists for name in each] if all(isinstance(each, list) for each in lists) else [None]
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise InputError(f"{path} is damaged: restore it, or train another run")
    return dict(zip(SPLITS, lists, strict=True))


def keep_split(saved, images, captions_file, run):
    """The number of images that are not in a run's split; raises InputError if one of its images is missing."""
    known = set(images)
    for split, names in saved.items():
        missing = [name for name in names if name not in known]
        if missing:
            raise InputError(
                f"{captions_file} lacks {missing[0]!r:.99} and {len(missing) - 1} more of the {len(names)} {split} "
                f"images of {run}: the captions are not those the run was started with"
            )
    return len(known) - sum(map(len, saved.values()))

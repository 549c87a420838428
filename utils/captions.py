"""Captions files, lists of captions, and a tokenizer built from captions."""

import fnmatch
import os
import re
import unicodedata
from collections import Counter
from pathlib import Path, PureWindowsPath

import numpy as np
import pandas as pd

from config import InputError
from utils.formats import clean_text, read_lines, read_table
from utils.shards import find_shards, read_shards

# Usual names of captions files in a folder, the most specific first; compared in lower case.
CAPTION_FILES = ("captions.txt", "captions.csv", "captions.tsv", "flickr8k.token.txt", "results*.token", "results.csv")
CAPTION_FILES += ("dataset_*.json", "captions*.json", "captions.jsonl", "metadata.csv", "metadata.jsonl", "*.token.txt")
MISSING_IMAGES = {"2258277193_586949ec62.jpg.1"}  # listed in Flickr8k.token.txt, but absent from all archives
MAX_WORDS = 1000  # a longer "caption" comes from an unclosed quote
MAX_NAME = 4096  # characters of an image name with its folders
FLICKR8K_HELP = (
    "Flickr8k is available on Kaggle (search for 'flickr 8k dataset'): unpack it and pass --image_path .../Images "
    "--captions_path .../captions.txt. To try the program without it: python main.py --preset demo"
)


def find_captions_file(path):
    """The captions file at `path`, the file itself or the folder that contains it; shards without one are their own."""
    path = Path(path)
    if os.path.isfile(path):
        return path
    visible = [file for file in sorted(path.glob("[!.]*")) if file.is_file()] if os.path.isdir(path) else []
    for pattern in CAPTION_FILES:
        found = [file for file in visible if fnmatch.fnmatchcase(file.name.lower(), pattern)]
        if len(found) > 1:
            raise InputError(
                f"captions_path is {path}, which has {found[0].name} and {found[1].name}: pass one of them"
            )
        if found:
            return found[0]
    if find_shards(path):
        return path
    problem = f"a folder without {', '.join(CAPTION_FILES[:4])}, ..." if visible else "which does not exist"
    problem = "a folder without captions.txt" if not visible and os.path.isdir(path) else problem
    raise InputError(f"captions_path is {path}, {problem}. {FLICKR8K_HELP}")


def read_captions(path):
    """The captions as a DataFrame with the columns `image` and `caption`, one row per pair; raises InputError.

    The formats are those of `formats.read_table`.
    """
    return read_pairs(path)[["image", "caption"]]


def read_pairs(path, image_path=None):
    """Like `read_captions`, with a column `split` where the file has one; `attrs` has its format and notes about it.

    Absolute image names inside the folder `image_path` become relative to it.
    """
    path = find_captions_file(path)
    if path.is_dir():
        return pairs_in_shards(path)
    frame = read_table(path)
    lines, attrs = frame.index.tolist(), {**frame.attrs, "notes": []}
    names = [name.strip() for name in frame["image"].tolist()]
    cells = frame["caption"].tolist()  # an unchanged caption stays the same string, which saves memory
    captions = [cell if (text := " ".join(clean_text(cell).split())) == cell else text for cell in cells]
    relative = {}
    for line, name in zip(lines, names, strict=True):
        if name not in relative:
            relative[name] = check_name(path, line, name, image_path)
    for line, caption in zip(lines, captions, strict=True):
        if len(caption) > 2 * MAX_WORDS and (n := caption.count(" ") + 1) > MAX_WORDS:
            raise InputError(f"{path} line {line}: caption has {n:,} words (at most {MAX_WORDS:,}): unclosed quote?")
    kept = [row for row, name in enumerate(names) if captions[row] and name not in MISSING_IMAGES]
    described = {names[row] for row in kept}
    blank = {name: lines[row] for row, name in reversed([*enumerate(names)]) if not captions[row]}
    without = sorted(set(blank) - described - MISSING_IMAGES)
    if without:
        more = f" ({len(without) - 1} more images have none)" if len(without) > 1 else ""
        raise InputError(f"{path} line {blank[without[0]]}: image {without[0]!r:.99} has no caption{more}")
    if not kept:
        raise InputError(f"{path} contains no captions")
    if blank:
        attrs["notes"].append(
            f"{len(blank)} images have a blank caption besides others, first in line {min(blank.values())}"
        )
    result = pd.DataFrame({"image": [relative[names[row]] for row in kept], "caption": [captions[row] for row in kept]})
    if "split" in frame:
        result["split"] = frame["split"].str.strip().str.lower().iloc[kept].tolist()
    result.attrs = attrs
    return result


def pairs_in_shards(folder):
    """Like `read_pairs`, for a folder of tar shards; the column `split` comes from their names."""
    samples, incomplete = read_shards(folder)
    cleaned = [(name, " ".join(clean_text(text).split()), split) for name, texts, split in samples for text in texts]
    frame = pd.DataFrame([row for row in cleaned if row[1]], columns=["image", "caption", "split"])
    frame = frame.fillna({"split": "train"}) if frame["split"].notna().any() else frame.drop(columns="split")
    notes = [f"{incomplete} samples without an image or a caption are not used"] if incomplete else []
    frame.attrs = {"format": "WebDataset shards", "notes": notes, "split_source": "names of the shards"}
    return frame


def check_name(path, line, name, image_path):
    """The name of an image relative to the image folder; raises InputError if it is outside."""
    windows = PureWindowsPath(name)  # parses the paths of all systems
    if len(name) > MAX_NAME or "\0" in name:
        raise InputError(f"{path} line {line}: the image name {name!r:.40} has {len(name):,} characters, or a NUL")
    if name and not windows.anchor and ".." not in windows.parts:
        return name
    for root in {os.path.abspath(image_path), os.path.realpath(image_path)} if image_path and name else ():
        if os.path.isabs(name) and Path(os.path.normpath(name)).is_relative_to(root):
            return Path(os.path.normpath(name)).relative_to(root).as_posix()
    raise InputError(f"{path} line {line}: the image name {name!r:.99} is not inside the image folder")


def normalize_caption(caption):
    """A caption without the differences that do not make another text: case, blanks, punctuation at the end."""
    return " ".join(unicodedata.normalize("NFC", caption).casefold().split()).rstrip(" .,;:!?。！？")


def text_ids(captions):
    """(T,) int64 ids of captions; equal after `normalize_caption` means an equal id, in all processes and data sets."""
    if not len(captions):
        return np.zeros(0, np.int64)
    return pd.util.hash_array(np.array([normalize_caption(each) for each in captions], dtype=object)).view(np.int64)


def shared_captions(ids, image_index):
    """(T,) booleans: captions with the same id as one of another image. ids: `text_ids`; image_index: ascending."""
    order = np.argsort(ids, kind="stable")
    new = np.diff(ids[order], prepend=ids[order[:1]] - 1) != 0
    group = np.cumsum(new) - 1  # of equal captions
    other = image_index[order] != image_index[order][new][group]  # another image than the first of the group
    shared = np.empty(len(ids), dtype=bool)
    shared[order] = np.bincount(group, other)[group] > 0
    return shared


def read_caption_list(path):
    """The distinct captions of a text file and the group of each, as two lists; raises InputError.

    A line is a caption, or a group name, a tab and a caption: the captions of a group have the same meaning.
    """
    if not Path(path).is_file():
        raise InputError(f"gan_captions is {path}, which is not a file: use a text file with one caption per line")
    found, lines = {}, read_lines(path)
    first = lines[0].lower() if lines else ""
    if first in ("image,caption", "image\tcaption") or re.match(r"[^\t]+\.\w+#\d+\t", first):
        raise InputError(f"gan_captions is {path}, a captions file with images: use a file with one caption per line")
    for line in lines:
        group, tab, caption = line.partition("\t")
        found.setdefault(caption.strip() if tab else line, group if tab else line)
    if len(found) < 2:
        raise InputError(f"{path} contains {len(found)} captions: at least 2 are needed, one per line")
    return list(found), list(found.values())


def group_captions(captions, groups, pairs):
    """The group id of each caption: the index of a training image with a caption of the group, else negative."""
    known = dict(zip(map(normalize_caption, pairs.captions), pairs.image_index.tolist(), strict=True))
    texts = [normalize_caption(caption) for caption in captions]
    numbers = {group: -1 - number for number, group in enumerate(dict.fromkeys(groups))}
    numbers |= {group: known[text] for text, group in zip(texts, groups, strict=True) if text in known}
    return [known.get(text, numbers[group]) for text, group in zip(texts, groups, strict=True)]


def train_tokenizer(captions, vocab_size=30_000):
    """A lower-casing WordPiece tokenizer: words that occur at least twice, and characters to spell the others."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    # Accents, vowel signs and tones distinguish words; NFC, so that two spellings of a letter are one.
    parts = [normalizers.NFC(), normalizers.BertNormalizer(lowercase=True, strip_accents=False)]
    normalizer, splitter = normalizers.Sequence(parts), pre_tokenizers.BertPreTokenizer()
    words = Counter()
    for text, count in Counter(part for caption in captions for part in caption.split(" ")).items():
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)):
            words[word] += count
    characters = sorted({character for word in words for character in word})
    frequent = [word for word, count in sorted(words.items(), key=lambda item: (-item[1], item[0])) if count > 1]
    # The trainer of the tokenizers library breaks ties at random; here the order is deterministic.
    pieces = [*names.values(), *characters, *(f"##{character}" for character in characters), *frequent]
    vocabulary = {piece: number for number, piece in enumerate(list(dict.fromkeys(pieces))[:vocab_size])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)

"""Captions files, lists of captions, and a tokenizer built from captions."""

import csv
import io
import re
from collections import Counter
from pathlib import Path, PureWindowsPath

import pandas as pd

from config import InputError
from utils.files import read_lines, read_text

CAPTION_FILES = ("captions.txt", "captions.csv", "Flickr8k.token.txt")
MISSING_IMAGES = {"2258277193_586949ec62.jpg.1"}  # listed in Flickr8k.token.txt, but absent from all archives
MAX_WORDS = 1000  # a longer "caption" comes from an unclosed quote
FLICKR8K_HELP = (
    "Flickr8k is available on Kaggle (search for 'flickr 8k dataset'): unpack it and pass --image_path .../Images "
    "--captions_path .../captions.txt. To try the program without it: python main.py --preset demo"
)


def find_captions_file(path):
    """The captions file at `path`, which may be the file itself or the folder that contains it."""
    path = Path(path)
    for file in (path, *(path / name for name in CAPTION_FILES)):
        if file.is_file():
            return file
    problem = f"a folder without {', '.join(CAPTION_FILES)}" if path.is_dir() else "which does not exist"
    raise InputError(f"captions_path is {path}, {problem}. {FLICKR8K_HELP}")


def read_captions(path):
    """The captions as a DataFrame with the columns `image` and `caption`, one row per pair.

    Supported formats, recognised by the first line: a CSV with a header that contains `image` and `caption` (Kaggle's
    captions.txt), and lines of `name.jpg#0<TAB>caption` (the original Flickr8k.token.txt). Raises InputError.
    """
    path = find_captions_file(path)
    text = read_text(path)
    if not text.strip():
        raise InputError(f"{path} is empty: it should contain `image,caption` lines")
    first_line = text.lstrip()[:1000].splitlines()[0]
    header = next(csv.reader([first_line]))
    columns = [name.strip().lower() for name in header]
    if "image" in columns and "caption" in columns:
        rows = read_csv_rows(path, text, columns)
    elif re.match(r"[^\t]+#\d+\t", first_line):
        rows = read_token_rows(path, text)
    else:
        expected = "a header with `image` and `caption`, or lines of `name.jpg#0<TAB>caption`"
        raise InputError(f"{path} starts with {header[:4]}: it should start with {expected}")
    return pd.DataFrame(check_rows(path, rows), columns=["image", "caption"])


def read_csv_rows(path, text, columns):
    """Yield (line number, image, caption); `pd.read_csv` would fill short rows and shift long ones."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        rows = (row for row in reader if "".join(row).strip())
        next(rows)  # the header
        for row in rows:
            if len(row) != len(columns):
                found = f"{len(row)} columns instead of {len(columns)}"
                raise InputError(f"{path} line {reader.line_num}: {found}; a caption with commas needs quotes")
            yield reader.line_num, row[columns.index("image")], row[columns.index("caption")]
    except csv.Error as error:
        raise InputError(f"{path} line {reader.line_num} cannot be read as CSV ({error})") from None


def read_token_rows(path, text):
    for number, line in enumerate(io.StringIO(text), 1):
        if line.strip():
            name, tab, caption = line.partition("\t")
            if not tab:
                raise InputError(f"{path} line {number}: no tab between the image name and the caption")
            yield number, name.rsplit("#", 1)[0], caption


def check_rows(path, rows):
    """Stripped (image, caption) pairs without blank captions or Flickr8k's missing image; raises InputError."""
    pairs, blank = [], {}
    for number, image, caption in rows:
        image, caption = image.strip(), " ".join(caption.split())
        windows = PureWindowsPath(image)  # parses the paths of all systems
        if image in MISSING_IMAGES:
            continue
        if not image or windows.anchor or ".." in windows.parts:  # absolute, or leaves the folder
            raise InputError(f"{path} line {number}: the image name {image!r} is not inside the image folder")
        if (n := caption.count(" ") + 1) > MAX_WORDS:
            raise InputError(f"{path} line {number}: caption has {n:,} words (at most {MAX_WORDS:,}): unclosed quote?")
        if caption:
            pairs.append((image, caption))
        else:
            blank.setdefault(image, number)
    without = sorted(set(blank) - {image for image, _ in pairs})
    if without:
        more = f" ({len(without) - 1} more images have none)" if len(without) > 1 else ""
        raise InputError(f"{path} line {blank[without[0]]}: image {without[0]!r} has no caption{more}")
    if not pairs:
        raise InputError(f"{path} contains no captions")
    return pairs


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
    known = dict(zip(pairs.captions, pairs.image_index.tolist(), strict=True))
    numbers = {group: -1 - number for number, group in enumerate(dict.fromkeys(groups))}
    numbers |= {group: known[caption] for caption, group in zip(captions, groups, strict=True) if caption in known}
    return [known.get(caption, numbers[group]) for caption, group in zip(captions, groups, strict=True)]


def train_tokenizer(captions, vocab_size=30_000):
    """A lower-casing WordPiece tokenizer: words that occur at least twice, and characters to spell the others."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    # Accents, vowel signs and tones distinguish words; NFC, so that two spellings of a letter are one.
    parts = [normalizers.NFC(), normalizers.BertNormalizer(lowercase=True, strip_accents=False)]
    normalizer, splitter = normalizers.Sequence(parts), pre_tokenizers.BertPreTokenizer()
    texts = map(normalizer.normalize_str, captions)
    words = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(text))
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

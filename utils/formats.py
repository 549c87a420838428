"""Captions files of common data sets as one table: CSV, TSV and JSON in several layouts and encodings."""

import ast
import contextlib
import csv
import io
import json
import re
import warnings
from pathlib import Path

import pandas as pd

from config import InputError
from utils.files import check_regular

# Usual column names, the most specific first; compared in lower case, with underscores for blanks and hyphens.
IMAGE_COLUMNS = ("image", "file_name", "filename", "image_name", "image_file", "image_filename", "image_path")
IMAGE_COLUMNS += ("filepath", "file_path", "path", "file", "img", "img_name", "img_path", "photo", "picture")
IMAGE_COLUMNS += ("bild", "bilddatei", "dateiname", "datei", "imagen", "archivo", "fichier", "image_id", "name")
CAPTION_COLUMNS = ("caption", "captions", "caption_text", "image_caption", "sentence", "sentences", "text", "texts")
CAPTION_COLUMNS += ("comment", "comments", "raw", "description", "descriptions", "alt_text", "alt", "title")
CAPTION_COLUMNS += ("bildunterschrift", "beschreibung", "beschriftung", "légende", "descripción", "didascalia")
SPLIT_COLUMNS = ("split", "partition", "subset")
NUMBERED_CAPTION = re.compile(r"(caption|sentence|text|comment|description)s?_?\d+")
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "pipe"}
LIST = re.compile(r"[\[({]\s*['\"{].*[\])}]\Z", re.DOTALL)
EXPECTED = "a header such as `image,caption`, or lines of `name.jpg#0<TAB>caption`"
MAX_BYTES = 8 * 10**9
MAX_LIST = 100_000  # characters of a caption cell that holds a list


def read_table(path):
    """The pairs of a captions file as a DataFrame of strings: `image`, `caption` and, where known, `split`.

    The index is the line of each pair (JSON: its number); `attrs["format"]` says what it is. Raises InputError.
    """
    text, encoding = read_decoded(path)
    if not text.strip():
        raise InputError(f"{path} is empty: it should contain {EXPECTED}")
    if text.lstrip()[0] in "{[":
        frame, recognised = read_json_pairs(path, text)
    else:
        frame, recognised = read_text_pairs(path, text)
    frame.attrs["format"] = f"{recognised}, {encoding}"
    return expand_lists(frame)


def read_columns(path, **usual):
    """A DataFrame of strings with these columns, {name: usual names}, of a table with a header; None if one is missing.

    The index is the line of each row. Raises InputError.
    """
    text, _ = read_decoded(path)
    first_line = text.lstrip("\n ").partition("\n")[0]
    for delimiter in DELIMITERS:
        names = split_header(first_line, delimiter)
        found = {column: first_of(names, choice) for column, choice in usual.items()}
        if None not in found.values():
            table = parse_table(path, text, delimiter)
            return pd.DataFrame({column: table[number] for column, number in found.items()}, index=table.index)
    return None


# ---- text -------------------------------------------------------------------------------------------------------


def read_decoded(path):
    """The text of a file and its encoding; raises InputError."""
    check_regular(path, MAX_BYTES)
    try:
        return decode_text(Path(path).read_bytes(), path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None


def read_lines(path):
    """The stripped, non-empty lines of a text file; raises InputError."""
    return [line.strip() for line in read_decoded(path)[0].split("\n") if line.strip()]  # names may have a U+2028


def decode_text(content, name):
    """The text of bytes with line ends `\\n`, and the encoding: UTF-8, UTF-16 or cp1252; raises InputError."""
    encoding, sample = "UTF-8", content[:1000]
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "UTF-16"
    elif sample.count(0) > len(sample) // 3:  # ASCII characters of two bytes
        encoding = "UTF-16-LE" if sample[1::2].count(0) > sample[::2].count(0) else "UTF-16-BE"
    try:
        text = content.decode("utf-8-sig" if encoding == "UTF-8" else encoding)
    except UnicodeDecodeError as error:
        text = None if encoding != "UTF-8" else decode_cp1252(content)
        if text is None:
            line = content.count(b"\n", 0, error.start) + 1
            raise InputError(f"{name} line {line} cannot be read as {encoding} text: save the file as UTF-8") from None
        encoding = "cp1252"
    if "\0" in text:
        raise InputError(f"{name} line {text.count(chr(10), 0, text.index(chr(0))) + 1} has a NUL character: not text")
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n"), encoding


def decode_cp1252(content):
    """Bytes decoded as cp1252; None if most of the other characters are valid UTF-8: then a few bytes are damaged."""
    lenient = content.decode("utf-8", "replace")
    damaged = lenient.count("\ufffd")
    if sum(ord(character) > 127 for character in lenient) >= 2 * damaged:
        return None
    with contextlib.suppress(UnicodeDecodeError):
        return content.decode("cp1252")
    return None


def clean_text(text):
    """Text without lone surrogates: bytes of a command line in another encoding are read as UTF-8, else as cp1252."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = re.sub("[\ud800-\udc7f]", "\ufffd", text)
        content = text.encode("utf-8", "surrogateescape")
        with contextlib.suppress(UnicodeDecodeError):
            return content.decode()
        return decode_cp1252(content) or content.decode("utf-8", "replace")
    return text


def read_text_pairs(path, text):
    """The pairs of a table with a header, or of lines `name.jpg#0<TAB>caption`, and a description."""
    first_line, skipped = text.lstrip("\n ").partition("\n")[0], 0
    if re.fullmatch(r"\"?sep=.\"?", first_line.strip()):  # written by Excel
        skipped = text.index(first_line) + len(first_line)
        text = "\n" * text.count("\n", 0, skipped) + text[skipped:]
        first_line = text.lstrip("\n ").partition("\n")[0]
    if re.match(r"[^\t]+#\d+\t", first_line):
        return read_token_lines(path, text), "token lines"
    for delimiter in DELIMITERS:
        columns = find_columns(split_header(first_line, delimiter))
        if columns:
            return read_delimited(path, text, delimiter, columns, first_line)
    raise InputError(f"{path} starts with {first_line[:60]!r}: it should start with {EXPECTED}")


def read_token_lines(path, text):
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            name, tab, caption = line.partition("\t")
            if not tab:
                raise InputError(f"{path} line {number}: no tab between the image name and the caption")
            rows.append((number, name.rsplit("#", 1)[0], caption))
    numbers, images, captions = zip(*rows, strict=True)
    return pd.DataFrame({"image": images, "caption": captions}, index=numbers)


def split_header(line, delimiter):
    """The normalised column names of a header."""
    try:
        names = next(csv.reader([line[:10_000]], delimiter=delimiter, skipinitialspace=True), [])
    except csv.Error:
        return []
    return [normalize_name(name) for name in names]


def normalize_name(name):
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def first_of(names, usual):
    """The index of the first of the usual names that is among `names`; None if there is none."""
    return next((names.index(name) for name in usual if name in names), None)


def find_columns(names):
    """{"image": index, "captions": [indices], "split": index or None} of column names; None if one is missing."""

    caption, image, split = (first_of(names, usual) for usual in (CAPTION_COLUMNS, IMAGE_COLUMNS, SPLIT_COLUMNS))
    numbered = [number for number, name in enumerate(names) if NUMBERED_CAPTION.fullmatch(name)]
    captions = numbered if caption is None else [caption]
    if image is None or not captions:
        return None
    unused = [name for number, name in enumerate(names) if name and number not in (image, *captions, split)]
    return {"image": image, "captions": captions, "split": split, "names": names, "unused": unused}


def read_delimited(path, text, delimiter, columns, first_line):
    """The pairs of a table with a header."""
    # Flickr30k's results.csv has blanks after its delimiters, and quotes as parts of the captions.
    quoting = csv.QUOTE_NONE if delimiter == "|" and "| " in first_line else csv.QUOTE_MINIMAL
    table = parse_table(path, text, delimiter, quoting)
    if "comment_number" in columns["names"]:
        mend_results_row(table, columns["names"].index("comment_number"), columns["captions"][0])
    image, captions, split = table[columns["image"]], columns["captions"], columns["split"]
    frame = pd.DataFrame({"image": image, "caption": table[captions[0]]}, index=table.index)
    if len(captions) > 1:
        frame["caption"] = table[captions].to_numpy().tolist()
    if split is not None:
        frame["split"] = table[split]
    unused = f", columns not used: {', '.join(columns['unused'])[:80]}" if columns["unused"] else ""
    return frame, f"table with {DELIMITERS[delimiter]}s ({describe_columns(columns)}{unused})"


def parse_table(path, text, delimiter, quoting=csv.QUOTE_MINIMAL):
    """The rows after the header, parsed by pandas, with their lines as index, without empty ones; raises InputError.

    A row with too many cells is an error, missing cells are empty.
    """
    options = {"header": None, "dtype": str, "na_filter": False, "skip_blank_lines": False, "skipinitialspace": True}
    leading = len(text) - len(text.lstrip("\n "))
    blank = text.count("\n", 0, leading)
    try:
        table = pd.read_csv(io.BytesIO(text[leading:].encode()), sep=delimiter, quoting=quoting, **options)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, ValueError) as error:
        raise InputError(f"{path}{table_error(error, blank)}") from None
    table = table.fillna("").iloc[1:]
    table.index = line_numbers(table, first=blank + 2, exact=text.count("\n") - blank <= len(table) + 1)
    return table[(table != "").any(axis=1)]


def describe_columns(columns):
    used = [columns["image"], *columns["captions"], *([] if columns["split"] is None else [columns["split"]])]
    return ", ".join(columns["names"][number] for number in used)


def table_error(error, blank):
    """A parser's message in our words; `blank`: lines before the table."""
    if found := re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", str(error)):
        expected, line, saw = map(int, found.groups())
        return f" line {line + blank}: {saw} columns instead of {expected}; a caption with commas needs quotes"
    if found := re.search(r"EOF inside string starting at row (\d+)", str(error)):
        return f" line {int(found[1]) + 1 + blank}: a quote is opened and never closed"
    return f" cannot be read as a table ({' '.join(str(error).split())[:120]})"


def line_numbers(table, first, exact):
    """The line of each row; `exact`: no cell contains a line end."""
    lines = pd.RangeIndex(first, first + len(table))
    if exact or table.empty:
        return lines
    breaks = sum(table[column].str.count("\n") for column in table).to_numpy()
    return pd.Index(lines + breaks.cumsum() - breaks)


def mend_results_row(table, number, caption):
    """Move the caption of Flickr30k's row without its second delimiter (`4   A dog runs`) into its column."""
    broken = table[caption].str.strip() == ""
    parts = table.loc[broken, number].str.extract(r"^\s*\d+\s+(\S.*)$")[0].dropna()
    table.loc[parts.index, caption] = parts


# ---- JSON -------------------------------------------------------------------------------------------------------


def read_json_pairs(path, text):
    """The pairs of a JSON or JSONL file, and a description."""
    try:
        try:
            content, kind = json.loads(text), "JSON"
        except json.JSONDecodeError as error:
            content, kind = read_json_lines(path, text, error), "JSON lines"
        if isinstance(content, dict) and isinstance(content.get("images"), list):
            return read_data_set(content)
        if isinstance(content, dict):
            lists = [value for value in content.values() if isinstance(value, list) and find_record(value)]
            content = lists[0] if len(lists) == 1 else content
        if isinstance(content, dict) and find_columns([*map(normalize_name, content)]):
            content = [content]  # a file of one line, or columns
        if isinstance(content, dict):
            content = [{"image": name, "caption": captions} for name, captions in content.items()]
        return read_records(content, kind)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        problem = f"{type(error).__name__}: {str(error)[:60]}"
        raise InputError(
            f"{path} is JSON without the captions of Karpathy's, COCO's or Hugging Face's layout ({problem})"
        ) from None


def read_json_lines(path, text, first_error):
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if text.lstrip()[0] != "{" or len(lines) < 2:
        raise InputError(f"{path} line {first_error.lineno} cannot be read as JSON ({first_error.msg})")
    records = []
    for number, line in lines:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InputError(f"{path} line {number} cannot be read as JSON ({error.msg})") from None
    return records


def read_data_set(content):
    """The pairs of Karpathy's dataset_*.json (with its splits) or COCO's captions_*.json, and a description."""
    images = content["images"]
    if "annotations" in content:
        names = {image["id"]: image["file_name"] for image in images}
        pairs = [(names[each["image_id"]], each["caption"]) for each in content["annotations"]]
        return pair_frame(pairs, ["image", "caption"]), "COCO captions"
    rows = []
    for image in images:
        name = "/".join(part for part in (image.get("filepath"), image["filename"]) if part)
        sentences = [each["raw"] if "raw" in each else " ".join(each["tokens"]) for each in image["sentences"]]
        rows += [(name, sentence, image.get("split", "")) for sentence in sentences]
    return pair_frame(rows, ["image", "caption", "split"]), "Karpathy's JSON"


def read_records(records, kind):
    """The pairs of a list of objects with an image and a caption, or a list of captions; and a description."""
    names = list(dict.fromkeys(name for record in records for name in record))
    columns = find_columns([normalize_name(name) for name in names])
    if columns is None:
        raise KeyError("image and caption")
    image, captions, split = names[columns["image"]], [names[i] for i in columns["captions"]], columns["split"]
    rows = []
    for record in records:
        cells = [record[name] for name in captions if record.get(name) is not None]
        caption = cells[0] if len(cells) == 1 else cells or ""
        rows.append((record[image], caption, "" if split is None else record.get(names[split]) or ""))
    frame = pair_frame(rows, ["image", "caption", "split"])
    unused = f", not used: {', '.join(columns['unused'])[:80]}" if columns["unused"] else ""
    return frame if split is not None else frame.drop(columns="split"), f"{kind} ({describe_columns(columns)}{unused})"


def find_record(values):
    """Whether a list consists of objects with an image and a caption, as far as its first one tells."""
    return values and isinstance(values[0], dict) and find_columns([*map(normalize_name, values[0])])


def pair_frame(rows, columns):
    """A DataFrame of rows whose cells are strings (captions: or lists); raises TypeError."""
    for row in rows:
        for column, cell in zip(columns, row, strict=True):
            if not isinstance(cell, str) and not (column == "caption" and isinstance(cell, list)):
                raise TypeError(f"{column} is {cell!r:.40}")
    return pd.DataFrame(rows, columns=columns, dtype=object, index=range(1, len(rows) + 1))


# ---- lists of captions in a cell --------------------------------------------------------------------------------


def expand_lists(frame):
    """One row per caption where a cell is a list of captions, or the text of one as Python and JSON print it."""
    cells = frame["caption"].tolist()
    expanded = [cell if (found := as_captions(cell)) is None else found for cell in cells]
    if not any(isinstance(cell, list) for cell in expanded):
        return frame
    recognised = frame.attrs["format"]
    frame = frame.assign(caption=pd.Series(expanded, frame.index, dtype=object)).explode("caption").fillna("")
    frame.attrs["format"] = f"{recognised}, lists of captions"
    return frame


def as_captions(cell):
    """The captions in a list, or in the text of one; None if the cell is a caption."""
    if isinstance(cell, str):
        text = cell.strip()
        if not LIST.match(text) or len(text) > MAX_LIST:
            return None
        cell = parse_list(f"[{text[1:-1]}]")  # also of a tuple, or of a set, whose order would be random
    return [caption_text(each) for each in cell] if isinstance(cell, list) else None


def parse_list(text):
    """The value of a list literal, JSON's, Python's or NumPy's (without commas); None if it is none."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of unknown escapes
        return ast.literal_eval(re.sub(r"(['\"])\s+(?=['\"])", r"\1, ", text))  # Python would join the strings
    return None


def caption_text(value):
    """A caption from an element of a list: a string, or an object with one, as in Karpathy's sentences."""
    if isinstance(value, dict):
        value = next((value[name] for name in ("raw", *CAPTION_COLUMNS) if name in value), None)
    if not isinstance(value, str):
        raise InputError(f"a list of captions contains {value!r:.40}, which is not a caption")
    return value

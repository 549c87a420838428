"""Names of image files: what counts as an image, and the files of a data set; does not import torch."""

import functools
import importlib
import os
import re
import unicodedata
from collections import Counter
from pathlib import Path

from config import InputError
from utils.shards import image_exists

# Formats that Pillow opens but that are documents, videos, or stubs without a decoder (EPS starts another program).
NOT_IMAGES = {"BUFR", "EPS", "FPX", "GRIB", "HDF5", "MIC", "MPEG", "PDF", "WMF"}


@functools.cache
def image_suffixes():
    """The lower-case suffixes of the image formats that can be decoded here; HEIC with the package pillow-heif."""
    from PIL import Image

    register_decoders()
    formats = Image.registered_extensions()  # loads all plugins of Pillow
    return frozenset(suffix for suffix, name in formats.items() if name in Image.OPEN and name not in NOT_IMAGES)


@functools.cache
def register_decoders():
    """Let Pillow open HEIC files, if the package pillow-heif is installed."""
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return False
    return True


def is_image_name(name):
    return Path(name).suffix.lower() in image_suffixes()


def printable_name(name):
    """A file name in one line, with escapes in place of line ends and other control characters."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda match: ascii(match[0])[1:-1], str(name))


def find_images(folder, names):
    """The files of image names in a folder, a list of paths, which need not exist.

    A name may differ from its file in the Unicode form (macOS decomposes accents) or in Windows' separators, may lack
    the suffix, and may have folders that the file has not.
    """
    files = [Path(folder) / name for name in names]
    if all(map(image_exists, files)):  # False, not an error, for an invalid name
        return files
    bases = Counter(name.replace("\\", "/").rsplit("/", 1)[-1] for name in names)
    for row, (file, name) in enumerate(zip(files, names, strict=True)):
        if not os.path.isfile(file):
            name = name.replace("\\", "/")
            base = name.rsplit("/", 1)[-1]
            forms = [
                unicodedata.normalize(f, n) for n in (name, base)[: 1 + (bases[base] == 1)] for f in ("NFC", "NFD")
            ]
            forms += [
                f"{form}{suffix}" for form in forms for suffix in (".jpg", ".jpeg", ".png") if "." not in form[-6:]
            ]
            files[row] = next((path for form in forms if os.path.isfile(path := Path(folder) / form)), file)
    return files


def check_files(files, where="image_path"):
    """Raise InputError if any image is missing; the message names the first and counts the others."""
    missing = [file for file in files if not image_exists(file)]  # False, not an error, for an invalid name
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        name = printable_name(missing[0])
        name = name if len(name) < 300 else f"{name[:300]}..."
        raise InputError(f"image {name} is missing{more}: is {where} right?")

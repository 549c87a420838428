"""Photographs as pixels: decoding, and the cache in which every picture of a data set is decoded once."""

import contextlib
import hashlib
import os
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from config import InputError, progress_bar

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # 100 megapixels are no attack

VERSION = 2  # of how a picture is decoded
BLOCK = 10_000  # pictures given to the decoding threads at once


def decode_image(file, side):
    """A picture as (side, side, 3) uint8 RGB: upright, the whole of it, squeezed to a square; raises InputError.

    Nothing is cut off, because captions speak of what stands at the edges.
    """
    try:
        with Image.open(file) as image:
            image.draft("RGB", (side, side))  # a JPEG is decoded no larger than needed
            return np.asarray(upright_rgb(image).resize((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0))
    except FileNotFoundError:
        raise InputError(f"picture {file} is missing") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"picture {file} cannot be read ({error})") from None


def upright_rgb(image):
    """A PIL image turned as its camera says, in RGB; what is transparent becomes white."""
    if image.mode[0] in "IF":  # numbers, of which `convert` would cut off all above 255
        image = Image.fromarray(to_bytes(np.asarray(image, dtype=np.float32)))
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_bytes(values):
    """Grey values in [0, 1], of 8 bits or of 16, told apart by the largest, as uint8."""
    most = values.max(initial=0)
    scale = 255 if most <= 1 else 1 if most <= 255 else 255 / max(65535, most)
    return (values * scale).clip(0, 255).astype(np.uint8)


def stored_side(size):
    """The side of a stored picture, pixels: a little above the model's, so that training crops lose no detail."""
    return round(size * 8 / 7)


class Cache(NamedTuple):
    """Decoded pictures: a .npy file (N, side, side, 3) uint8, and the row in it of each picture asked for."""

    path: Path
    rows: np.ndarray


class ImageStore:
    """Decoded pictures by index, (side, side, 3) uint8; from the `Cache` if there is one, else from the files."""

    def __init__(self, files, side, cache=None):
        self.files, self.side, self.cache = files, side, cache
        self.pixels = None  # opened in each process on first use

    def __len__(self):
        return len(self.files if self.cache is None else self.cache.rows)

    def __getitem__(self, index):
        if self.cache is None:
            return decode_image(self.files[index], self.side)
        if self.pixels is None:
            self.pixels = np.load(self.cache.path, mmap_mode="r")
        return np.asarray(self.pixels[self.cache.rows[index]])

    def __getstate__(self):
        """What a loader process is sent: millions of names only if it has to decode."""
        return {**self.__dict__, "pixels": None, "files": self.files if self.cache is None else None}


def build_image_cache(files, side, folder, num_workers=4, show_progress=True):
    """The `Cache` of the pictures, decoded if they are in none that is there.

    Beside the pixels lies a digest of every picture's name, size and time, so a changed picture asks for a new cache,
    and another split of the same pictures does not. A cache appears under its name only once it is whole. Raises
    InputError for unreadable pictures, all of which are listed in a file, and for a full disk.
    """
    folder = Path(folder)
    digests = np.array([digest_of(file) for file in files], dtype="S16")
    known = find_cache(digests, side, folder)
    if known is not None:
        return known
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = len(files) * side * side * 3, shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"the decoded images need {needed / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free: "
            "give another --cache_path, or --cache_images false"
        )
    place = hashlib.sha256("\n".join(sorted(map(os.path.abspath, files))).encode("utf-8", "surrogateescape"))
    place = f"images-{side}-{place.hexdigest()[:12]}"
    path = folder / f"{place}-{hashlib.sha256(digests.tobytes()).hexdigest()[:16]}.npy"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        errors = write_image_cache(temporary, files, side, num_workers, show_progress)
        if errors:
            raise InputError(describe_unreadable(errors, folder))
        for old in folder.glob(f"{place}-*"):  # the same pictures before they were changed
            if old.suffix != ".tmp":
                with contextlib.suppress(OSError):  # still open somewhere (Windows)
                    old.unlink()
        with open(path.with_suffix(".digests"), "wb") as file:
            np.save(file, digests)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return Cache(path, np.arange(len(files)))


def digest_of(file):
    """16 bytes that change when the picture does."""
    stat = os.stat(file)
    words = f"{VERSION} {os.path.abspath(file)} {stat.st_size} {stat.st_mtime_ns}"
    # A string of bytes in numpy loses zeros at its end: one more byte that is none.
    return hashlib.blake2b(words.encode("utf-8", "surrogateescape"), digest_size=15).digest() + b"."


def find_cache(digests, side, folder):
    """A `Cache` in the folder that holds all these pictures, or None."""
    for path in sorted(folder.glob(f"images-{side}-*.npy")):
        try:
            with open(path.with_suffix(".digests"), "rb") as file:
                held = np.load(file)
        except (OSError, ValueError, EOFError):
            continue
        order = np.argsort(held)
        rows = order[np.searchsorted(held, digests, sorter=order).clip(max=len(held) - 1)]
        if np.array_equal(held[rows], digests):
            return Cache(path, rows)
    return None


def describe_unreadable(errors, folder):
    """A line for people; with more than one, all are written to a file in the folder."""
    if len(errors) == 1:
        return errors[0]
    path = folder / "unreadable.txt"
    path.write_text("\n".join(errors) + "\n", encoding="utf-8", errors="surrogateescape")
    return f"{errors[0]} (and {len(errors) - 1} more pictures: see {path})"


def write_image_cache(path, files, side, num_workers, show_progress):
    """Decode all pictures into a new .npy file; what was wrong with those that could not be read, a list."""
    pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(len(files), side, side, 3))
    if hasattr(os, "posix_fallocate"):  # else a disk that others fill meanwhile would kill the process
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, pixels.offset + pixels.nbytes)
    errors = []

    def decode(index):
        try:
            pixels[index] = decode_image(files[index], side)
        except InputError as error:
            errors.append((index, str(error)))

    bar = progress_bar(desc="decoding images", total=len(files), unit="image", disable=not show_progress)
    # Threads, not processes: decoding releases the interpreter's lock.
    with bar, ThreadPoolExecutor(max(1, num_workers)) as pool:
        for start in range(0, len(files), BLOCK):
            for _ in pool.map(decode, range(start, min(start + BLOCK, len(files)))):
                bar.update()
    pixels.flush()
    return [message for _, message in sorted(errors)]

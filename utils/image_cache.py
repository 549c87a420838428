"""Image decoding, and the cache in which every image of a data set is decoded once."""

import contextlib
import hashlib
import os
import shutil
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from config import InputError
from utils.cli import progress_bar
from utils.files import atomic_write

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # 100 megapixels are no attack

DECODER_VERSION = 2  # increased whenever `decode_image` returns other pixels: older caches are then rebuilt
CHUNK_SIZE = 10_000  # images submitted to the decoding threads at once

# Most damaged files raise OSError. The others: PNG and GIF chunks, EXIF data, palettes, and the AVIF decoder.
DECODING_ERRORS = (OSError, EOFError, SyntaxError, ValueError, RuntimeError, LookupError, ArithmeticError)
DECODING_ERRORS += (struct.error, Image.DecompressionBombError)


def decode_image(file, resolution):
    """An image file as (resolution, resolution, 3) uint8 RGB; raises InputError if it cannot be read.

    The whole image is resized to a square without cropping, because captions also describe what is near the edges.
    """
    try:
        with Image.open(file) as image:
            image.draft("RGB", (resolution, resolution))  # JPEG: decode at a reduced scale where possible
            upright = to_upright_rgb(image)
            return np.asarray(upright.resize((resolution, resolution), Image.Resampling.BICUBIC, reducing_gap=2.0))
    except FileNotFoundError:
        raise InputError(f"image {file} is missing") from None
    except DECODING_ERRORS as error:
        raise InputError(f"image {file} cannot be read ({error})") from error


def to_upright_rgb(image):
    """A PIL image in RGB, rotated by its EXIF orientation; transparent pixels become white."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # integers or floats, which `convert` would clip at 255
        image = Image.fromarray(to_uint8(np.asarray(image, dtype=np.float32)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_uint8(values):
    """Grey values as uint8; the largest value tells whether they are fractions, 8-bit or 16-bit."""
    largest = values.max(initial=0)
    scale = 255 if largest <= 1 else 1 if largest <= 255 else 255 / max(65535, largest)
    return (values * scale).clip(0, 255).astype(np.uint8)


def storage_resolution(size):
    """The resolution of stored images: slightly above the model's, so that training crops lose no detail."""
    return round(size * 8 / 7)


class Cache(NamedTuple):
    """Decoded images: a .npy file (N, resolution, resolution, 3) uint8, and the row of each requested image in it."""

    path: Path
    rows: np.ndarray


def build_image_cache(files, resolution, folder, num_workers=4, show_progress=True):
    """The `Cache` of the images, decoded only if no cache in the folder holds them all.

    A file beside the pixels holds a digest of each image's path, size and modification time: a changed image
    requires a new cache, another split of the same images does not. An interrupted build leaves no cache. Raises
    InputError for a full disk and for unreadable images; if there are several, all are listed in a file.
    """
    folder = Path(folder)
    digests = np.array([file_digest(file) for file in files], dtype="S16")
    existing = find_cache(digests, resolution, folder)
    if existing is not None:
        return existing
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = len(files) * resolution * resolution * 3, shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"the decoded images need {needed / 1e9:.1f} GB in {folder}, which has {free / 1e9:.1f} GB free: "
            "give another --cache_path, or --no-cache_images"
        )
    paths = hashlib.sha256("\n".join(sorted(map(os.path.abspath, files))).encode("utf-8", "surrogateescape"))
    prefix = f"images-{resolution}-{paths.hexdigest()[:12]}"
    path = folder / f"{prefix}-{hashlib.sha256(digests.tobytes()).hexdigest()[:16]}.npy"
    with atomic_write(path) as temporary:
        errors = write_pixels(temporary, files, resolution, num_workers, show_progress)
        if errors:
            raise InputError(describe_errors(errors, folder))
        for outdated in folder.glob(f"{prefix}-*"):  # the same paths with earlier contents
            with contextlib.suppress(OSError):  # still open in another process (Windows)
                outdated.unlink()
        with atomic_write(path.with_suffix(".digests")) as digests_file, open(digests_file, "wb") as file:
            np.save(file, digests)
    return Cache(path, np.arange(len(files)))


def file_digest(file):
    """16 bytes that change with the path, size or modification time of a file."""
    stat = os.stat(file)
    key = f"{DECODER_VERSION} {os.path.abspath(file)} {stat.st_size} {stat.st_mtime_ns}"
    # NumPy strips trailing zero bytes from a byte string, hence the final non-zero byte.
    return hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=15).digest() + b"."


def find_cache(digests, resolution, folder):
    """A `Cache` in the folder that holds all images with these digests, or None."""
    for path in sorted(folder.glob(f"images-{resolution}-*.npy")):
        try:
            with open(path.with_suffix(".digests"), "rb") as file:
                stored = np.load(file)
        except (OSError, ValueError, EOFError):
            continue
        order = np.argsort(stored)
        rows = order[np.searchsorted(stored, digests, sorter=order).clip(max=len(stored) - 1)]
        if np.array_equal(stored[rows], digests):
            return Cache(path, rows)
    return None


def describe_errors(errors, folder):
    """One line; several errors are also written to a file in the folder."""
    if len(errors) == 1:
        return errors[0]
    path = folder / "unreadable.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(errors) + "\n", encoding="utf-8", errors="surrogateescape")
    return f"{errors[0]} (and {len(errors) - 1} more images: see {path})"


def write_pixels(path, files, resolution, num_workers, show_progress):
    """Decode all images into a new .npy file; returns the error messages of those that cannot be read."""
    shape = (len(files), resolution, resolution, 3)
    pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):  # without reserved space, a disk filled meanwhile would kill the process
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, pixels.offset + pixels.nbytes)
    errors = []

    def decode(index):
        try:
            pixels[index] = decode_image(files[index], resolution)
        except InputError as error:
            errors.append((index, str(error)))

    bar = progress_bar(desc="decoding images", total=len(files), unit="image", disable=not show_progress)
    # Threads suffice: decoding releases the interpreter's lock.
    with bar, ThreadPoolExecutor(max(1, num_workers)) as pool:
        for start in range(0, len(files), CHUNK_SIZE):
            for _ in pool.map(decode, range(start, min(start + CHUNK_SIZE, len(files)))):
                bar.update()
    pixels.flush()
    return [message for _, message in sorted(errors)]

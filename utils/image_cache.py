"""Decoded images by index, from the files or from a cache in which every image of a data set is decoded once."""

import contextlib
import errno
import hashlib
import multiprocessing.queues
import os
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset, get_worker_info

from config import InputError
from utils.cli import one_line, progress_bar
from utils.distributed import first_process_first, is_first_process
from utils.files import atomic_write, check_regular
from utils.image_files import printable_name, register_decoders
from utils.shards import image_stat, open_image

register_decoders()
# For all processes: a loader process that is forked while OpenCV has threads hangs as soon as it changes their number.
cv2.setNumThreads(1)
Image.MAX_IMAGE_PIXELS = None  # `load_image` has limits of its own: a 200-megapixel JPEG is a photograph

DECODER_VERSION = 2  # increased whenever `decode_image` returns different pixels, so older caches are rebuilt
CHUNK_SIZE = 10_000  # images submitted to the decoding threads at once
MAX_PIXELS = 180_000_000  # to be decoded, which takes 4 to 8 bytes each
MAX_COMPRESSION = 10_000  # pixels per byte of a file: Deflate reaches 8,256 for one bit per pixel
MIN_SUSPECT = 25_000_000  # pixels, below which a damaged file does no harm


def load_image(file, resolution):
    """An image file as an upright RGB PIL image, at least of `resolution` if the file is; InputError if unreadable."""
    try:
        with open_image(file) as opened, Image.open(opened) as image:
            image.draft("RGB", (resolution, resolution))  # JPEG: decode at a reduced scale where possible
            check_size(image, image_stat(file)[0])
            return to_upright_rgb(image)
    except FileNotFoundError:
        raise InputError(f"image {printable_name(file)} is missing") from None
    except Exception as error:  # decoders raise exceptions of almost any type for damaged files
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        raise InputError(f"image {printable_name(file)} cannot be read ({one_line(error)})") from error


def check_size(image, num_bytes):
    """Raise InputError for an image whose pixels would fill the memory, or cannot all be in its file."""
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        limit = f"more than {MAX_PIXELS / 1e6:.0f} megapixels"
        raise InputError(f"{image.width} x {image.height} pixels, {limit}: reduce it")
    if pixels > max(MIN_SUSPECT, MAX_COMPRESSION * num_bytes):
        raise InputError(f"{image.width} x {image.height} pixels in {num_bytes} bytes: the file is damaged")


def decode_image(file, resolution):
    """An image file as (resolution, resolution, 3) uint8 RGB; raises InputError if it cannot be read."""
    upright = load_image(file, resolution)  # not cropped below: captions also describe what is near the edges
    return np.asarray(upright.resize((resolution, resolution), Image.Resampling.BICUBIC, reducing_gap=2.0))


def to_upright_rgb(image):
    """A PIL image in RGB, rotated by its EXIF orientation; transparent pixels become white."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # integers or floats, which `convert` would clip at 255
        values = np.asarray(image, dtype=np.float32)
        largest = values.max(initial=0)  # tells whether the values are fractions, 8-bit or 16-bit
        scale = 255 if largest <= 1 else 1 if largest <= 255 else 255 / max(65535, largest)
        image = Image.fromarray((values * scale).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def storage_resolution(size):
    """The resolution of stored images: slightly above the model's, so that training crops lose no detail."""
    return round(size * 8 / 7)


def resize_image(image, size):
    """The evaluation transform: the whole image, (S, S, 3) -> (size, size, 3)."""
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)


def to_tensor(image):
    """(H, W, 3) uint8 array -> (3, H, W) uint8 tensor."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)


class Cache(NamedTuple):
    """Decoded images: a .npy file (N, resolution, resolution, 3) uint8, and the row of each requested image in it."""

    path: Path
    rows: np.ndarray


def build_image_cache(files, resolution, folder, num_workers=4, show_progress=True):
    """The `Cache` of the images, decoded only if no cache in the folder contains all of them.

    A file next to the pixels stores a digest of each image's path, size and modification time: a changed image requires
    a new cache, another split of the same images does not. Raises InputError for a full disk and unreadable images.
    """
    folder = Path(folder)
    digests = np.array([file_digest(file) for file in files], dtype="S16")
    if existing := find_cache(digests, resolution, folder):
        return existing
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = len(files) * resolution**2 * 3 / 1e9, shutil.disk_usage(folder).free / 1e9
    if needed > free:
        advice = "pass another --cache_path, or --no-cache_images"
        raise InputError(f"the decoded images need {needed:.1f} GB in {folder}, which has {free:.1f} GB free: {advice}")
    paths = hashlib.sha256("\n".join(sorted(map(os.path.abspath, files))).encode("utf-8", "surrogateescape"))
    prefix = f"images-{resolution}-{paths.hexdigest()[:12]}"
    path = folder / f"{prefix}-{hashlib.sha256(digests.tobytes()).hexdigest()[:16]}.npy"
    with atomic_write(path) as temporary:
        write_pixels(temporary, files, resolution, folder / "unreadable.txt", num_workers, show_progress)
        for outdated in folder.glob(f"{prefix}-*"):  # the same paths with earlier contents
            if outdated.stem != path.stem:  # which another process may have written in the meantime, and reads
                with contextlib.suppress(OSError):  # still open in another process (Windows)
                    outdated.unlink()
        with atomic_write(path.with_suffix(".digests")) as digests_file, open(digests_file, "wb") as file:
            np.save(file, digests)
    return Cache(path, np.arange(len(files)))


def file_digest(file):
    """16 bytes that change with the path, size or modification time of a file."""
    size, changed = image_stat(file)
    key = f"{DECODER_VERSION} {os.path.abspath(file)} {size} {changed}"
    # NumPy strips trailing zero bytes from a byte string, hence the final non-zero byte.
    return hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=15).digest() + b"."


def find_cache(digests, resolution, folder):
    """A `Cache` in the folder that holds all images with these digests, or None; a damaged one is removed."""
    for path in sorted(folder.glob(f"images-{resolution}-*.npy")):
        try:
            stored = read_digests(path, resolution)
        except FileNotFoundError:
            continue
        except (ValueError, EOFError) as error:  # InputError included
            print(f"{path} is damaged ({one_line(error)}): the images are decoded again", file=sys.stderr)
            with contextlib.suppress(OSError):  # open in another process (Windows)
                path.unlink()
            continue
        order = np.argsort(stored)
        rows = order[np.searchsorted(stored, digests, sorter=order).clip(max=len(stored) - 1)]
        if np.array_equal(stored[rows], digests):
            return Cache(path, rows)
    return None


def read_digests(path, resolution):
    """The digests of the images in a cache, (N,); raises ValueError or EOFError if it is damaged."""
    arrays = []
    for file in (path.with_suffix(".digests"), path):
        check_regular(file)
        arrays.append(np.lib.format.open_memmap(file, mode="r"))
    stored, pixels = arrays
    shape = (stored.size, resolution, resolution, 3)
    expected = [("S16", shape[:1]), (np.uint8, shape)]
    if not stored.size or [(array.dtype, array.shape) for array in arrays] != expected:
        raise ValueError(f"it holds {pixels.dtype} {pixels.shape} for {stored.size} images")
    return np.array(stored)


def write_pixels(path, files, resolution, error_file, num_workers, show_progress):
    """Decode all images into a new .npy file; raises InputError, with several unreadable images listed in a file."""
    shape, errors = (len(files), resolution, resolution, 3), {}
    pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):  # without reserved space, a disk filled meanwhile would kill the process
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, pixels.offset + pixels.nbytes)

    def decode(index):
        try:
            pixels[index] = decode_image(files[index], resolution)
        except InputError as error:
            errors[index] = str(error)

    bar = progress_bar(desc="decoding images", total=len(files), unit="image", disable=not show_progress)
    # Threads suffice: decoding releases the GIL.
    with bar, ThreadPoolExecutor(max(1, num_workers)) as pool:
        for start in range(0, len(files), CHUNK_SIZE):
            for _ in pool.map(decode, range(start, min(start + CHUNK_SIZE, len(files)))):
                bar.update()
    pixels.flush()
    messages = [errors[index] for index in sorted(errors)]
    if len(messages) > 1:
        with atomic_write(error_file) as temporary:
            temporary.write_text("\n".join([*messages, ""]), encoding="utf-8", errors="surrogateescape")
        messages[0] += f" (and {len(messages) - 1} more images: see {error_file})"
    if messages:
        raise InputError(messages[0])


class ImageStore:
    """Decoded images by index, (S, S, 3) uint8; from a `Cache` if given, else from the files."""

    def __init__(self, files, resolution, cache=None):
        self.files, self.resolution, self.cache = files, resolution, cache
        self.pixels = None  # opened in each process at first use

    def __len__(self):
        return len(self.files if self.cache is None else self.cache.rows)

    def __getitem__(self, index):
        if self.cache is None:
            return decode_image(self.files[index], self.resolution)
        if self.pixels is None:
            self.pixels = np.load(self.cache.path, mmap_mode="r")
        return np.asarray(self.pixels[self.cache.rows[index]])

    def copy_to(self, device):
        """All decoded images on a GPU, (N, S, S, 3) uint8; None if they take more than a quarter of its free memory."""
        if self.cache is None or len(self) * 3 * self.resolution**2 > torch.cuda.mem_get_info(device)[0] / 4:
            return None
        stored, rows = torch.from_numpy(np.load(self.cache.path, mmap_mode="c")), torch.from_numpy(self.cache.rows)
        return torch.cat([stored[part].to(device) for part in rows.split(CHUNK_SIZE)])

    def __getstate__(self):
        """What a loader process receives: the file names only if it has to decode."""
        return {**self.__dict__, "pixels": None, "files": self.files if self.cache is None else None}


class EvaluationImages(Dataset):
    """Images of a store, (3, size, size) uint8; unreadable ones raise InputError, or with a dict `failed` are black."""

    def __init__(self, store, indices, size, failed=None):
        self.store, self.indices, self.size, self.failed = store, indices, size, failed

    def __len__(self):
        return len(self.indices)

    def __getitems__(self, positions):
        """A batch; without loader processes images are decoded in threads."""
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


def open_images(splits, config):
    """Set `pairs.images` of every split to an `ImageStore`; with `cache_images`, all images are decoded first."""
    resolution = storage_resolution(config.size)
    if config.cache_images:
        options = (resolution, config.cache_path, config.num_workers, is_first_process())
        files = sorted(file for pairs in splits.values() for file in pairs.files)
        first_process_first(lambda: build_image_cache(files, *options))  # one cache for all splits
    for pairs in splits.values():
        cache = build_image_cache(pairs.files, *options) if config.cache_images else None
        pairs.images = ImageStore(pairs.files, resolution, cache)


def prepare_worker(_):
    """Set up a loader process: Ctrl-C is left to the main process, and one thread is used."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(exit_worker)


def exit_worker(error, batch):
    """End a loader process that cannot hand over a batch: otherwise the main process would wait for it for ever."""
    print(f"a batch cannot be handed over: {one_line(error)}", file=sys.stderr, flush=True)
    os._exit(1)

"""Decoded images by index, from the image cache or the files, and the evaluation transform."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from config import InputError
from utils.distributed import first_process_first, is_first_process
from utils.image_cache import build_image_cache, decode_image, storage_resolution


def resize_image(image, size):
    """The evaluation transform: the whole image, (S, S, 3) -> (size, size, 3)."""
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)


def to_tensor(image):
    """(H, W, 3) uint8 array -> (3, H, W) uint8 tensor."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)


class ImageStore:
    """Decoded images by index, (S, S, 3) uint8; from an `image_cache.Cache` if given, else from the files."""

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

    def __getstate__(self):
        """What a loader process receives: millions of names only if it has to decode."""
        return {**self.__dict__, "pixels": None, "files": self.files if self.cache is None else None}


class EvaluationImages(Dataset):
    """Images of a store with the evaluation transform, (3, size, size) uint8.

    With a dict `failed`, an image that cannot be read is recorded there, {position: reason}, and is black.
    """

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
    """Loader processes leave Ctrl-C to the main process and use one thread each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)

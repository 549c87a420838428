"""Decoded images by index, and the evaluation transform."""

import pickle

import numpy as np
import pytest
import torch
from conftest import draw_image, quarters

from config import InputError
from utils.image_cache import build_image_cache, decode_image
from utils.image_store import EvaluationImages, ImageStore, resize_image


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{seed}.png" for seed in range(4)]
    for seed, path in enumerate(paths):
        draw_image(path, (64, 64), seed)
    return paths


def test_resize_image_keeps_the_whole_image():
    assert np.array_equal(resize_image(quarters(32), 16), quarters(16))


def test_evaluation_images_show_the_whole_image(files):
    store = ImageStore(files, 36)
    item = EvaluationImages(store, [0], 32)[0]
    assert (item.shape, item.dtype) == ((3, 32, 32), torch.uint8)
    corners = store[0][[2, 2, -3, -3], [2, -3, 2, -3]].astype(int)
    assert np.abs(item.permute(1, 2, 0).numpy()[[2, 2, -3, -3], [2, -3, 2, -3]] - corners).max() < 12


def test_image_store_reads_the_same_from_files_and_from_the_cache(files, tmp_path):
    direct = ImageStore(files, 36)
    cached = ImageStore(files, 36, build_image_cache(files, 36, tmp_path / "cache", 0, False))
    assert len(direct) == len(cached) == 4
    for index in range(4):
        assert np.array_equal(direct[index], decode_image(files[index], 36))
        assert np.array_equal(direct[index], cached[index])
    copy = pickle.loads(pickle.dumps(cached))  # as for a loader process
    assert copy.files is None and np.array_equal(copy[3], direct[3])
    assert np.array_equal(pickle.loads(pickle.dumps(direct))[3], direct[3])


def test_evaluation_images_record_failures_or_raise(files):
    files[2].write_bytes(b"no image")
    failed = {}
    images = EvaluationImages(ImageStore(files, 36), [3, 2, 1], 32, failed)
    batch = images.__getitems__([0, 1, 2])
    assert len(images) == 3
    assert list(failed) == [1] and "2.png cannot be read" in failed[1]
    assert [bool((image == 0).all()) for image in batch] == [False, True, False]
    with pytest.raises(InputError, match=r"2\.png cannot be read"):
        EvaluationImages(ImageStore(files, 36), [3, 2, 1], 32).__getitems__([0, 1, 2])

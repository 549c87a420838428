"""Augmentation of a batch on the device, against the transforms of single images."""

import cv2
import numpy as np
import pytest
import torch
from conftest import quarters

from dataset import Batch
from utils.device_augmentation import LoaderWithImages, augment_images, draw_augmentation

PLAIN = [0.5, 0.5, 1, 1, 1, 1, 1, 1]


def augment(image, size, **changes):
    """The result for one image (S, S, 3), as an (size, size, 3) float array."""
    names = ("x", "y", "width", "height", "mirror", "brightness", "contrast", "saturation")
    parameters = torch.tensor([[changes.get(name, value) for name, value in zip(names, PLAIN, strict=True)]])
    images = torch.from_numpy(image).permute(2, 0, 1)[None]
    return augment_images(images, parameters, size)[0].permute(1, 2, 0).numpy().astype(np.float32)


def smooth_image(size=64):
    rng = np.random.default_rng(0)
    return cv2.resize(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), (size, size), interpolation=cv2.INTER_CUBIC)


def test_without_changes_the_image_stays():
    image = smooth_image()
    assert np.abs(augment(image, 64) - image).max() < 1e-3
    assert np.abs(augment(image, 64, mirror=-1) - image[:, ::-1]).max() < 1e-3


def test_crop_is_resized_bilinearly():
    image = smooth_image()
    found = augment(image, 48, x=24 / 64, y=40 / 64, width=32 / 64, height=40 / 64)
    crop = image[20:60, 8:40].astype(np.float32)
    expected = cv2.resize(crop, (48, 48), interpolation=cv2.INTER_LINEAR)
    assert np.abs(found - expected)[2:-2, 2:-2].max() < 1  # at its border the crop sees its neighbours


def test_color_factors_are_those_of_a_naive_computation():
    image, grey = smooth_image().astype(np.float32), np.array([0.299, 0.587, 0.114], dtype=np.float32)
    bright = 0.9 * image
    contrasted = 0.8 * bright + 0.2 * (bright @ grey).mean()
    expected = 1.1 * contrasted - 0.1 * (contrasted @ grey)[..., None]
    found = augment(image.astype(np.uint8), 64, brightness=0.9, contrast=0.8, saturation=1.1)
    assert np.abs(found - expected.clip(0, 255)).max() < 0.51


def test_parameters_depend_on_the_seed_and_have_the_asked_distribution():
    drawn = np.stack([draw_augmentation([0, 1, n], True, 0.3, 0.2) for n in range(2000)])
    assert np.array_equal(draw_augmentation([0, 1, 5], True, 0.3, 0.2), drawn[5])
    x, y, width, height, mirror, *factors = drawn.T
    assert (x - width / 2 > -1e-6).all() and (x + width / 2 < 1 + 1e-6).all()
    assert (y - height / 2 > -1e-6).all() and (y + height / 2 < 1 + 1e-6).all()
    area, inside = width * height, (width < 1) & (height < 1)
    assert area.min() >= 0.25 and area[inside].mean() == pytest.approx(0.6, abs=0.05)
    assert (width / height)[inside].min() > 0.74 and (width / height)[inside].max() < 1.34
    assert (mirror < 0).mean() == pytest.approx(0.5, abs=0.05)
    for factor in factors:
        assert 0.8 <= factor.min() < 0.82 and 1.18 < factor.max() <= 1.2
        assert (factor == 1).mean() == pytest.approx(0.2, abs=0.04)


def test_no_crop_no_jitter_and_no_flip_on_request():
    for seed in range(50):
        assert draw_augmentation(seed, False, 1.0, 0.0).tolist() == PLAIN


def test_batch_is_channels_last_and_each_image_has_its_own_parameters():
    images = torch.from_numpy(np.stack([quarters(16)] * 2)).permute(0, 3, 1, 2)
    parameters = torch.tensor([PLAIN, [*PLAIN[:4], -1, *PLAIN[5:]]])
    found = augment_images(images, parameters, 16)
    assert found.is_contiguous(memory_format=torch.channels_last) and found.dtype == torch.uint8
    assert torch.equal(found[0].flip(2), found[1])
    assert not torch.equal(found[0], found[1])


def test_loader_with_images_takes_the_images_of_each_batch_from_all():
    images = torch.randint(256, (5, 4, 4, 3), dtype=torch.uint8)
    batches = [Batch(torch.arange(2), torch.tensor(ids)) for ids in ([3, 0], [4, 4])]
    found = list(LoaderWithImages(batches, images))
    assert torch.equal(found[0].images, images[[3, 0]].permute(0, 3, 1, 2))
    assert torch.equal(found[1].images, images[[4, 4]].permute(0, 3, 1, 2))

"""The tiled contrastive loss against the naive one, for tiles that divide the batch evenly or not."""

import math

import pytest
import torch
from naive import loss_and_gradients, loss_cases, naive_loss, random_embeddings, relative_error

from utils import tiled_loss
from utils.tiled_loss import EqualTexts, tiled_contrastive_loss


def tiled(images, texts, t, image_index, image_ids=None, weights=None, text_ids=None):
    image_ids = torch.arange(len(images)) if image_ids is None else image_ids
    weights = torch.ones_like(images[:, 0]) if weights is None else weights
    equal = None if text_ids is None else EqualTexts(image_index, text_ids, text_ids)
    return tiled_contrastive_loss(images, texts, t, image_index, image_ids, weights, equal=equal)


@pytest.mark.parametrize("t", [math.log(1 / 0.07), math.log(100)], ids=["initial t", "maximum t"])
@pytest.mark.parametrize("tile", [2, 5, 2048])
@pytest.mark.parametrize("case", loss_cases())
def test_tiled_contrastive_loss_and_gradients_equal_the_naive_ones(monkeypatch, case, tile, t):
    monkeypatch.setattr(tiled_loss, "TILE", tile)
    targets = loss_cases()[case]
    images, texts = random_embeddings(targets["image_index"])
    expected = loss_and_gradients(naive_loss, images, texts, t, torch.float64, **targets)
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-5)):
        found = loss_and_gradients(tiled, images, texts, t, dtype, **targets)
        for name, value, expected_value in zip(("loss", "images", "texts", "t"), found, expected, strict=True):
            assert relative_error(value, expected_value) < tolerance, name


def test_tiled_contrastive_loss_keeps_no_similarity_matrix(monkeypatch):
    monkeypatch.setattr(tiled_loss, "TILE", 8)
    image_index = torch.arange(64)
    images, texts = (x.requires_grad_() for x in random_embeddings(image_index))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        tiled(images, texts, torch.tensor(1.0), image_index).backward()
    assert max(sizes) <= 64 * 16  # (B, D); the matrix would have 64 x 64

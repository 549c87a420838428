"""Gradient caching against one backward pass of the whole batch, and BatchNorm's running statistics."""

from functools import partial

import numpy as np
import pytest
import torch
from naive import naive_loss
from torch import nn

from clip import CLIP, contrastive_loss
from dataset import (
    ImageStore,
    PairSampler,
    TokenStore,
    TrainingPairs,
    load_splits,
    pair_targets,
    train_tokenizer,
)
from utils.grad_cache import cached_backward, frozen_batchnorm_stats
from utils.image_cache import storage_resolution

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def build(config, sizes):
    """A model, and micro-batches of the given sizes as the loader yields them, with two captions per image."""
    pairs = load_splits(config)["train"]
    model = CLIP(config, train_tokenizer(pairs.captions))
    store = ImageStore(pairs.files, storage_resolution(config.size))
    tokens = TokenStore(model.tokenizer, pairs.captions, model.max_length)
    dataset = TrainingPairs(pairs, store, tokens, model.tokenizer.pad_token_id, config)
    keys = [key for micro_batch in PairSampler(pairs, config) for key in micro_batch]
    ends = np.cumsum(sizes)
    parts = [keys[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    return model, [dataset.collate([dataset[key] for key in part]) for part in parts]


def backward(model, batches, generated=(), scaler=NO_SCALER):
    loss_function = partial(contrastive_loss, logit_scale=model.logit_scale, **pair_targets([*batches, *generated]))
    return cached_backward(model, batches, list(generated), loss_function, None, scaler)


def batchnorms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    assert "logit_scale" in found
    total = torch.cat([grad.flatten() for grad in expected.values()]).norm().item()
    for name in expected:
        scale = max(1e-2 * total, expected[name].norm().item())
        assert (found[name] - expected[name]).norm().item() < 1e-5 * scale, name


def naive_backward(model, batches):
    """The whole batch in one graph, encoded in the same order and therefore with the same dropout masks."""
    images, texts = (torch.cat(parts) for parts in zip(*[model(batch) for batch in batches], strict=True))
    targets = pair_targets(batches)
    loss = naive_loss(images.double(), texts.double(), model.logit_scale.double(), **targets)
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize("repeated", [False, True], ids=["", "repeated images"])
def test_cached_backward_equals_the_whole_batch_with_dropout(tiny_config, repeated):
    config = tiny_config(captions_per_image=2, dropout=0.3, num_projection_layers=2)
    model, batches = build(config, (4, 4, 3))
    if repeated:  # an image with two rows in one micro-batch and one in another
        batches[0].image_ids[2] = batches[0].image_ids[1]
        batches[2].image_ids[0] = batches[0].image_ids[1]
    model.train()
    for layer in batchnorms(model):
        layer.eval()
    dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.training and m.p]
    assert len(dropouts) > 4
    state = torch.get_rng_state()
    found_loss = backward(model, batches)
    after = torch.get_rng_state()
    found = gradients(model)
    model.zero_grad()

    torch.set_rng_state(state)
    loss, expected = naive_backward(model, batches)
    assert found_loss.item() == pytest.approx(loss, rel=1e-6)
    assert not found_loss.requires_grad
    assert_close(found, expected)
    assert torch.equal(torch.get_rng_state(), after)  # the second pass draws the same numbers as the first


def test_cached_backward_draws_new_dropout_masks_each_time(tiny_config):
    model, batches = build(tiny_config(captions_per_image=2, dropout=0.3), (4, 4))
    model.train()
    losses = {backward(model, batches).item() for _ in range(3)}
    assert len(losses) == 3


@pytest.mark.parametrize("sizes", [(6,), (3, 3), (1, 5), (2, 2, 2)])
def test_cached_backward_does_not_depend_on_the_micro_batches(tiny_config, sizes):
    model, (batch,) = build(tiny_config(captions_per_image=2), (6,))
    model.eval()
    loss, expected = naive_backward(model, [batch])
    model.zero_grad()
    _, batches = build(model.config, sizes)
    width = batch.input_ids.shape[1]
    for part in batches:  # padded as the whole batch is
        part.input_ids = nn.functional.pad(part.input_ids, (0, width - part.input_ids.shape[1]))
        part.attention_mask = nn.functional.pad(part.attention_mask, (0, width - part.attention_mask.shape[1]))
    assert backward(model, batches).item() == pytest.approx(loss, rel=1e-6)
    assert_close(gradients(model), expected)


def test_cached_backward_of_generated_batches(tiny_config):
    """Generated images take part in the loss with their weights, but not in the running statistics."""
    model, (first, second, generated) = build(tiny_config(captions_per_image=2, dropout=0.0), (3, 3, 4))
    generated.weights = torch.full((4,), 0.5)
    generated.image_ids[0] = first.image_ids[0]  # generated for a caption of a real image
    alone, _ = build(tiny_config(captions_per_image=2, dropout=0.0), (3,))
    alone.load_state_dict(model.state_dict())
    model.train(), alone.train()
    state = torch.get_rng_state()
    found_loss = backward(model, [first, second], [generated]).item()
    found, stats = gradients(model), {name: buffer.clone() for name, buffer in model.named_buffers()}
    backward(alone, [first, second])
    for name, buffer in alone.named_buffers():
        assert torch.equal(buffer, stats[name]), name
    model.zero_grad()
    torch.set_rng_state(state)
    loss, expected = naive_backward(model, [first, second, generated])
    assert found_loss == pytest.approx(loss, rel=1e-6)
    assert_close(found, expected)


def test_batchnorm_statistics_move_once_per_step_by_the_mean(tiny_config):
    model, batches = build(tiny_config(captions_per_image=2), (4, 4, 3))
    model.train()
    first = batchnorms(model)[0]
    seen = []
    first.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0].detach()))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    backward(model, batches)
    assert len(seen) == 6  # each micro-batch twice
    mean = torch.stack([x.mean((0, 2, 3)) for x in seen[3:]]).mean(0)
    variance = torch.stack([x.var((0, 2, 3)) for x in seen[3:]]).mean(0)
    assert torch.allclose(first.running_mean, 0.1 * mean, rtol=1e-4, atol=1e-6)
    assert torch.allclose(first.running_var, 0.9 + 0.1 * variance, rtol=1e-4)
    for layer in batchnorms(model):
        assert layer.num_batches_tracked == 1
        assert layer.momentum == 0.1
    moved = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert {name for name in before if "running_" in name} <= moved


def test_batchnorm_statistics_of_equal_micro_batches_are_those_of_one(tiny_config):
    config = tiny_config(captions_per_image=2, dropout=0.0)
    one, (batch,) = build(config, (6,))
    several = CLIP(config, one.tokenizer)
    several.load_state_dict(one.state_dict())
    one.train()(batch)
    backward(several.train(), [batch, batch, batch])
    for a, b in zip(batchnorms(one), batchnorms(several), strict=True):
        assert torch.allclose(a.running_mean, b.running_mean, rtol=1e-5, atol=1e-7)
        assert torch.allclose(a.running_var, b.running_var, rtol=1e-5)


def test_frozen_batchnorm_stats_normalises_with_the_batch_and_keeps_the_statistics(tiny_config):
    model, (batch,) = build(tiny_config(captions_per_image=2, dropout=0.0), (6,))
    model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with frozen_batchnorm_stats(model):
        inside = model.image_encoder(batch.images)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert torch.equal(inside, model.image_encoder(batch.images))
    assert not all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(layer.momentum == 0.1 for layer in batchnorms(model))


def test_cached_backward_scales_the_loss_for_the_gradient_scaler(tiny_config):
    model, batches = build(tiny_config(captions_per_image=2), (3, 3))
    model.eval()
    loss = backward(model, batches)
    plain = gradients(model)
    plain = {name: grad.clone() for name, grad in plain.items()}
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    assert backward(model, batches, scaler=scaler) == loss
    assert_close({name: grad / 64 for name, grad in gradients(model).items()}, plain)

"""Gradient caching (Gao et al. 2021, arXiv:2101.06983): the gradient of a large batch in the memory of a small one."""

import contextlib

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from utils.device import autocast


def cached_backward(model, batches, generated, loss_function, amp_dtype, scaler, reducer=None):
    """Accumulate the gradient of the loss over all micro-batches in the parameters; returns the loss.

    The micro-batches are encoded twice: first without gradient, for the embeddings and the gradient of the loss with
    respect to them; then with gradient, one at a time, to backpropagate it through the encoders. Dropout draws the
    same masks both times. The result is the exact gradient of the batch, including that of the temperature, if an
    embedding depends on its own sample alone. BatchNorm in training mode couples the samples of a micro-batch: then
    it is the exact gradient of the loss with per-micro-batch statistics, and running statistics are updated once per
    step, by their mean over the micro-batches.

    Args:
        batches: micro-batches of real images. generated: of generated images, which do not update the statistics of
            BatchNorm.
        loss_function: (image_embeddings, text_embeddings) of all batches -> loss.
        reducer: a `GradientReducer`, started before the last backward pass.
    """
    all_batches, device = [*batches, *generated], model.device
    outputs, random_states = [], []
    with frozen_batchnorm_stats(model), torch.no_grad():
        for batch in all_batches:
            random_states.append(get_random_state(device))
            with autocast(device, amp_dtype):
                outputs.append(model(batch))
    image_embeddings, text_embeddings = (torch.cat(parts).requires_grad_() for parts in zip(*outputs, strict=True))
    loss = loss_function(image_embeddings, text_embeddings)
    scaler.scale(loss).backward()
    image_grads = image_embeddings.grad.split([len(images) for images, _ in outputs])
    text_grads = text_embeddings.grad.split([len(texts) for _, texts in outputs])
    del outputs

    def encode_and_backward(number):
        set_random_state(random_states[number], device)
        with autocast(device, amp_dtype):
            embeddings = model(all_batches[number])
        grads = image_grads[number], text_grads[number]
        if reducer and number == len(all_batches) - 1:
            reducer.start()
        tensors = [(x, grad) for x, grad in zip(embeddings, grads, strict=True) if x.requires_grad]
        torch.autograd.backward([x for x, _ in tensors], [grad for _, grad in tensors])

    with averaged_batchnorm_stats(model) as add_micro_batch:
        for number in range(len(batches)):
            encode_and_backward(number)
            add_micro_batch()
    with frozen_batchnorm_stats(model):
        for number in range(len(batches), len(all_batches)):
            encode_and_backward(number)
    return loss.detach()


def batchnorm_layers(model):
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]


@contextlib.contextmanager
def batchnorm_momentum(layers, momentum):
    """Within the block BatchNorm layers have this momentum, and at its end their counts of batches are as before.

    The momentum is 0 or 1: a compiled encoder is compiled again for each new value.
    """
    momenta, counts = [m.momentum for m in layers], [m.num_batches_tracked for m in layers]
    before = [count.clone() for count in counts]
    for layer in layers:
        layer.momentum = momentum
    try:
        yield
    finally:
        for layer, own in zip(layers, momenta, strict=True):
            layer.momentum = own
        if counts:
            torch._foreach_copy_(counts, before)


def frozen_batchnorm_stats(model):
    """Within the block BatchNorm normalises with batch statistics without updating its running statistics."""
    return batchnorm_momentum(batchnorm_layers(model), 0.0)


@contextlib.contextmanager
def averaged_batchnorm_stats(model):
    """Over several micro-batches the running statistics are updated once, by the mean of the micro-batches' statistics.

    Yields a function to call after each micro-batch.
    """
    layers = batchnorm_layers(model)
    running = [x for m in layers for x in (m.running_mean, m.running_var)]
    before, sums, count = [x.clone() for x in running], [torch.zeros_like(x) for x in running], 0

    def add_micro_batch():
        nonlocal count
        count += 1
        if running:
            torch._foreach_add_(sums, running)  # with momentum 1, the statistics of the micro-batch alone

    with batchnorm_momentum(layers, 1.0):
        yield add_micro_batch
    if running:
        momenta = [m.momentum for m in layers for _ in range(2)]
        torch._foreach_mul_(before, [1 - momentum for momentum in momenta])
        torch._foreach_mul_(sums, [momentum / count for momentum in momenta])
        torch._foreach_copy_(running, torch._foreach_add(before, sums))
        torch._foreach_add_([m.num_batches_tracked for m in layers], 1)


def get_random_state(device):
    own = {"cuda": lambda: torch.cuda.get_rng_state(device), "mps": torch.mps.get_rng_state}
    return torch.get_rng_state(), own[device.type]() if device.type in own else None


def set_random_state(state, device):
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state[1])

"""Exponential moving average of a model's weights."""

import copy

import torch


class EMA:
    """The EMA of a model's weights and buffers, `module`, with the decay min(decay, (1 + step) / (10 + step)).

    That decay forgets the initialisation quickly.
    """

    def __init__(self, model, decay):
        self.module, self.decay = copy.deepcopy(model).requires_grad_(False).eval(), decay
        pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        counts = [pair for pair in pairs if not pair[0].is_floating_point()]
        self.floats, self.counts = ([list(side) for side in zip(*group, strict=True)] for group in (floats, counts))

    @torch.no_grad()
    def update(self, step, overflow=None):
        """Move the EMA towards the model; step: completed steps, from 0 on.

        overflow: a boolean scalar tensor, true for no move.
        """
        weight = 1 - min(self.decay, 1 - (1 + (step + 1) / 9) ** -1.0)
        ema, new = self.floats
        if overflow is None:
            torch._foreach_lerp_(ema, new, weight)
        else:
            differences = torch._foreach_sub(new, ema)
            torch._foreach_mul_(differences, weight * ~overflow)
            torch._foreach_add_(ema, differences)
        if self.counts:
            torch._foreach_copy_(*self.counts)

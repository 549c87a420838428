"""Exponential moving average of a model's weights."""

from timm.utils import ModelEmaV3


class EMA(ModelEmaV3):
    """timm's EMA with the decay min(decay, (1 + step) / (10 + step)), which forgets the initialisation quickly."""

    def __init__(self, model, decay):
        super().__init__(model, decay, use_warmup=True, warmup_gamma=9, warmup_power=1.0)
        self.requires_grad_(False)

    def update(self, model, step):
        """Move the average; step: completed steps, from 0 on."""
        super().update(model, step + 2)  # timm counts from 1 and only copies at 1

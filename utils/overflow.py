"""float16: a step whose gradients overflow changes nothing, without the host waiting for the device.

GradScaler skips the step of the optimizer. The running statistics of BatchNorm, which the forward pass has changed, are
restored here.
"""

import torch


class OverflowGuard:
    """Restores the buffers of a model after an overflow."""

    def __init__(self, model, scaler):
        self.scaler, buffers = scaler, list(model.buffers())
        dtypes = {buffer.dtype for buffer in buffers}
        self.groups = [[buffer for buffer in buffers if buffer.dtype == dtype] for dtype in dtypes]
        self.saved = []

    def save(self):
        """Save the buffers; called before the forward pass."""
        self.saved = [flatten(group) for group in self.groups]

    @torch.no_grad()
    def restore(self, optimizer):
        """Whether the gradients overflowed, a boolean scalar tensor.

        Called between `GradScaler.unscale_` and `GradScaler.update`.
        """
        overflow = sum(self.scaler._found_inf_per_device(optimizer).values()) > 0
        for group, saved in zip(self.groups, self.saved, strict=True):
            kept = torch.where(overflow, saved, flatten(group)).split([buffer.numel() for buffer in group])
            torch._foreach_copy_(group, [part.view_as(buffer) for part, buffer in zip(kept, group, strict=True)])
        return overflow


def flatten(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors])

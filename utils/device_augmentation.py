"""Training augmentation of a whole batch on a GPU: random crop, flip and color jitter.

The parameters are drawn on the host, image by image, from a seed, so that a resumed run sees the same images; loader
processes only copy stored images. All in float32: coarser coordinates would be off by a good part of a pixel.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

GREY = (0.299, 0.587, 0.114)  # luminance of red, green and blue (ITU-R BT.601)
MAX_LOG_RATIO = math.log(4 / 3)  # of width to height of a crop


def draw_augmentation(seed, flip, crop_scale, color_jitter):
    """The parameters of one image, (8,) float32, with the distributions of `dataset.TrainTransform`.

    Centre x, y and width, height of the crop as fractions of the image; -1 for a flip, else 1; factors of brightness,
    contrast and saturation. flip: whether the image may be flipped.
    """
    u = np.random.default_rng(seed).random(9)
    area, ratio = 1 - (1 - crop_scale) * u[0], math.exp(MAX_LOG_RATIO * (2 * u[1] - 1)) if crop_scale < 1 else 1
    width, height = min(1, math.sqrt(area * ratio)), min(1, math.sqrt(area / ratio))
    x, y = width / 2 + u[2] * (1 - width), height / 2 + u[3] * (1 - height)
    factors = 1 + color_jitter * (2 * u[4:7] - 1) if u[7] < 0.8 else np.ones(3)
    return np.array([x, y, width, height, -1 if flip and u[8] < 0.5 else 1, *factors], dtype=np.float32)


@torch.no_grad()
def augment_images(images, parameters, size):
    """(B, 3, S, S) uint8 and parameters (B, 8) -> (B, 3, size, size) uint8, channels-last."""
    x, y, width, height, mirror, brightness, contrast, saturation = parameters.unbind(1)
    line = (torch.arange(size, device=images.device) + 0.5) * (2 / size) - 1  # pixel centres in [-1, 1]
    columns = (2 * x - 1)[:, None] + (mirror * width)[:, None] * line  # (B, size)
    rows = (2 * y - 1)[:, None] + height[:, None] * line
    shape = (len(images), size, size)
    grid = torch.stack([columns[:, None, :].expand(shape), rows[:, :, None].expand(shape)], -1)
    images = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    grey = sum(weight * channel for weight, channel in zip(GREY, images.unbind(1), strict=True))  # (B, size, size)
    # Brightness, then contrast around the mean, then saturation: an affine function of the color.
    shift = (brightness * (1 - contrast) * grey.mean((1, 2)))[:, None, None, None]
    images = torch.lerp(grey[:, None], images, saturation[:, None, None, None])
    images = images * (brightness * contrast)[:, None, None, None] + shift
    return images.clamp_(0, 255).round_().to(torch.uint8).contiguous(memory_format=torch.channels_last)


class LoaderWithImages:
    """A loader whose batches take their images from all decoded images on a GPU, (N, S, S, 3) uint8."""

    def __init__(self, loader, images):
        self.loader, self.images = loader, images

    def __iter__(self):
        for batch in self.loader:
            batch = batch.to(self.images.device)
            batch.images = self.images[batch.image_ids].permute(0, 3, 1, 2)  # (B, S, S, 3) -> (B, 3, S, S)
            yield batch

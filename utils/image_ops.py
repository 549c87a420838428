"""Differentiable operations on batches of images (B, 3, S, S)."""

import torch
import torch.nn.functional as F


def augment(images):
    """DiffAugment (Zhao et al. 2020, arXiv:2006.10738): random translation by up to S/8 and cutout of size S/3.

    The discriminator sees only augmented images and cannot memorise a small data set. Colours stay: captions name them.
    """
    count, _, size, _ = images.shape
    device, max_shift, cut = images.device, size // 8, size // 3
    line, rows = torch.arange(size, device=device), torch.arange(count, device=device)[:, None, None]
    y, x = line + torch.randint(0, 2 * max_shift + 1, (2, count, 1), device=device)  # (B, S): source of each pixel
    padded = F.pad(images, [max_shift] * 4)
    shifted = padded[rows, :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)
    top, left = torch.randint(0, size, (2, count, 1), device=device) - cut // 2
    in_y, in_x = (line >= top) & (line < top + cut), (line >= left) & (line < left + cut)
    return shifted * ~(in_y[:, None, :, None] & in_x[:, None, None, :])


def resize_images(images, size):
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)

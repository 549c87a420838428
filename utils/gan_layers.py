"""Building blocks of the GAN's networks.

Shapes: B images, T captions, D width of CLIP's shared space, C channels, S resolution.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

NOISE_DIM = 64  # width of the noise
CONDITION_DIM = 128  # width of the conditioning vector
VARIANCE_FLOOR = 0.02  # fraction of the mean variance, added in whitening: low-variance directions are noise

leaky = partial(F.leaky_relu, negative_slope=0.2)
upsample = partial(F.interpolate, scale_factor=2)  # nearest neighbour; the next convolution smooths


def stage_channels(size, width):
    """Channels at the resolutions 4, 8, ... `size`: `width` at `size`, up to 4 times as many at lower resolutions."""
    return [min(4 * width, width * size // 2**k) for k in range(2, int(math.log2(size)) + 1)]


class CaptionConditioning(nn.Module):
    """Caption embeddings (B, D) -> conditions (B, CONDITION_DIM), whitened by the statistics of the training captions.

    Most of the variance of CLIP's embeddings lies in a few directions, such as the colours in an image. What
    distinguishes similar captions, such as which object has which colour, is learned very slowly without whitening.
    """

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("whitening", torch.eye(dim))
        self.linear = nn.Linear(dim, CONDITION_DIM)
        self.norm = nn.LayerNorm(CONDITION_DIM)

    def fit(self, embeddings):
        """Estimate the statistics from the embeddings (T, D) of the training captions."""
        embeddings = embeddings.detach().cpu().double()
        centered = embeddings - embeddings.mean(0)
        variances, axes = torch.linalg.eigh(centered.T @ centered / len(centered))
        scales = (variances.clamp(min=0) + VARIANCE_FLOOR * variances.mean() + 1e-12).rsqrt()
        self.mean.copy_(embeddings.mean(0))
        self.whitening.copy_(axes * scales)

    def forward(self, embeddings):
        return self.norm(self.linear((embeddings - self.mean) @ self.whitening))


class Affine(nn.Module):
    """Scales and shifts each channel by linear functions of the condition; starts as the identity."""

    def __init__(self, channels):
        super().__init__()
        self.linear = nn.Linear(NOISE_DIM + CONDITION_DIM, 2 * channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, h, condition):
        scale, shift = self.linear(condition)[:, :, None, None].chunk(2, 1)
        return torch.addcmul(h + shift, h, scale)


class UpBlock(nn.Module):
    """Residual block of the generator, modulated before each convolution; (B, C, S, S) -> (B, C', 2S, 2S)."""

    def __init__(self, channels, out):
        super().__init__()
        self.affine1, self.affine2 = Affine(channels), Affine(out)
        self.conv1, self.conv2 = nn.Conv2d(channels, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, h, condition):
        residual = self.conv1(upsample(leaky(self.affine1(h, condition))))
        residual = self.conv2(leaky(self.affine2(residual, condition)))
        return residual + upsample(self.shortcut(h))


class DownBlock(nn.Module):
    """Residual block of the discriminator, scaled to preserve the variance; (B, C, S, S) -> (B, C', S/2, S/2).

    DF-GAN's residual has a weight that starts at zero and stays small in short training runs; a discriminator that sees
    little more than averaged pixels accepts blurry images.
    """

    def __init__(self, channels, out):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, out, 4, 2, 1), nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, h):
        residual = leaky(self.conv2(leaky(self.conv1(h))))
        return (self.shortcut(F.avg_pool2d(h, 2)) + residual) * math.sqrt(0.5)

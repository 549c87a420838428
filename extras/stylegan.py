"""Style generator, similar to StyleGAN2 (Karras et al. 2020, arXiv:1912.04958): `--gan_generator style`.

Shapes: B images, Z width of the noise, D width of CLIP's shared space, C channels, S resolution.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from utils.gan_layers import CONDITION_DIM, NOISE_DIM, CaptionConditioning, leaky, stage_channels, upsample


class ModulatedConv(nn.Module):
    """Convolution (B, C, S, S) -> (B, C', S, S), modulated by a style and demodulated to unit variance.

    Section 2.2 of the paper, computed as scaling, convolution and rescaling, with the same result.
    """

    def __init__(self, channels, out, kernel=3, demodulate=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, channels, kernel, kernel) / math.sqrt(channels * kernel**2))
        self.bias = nn.Parameter(torch.zeros(out))
        self.style = nn.Linear(NOISE_DIM + CONDITION_DIM, channels)
        nn.init.ones_(self.style.bias)
        self.demodulate = demodulate

    def forward(self, h, w):
        style = self.style(w)  # (B, C)
        h = F.conv2d(h * style[:, :, None, None], self.weight, padding=self.weight.shape[-1] // 2)
        if self.demodulate:
            power = style.float().square() @ self.weight.float().square().sum((2, 3)).T  # (B, C')
            h = h * torch.rsqrt(power + 1e-8)[:, :, None, None]
        return h + self.bias[:, None, None]


class StyleBlock(nn.Module):
    """Doubles the resolution and adds its RGB output to the upsampled image of the previous blocks."""

    def __init__(self, channels, out):
        super().__init__()
        self.conv1, self.conv2 = ModulatedConv(channels, out), ModulatedConv(out, out)
        self.to_rgb = ModulatedConv(out, 3, kernel=1, demodulate=False)

    def forward(self, h, image, w):
        h = leaky(self.conv1(upsample(h), w)) * math.sqrt(2)
        h = leaky(self.conv2(h, w)) * math.sqrt(2)
        image = F.interpolate(image, scale_factor=2, mode="bilinear")
        return h, image + self.to_rgb(h, w)


class StyleGenerator(nn.Module):
    """Mapping network, learned constant and modulated convolutions, without per-pixel noise or style mixing.

    The mapping cannot discard the caption: it is concatenated afterwards, as in StyleGAN-T (arXiv:2301.09515).
    """

    def __init__(self, size, width, dim):
        super().__init__()
        self.caption = CaptionConditioning(dim)
        layers = nn.Linear(NOISE_DIM, NOISE_DIM), nn.LeakyReLU(0.2), nn.Linear(NOISE_DIM, NOISE_DIM)
        self.mapping = nn.Sequential(*layers)
        channels = stage_channels(size, width)
        self.constant = nn.Parameter(torch.randn(1, channels[0], 4, 4))
        self.first = ModulatedConv(channels[0], channels[0])
        self.blocks = nn.ModuleList(StyleBlock(a, b) for a, b in zip(channels, channels[1:], strict=False))

    def forward(self, noise, embeddings):
        """Normal noise (B, Z) and caption embeddings (B, D) -> images (B, 3, S, S) in [-1, 1]."""
        noise = noise * torch.rsqrt(noise.square().mean(1, keepdim=True) + 1e-8)
        w = torch.cat([self.mapping(noise), self.caption(embeddings)], 1)
        h = leaky(self.first(self.constant.expand(len(noise), -1, -1, -1), w)) * math.sqrt(2)
        h, image = h.contiguous(memory_format=torch.channels_last), h.new_zeros((len(noise), 3, 4, 4))
        for block in self.blocks:
            h, image = block(h, image, w)
        return torch.tanh(image.float())

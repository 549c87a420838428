"""The networks of the GAN: two generators and a discriminator, all told a caption by its CLIP embedding.

Shapes: B pictures, Z width of the noise, D width of CLIP's shared space, C channels, S side in pixels. Pictures are
(B, 3, S, S) in [-1, 1].
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

NOISE = 64  # Z
CONDITION = 128  # width of the caption's part in the networks' conditions
FLOOR = 0.02  # of the embeddings' mean variance: axes with much less are mostly noise and fade


def leaky(h):
    return F.leaky_relu(h, 0.2)


def enlarge(h):
    return F.interpolate(h, scale_factor=2)  # nearest: the convolution behind it smooths


def channels_at(side, size, width):
    """Channels at a resolution: `width` at the full size, twice as many at half of it, at most 4 times `width`."""
    return min(4 * width, width * size // side)


def sides(size):
    """4, 8, ... size."""
    return [2**k for k in range(2, int(math.log2(size)) + 1)]


class CaptionInput(nn.Module):
    """(B, D) caption embeddings -> (B, CONDITION); knows how the training captions' are spread and whitens them.

    The embeddings lie close together on the unit sphere and differ mostly along a few axes, such as which colours a
    picture has; what tells alike captions apart, such as which thing has which colour, is small in them. Whitened,
    every axis counts alike. Without this the networks learn only the large ones in any training of sane length.
    """

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("whitening", torch.eye(dim))
        self.linear = nn.Linear(dim, CONDITION)
        self.norm = nn.LayerNorm(CONDITION)

    def measure(self, embeddings):
        embeddings = embeddings.detach().cpu().double()
        mean = embeddings.mean(0)
        variances, axes = torch.linalg.eigh((embeddings - mean).T @ (embeddings - mean) / len(embeddings))
        scales = (variances.clamp(min=0) + FLOOR * variances.mean() + 1e-12).rsqrt()
        self.mean.copy_(mean)
        self.whitening.copy_(axes * scales)

    def forward(self, embeddings):
        return self.norm(self.linear((embeddings - self.mean) @ self.whitening))


class Affine(nn.Module):
    """A scale and a shift for each channel, told by the condition; starts as the identity."""

    def __init__(self, channels):
        super().__init__()
        self.linear = nn.Linear(NOISE + CONDITION, 2 * channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, h, condition):
        scale, shift = self.linear(condition)[:, :, None, None].chunk(2, 1)
        return torch.addcmul(h + shift, h, scale)


class AffineBlock(nn.Module):
    """Doubles the side: two convolutions, each behind a modulation; (B, C, S, S) -> (B, C', 2S, 2S)."""

    def __init__(self, channels, out):
        super().__init__()
        self.affine1, self.affine2 = Affine(channels), Affine(out)
        self.conv1, self.conv2 = nn.Conv2d(channels, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, h, condition):
        new = self.conv1(enlarge(leaky(self.affine1(h, condition))))
        new = self.conv2(leaky(self.affine2(new, condition)))
        return new + enlarge(self.shortcut(h))


class AffineGenerator(nn.Module):
    """In the manner of DF-GAN (Tao et al. 2022, arXiv:2008.05865): the caption modulates every block."""

    def __init__(self, dim, size, width):
        super().__init__()
        self.caption = CaptionInput(dim)
        channels = [channels_at(side, size, width) for side in sides(size)]
        self.bottom = nn.Linear(NOISE + CONDITION, channels[0] * 16)
        self.blocks = nn.ModuleList(AffineBlock(a, b) for a, b in zip(channels, channels[1:], strict=False))
        self.to_rgb = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, noise, embeddings):
        """(B, Z) normal noise and (B, D) caption embeddings -> (B, 3, S, S) in [-1, 1]."""
        condition = torch.cat([noise, self.caption(embeddings)], 1)
        h = self.bottom(condition).view(len(noise), -1, 4, 4).contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            h = block(h, condition)
        return torch.tanh(self.to_rgb(leaky(h)).float())


class ModulatedConv(nn.Module):
    """A convolution whose input channels are scaled by a style and whose output is brought back to unit variance.

    Karras et al. 2020 (arXiv:1912.04958), section 2.2, computed as scale, convolve, rescale: plain operations,
    the same result.
    """

    def __init__(self, channels, out, kernel=3, demodulate=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, channels, kernel, kernel) / math.sqrt(channels * kernel**2))
        self.bias = nn.Parameter(torch.zeros(out))
        self.style = nn.Linear(NOISE + CONDITION, channels)
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
    """Doubles the side and adds its own share to the picture, enlarged from the blocks before."""

    def __init__(self, channels, out):
        super().__init__()
        self.conv1, self.conv2 = ModulatedConv(channels, out), ModulatedConv(out, out)
        self.to_rgb = ModulatedConv(out, 3, kernel=1, demodulate=False)

    def forward(self, h, picture, w):
        h = leaky(self.conv1(enlarge(h), w)) * math.sqrt(2)
        h = leaky(self.conv2(h, w)) * math.sqrt(2)
        picture = F.interpolate(picture, scale_factor=2, mode="bilinear")
        return h, picture + self.to_rgb(h, w)


class StyleGenerator(nn.Module):
    """In the manner of StyleGAN2 (Karras et al. 2020): a mapping network, a learned constant, modulated convolutions.

    The caption joins behind the mapping network, which cannot wash it out (StyleGAN-T, arXiv:2301.09515). Noise per
    pixel, style mixing and the path-length penalty, which StyleGAN2 itself leaves out for small pictures, are absent.
    """

    def __init__(self, dim, size, width):
        super().__init__()
        self.caption = CaptionInput(dim)
        self.mapping = nn.Sequential(nn.Linear(NOISE, NOISE), nn.LeakyReLU(0.2), nn.Linear(NOISE, NOISE))
        channels = [channels_at(side, size, width) for side in sides(size)]
        self.constant = nn.Parameter(torch.randn(1, channels[0], 4, 4))
        self.first = ModulatedConv(channels[0], channels[0])
        self.blocks = nn.ModuleList(StyleBlock(a, b) for a, b in zip(channels, channels[1:], strict=False))

    def forward(self, noise, embeddings):
        """As `AffineGenerator`."""
        noise = noise * torch.rsqrt(noise.square().mean(1, keepdim=True) + 1e-8)
        w = torch.cat([self.mapping(noise), self.caption(embeddings)], 1)
        h = leaky(self.first(self.constant.expand(len(noise), -1, -1, -1), w)) * math.sqrt(2)
        h, picture = h.contiguous(memory_format=torch.channels_last), h.new_zeros((len(noise), 3, 4, 4))
        for block in self.blocks:
            h, picture = block(h, picture, w)
        return torch.tanh(picture.float())


GENERATORS = {"affine": AffineGenerator, "style": StyleGenerator}


class DiscriminatorBlock(nn.Module):
    """Halves the side; (B, C, S, S) -> (B, C', S/2, S/2). Residual, divided by sqrt(2) to keep the variance.

    DF-GAN gives the convolutions a weight that starts at zero. In short trainings it stays small, and a discriminator
    that sees little more than averaged pixels is content with blurs.
    """

    def __init__(self, channels, out):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, out, 4, 2, 1), nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, h):
        new = leaky(self.conv2(leaky(self.conv1(h))))
        return (self.shortcut(F.avg_pool2d(h, 2)) + new) * math.sqrt(0.5)


class Discriminator(nn.Module):
    """Logits of (picture, caption) pairs: u.h(x) + <V h(x), W e> / sqrt(CONDITION), h the picture's features.

    The projection of Miyato and Koyama 2018 (arXiv:1802.05637). No normalisation over the batch, so that the gradient
    penalty means what it says.
    """

    def __init__(self, dim, size, width):
        super().__init__()
        self.caption = CaptionInput(dim)
        channels = [channels_at(side, size, width) for side in reversed(sides(size))]
        self.from_rgb = nn.Conv2d(3, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList(DiscriminatorBlock(a, b) for a, b in zip(channels, channels[1:], strict=False))
        self.flatten = nn.Linear(channels[-1] * 16, 2 * CONDITION)
        self.realness = nn.Linear(2 * CONDITION, 1)
        self.projection = nn.Linear(2 * CONDITION, CONDITION)

    def features(self, pictures):
        """(B, 3, S, S) -> (B, 2 CONDITION)."""
        h = self.from_rgb(pictures.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            h = block(h)
        return leaky(self.flatten(leaky(h).flatten(1)))

    def score(self, features, embeddings):
        """Logits (B,), float32, of features (B, 2 CONDITION) and captions (B, D); (B, K) of (B, 1, .) and (B, K, D)."""
        features = features.float()
        with torch.autocast(features.device.type, enabled=False):
            match = (self.projection(features) * self.caption(embeddings)).sum(-1) / math.sqrt(CONDITION)
            return self.realness(features)[..., 0] + match

    def forward(self, pictures, embeddings):
        return self.score(self.features(pictures), embeddings)


@dataclass(frozen=True)
class Architecture:
    """What has to be known to build a generator again; `dim` is D, `width` the channels at the full size."""

    generator: str
    size: int
    width: int
    dim: int

    def build_generator(self):
        generator = GENERATORS[self.generator](self.dim, self.size, self.width)
        generator.architecture = self
        return generator

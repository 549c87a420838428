"""Discriminator on the features of a frozen pretrained image encoder: `--gan_discriminator projected`.

Projected GAN (Sauer et al. 2021, arXiv:2111.01007): the feature maps of four stages are mixed across channels and
scales by random convolutions that are not trained, and a small discriminator is trained on each of them. It starts with
what the encoder knows about photographs, so that a few thousand images and steps are enough.

Shapes: B images, K mismatched captions, D width of CLIP's shared space, S resolution, H heads.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from config import InputError
from gan import Discriminator
from utils.cli import one_line
from utils.gan_layers import CONDITION_DIM, CaptionConditioning

NUM_HEADS = 4  # at most, on the last stages of the encoder
CHANNELS = 64  # after the random projections
UPSAMPLING = 1.5  # of the images, if the encoder takes any resolution: it was trained on larger images


class ProjectedDiscriminator(Discriminator):
    """As `gan.Discriminator`, but with one logit per head: (B, H) and (B, K, H).

    encoder: the frozen `ImageEncoder`, which is no part of the state; size: S; dim: D; resolution: of the encoder.
    Raises InputError for an encoder without feature maps.
    """

    penalised = False  # spectral normalisation of the heads instead

    def __init__(self, encoder, size, dim, resolution):
        nn.Module.__init__(self)
        self.encoder = [encoder]  # in a list, which makes it no submodule
        self.caption = CaptionConditioning(dim)
        maps = self.first_maps(size, resolution)
        self.mix_channels = nn.ModuleList(nn.Conv2d(x.shape[1], CHANNELS, 1, bias=False) for x in maps)
        self.mix_scales = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False) for _ in maps)
        for layer in (*self.mix_channels, *self.mix_scales):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear").requires_grad_(False)
        self.heads = nn.ModuleList(build_head(x.shape[-1]) for x in maps)
        self.realness = nn.Linear(2 * CONDITION_DIM, 1)
        self.projection = nn.Linear(2 * CONDITION_DIM, CONDITION_DIM)

    @torch.no_grad()
    def first_maps(self, size, resolution):
        """The feature maps of one image; sets the resolution at which the encoder sees the images."""
        encoder, resolutions = self.encoder[0], [resolution]
        stages = getattr(encoder.backbone, "feature_info", ())
        if len({stage["reduction"] for stage in stages}) > 1:  # otherwise all maps are as coarse as the last
            resolutions.insert(0, int(UPSAMPLING * size))
        for self.resolution in resolutions:  # some encoders take their own resolution only
            try:
                return self.encode(torch.zeros(1, 3, size, size, device=encoder.mean.device))
            except Exception as error:
                found = one_line(error)
        raise InputError(
            f"gan_discriminator is projected, but the image encoder, {type(encoder.backbone).__name__}, yields no "
            f"feature maps ({found:.200}): pass --gan_discriminator convolutional"
        )

    def encode(self, images):
        """Feature maps of the last stages of the encoder, (B, C, S', S') each, of images (B, 3, S, S) in [-1, 1]."""
        encoder = self.encoder[0]
        images = F.interpolate((images + 1) / 2, (self.resolution,) * 2, mode="bilinear")
        images = ((images - encoder.mean) / encoder.std).contiguous(memory_format=torch.channels_last)
        heads = min(NUM_HEADS, len(encoder.backbone.feature_info))
        return encoder.backbone.forward_intermediates(images, indices=heads, intermediates_only=True)

    def features(self, images):
        """(B, 3, S, S) -> (B, H, 2 CONDITION_DIM)."""
        maps = [mix(x) for mix, x in zip(self.mix_channels, self.encode(images), strict=True)]
        mixed, coarser = [], None
        for x, mix in zip(reversed(maps), reversed(self.mix_scales), strict=True):  # the coarsest first
            if coarser is not None:
                x = (x + F.interpolate(coarser, x.shape[-2:], mode="bilinear")) * 0.5**0.5
            coarser = mix(x)
            mixed.insert(0, coarser)
        return torch.stack([head(x) for head, x in zip(self.heads, mixed, strict=True)], 1)

    def score(self, features, embeddings):
        """Logits (B, H) of features (B, H, .) and captions (B, D); (B, K, H) of (B, 1, H, .) and (B, K, D)."""
        return super().score(features, embeddings[..., None, :])


def build_head(size):
    """A discriminator without the last layer: (B, CHANNELS, S', S') -> (B, 2 CONDITION_DIM)."""
    layers, channels = [], CHANNELS
    while size >= 8:
        layers += [spectral_norm(nn.Conv2d(channels, 2 * CHANNELS, 4, 2, 1)), nn.LeakyReLU(0.2)]
        channels, size = 2 * CHANNELS, size // 2
    layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten(), spectral_norm(nn.Linear(16 * channels, 2 * CONDITION_DIM))]
    return nn.Sequential(*layers, nn.LeakyReLU(0.2))

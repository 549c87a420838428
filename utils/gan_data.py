"""Data of the GAN's training, and its log.

Shapes: N images, T captions, B images of a batch, K hard negatives, D width of CLIP's shared space, S resolution.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from config import DivergenceError, InputError
from utils.embed import embed_captions
from utils.image_cache import build_image_cache, storage_resolution
from utils.image_store import ImageStore, resize_image
from utils.plotting import plot_gan_samples

MAX_BYTES = 16e9  # of images on the device
NUM_HARD_NEGATIVES = 8  # K: the most similar of ...
NUM_CANDIDATES = 256  # ... so many random captions


class GANBatch(NamedTuple):
    """Real images with numbers of captions; embeddings are interpolated between two captions of an image (mixup)."""

    real: torch.Tensor  # (B, 3, S, S) in [-1, 1]
    captions: torch.Tensor  # (B,)
    other_captions: torch.Tensor  # (B,)
    lam: torch.Tensor  # (B, 1) mixup weight of `other_captions`
    hard_negatives: torch.Tensor  # (B, K)

    def mix(self, encode):
        """Interpolated unit vectors (B, D); `encode` maps caption numbers (B,) to embeddings (B, D)."""
        return F.normalize(torch.lerp(encode(self.captions), encode(self.other_captions), self.lam), dim=1)


class GANData:
    """The images of a split at the GAN's resolution and the embeddings of their captions, on the device.

    Args:
        clip: the model that embeds the captions.
        pairs: the `dataset.Pairs` of the split.
        sided: a compiled pattern of the words for left and right.

    Raises InputError if the images do not fit into memory.
    """

    def __init__(self, clip, pairs, config, sided, device):
        self.images = torch.from_numpy(resized_images(pairs.files, config)).permute(0, 3, 1, 2).to(device)
        self.captions, self.embeddings = pairs.captions, embed_captions(clip, pairs.captions).to(device)  # (T, D)
        self.sided = torch.tensor([bool(sided.search(caption)) for caption in pairs.captions], device=device)
        self.image_index = torch.from_numpy(pairs.image_index).to(device)
        self.caption_offsets = torch.from_numpy(pairs.caption_offsets).to(device)

    def embed(self, captions):
        """Embeddings of caption numbers, (...) -> (..., D)."""
        return self.embeddings[captions]

    def sample_embeddings(self, count=100):
        """(count, D) embeddings of the first caption of `count` images, or of all if there are fewer."""
        return self.embeddings[self.caption_offsets[:-1][:count]]

    def batch(self, images):
        """The `GANBatch` of the images with these numbers (B,).

        Half of the images are flipped, unless the caption says left or right. Half of the embeddings are interpolated:
        the generator has to cover the space between the training captions, too.
        """
        captions, others = self.draw_captions(images), self.draw_captions(images)
        flipped = (torch.rand(len(images), device=images.device) < 0.5) & ~self.sided[captions]
        mixed = torch.rand(len(images), 1, device=images.device) < 0.5
        flipped &= ~(mixed[:, 0] & self.sided[others])
        real = self.images[images].float() / 127.5 - 1
        real = torch.where(flipped[:, None, None, None], real.flip(3), real)
        lam = torch.rand(len(images), 1, device=images.device) * mixed
        return GANBatch(real, captions, others, lam, self.hard_negatives(images, captions))

    def draw_captions(self, images):
        """(B,) a random caption of each image."""
        counts = self.caption_offsets[images + 1] - self.caption_offsets[images]
        return self.caption_offsets[images] + (torch.rand(len(images), device=images.device) * counts).long()

    def hard_negatives(self, images, captions):
        """(B, K) captions of other images: of random candidates, those most similar to `captions` (B,).

        Most random captions describe another scene altogether, so they would not teach the networks to tell similar
        captions apart. K captions cost little more than one: they share the image features.
        """
        candidates = torch.randint(len(self.embeddings), (NUM_CANDIDATES,), device=images.device)
        similarity = self.embeddings[captions] @ self.embeddings[candidates].T  # (B, NUM_CANDIDATES)
        similarity.masked_fill_(self.image_index[candidates] == images[:, None], -2)
        return candidates[similarity.topk(NUM_HARD_NEGATIVES, 1).indices]


def resized_images(files, config):
    """All images at resolution `gan_size`, (N, S, S, 3) uint8; raises InputError if they need too much memory."""
    size, resolution, cache = config.gan_size, max(storage_resolution(config.size), config.gan_size), None
    num_bytes = len(files) * size * size * 3
    if num_bytes > MAX_BYTES:
        raise InputError(
            f"the GAN keeps all images in memory: {len(files)} images at {size} pixels need {num_bytes / 1e9:.0f} GB "
            f"(at most {MAX_BYTES / 1e9:.0f} GB): give --gan_subset"
        )
    if config.cache_images:
        cache = build_image_cache(files, resolution, config.cache_path, config.num_workers)
    store, images = ImageStore(files, resolution, cache), np.empty((len(files), size, size, 3), dtype=np.uint8)
    for number in range(len(files)):
        images[number] = resize_image(store[number], size)
    return images


def check_finite(stats, step):
    """Raise DivergenceError if a statistic (a scalar tensor) is not finite."""
    for name, value in stats.items():
        if not torch.isfinite(value):
            raise DivergenceError(f"the GAN's {name} is {value:.3f} at step {step}: train again with a lower --gan_lr")


@torch.no_grad()
def recall_at_10(clip, generate, validation, train):
    """R@10 (%) of the caption of a generated image among 100 captions, as ranked by `clip`.

    For the first captions of 100 images of the validation split; the training split fills up the 100, if necessary.

    Args:
        generate: embeddings (B, D), a seed and a size -> images (B, 3, size, size) in [0, 1].
        validation, train: `GANData`.
    """
    embeddings = validation.sample_embeddings()
    candidates = torch.cat([embeddings, train.sample_embeddings()])[:100]
    images = clip.encode_image(generate(embeddings, seed=0, size=clip.config.size))
    ranks = ((images @ candidates.T) >= (images * embeddings).sum(1, keepdim=True)).sum(1)
    return 100 * (ranks <= 10).float().mean().item()


def format_epoch(line, epochs):
    return (
        f"GAN, epoch {line['epoch']}/{epochs}: real above generated image {100 * line['real_above_fake']:.0f}%, "
        f"matching above mismatched caption {100 * line['real_above_mismatched']:.0f}%, "
        f"caption of a generated image in CLIP's top 10 of 100 {line['image_to_caption_R@10_of_100']:.0f}%"
    )


def plot_samples(generate, data, path, num_captions=8, num_images=3):
    """Plot captions of a split with their real image and generated ones.

    generate: embeddings (B, D) and a seed -> images (B, 3, S, S) in [0, 1].
    """
    chosen, rows = np.random.default_rng(0).permutation(len(data.captions))[:num_captions].tolist(), []
    for caption in chosen:
        real = data.images[data.image_index[caption]] / 255
        generated = generate(data.embeddings[caption].expand(num_images, -1), seed=caption)
        rows.append([images.movedim(-3, -1).cpu().numpy() for images in (real, generated)])
    plot_gan_samples(path, [data.captions[caption] for caption in chosen], rows)

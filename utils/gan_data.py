"""The GAN's training data, log, and files in <run>/gan.

Shapes: T captions, B images of a batch, K hard negatives, D width of CLIP's shared space, S resolution.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from config import Config, DivergenceError, InputError
from utils.captions import text_ids
from utils.checkpoint import read_checkpoint, write_history
from utils.cli import one_line
from utils.embed import embed_captions
from utils.files import atomic_write, check_regular, read_json, write_json
from utils.image_cache import ImageStore, build_image_cache, resize_image, storage_resolution
from utils.plotting import plot_gan_samples
from utils.saved_model import build_empty, check_entries, read_header, read_tensors

SETTINGS = {field.name: field.metadata for field in dataclasses.fields(Config)}
ARCHITECTURE = {  # of a saved generator
    "generator": lambda value: value in SETTINGS["gan_generator"]["choices"],
    "size": lambda value: type(value) is int and value in SETTINGS["gan_size"]["choices"],
    "width": lambda value: type(value) is int and 1 <= value <= SETTINGS["gan_width"]["high"],
    "dim": lambda value: type(value) is int and 1 <= value <= SETTINGS["projection_dim"]["high"],
}
MAX_BYTES = 16e9  # maximum size of the images on the device
NUM_HARD_NEGATIVES = 8  # K: the most similar of the candidates
NUM_CANDIDATES = 256  # random captions from which hard negatives are chosen


class GANBatch(NamedTuple):
    """Real images with caption indices; embeddings are interpolated between two captions of an image (mixup)."""

    real: torch.Tensor  # (B, 3, S, S) in [-1, 1]
    captions: torch.Tensor  # (B,)
    other_captions: torch.Tensor  # (B,)
    lam: torch.Tensor  # (B, 1) mixup weight of `other_captions`
    hard_negatives: torch.Tensor  # (B, K)

    def mix(self, encode):
        """Interpolated unit vectors (B, D); `encode` maps caption indices (B,) to embeddings (B, D)."""
        return F.normalize(torch.lerp(encode(self.captions), encode(self.other_captions), self.lam), dim=1)


class GANData:
    """The images of a split at the GAN's resolution and the embeddings of their captions, on the device.

    sided: a compiled pattern of the words for left and right. Raises InputError for more than MAX_BYTES.
    """

    def __init__(self, clip, pairs, config, sided, device):
        size, cache, num_bytes = config.gan_size, None, len(pairs.files) * 3 * config.gan_size**2
        if num_bytes > MAX_BYTES:
            raise InputError(
                f"the GAN keeps all images in memory: {len(pairs.files)} images at {size} pixels need "
                f"{num_bytes / 1e9:.0f} GB (at most {MAX_BYTES / 1e9:.0f} GB): pass --gan_subset"
            )
        resolution = max(storage_resolution(config.size), size)
        if config.cache_images:
            cache = build_image_cache(pairs.files, resolution, config.cache_path, config.num_workers)
        store = ImageStore(pairs.files, resolution, cache)
        images = torch.empty((len(pairs.files), size, size, 3), dtype=torch.uint8)
        for number, image in enumerate(images):
            image.copy_(torch.from_numpy(resize_image(store[number], size)))
        self.images = images.permute(0, 3, 1, 2).to(device)
        self.captions, self.embeddings = pairs.captions, embed_captions(clip, pairs.captions).to(device)  # (T, D)
        sides = [not config.flip or bool(sided.search(caption)) for caption in pairs.captions]
        self.sided = torch.tensor(sides, device=device)  # (T,) captions whose images are not flipped
        self.text_ids = torch.from_numpy(text_ids(pairs.captions)).to(device)
        self.max_captions = int(np.diff(pairs.caption_offsets).max())
        self.image_index = torch.from_numpy(pairs.image_index).to(device)
        self.caption_offsets = torch.from_numpy(pairs.caption_offsets).to(device)

    def embed(self, captions):
        """Embeddings of caption indices, (...) -> (..., D)."""
        return self.embeddings[captions]

    def sample_embeddings(self, count=100):
        """(count, D) embeddings of the first caption of at most `count` images."""
        return self.embeddings[self.caption_offsets[:-1][:count]]

    def batch(self, images):
        """The `GANBatch` of the images with these indices (B,).

        Half of the images are flipped, unless the caption says left or right. Half of the embeddings are interpolated:
        the generator also has to cover the space between training captions.
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
        """(B, K) other captions of other images: of random candidates, those most similar to `captions` (B,).

        Most random captions describe another scene, and would not teach the networks to tell similar captions apart.
        K captions cost little more than one: they share the image features.
        """
        candidates = torch.randint(len(self.embeddings), (NUM_CANDIDATES,), device=images.device)
        similarity = self.embeddings[captions] @ self.embeddings[candidates].T  # (B, NUM_CANDIDATES)
        similarity.masked_fill_(self.image_index[candidates] == images[:, None], -2)
        start, end = self.caption_offsets[images][:, None], self.caption_offsets[images + 1][:, None]
        own = torch.minimum(start + torch.arange(self.max_captions, device=images.device), end - 1)
        equal = (self.text_ids[own][:, :, None] == self.text_ids[candidates]).any(1)  # to a caption of the image
        similarity.masked_fill_(equal, -2)
        return candidates[similarity.topk(NUM_HARD_NEGATIVES, 1).indices]


def augment(images):
    """DiffAugment (Zhao et al. 2020, arXiv:2006.10738): random translation by up to S/8 and cutout of size S/3.

    The discriminator sees only augmented images and cannot memorise a small data set. Colours do not change, because
    captions name them.
    """
    count, _, size, _ = images.shape
    device, max_shift, cut = images.device, size // 8, size // 3
    line, rows = torch.arange(size, device=device), torch.arange(count, device=device)[:, None, None]
    y, x = line + torch.randint(0, 2 * max_shift + 1, (2, count, 1), device=device)  # (B, S): source of each pixel
    shifted = F.pad(images, [max_shift] * 4)[rows, :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)
    top, left = torch.randint(0, size, (2, count, 1), device=device) - cut // 2
    in_y, in_x = (line >= top) & (line < top + cut), (line >= left) & (line < left + cut)
    return shifted * ~(in_y[:, None, :, None] & in_x[:, None, None, :])


def resize_images(images, size):
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def check_finite(stats, step):
    """Raise DivergenceError if a statistic (a scalar tensor) is not finite."""
    for name, value in stats.items():
        if not torch.isfinite(value):
            raise DivergenceError(f"the GAN's {name} is {value:.3f} at step {step}: train again with a lower --gan_lr")


@torch.no_grad()
def recall_at_10(clip, generate, validation, train):
    """R@10 (%) of the caption of a generated image among 100 validation (then training) captions, ranked by `clip`.

    generate: embeddings (B, D), a seed and a size -> images (B, 3, size, size) in [0, 1].
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
    """Plot captions of a split with their real image and images from `generate` (as in `recall_at_10`)."""
    chosen, rows = np.random.default_rng(0).permutation(len(data.captions))[:num_captions].tolist(), []
    for caption in chosen:
        real = data.images[data.image_index[caption]] / 255
        generated = generate(data.embeddings[caption].expand(num_images, -1), seed=caption)
        rows.append([images.movedim(-3, -1).cpu().numpy() for images in (real, generated)])
    plot_gan_samples(path, [data.captions[caption] for caption in chosen], rows)


def save_checkpoint(gan, folder, history):
    """Write last.pt and metrics.jsonl; history: the metrics of the finished epochs, a list of dicts."""
    with atomic_write(folder / "last.pt") as path:
        torch.save({"gan": gan.state_dict(), "history": history}, path)
    write_history(history, folder)


def load_checkpoint(gan, folder):
    """Restore `gan` from last.pt if it exists; returns the history; raises InputError."""
    path = folder / "last.pt"
    if path.exists():
        checkpoint = read_checkpoint(path, "a checkpoint of this GAN")
        try:
            gan.load_state_dict(checkpoint["gan"])
            history = checkpoint["history"]
            if not isinstance(history, list) or not all(isinstance(line, dict) for line in history):
                raise ValueError("history is not a list of dicts")
            return history
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{path} is not a checkpoint of this GAN ({one_line(error)})") from None
    if (folder / "metrics.jsonl").exists():
        raise InputError(f"{folder} lacks last.pt, so its GAN cannot be resumed: remove that folder")
    return []


def save_generator(generator, folder, **content):
    """Write generator.safetensors and config.json, which holds its architecture and `content`."""
    write_json(folder / "config.json", {"architecture": generator.architecture, **content})
    with atomic_write(folder / "generator.safetensors") as path:
        save_file({name: tensor.cpu().contiguous() for name, tensor in generator.state_dict().items()}, path)


def read_generator(folder, build_generator):
    """The generator that `save_generator` wrote, built by `build_generator(**architecture)`; raises InputError."""
    if not (folder / "generator.safetensors").exists():
        command = f"python gan.py --run {folder.parent.as_posix()}"
        raise InputError(f"{folder} contains no generator: train one with {command} (--resume if one was started)")
    try:
        path, architecture = folder / "generator.safetensors", read_json(folder / "config.json").get("architecture")
        check_entries(architecture, ARCHITECTURE, "architecture")
        check_regular(path)
        generator = build_empty(lambda: build_generator(**architecture), read_header(path), path.name)
        generator.load_state_dict(read_tensors(path), assign=True)
        return generator
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{folder} does not contain a generator of this version ({one_line(error)})") from None

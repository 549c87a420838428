"""Running an encoder over many images or captions."""

import contextlib
import hashlib
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from config import InputError
from utils.device import autocast
from utils.distributed import all_gather_rows, is_first_process, process_group, rank_and_world_size
from utils.files import atomic_write, check_regular
from utils.fold import fold_batchnorm
from utils.image_cache import EvaluationImages, file_digest, prepare_worker

CPU_IMAGES = 16  # images encoded at once on a CPU: large activations do not fit into its caches
MIN_FOLDED = 64  # images for which folding BatchNorm pays
MIN_LOADED = 2000  # decoded images for which starting loader processes pays


@torch.no_grad()
def encode_dataset(function, dataset, device, amp_dtype=None, batch_size=64, num_workers=0, desc=None, collate_fn=None):
    """`function` of every batch of a dataset, concatenated, float32, on the device; a progress bar if `desc` is given.

    A batch is a tensor, or a tuple of tensors that become the arguments of `function`.
    """
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        collate_fn=collate_fn,
        worker_init_fn=prepare_worker if num_workers else None,
        generator=torch.Generator(),  # does not touch the global random state
    )
    results = []
    hidden = desc is None or not sys.stderr.isatty()  # a progress bar would only clutter a log file
    with tqdm(total=len(dataset), desc=desc, disable=hidden, leave=False) as bar:
        for batch in loader:
            parts = batch if isinstance(batch, tuple) else (batch,)
            with autocast(device, amp_dtype):
                results.append(function(*[part.to(device, non_blocking=True) for part in parts]).float())
            bar.update(len(parts[0]))
    return torch.cat(results)


class CaptionDataset(Dataset):
    """Captions for a text encoder, tokenised batch by batch and padded to the longest of the batch."""

    def __init__(self, captions, tokenizer, max_length):
        self.captions, self.tokenizer, self.max_length = list(captions), tokenizer, max_length

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, index):
        return self.captions[index]

    def collate(self, captions):
        """input_ids and attention_mask, (T, L)."""
        tokens = self.tokenizer(
            captions, truncation=True, max_length=self.max_length, padding=True, return_tensors="pt"
        )
        return tokens["input_ids"], tokens["attention_mask"]


def embed_captions(model, captions, batch_size=256, amp_dtype=None, desc=None):
    """(T, D) unit vectors of T captions, float32, on the model's device."""
    dataset = CaptionDataset(captions, model.tokenizer, model.max_length)
    return encode_dataset(
        model.encode_text, dataset, model.device, amp_dtype, batch_size, desc=desc, collate_fn=dataset.collate
    )


def precompute_features(model, splits, amp_dtype, config):
    """Encode the training and validation split once with each encoder that is not trained; cached in `cache_path`."""
    for split in ("train", "validation"):
        pairs, desc = splits[split], f"encoding {split}" if is_first_process() else None
        for encoder in ("image", "text"):
            if not config.encoder_flag("trainable", encoder):
                features = cached_features(model, pairs, encoder, amp_dtype, config, desc)
                # The training features may be large, so they stay in main memory.
                setattr(pairs, f"{encoder}_features", features.cpu() if split == "train" else features)


def cached_features(model, pairs, encoder, amp_dtype, config, desc=None):
    """The features of a split, read from the cache if it was encoded before with the same weights and settings."""
    if process_group():  # all processes would have to agree on what they read
        return encode_split(model, pairs, encoder, nn.Identity(), amp_dtype, config, desc)
    path = Path(config.cache_path) / f"features-{features_hash(model, pairs, encoder, amp_dtype)}.safetensors"
    with contextlib.suppress(OSError, SafetensorError, KeyError, InputError):  # not cached, or damaged
        check_regular(path)
        features, width = load_file(path)["features"], getattr(model, f"{encoder}_encoder").width
        expected = (len(pairs.files if encoder == "image" else pairs.captions), width)
        if features.shape == expected and features.isfinite().all():
            return features.to(model.device)
    features = encode_split(model, pairs, encoder, nn.Identity(), amp_dtype, config, desc)
    with atomic_write(path) as temporary:
        save_file({"features": features.cpu()}, temporary)
    return features


def features_hash(model, pairs, encoder, amp_dtype):
    """A hash of all that determines the features of a split: model config, weights, precision, images or tokens."""
    module = getattr(model, f"{encoder}_encoder")
    if encoder == "image":
        parts = [f"{model.image_config} {model.config.size} {amp_dtype}".encode()]
        parts += [file_digest(file) for file in pairs.files]
    else:
        tokens = model.tokenizer(pairs.captions, truncation=True, max_length=model.max_length)["input_ids"]
        parts = [f"{sorted(module.model_config.items(), key=str)} {module.pooling} {amp_dtype}".encode()]
        parts += [str(ids).encode() for ids in tokens]
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        whole.update(len(part).to_bytes(4, "little") + part)
    for _, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):
        whole.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return whole.hexdigest()


def encode_split(model, pairs, encoder, project, amp_dtype, config, desc=None):
    """`project` of the features of every image ("image") or caption ("text") of a split.

    The processes share the work.
    """
    own = own_share(len(pairs.files if encoder == "image" else pairs.captions))
    batch_size = min(config.micro_batch_size or config.batch_size, 256)
    model.eval()
    if encoder == "image":
        dataset = EvaluationImages(pairs.images, own, config.size)
        # On a GPU, one process that reads decoded images is too slow for many of them.
        alone = pairs.images.cache and (model.device.type == "cpu" or len(own) < MIN_LOADED)
        workers = 0 if alone else config.num_workers
        batch_size = image_batch_size(model.device, batch_size)
        module = fast_image_encoder(model, len(dataset), amp_dtype)
        found = encode_dataset(
            lambda images: project(module(images)), dataset, model.device, amp_dtype, batch_size, workers, desc
        )
    else:  # captions of similar length together, so that little padding is encoded
        order = sorted(own, key=lambda caption: len(pairs.captions[caption]))
        dataset = CaptionDataset([pairs.captions[j] for j in order], model.tokenizer, model.max_length)
        found = encode_dataset(
            lambda *tokens: project(model.text_encoder(*tokens)),
            dataset,
            model.device,
            amp_dtype,
            batch_size,
            desc=desc,
            collate_fn=dataset.collate,
        )
        found = found[torch.tensor(order, device=found.device).argsort()]
    return all_gather_rows(found, process_group())


def fast_image_encoder(model, count, amp_dtype=None):
    """The image encoder for `count` images; on a CPU, a copy with folded BatchNorm if there are many."""
    if model.device.type != "cpu" or amp_dtype or count < MIN_FOLDED or model.config.compile:
        return model.image_encoder
    size, generator = model.config.size, torch.Generator().manual_seed(0)
    example = torch.randint(256, (2, 3, size, size), dtype=torch.uint8, generator=generator)
    return fold_batchnorm(model.image_encoder, example)


def image_batch_size(device, batch_size):
    """The number of images to encode at once: `batch_size`, or the fastest on a CPU."""
    return min(batch_size, CPU_IMAGES) if device.type == "cpu" else batch_size


def own_share(number):
    """The contiguous part of `number` items that this process encodes, a range."""
    rank, world_size = rank_and_world_size()
    return range(rank * number // world_size, (rank + 1) * number // world_size)


@torch.no_grad()
def embed_split(model, pairs, amp_dtype, config):
    """Embeddings of a split: (N, D) of its images and (T, D) of its captions."""
    model.eval()
    embeddings = []
    for encoder, project in (("image", model.project_image), ("text", model.project_text)):
        features = getattr(pairs, f"{encoder}_features")
        if features is None:
            embeddings.append(encode_split(model, pairs, encoder, project, amp_dtype, config))
        else:
            embeddings.append(project(features.to(model.device)))
    return tuple(embeddings)

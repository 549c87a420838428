"""Running an encoder over many images or captions."""

import sys

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from utils.device import autocast
from utils.distributed import all_gather_rows, is_first_process, process_group, rank_and_world_size
from utils.image_cache import EvaluationImages, prepare_worker


@torch.no_grad()
def encode_dataset(function, dataset, device, amp_dtype=None, batch_size=64, num_workers=0, desc=None, collate_fn=None):
    """`function` of every batch of a dataset, concatenated, float32, on the device; a progress bar if `desc` is given.

    A batch is a tensor, or a tuple of tensors that become the arguments of `function`.
    """
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate_fn,
        worker_init_fn=prepare_worker if num_workers else None,
        generator=torch.Generator(),  # leaves the global random state alone
    )
    results = []
    hidden = desc is None or not sys.stderr.isatty()  # short work: in a log file its bar is only noise
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
    """Encode the training and validation split once with each encoder that is not trained."""
    for split in ("train", "validation"):
        pairs, desc = splits[split], f"encoding {split}" if is_first_process() else None
        for encoder, module in (("image", model.image_encoder), ("text", model.text_encoder)):
            if not config.encoder_flag("trainable", encoder):
                features = encode_split(model, pairs, encoder, module, amp_dtype, config, desc)
                # Those of the training split are kept in main memory: they may be many.
                setattr(pairs, f"{encoder}_features", features.cpu() if split == "train" else features)


def encode_split(model, pairs, encoder, function, amp_dtype, config, desc=None):
    """`function` of every image ("image") or caption ("text") of a split; the processes share the work."""
    own = own_share(len(pairs.files if encoder == "image" else pairs.captions))
    if encoder == "image":
        dataset, collate_fn = EvaluationImages(pairs.images, own, config.size), None
        workers = 0 if pairs.images.cache else config.num_workers
    else:
        dataset = CaptionDataset(pairs.captions[own.start : own.stop], model.tokenizer, model.max_length)
        workers, collate_fn = 0, dataset.collate
    batch_size = min(config.micro_batch_size or config.batch_size, 256)
    model.eval()
    found = encode_dataset(function, dataset, model.device, amp_dtype, batch_size, workers, desc, collate_fn)
    return all_gather_rows(found, process_group())


def own_share(number):
    """The contiguous part of `number` items that this process encodes, a range."""
    rank, world_size = rank_and_world_size()
    return range(rank * number // world_size, (rank + 1) * number // world_size)


@torch.no_grad()
def embed_split(model, pairs, amp_dtype, config):
    """Embeddings of a split: (N, D) of its images and (T, D) of its captions."""
    model.eval()
    embeddings = []
    for encoder, project, encode in (
        ("image", model.project_image, model.encode_image),
        ("text", model.project_text, model.encode_text),
    ):
        features = getattr(pairs, f"{encoder}_features")
        if features is None:
            embeddings.append(encode_split(model, pairs, encoder, encode, amp_dtype, config))
        else:
            embeddings.append(project(features.to(model.device)))
    return tuple(embeddings)

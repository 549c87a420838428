"""Running an encoder over many images or captions."""

import sys

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from utils.device import autocast
from utils.distributed import all_gather_rows, is_first_process, process_group, rank_and_world_size
from utils.image_store import EvaluationImages, prepare_worker


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
        if not config.encoder_flag("trainable", "image"):
            pairs.image_features = encode_images(model, pairs, model.image_encoder, amp_dtype, config, desc)
        if not config.encoder_flag("trainable", "text"):
            pairs.text_features = encode_captions(model, pairs, model.text_encoder, amp_dtype, config, desc)
    train = splits["train"]  # kept in main memory: they may be many
    train.image_features = None if train.image_features is None else train.image_features.cpu()
    train.text_features = None if train.text_features is None else train.text_features.cpu()


def encode_images(model, pairs, function, amp_dtype, config, desc=None):
    """`function` of every image of a split; the processes share the work."""
    dataset = EvaluationImages(pairs.images, own_share(len(pairs.files)), config.size)
    workers = 0 if pairs.images.cache else config.num_workers
    batch_size = min(config.micro_batch_size or config.batch_size, 256)
    model.eval()
    found = encode_dataset(function, dataset, model.device, amp_dtype, batch_size, workers, desc)
    return all_gather_rows(found, process_group())


def encode_captions(model, pairs, function, amp_dtype, config, desc=None):
    """`function` of every caption of a split; the processes share the work."""
    own = own_share(len(pairs.captions))
    dataset = CaptionDataset(pairs.captions[own.start : own.stop], model.tokenizer, model.max_length)
    batch_size = min(config.micro_batch_size or config.batch_size, 256)
    model.eval()
    found = encode_dataset(
        function, dataset, model.device, amp_dtype, batch_size, desc=desc, collate_fn=dataset.collate
    )
    return all_gather_rows(found, process_group())


def own_share(number):
    """The contiguous part of `number` items that this process encodes, a range."""
    rank, world_size = rank_and_world_size()
    return range(rank * number // world_size, (rank + 1) * number // world_size)


@torch.no_grad()
def embed_split(model, pairs, amp_dtype, config):
    """Embeddings of a split: (N, D) of its images and (T, D) of its captions."""
    model.eval()
    if pairs.image_features is not None:
        image_embeddings = model.project_image(pairs.image_features.to(model.device))
    else:
        image_embeddings = encode_images(model, pairs, model.encode_image, amp_dtype, config)
    if pairs.text_features is not None:
        text_embeddings = model.project_text(pairs.text_features.to(model.device))
    else:
        text_embeddings = encode_captions(model, pairs, model.encode_text, amp_dtype, config)
    return image_embeddings, text_embeddings

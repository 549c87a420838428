"""Hashes that show when a file or a saved model has changed; does not import torch."""

import contextlib
import hashlib

from config import InputError
from utils.files import read_json, write_json
from utils.runs import model_folder
from utils.shards import image_stat

PREPROCESSING_VERSION = 2  # increased when preprocessing changes, which invalidates all embeddings


def file_stat(file):
    """A file's size in bytes and its time of modification in nanoseconds."""
    size, changed = image_stat(file)
    return size, (changed + 2**63) % 2**64 - 2**63  # int64, also for times after 2262


def content_hash(content):
    """A hash of bytes, 16 bytes."""
    return hashlib.blake2b(content, digest_size=16).digest()


def model_hash(run):
    """A hash of whatever determines the embeddings of a run's saved model: weights, settings, tokenizer; 32 hex digits.

    The hash of the weights is cached beside them, because reading them takes longer than a search.
    """
    folder, cached = model_folder(run), {}
    weights, cache = folder / "model.safetensors", folder / "weights_hash.json"
    stat = list(file_stat(weights))
    with contextlib.suppress(InputError):
        cached = read_json(cache)
    if cached.get("file_stat") != stat or not isinstance(cached.get("hash"), str):
        cached = {"file_stat": stat, "hash": content_hash(weights.read_bytes()).hex()}
        with contextlib.suppress(OSError):  # a read-only folder: the weights are hashed again next time
            write_json(cache, cached)
    files = [folder / "config.json", *sorted((folder / "tokenizer").glob("*"))]
    parts = [f"{PREPROCESSING_VERSION} {cached['hash']}".encode(), *(file.read_bytes() for file in files)]
    return content_hash(b"".join(parts)).hex()

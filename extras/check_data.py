"""`python main.py --check`: what a training would see, and how fast; it writes no run."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from config import InputError
from dataset import TokenStore, describe_splits
from utils.cli import progress_bar
from utils.device import autocast, setup_device
from utils.image_cache import ImageStore, load_image, storage_resolution

LOADING_SECONDS = 5.0
MAX_BATCH = 4096


def check_data(config, load_data, build_model, build_loader):
    """Print the splits, broken images, captions, loading speed and the largest batch; returns them as a dict."""
    device, amp_dtype = setup_device(config.device, config.precision)
    splits = load_data(config)
    print(describe_splits(config, splits))
    found = check_images([file for pairs in splits.values() for file in pairs.files])
    train = splits["train"]
    model = build_model(config, train.captions, device)
    found |= check_captions(model, [pairs for pairs in splits.values() if pairs.files])
    if found["broken"]:
        raise InputError(
            f"{found['broken']} images cannot be read: replace them, or remove them from the captions file"
        )
    found["images_per_second"] = loading_speed(build_loader, model, train, config)
    workers = f"{config.num_workers} processes" if config.num_workers else "in the training process"
    print(f"loading: {found['images_per_second']:,.0f} images/s, decoded each time ({workers}); the cache is faster")
    found["largest_batch"] = largest_batch(model, train, config, amp_dtype)
    print(f"batch: {describe_batch(found['largest_batch'], config)}")
    return found


def check_images(files):
    """Decode every image; prints and counts those that cannot be read."""
    errors, sides = [], []

    def check(file):
        try:
            sides.append(min(load_image(file, 4096).size))
        except InputError as error:
            errors.append(str(error))

    with ThreadPoolExecutor() as pool, progress_bar(total=len(files), desc="checking images", unit="image") as bar:
        for _ in pool.map(check, files):
            bar.update()
    print(f"images: {len(files):,}, {len(errors)} cannot be read", end="")
    print(f"; the shorter side has {min(sides)} to {max(sides)} pixels" if sides else "")
    for error in sorted(errors)[:5]:
        print(f"  {error}")
    return {"images": len(files), "broken": len(errors)}


def check_captions(model, splits):
    """Captions per image, and the longest caption in tokens."""
    counts = np.concatenate([np.diff(pairs.caption_offsets) for pairs in splits])
    captions = [caption for pairs in splits for caption in pairs.captions]
    lengths = np.diff(TokenStore(model.tokenizer, captions, 100_000).offsets)
    truncated = int((lengths > model.max_length).sum())
    print(f"captions: {counts.min()} to {counts.max()} per image, {np.median(lengths):.0f} tokens (median), at most "
          f"{lengths.max()}; {truncated:,} are truncated (max_length {model.max_length})")  # fmt: skip
    return {"captions": len(captions), "longest": int(lengths.max()), "truncated": truncated}


def loading_speed(build_loader, model, pairs, config):
    """Images per second that the data loader yields, without the cache of decoded images."""
    pairs = replace(pairs, images=ImageStore(pairs.files, storage_resolution(config.size)))
    _, loader = build_loader(model, pairs, replace(config, micro_batch_size=0))
    batches, images = iter(loader), 0
    next(batches)  # starts the loader processes
    start = time.perf_counter()
    for batch in batches:
        images += len(batch)
        if time.perf_counter() - start > LOADING_SECONDS:
            break
    return images / (time.perf_counter() - start)


def largest_batch(model, pairs, config, amp_dtype):
    """The largest power of two of images with which a step fits in GPU memory, None on other devices."""
    if model.device.type != "cuda":
        return None
    size, fits = 2, 0
    k = min(config.captions_per_image, int(np.diff(pairs.caption_offsets).max()))
    while size <= min(MAX_BATCH, 2 * config.batch_size):
        try:
            images = torch.zeros(size, 3, config.size, config.size, device=model.device, dtype=torch.uint8)
            tokens = torch.full((size * k, model.max_length), 5, device=model.device)
            with autocast(model.device, amp_dtype):
                embeddings = model.encode_image(images), model.encode_text(tokens, torch.ones_like(tokens))
            sum(x.sum() for x in embeddings).backward()
        except torch.cuda.OutOfMemoryError:
            break
        finally:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        size, fits = 2 * size, size
    return fits


def describe_batch(largest, config):
    if largest is None:
        return f"{config.batch_size} images per step; if memory runs out, pass --micro_batch_size 16"
    if largest >= (config.micro_batch_size or config.batch_size):
        return f"{config.batch_size} images per step fit in GPU memory"
    return f"at most {largest} images at once fit in GPU memory: pass --micro_batch_size {largest}"

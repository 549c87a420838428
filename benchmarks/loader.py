"""Images per second of the training loader, with and without the image cache.

    python benchmarks/loader.py

Nothing is trained: batches are loaded, cropped, jittered, collated and discarded. The images are synthetic 500 x 375
JPEGs; any setting of the program can be given as a flag.
"""

import sys
import tempfile
import time

from common import benchmark_config, report, spread

from dataset import ImageStore, PairSampler, TokenStore, TrainingPairs, load_splits, make_loader, train_tokenizer
from utils.image_cache import build_image_cache, storage_resolution

NUM_IMAGES, NUM_ROUNDS = 500, 5


def main():
    with tempfile.TemporaryDirectory() as folder:
        config = benchmark_config(folder, sys.argv[1:], NUM_IMAGES)
        pairs = load_splits(config)["train"]
        started = time.perf_counter()
        resolution = storage_resolution(config.size)
        cache = build_image_cache(pairs.files, resolution, config.cache_path, config.num_workers)
        build_time = time.perf_counter() - started
        loaders = {"without cache": build_loader(pairs, config, None), "with cache": build_loader(pairs, config, cache)}
        rates = {name: [] for name in loaders}
        for name in list(loaders) * (1 + NUM_ROUNDS):
            rates[name].append(images_per_second(loaders[name]))
    rates = {name: values[1:] for name, values in rates.items()}  # the first round starts the processes
    ratios = [cached / uncached for uncached, cached in zip(*rates.values(), strict=True)]
    report(
        "loader",
        [{"loader": name, "images/s": spread(values, 0)} for name, values in rates.items()],
        ratio=spread(ratios),
        building_the_cache_images_per_second=round(len(pairs.files) / build_time),
        settings={key: getattr(config, key) for key in ("size", "batch_size", "num_workers")},
    )


def build_loader(pairs, config, cache):
    tokenizer = train_tokenizer(pairs.captions)
    tokens = TokenStore(tokenizer, pairs.captions, config.max_length)
    store = ImageStore(pairs.files, storage_resolution(config.size), cache)
    dataset = TrainingPairs(pairs, store, tokens, tokenizer.pad_token_id, config)
    sampler = PairSampler(pairs, config)
    return make_loader(dataset, config.num_workers, batch_sampler=sampler, collate_fn=dataset.collate)


def images_per_second(loader):
    """Throughput of a loader over one epoch."""
    started = time.perf_counter()
    images = sum(len(batch) for batch in loader)
    return images / (time.perf_counter() - started)


if __name__ == "__main__":
    main()

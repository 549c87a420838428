"""Images per second that the training loader delivers, with the cache of decoded pictures and without it.

    python benchmarks/loader.py

Nothing is trained: batches are loaded, cropped, jittered, collated and dropped. The pictures are 500 x 375 JPEGs
drawn for the purpose; any setting of the program may be given as a flag.
"""

import sys
import tempfile
import time

from common import benchmark_config, report, spread

from dataset import PairSampler, TokenStore, TrainingPairs, load_splits, make_loader, train_tokenizer
from images import ImageStore, build_image_cache, stored_side

PICTURES, ROUNDS = 500, 5


def main():
    with tempfile.TemporaryDirectory() as folder:
        config = benchmark_config(folder, sys.argv[1:], PICTURES)
        pairs = load_splits(config)["train"]
        started = time.perf_counter()
        cache = build_image_cache(pairs.files, stored_side(config.size), config.cache_path, config.num_workers)
        built = time.perf_counter() - started
        loaders = {"without cache": build_loader(pairs, config, None), "with cache": build_loader(pairs, config, cache)}
        rates = {name: [] for name in loaders}
        for name in list(loaders) * (1 + ROUNDS):
            rates[name].append(images_per_second(loaders[name]))
    rates = {name: found[1:] for name, found in rates.items()}  # the first round starts the processes
    ratios = [cached / plain for plain, cached in zip(*rates.values(), strict=True)]
    report(
        "loader",
        [{"loader": name, "images/s": spread(found, 0)} for name, found in rates.items()],
        ratio=spread(ratios),
        building_the_cache_images_per_second=round(len(pairs.files) / built),
        settings={key: getattr(config, key) for key in ("size", "batch_size", "num_workers")},
    )


def build_loader(pairs, config, cache):
    tokenizer = train_tokenizer(pairs.captions)
    tokens = TokenStore(tokenizer, pairs.captions, config.max_length)
    store = ImageStore(pairs.files, stored_side(config.size), cache)
    dataset = TrainingPairs(pairs, store, tokens, tokenizer.pad_token_id, config)
    sampler = PairSampler(pairs, config)
    return make_loader(dataset, config.num_workers, batch_sampler=sampler, collate_fn=dataset.collate)


def images_per_second(loader):
    """Over one epoch."""
    started = time.perf_counter()
    images = sum(len(batch["images"]) for batch in loader)
    return images / (time.perf_counter() - started)


if __name__ == "__main__":
    main()

"""Search latency: a query over 8,000 indexed images, changed files, and one million indexed vectors.

All images are in the index. The image files are listed while the model is loaded; then their file stats are compared,
the sentence is encoded, the images are ranked, and the match decision is made. Each measurement is the first query of a
new process. The text encoders have the shape of DistilBERT and of the preset demo, with random weights.
`python benchmarks/search.py [images vectors]`; needs 1.1 GB in the temporary folder.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from common import in_fresh_process, report, spread

REPEATS = 5
QUERY = "a dog on the grass"
TEXT_ENCODERS = {"distilbert": {}, "small": {"text_layers": 2, "text_width": 128}}


def prepare(folder, num_images):
    """Write saved models, the small synthetic data set of their match thresholds, and a gallery of small images."""
    import numpy as np
    from PIL import Image

    from clip import CLIP, save_model
    from config import Config
    from dataset import load_splits, train_tokenizer
    from utils.synthetic import generate_dataset

    paths = {"image_path": str(folder / "shapes/Images"), "captions_path": str(folder / "shapes/captions.txt")}
    generate_dataset(**paths, train_images=40, validation_images=20, test_images=20)
    for name, shape in TEXT_ENCODERS.items():
        settings = {"model_name": "resnet10t", "text_tokenizer": "wordpiece", "pretrained": False, "size": 32}
        config = Config(**paths, **settings, max_length=32, **shape)
        save_model(CLIP(config, train_tokenizer(load_splits(config)["train"].captions)), folder / name / "best")
    rng = np.random.default_rng(0)
    for number in range(num_images):
        file = folder / "gallery" / f"{number % 20:02d}" / f"{number:06d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((64, 48)).save(file)


def answer(folder, name):
    """Times in seconds to load the model and to answer one sentence, as inference.py does."""
    import inference

    embed, encoding = inference.embed_captions, []

    def timed(*arguments):
        before = time.perf_counter()
        vectors = embed(*arguments)
        encoding.append(time.perf_counter() - before)
        return vectors

    inference.embed_captions = timed
    started = time.perf_counter()
    searcher = inference.Searcher(f"{folder}/{name}", f"{folder}/gallery", device="cpu")
    loaded = time.perf_counter()
    found = searcher.answer(inference.build_query(QUERY))
    answered = time.perf_counter()
    assert found["searched"] == len(searcher.gallery.names)
    return {"load": loaded - started, "answer": answered - loaded, "encode": sum(encoding)}


def load(folder, name):
    """Seconds to load the model alone."""
    from extras.search_index import open_run

    started = time.perf_counter()
    open_run(f"{folder}/{name}")
    return time.perf_counter() - started


def write_vectors(folder, number, width=256):
    """Save an index of random unit vectors, as a search would."""
    import numpy as np
    import torch

    from extras.search_index import Index, write_index

    number, generator = int(number), torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(number, width, generator=generator), dim=1)
    names = [f"{row % 1000:03d}/photograph_{row:08d}.jpg" for row in range(number)]
    file_stats, content_hashes = np.zeros((number, 2), np.int64), np.zeros((number, 16), np.uint8)
    path = Path(folder) / "vectors.safetensors"
    write_index(path, "benchmark", Index(names, file_stats, content_hashes, vectors))


def rank_vectors(folder):
    """Times in seconds to open the index of random vectors and to rank them for one query."""
    import torch

    from extras.search_index import read_index
    from inference import mean_scores, rank

    started = time.perf_counter()
    index = read_index(Path(folder) / "vectors.safetensors", "benchmark")
    opened = time.perf_counter()
    times = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        query = torch.nn.functional.normalize(torch.randn(index.vectors.shape[1], generator=generator), dim=0)
        before = time.perf_counter()
        best = rank(mean_scores([index.vectors], [query]), 9, 0.5)
        times.append(time.perf_counter() - before)
    assert len(best) == 9
    return {"open": opened - started, "first": times[0], "later": min(times[1:])}


def replace_image(file, seed):
    from PIL import Image

    Image.new("RGB", (64, 48), (seed, 200, 100)).save(file)


def change_files(folder):
    """{change of a file: number of images embedded by the next search, and its seconds}."""
    import inference
    from extras import search_index

    embedded, embed = [], search_index.embed_images
    search_index.embed_images = lambda model, files, **more: embedded.extend(files) or embed(model, files, **more)
    searcher = inference.Searcher(f"{folder}/small", f"{folder}/gallery", device="cpu")
    files = sorted((Path(folder) / "gallery").rglob("*.jpg"))
    counts = {}
    for what, change in (
        ("nothing changed", lambda: None),
        ("one changed", lambda: replace_image(files[1], 1)),
        ("one deleted", files[2].unlink),
        ("one renamed", lambda: files[3].rename(files[3].with_name("renamed.jpg"))),
        ("one touched", lambda: os.utime(files[4])),
        (
            "one added",
            lambda: files[5].with_name("added.jpg").write_bytes(files[5].read_bytes()[:-2] + b"\0\0\xff\xd9"),
        ),
    ):
        change()
        embedded.clear()
        searcher.loaded.clear()
        started = time.perf_counter()
        searcher.gallery = search_index.list_gallery(f"{folder}/gallery", None)
        searcher.search(QUERY)
        counts[what] = {"embedded": len(embedded), "seconds": round(time.perf_counter() - started, 3)}
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("images", nargs="?", type=int, default=8000, help="images in the gallery (default: 8000)")
    parser.add_argument("vectors", nargs="?", type=int, default=1_000_000, help="random vectors (default: 1000000)")
    sizes = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepare(folder, sizes.images)
        for name in TEXT_ENCODERS:
            in_fresh_process("answer", folder, name)  # embeds and saves
        runs, loads = {name: [] for name in TEXT_ENCODERS}, []
        for _ in range(REPEATS):
            loads.append(in_fresh_process("load", folder, "distilbert"))
            for name in TEXT_ENCODERS:
                runs[name].append(in_fresh_process("answer", folder, name))
        changes = in_fresh_process("change", folder)
        in_fresh_process("write", folder, sizes.vectors)
        ranked = [in_fresh_process("rank", folder) for _ in range(REPEATS)]

    def row(what, times):
        return {"measurement": what, "milliseconds: median (range)": spread([1000 * t for t in times], 0)}

    large, small = runs["distilbert"], runs["small"]
    rows = [
        row("loading the model alone", loads),
        row(f"loading the model, and listing {sizes.images:,} images meanwhile", [run["load"] for run in large]),
        row("then answering one sentence", [run["answer"] for run in large]),
        row("of which all but encoding the sentence", [run["answer"] - run["encode"] for run in large]),
        row("answering with the small text encoder of the demo", [run["answer"] for run in small]),
        row(f"opening an index of {sizes.vectors:,} vectors of width 256", [run["open"] for run in ranked]),
        row("ranking them, first query", [run["first"] for run in ranked]),
        row("ranking them, later queries", [run["later"] for run in ranked]),
    ]
    report("search", rows, changes=changes)


STEPS = {"answer": answer, "load": load, "change": change_files, "rank": rank_vectors, "write": write_vectors}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in STEPS:  # in a new process
        print(json.dumps(STEPS[sys.argv[1]](*sys.argv[2:])))
    else:
        main()

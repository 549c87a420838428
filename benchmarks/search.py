"""How long a search takes: a warm query over 8,000 indexed pictures, changed files, a million indexed vectors.

Warm means that every picture is in the index. The folder is listed while the model is loaded; what follows is comparing
sizes and times, encoding the sentence, ranking, the verdict. Each measurement is the first query of a fresh process.
The text encoder has DistilBERT's shape, or that of the preset demo; the weights are random, which costs the same.
`python benchmarks/search.py [pictures vectors]`; needs 1.1 GB in the temporary folder.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from common import in_fresh_process, report, spread

REPEATS = 5
QUERY = "a dog on the grass"
ENCODERS = {"distilbert": {}, "small": {"text_layers": 2, "text_width": 128}}  # of the text encoders


def prepare(folder, pictures):
    """Saved models, the small drawn data set they are calibrated on, and a gallery of small pictures."""
    import numpy as np
    from PIL import Image

    from clip import CLIP, save_model
    from config import Config
    from dataset import load_splits, train_tokenizer
    from shapes import draw_sample

    paths = {"image_path": str(folder / "shapes/Images"), "captions_path": str(folder / "shapes/captions.txt")}
    draw_sample(**paths, train_images=40, validation_images=20, test_images=20)
    for name, shape in ENCODERS.items():
        settings = {"model_name": "resnet10t", "text_tokenizer": "captions", "pretrained": False, "size": 32}
        config = Config(**paths, **settings, max_length=32, **shape)
        save_model(CLIP(config, train_tokenizer(load_splits(config)["train"].captions)), folder / name / "best")
    rng = np.random.default_rng(0)
    for number in range(pictures):
        place = folder / "gallery" / f"{number % 20:02d}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((64, 48)).save(
            place / f"{number:06d}.jpg"
        )


def answer(folder, name):
    """Load the model and answer one sentence, as inference.py does; times in seconds."""
    import torch

    import inference

    embed, encoding = inference.embed_captions, []

    def timed(*arguments):
        before = time.perf_counter()
        vectors = embed(*arguments)
        encoding.append(time.perf_counter() - before)
        return vectors

    inference.embed_captions = timed
    queries = inference.build_queries(inference.parse_arguments([QUERY]))
    started = time.perf_counter()
    runs, gallery = inference.open_runs_and_gallery([f"{folder}/{name}"], torch.device("cpu"), f"{folder}/gallery")
    loaded = time.perf_counter()
    answers = inference.search_pictures(runs, gallery, queries)
    answered = time.perf_counter()
    assert answers[0]["searched"] == len(gallery.names)
    return {
        "load": loaded - started,
        "answer": answered - loaded,
        "encode": sum(encoding),
    }


def load(folder, name):
    """Only load the model; seconds."""
    from index import open_run

    started = time.perf_counter()
    open_run(f"{folder}/{name}")
    return time.perf_counter() - started


def draw_vectors(folder, number, width=256):
    """An index of random unit vectors, as a search would have saved it."""
    import numpy as np
    import torch

    from index import Index, write_index

    number, generator = int(number), torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(number, width, generator=generator), dim=1)
    names = [f"{row % 1000:03d}/photograph_{row:08d}.jpg" for row in range(number)]
    stamps, digests = np.zeros((number, 2), np.int64), np.zeros((number, 16), np.uint8)
    write_index(Path(folder) / "vectors.safetensors", "benchmark", Index(names, stamps, digests, vectors))


def rank_vectors(folder):
    """Open the index of vectors and rank all of them for one query; times in seconds."""
    import torch

    from index import read_index
    from inference import average_scores, rank

    started = time.perf_counter()
    index = read_index(Path(folder) / "vectors.safetensors", "benchmark")
    opened = time.perf_counter()
    times = []
    for seed in range(3):
        query = torch.nn.functional.normalize(
            torch.randn(1, index.vectors.shape[1], generator=torch.Generator().manual_seed(seed)), dim=1
        )
        before = time.perf_counter()
        best = rank(average_scores([index.vectors], [query])[0], 9, 0.5)
        times.append(time.perf_counter() - before)
    assert len(best) == 9
    return {"open": opened - started, "first": times[0], "later": min(times[1:])}


def repaint(file, seed):
    from PIL import Image

    Image.new("RGB", (64, 48), (seed, 200, 100)).save(file)


def change_files(folder):
    """Change one picture, delete one and rename one; {what: pictures embedded by the next search}."""
    import index
    import inference

    queries = inference.build_queries(inference.parse_arguments([QUERY]))
    runs, embedded, embed = [inference.open_run(f"{folder}/small")], [], index.embed_images
    index.embed_images = lambda model, files, **more: embedded.extend(files) or embed(model, files, **more)
    files = sorted((Path(folder) / "gallery").rglob("*.jpg"))
    counts = {}
    for what, change in (
        ("nothing changed", lambda: None),
        ("one changed", lambda: repaint(files[1], 1)),
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
        started = time.perf_counter()
        inference.search_pictures(runs, inference.list_gallery(f"{folder}/gallery", None), queries)
        counts[what] = {"embedded": len(embedded), "seconds": round(time.perf_counter() - started, 3)}
    return counts


def main():
    pictures, vectors = (int(word) for word in sys.argv[1:] or (8000, 1_000_000))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepare(folder, pictures)
        for name in ENCODERS:
            in_fresh_process("answer", folder, name)  # embeds and saves
        runs, loads = {name: [] for name in ENCODERS}, []
        for _ in range(REPEATS):
            loads.append(in_fresh_process("load", folder, "distilbert"))
            for name in ENCODERS:
                runs[name].append(in_fresh_process("answer", folder, name))
        changes = in_fresh_process("change", folder)
        in_fresh_process("draw", folder, vectors)
        ranked = [in_fresh_process("rank", folder) for _ in range(REPEATS)]

    def row(what, times):
        return {"what": what, "milliseconds: median (range)": spread([1000 * t for t in times], 0)}

    rows = [
        row("loading the model alone", loads),
        row(f"loading it, and listing {pictures:,} pictures meanwhile", [run["load"] for run in runs["distilbert"]]),
        row("then answering one sentence", [run["answer"] for run in runs["distilbert"]]),
        row("all of that but encoding the sentence", [run["answer"] - run["encode"] for run in runs["distilbert"]]),
        row("answering with the small text encoder of the demo", [run["answer"] for run in runs["small"]]),
        row(f"opening an index of {vectors:,} vectors of width 256", [run["open"] for run in ranked]),
        row("ranking them, first query", [run["first"] for run in ranked]),
        row("ranking them, later queries", [run["later"] for run in ranked]),
    ]
    report("search", rows, changes=changes)


STEPS = {"answer": answer, "load": load, "change": change_files, "rank": rank_vectors, "draw": draw_vectors}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in STEPS:  # in a fresh process
        print(json.dumps(STEPS[sys.argv[1]](*sys.argv[2:])))
    else:
        main()

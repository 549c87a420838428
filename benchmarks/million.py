"""Start-up with a million captions: seconds and peak memory from the captions file to the first batch.

    python benchmarks/million.py
    git worktree add ../before COMMIT && python benchmarks/million.py --before ../before

Writes a captions file of 200,000 images with five captions each (11 of 3,000 words) to a temporary folder; no image is
opened. Each version of the code runs in a process of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

STAGES = ("read_captions", "captions_by_image", "make_pairs", "TokenStore", "first batch")


def measure(code, captions_file):
    """Print {stage: [seconds, peak memory in MB above that of the imports]} of the version in the folder `code`."""
    sys.path.insert(0, code)
    import dataset
    from config import build_config

    captions = ["a dog runs"] * 2
    tokenizer = dataset.train_tokenizer([f"word{number} word{number} ." for number in range(3000)])
    dataset.TokenStore(tokenizer, captions, 200)
    found, start, before = {}, time.perf_counter(), peak()

    def record(stage):
        nonlocal start
        found[stage] = [time.perf_counter() - start, peak() - before]
        start = time.perf_counter()

    frame = dataset.read_captions(captions_file)
    record("read_captions")
    by_name = dataset.captions_by_image(frame)
    del frame
    record("captions_by_image")
    pairs = dataset.make_pairs(by_name, "images", list(by_name))
    del by_name
    record("make_pairs")
    tokens = dataset.TokenStore(tokenizer, pairs.captions, 200)
    record("TokenStore")
    sampler = dataset.PairSampler(pairs, build_config({"captions_per_image": 5}))
    keys = next(iter(sampler.batches()))
    record("first batch")
    assert len(tokens) == len(pairs.captions)
    print(json.dumps({"stages": found, "check": [int(tokens.ids.sum()), repr(keys)[:200]]}))


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def write_captions(path, images, seed=0):
    import numpy as np

    words, rng = np.array([f"word{number}" for number in range(3000)]), np.random.default_rng(seed)
    with open(path, "w", encoding="utf-8") as file:
        file.write("image,caption\n")
        for image in range(images):
            for caption in rng.choice(words, (5, 11)):
                file.write(f"{image // 1000:03d}/{image:08d}.jpg,{' '.join(caption)} .\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--before", help="folder of another version of the code, which is measured as well")
    arguments = parser.parse_args()
    from common import ROOT, report

    versions = {"before": arguments.before, "now": ROOT} if arguments.before else {"now": ROOT}
    with tempfile.TemporaryDirectory() as folder:
        captions_file = Path(folder) / "captions.csv"
        write_captions(captions_file, arguments.images)
        found = {}
        for version, code in versions.items():
            command = [sys.executable, __file__, "measure", str(Path(code).resolve()), str(captions_file)]
            printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            found[version] = SimpleNamespace(**json.loads(printed.splitlines()[-1]))
    assert len({json.dumps(each.check) for each in found.values()}) == 1, "the versions give different batches"
    rows = []
    for stage in (*STAGES, "total"):
        row = {"stage": stage}
        for number, (unit, digits, combine) in enumerate((("s", 1, sum), ("MB", 0, max))):
            for version, each in found.items():
                values = [each.stages[name][number] for name in STAGES]
                value = combine(values) if stage == "total" else each.stages[stage][number]
                row[f"{version}, {unit}"] = f"{value:.{digits}f}"
        rows.append(row)
    report("million", rows, captions=5 * arguments.images)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(*sys.argv[2:])
    else:
        main()

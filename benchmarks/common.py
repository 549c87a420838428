"""What the benchmarks share: drawn photographs, peak memory, fresh processes, and results with their circumstances.

Each benchmark is run from the repository's root (`python benchmarks/loss.py`), prints a table, and writes it to
benchmarks/results/ with the hardware, the versions and the command. The machines that run them are noisy: what is
compared is measured in turn, several times, and reported as the median with the smallest and the largest value.
"""

import csv
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from config import build_config, parse_flags, write_json  # noqa: E402 (it lies in the repository's root)

PACKAGES = ("torch", "torchvision", "timm", "transformers", "numpy", "pillow", "albumentations")


# ---- data -------------------------------------------------------------------------------------------------------


def draw_photographs(folder, count, seed=0):
    """Write `count` 500 x 375 JPEGs and a captions file in Kaggle's layout, five captions a picture; returns settings.

    The pictures are as costly to decode as photographs are (noise at every scale, about 110 kB each; Flickr8k's have
    about 130 kB), and the captions as long as Flickr8k's (logarithms of the numbers of words: mean 2.41, deviation
    0.34; at most 38).
    """
    import numpy as np

    folder, rng = Path(folder), np.random.default_rng(seed)
    (folder / "Images").mkdir(parents=True)
    with open(folder / "captions.txt", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for number in range(count):
            name = f"{number:05d}.jpg"
            draw_photograph(rng).save(folder / "Images" / name, quality=92)
            for _ in range(5):
                words = int(np.clip(rng.lognormal(2.41, 0.34), 2, 38))
                writer.writerow([name, " ".join(f"w{word}" for word in rng.integers(0, 500, words))])
    return {"image_path": str(folder / "Images"), "captions_path": str(folder / "captions.txt")}


def draw_photograph(rng):
    """A 500 x 375 picture whose spectrum falls off as a photograph's does: noise of seven octaves."""
    import numpy as np
    from PIL import Image

    pixels = np.full((375, 500, 3), 128, dtype=np.float32)
    for octave in range(7):
        shape = (9 * 2**octave // 2, 6 * 2**octave)
        noise = rng.normal(0, 30, (*shape, 3)) + rng.normal(0, 40, (*shape, 1))  # mostly light and dark
        noise = Image.fromarray(np.clip(noise + 128, 0, 255).astype(np.uint8))
        smooth = np.asarray(noise.resize((500, 375), Image.Resampling.BILINEAR), dtype=np.float32) - 128
        pixels += smooth / 1.15**octave
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def benchmark_config(folder, flags, pictures, **defaults):
    """The `Config` of a benchmark: its own defaults, then the flags; draws photographs into `folder` if none are named.

    Encoders start from scratch with a tokenizer made from the captions, so that nothing has to be fetched.
    """
    given = parse_flags(flags)
    values = {"pretrained": False, "text_tokenizer": "captions", "num_workers": min(4, os.cpu_count()), **defaults}
    values |= {"run": str(Path(folder) / "run"), "cache_path": str(Path(folder) / "cache")}
    if "image_path" not in given:
        values |= draw_photographs(Path(folder) / "drawn", pictures)
    return build_config({**values, **given})


# ---- measuring --------------------------------------------------------------------------------------------------


def peak_memory(device="cpu"):
    """The largest memory this process ever held, bytes: on a GPU what PyTorch allocated there, else in RAM."""
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_fresh_process(*arguments, launcher=()):
    """Run this benchmark again in a process of its own and return the JSON that its last line holds.

    A peak of memory never falls, and on Linux a new process starts with its parent's: so each measurement gets a
    process, and the benchmark that starts them imports nothing large.
    """
    command = [sys.executable, *launcher, sys.argv[0], *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def spread(values, digits=2):
    """Median and range of repeated measurements as text."""
    low, middle, high = (f"{f(values):.{digits}f}" for f in (min, statistics.median, max))
    return f"{middle} ({low} to {high})" if len(values) > 1 else middle


# ---- results ----------------------------------------------------------------------------------------------------


def report(name, rows, details=None, folder=None, **more):
    """Print the rows (dicts with the same keys) as a Markdown table and write them to results/ (or `folder`), with
    `more` and, not printed, the dict `details`.
    """
    columns = list(rows[0])
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(str(row[column]) for column in columns)} |")
    for key, value in more.items():
        print(f"{key}: {value}")
    content = {
        "command": " ".join(["python", Path(sys.argv[0]).resolve().relative_to(ROOT).as_posix(), *sys.argv[1:]]),
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
        "rows": rows,
        **more,
        **(details or {}),
    }
    folder = Path(folder or ROOT / "benchmarks" / "results")
    folder.mkdir(exist_ok=True)
    write_json(folder / f"{name}.json", content)
    print(f"written to {folder / name}.json")


def hardware():
    """The processor with its cores and memory, and the GPUs if there are any."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "memory_GB": round(memory / 1e9, 1) or None,
        "gpus": [f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB" for gpu in gpus],
        "system": platform.system(),
    }


def processor_name():
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

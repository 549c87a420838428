"""Helpers shared by the benchmarks: synthetic images, training steps, peak memory, subprocesses, result files.

Run a benchmark from the root of the repository (`python benchmarks/loss.py`). It prints a table and writes it to
benchmarks/results/ together with the hardware, the versions and the command. Timings are noisy, so the candidates are
measured in turn over several rounds and reported as the median with the range.
"""

import csv
import importlib.metadata
import itertools
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from config import Config, InputError, build_config  # noqa: E402
from utils.cli import StopRequest  # noqa: E402
from utils.files import read_json, write_json  # noqa: E402
from utils.flags import parse_flags  # noqa: E402

PACKAGES = ("torch", "torchvision", "timm", "transformers", "numpy", "pillow", "albumentations")


# ---- data -------------------------------------------------------------------------------------------------------


def write_noise_images(folder, count, seed=0):
    """Write `count` 500 x 375 JPEGs and a captions file in Kaggle's layout, five captions per image.

    The images cost as much to decode as photographs (noise at every scale, about 110 kB each; about 130 kB in
    Flickr8k), and the captions are as long as those of Flickr8k (log-normal number of words with mean 2.41 and
    standard deviation 0.34 of the logarithm, at most 38 words). Returns the settings `image_path` and `captions_path`.
    """
    import numpy as np

    folder, rng = Path(folder), np.random.default_rng(seed)
    (folder / "Images").mkdir(parents=True)
    with open(folder / "captions.txt", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for number in range(count):
            name = f"{number:05d}.jpg"
            noise_image(rng).save(folder / "Images" / name, quality=92)
            for _ in range(5):
                words = int(np.clip(rng.lognormal(2.41, 0.34), 2, 38))
                writer.writerow([name, " ".join(f"w{word}" for word in rng.integers(0, 500, words))])
    return {"image_path": str(folder / "Images"), "captions_path": str(folder / "captions.txt")}


def noise_image(rng):
    """A 500 x 375 PIL image with the spectrum of a photograph: noise in seven octaves."""
    import numpy as np
    from PIL import Image

    pixels = np.full((375, 500, 3), 128, dtype=np.float32)
    for octave in range(7):
        shape = (9 * 2**octave // 2, 6 * 2**octave)
        noise = rng.normal(0, 30, (*shape, 3)) + rng.normal(0, 40, (*shape, 1))  # more luminance than colour
        noise = Image.fromarray(np.clip(noise + 128, 0, 255).astype(np.uint8))
        smooth = np.asarray(noise.resize((500, 375), Image.Resampling.BILINEAR), dtype=np.float32) - 128
        pixels += smooth / 1.15**octave
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def benchmark_config(folder, flags, num_images, **defaults):
    """The `Config` of a benchmark: its defaults, overridden by the flags.

    Without the flag `--image_path`, `num_images` synthetic images are written to `folder`. Encoders are trained from
    scratch with a tokenizer built from the captions, so nothing is downloaded.
    """
    given, _ = parse_flags(flags, Path(sys.argv[0]).name, "Benchmark; its flags are the settings of main.py.")
    values = {"pretrained": False, "text_tokenizer": "wordpiece", "num_workers": min(4, os.cpu_count()), **defaults}
    values |= {"run": str(Path(folder) / "run"), "cache_path": str(Path(folder) / "cache")}
    if "image_path" not in given:
        values |= write_noise_images(Path(folder) / "data", num_images)
    return build_config({**values, **given})


def parse_caption(caption):
    """(background, [(color, shape), (color, shape)]) of a caption of the synthetic data set, None for any other."""
    from utils.synthetic import BACKGROUNDS, COLORS, SHAPES

    shapes = {word: shape for shape, synonym in SHAPES.items() for word in (shape, synonym)}
    words = re.findall(r"\w+", caption.lower())
    backgrounds = [word for word in words if word in BACKGROUNDS]
    objects = [(a, shapes[b]) for a, b in itertools.pairwise(words) if a in COLORS and b in shapes]
    return (backgrounds[0], objects) if len(backgrounds) == 1 and len(objects) == 2 else None


# ---- training ---------------------------------------------------------------------------------------------------


class TrainingLoop:
    """The program's own training loop, a few steps at a time: the set-up of `main.train`, then `train_one_epoch`."""

    def __init__(self, config):
        import main
        from utils.device import setup_device
        from utils.distributed import init_processes
        from utils.embed import precompute_features
        from utils.image_cache import open_images

        self.config = config = init_processes(config)
        self.device, self.amp_dtype = setup_device(config.device, config.precision)
        splits = main.load_data(config)
        self.pairs = splits["train"]
        self.model = main.build_model(config, self.pairs.captions, self.device)
        open_images(splits, config)
        precompute_features(self.model, splits, self.amp_dtype, config)
        sampler, loader = main.build_loader(self.model, self.pairs, config)
        self.state = build_state(self.model, config, self.amp_dtype, self.pairs, config.epochs * sampler.num_batches)
        self.batches = endless_batches(sampler, loader)
        self.counts = itertools.cycle(sampler.micro_batch_counts())  # micro-batches of each step

    def train(self, steps):
        """Train for some steps; returns the seconds spent waiting for data."""
        counts = list(itertools.islice(self.counts, steps))
        return train_steps(self.state, self.batches, counts, self.config, self.amp_dtype)["data_time"]


def endless_batches(sampler, loader):
    """Yield the loader's micro-batches, epoch after epoch."""
    for epoch in itertools.count():
        sampler.epoch = epoch
        yield from loader


def build_state(model, config, amp_dtype, pairs=None, steps=1):
    """The `main.TrainState` of a new run of `steps` steps."""
    import torch

    import main

    optimizer = main.build_optimizer(model, config)
    return main.TrainState(
        model=model,
        ema=main.EMA(model, config.ema_decay) if config.ema_decay else None,
        optimizer=optimizer,
        scheduler=main.build_scheduler(optimizer, config, steps),
        scaler=torch.amp.GradScaler(model.device.type, enabled=amp_dtype == torch.float16),
        augmentation=main.build_gan_augmentation(model, pairs, amp_dtype, config, steps),
        loss_sum=torch.zeros((), device=model.device),
    )


def train_steps(state, batches, counts, config, amp_dtype):
    """Run `main.train_one_epoch` on an epoch of len(counts) steps; returns its statistics.

    Args:
        batches: iterable of micro-batches. counts: number of micro-batches of each step.
    """
    import main

    sampler = SimpleNamespace(num_batches=len(counts), micro_batch_counts=lambda: counts)
    state.batch = 0
    return main.train_one_epoch(state, sampler, batches, config, amp_dtype, stop=StopRequest())


# ---- measuring --------------------------------------------------------------------------------------------------


def synchronized_time(device):
    """Seconds on a monotonic clock, after all processes have reached this point and the device is idle."""
    import torch
    import torch.distributed as dist

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
    return time.perf_counter()


def peak_memory(device="cpu"):
    """Peak memory of this process, bytes: on a GPU what PyTorch allocated there, else the resident set size."""
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_fresh_process(*arguments, launcher=()):
    """Run this benchmark again in a new process and return the JSON in the last line of its output.

    Peak memory never falls, and on Linux a new process inherits the peak of its parent. So each measurement has its
    own process, and a benchmark that measures memory imports nothing large in the parent.
    """
    command = [sys.executable, *launcher, sys.argv[0], *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def in_fork(function, folder, kill_after=None):
    """Call a function in a forked process in `folder`; returns its exit status, its output and the seconds it took.

    The process is killed after some seconds, which gives the status -9. A fork spares the imports.
    """
    reader, writer = os.pipe()
    start, process = time.monotonic(), os.fork()
    if process == 0:
        os.chdir(folder)
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        status = 70
        try:
            function()
            status = 0
        except SystemExit as error:
            status = error.code
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(writer)
    chunks, timer = [], threading.Timer(kill_after or 600, os.kill, (process, signal.SIGKILL))
    thread = threading.Thread(target=read_all, args=(reader, chunks), daemon=True)
    thread.start()
    timer.start()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    timer.cancel()
    thread.join(10)  # loader processes of a killed process end some seconds later
    return status, b"".join(chunks).decode(errors="replace"), time.monotonic() - start


def read_all(reader, chunks):
    with os.fdopen(reader, "rb", buffering=0) as file:
        while chunk := file.read(2**16):
            chunks.append(chunk)


def spread(values, digits=2):
    """Median and range of repeated measurements as text."""
    low, middle, high = (f"{f(values):.{digits}f}" for f in (min, statistics.median, max))
    return f"{middle} ({low} to {high})" if len(values) > 1 else middle


# ---- results ----------------------------------------------------------------------------------------------------


def print_table(rows, heading=""):
    """Print dicts with the same keys as a Markdown table."""
    print(f"\n{heading}\n" if heading else "")
    print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(map(str, row.values()))} |")


def report(name, rows, details=None, folder=None, **more):
    """Print a table and write it to results/`name`.json, with the hardware, the versions and the command.

    Args:
        rows: dicts with the same keys, one per row of the table.
        details: dict that is written but not printed.
        folder: in place of benchmarks/results.
        more: further results, printed below the table and written.
    """
    print_table(rows)
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
    path = Path(folder or ROOT / "benchmarks" / "results") / f"{name}.json"
    write_json(path, content)
    print(f"written to {path}")


def check_folder(folder, config, **more):
    """Raise InputError if the folder contains runs with other settings, which would be mixed with those of today.

    more: settings besides those of the `Config`.
    """
    path, settings = Path(folder) / "settings.json", {**vars(config), "run": "", "device": "", "num_workers": 0, **more}
    if path.exists():
        before = {**vars(Config()), **read_json(path)}  # earlier versions had fewer settings
        for name, value in settings.items():
            if before.get(name) != value:
                raise InputError(
                    f"{name} is {value}, but {folder} contains runs with {before.get(name)}: pass another --folder"
                )
    write_json(path, settings)


def holm(values):
    """p-values corrected for their number (Holm 1979), in the same order."""
    corrected, largest = [0.0] * len(values), 0.0
    for rank, i in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        largest = max(largest, min(1.0, values[i] * (len(values) - rank)))
        corrected[i] = largest
    return corrected


def hardware():
    """Processor, cores, memory and GPUs of this machine, a dict."""
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

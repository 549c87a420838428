"""Random SIGKILLs and full disks: a resumed run equals an undisturbed one, and nothing is left behind.

    python benchmarks/kill.py --kills 50

Every variant is trained once undisturbed. Then runs are killed, half of them at random times, half just before or after
a random file is replaced, and resumed until they end; and runs whose disk is full from the k-th written file on, for
every k, are resumed with a disk that is not. The whole folders, run and cache, are compared but for times. Linux only.
"""

import argparse
import json
import os
import random
import resource
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from common import in_fork, report  # noqa: E402

import main as training  # noqa: E402
import utils.files  # noqa: E402
from gan import GAN  # noqa: E402, F401  imported once, before the processes are forked
from utils.files import read_json  # noqa: E402
from utils.synthetic import generate_dataset  # noqa: E402

SETTINGS = {"model_name": "test_resnet", "text_tokenizer": "wordpiece", "text_layers": 1, "text_width": 64}
SETTINGS |= {"pretrained": "false", "size": 32, "max_length": 32, "projection_dim": 32, "epochs": 2, "batch_size": 8}
SETTINGS |= {"captions_per_image": 2, "num_workers": 0, "device": "cpu", "warmup_steps": 2}
SETTINGS |= {"precision": "float32", "run": "run", "cache_path": "cache", "ema_decay": 0.9}
GAN_SETTINGS = {"gan_size": 32, "gan_width": 4, "gan_epochs": 2, "gan_batch_size": 8, "gan_start": 0.0}
GAN_SETTINGS |= {"gan_filter_top_k": 100}
VARIANTS = {
    "plain": {},
    "loader processes": {"num_workers": 2},
    "GAN pairs": {"gan": "pairs", **GAN_SETTINGS},
    "joint GAN": {"gan": "joint", **GAN_SETTINGS},
}
TIMES = ("seconds", "images_per_second", "data_time_share")  # in metrics.jsonl


# ---- processes --------------------------------------------------------------------------------------------------


def train(argv, folder, fault=None, kill_after=None):
    """Train in a forked process in `folder`; `fault` prepares it. Returns its status, output, seconds, and writes."""

    def child():
        count = fault() if fault else count_replaced()
        try:
            training.main(argv)
        finally:
            print(f"\nwrites: {count[0]}", flush=True)

    status, output, seconds = in_fork(child, folder, kill_after)
    found = output.rpartition("writes: ")[2].strip()
    return status, output, seconds, int(found) if found.isdigit() else 0


def count_replaced(kill_at=None, before=False):
    """Count the files that `atomic_write` replaces in this process, [number]; kill it at the file number `kill_at`."""
    replace, count = Path.replace, [0]

    def counted(path, target):
        count[0] += 1
        if count[0] == kill_at and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = replace(path, target)
        if count[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    Path.replace = counted
    return count


def fill_disk(number):
    """From the `number`-th file that this process writes, no file can grow; returns the count, [number of files]."""
    create, count = utils.files.create_temporary_folder, [0]

    def counted(path):
        count[0] += 1
        if count[0] == number:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return create(path)

    utils.files.create_temporary_folder = counted
    return count


def command(settings, folder):
    """The command line that starts the run, or resumes it."""
    if (folder / "run" / "config.json").exists():
        return ["--resume", "--run", "run"]
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def finish(settings, folder):
    """Train until the end without a fault; returns the output of a failure, or an empty string."""
    status, output, *_ = train(command(settings, folder), folder)
    return output if status else ""


# ---- comparison -------------------------------------------------------------------------------------------------


def contents(folder):
    """{relative path: content without times} of all files in a folder; folders have the content None."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            found[name] = None
        elif path.name == "metrics.jsonl":
            found[name] = without_times([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
        elif path.name == "weights_hash.json":
            found[name] = read_json(path)["hash"]
        elif path.suffix == ".pt":
            found[name] = flatten(torch.load(path, weights_only=True))
        else:
            found[name] = path.read_bytes()
    return found


def without_times(history):
    return [{name: value for name, value in line.items() if name not in TIMES} for line in history]


def flatten(value):
    """A checkpoint as nested tuples that can be compared, without times."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return tuple((str(key), flatten(item)) for key, item in value.items() if key not in TIMES)
    return tuple(map(flatten, value)) if isinstance(value, (list, tuple)) else value


def differences(folder, expected):
    """The names of files that differ from the undisturbed run, are missing or left behind."""
    found = contents(folder)
    return sorted(name for name in {*found, *expected} if found.get(name, 0) != expected.get(name, 0))


# ---- the benchmark ----------------------------------------------------------------------------------------------


def disturb(settings, folder, kills, rng, seconds, writes):
    """Kill a run at random moments and resume it until it ends; returns the number of kills and a failure."""
    done = 0
    while done < kills:
        if done % 2:
            after = rng.uniform(0, seconds)
            status, output, *_ = train(command(settings, folder), folder, kill_after=after)
        else:
            at, before = rng.randint(1, max(1, writes // 2)), rng.random() < 0.5
            status, output, *_ = train(command(settings, folder), folder, lambda: count_replaced(at, before))  # noqa: B023
        if status == 0:
            return done, ""
        if status != -signal.SIGKILL:
            return done, output
        done += 1
    return done, finish(settings, folder)


def check_variant(name, work, kills, full_disk, rng):
    """The row of a variant; prints what went wrong."""
    settings, failures = {**SETTINGS, **VARIANTS[name], "image_path": work / "data", "captions_path": work / "c.txt"}, 0
    slug = name.replace(" ", "-")
    undisturbed = new_folder(work / slug / "undisturbed")
    status, output, seconds, writes = train(command(settings, undisturbed), undisturbed, lambda: fill_disk(0))
    if status:
        raise RuntimeError(output)
    expected = contents(undisturbed)
    row = {"variant": name, "kills": 0, "full disks": 0, "files": len(expected), "differences": 0}

    def compare(what, folder, failure):
        nonlocal failures
        different = differences(folder, expected)
        if failure or different:
            row["differences"] += 1
            print(f"{name}, {what}: {different}\n{failure[-2000:]}", flush=True)

    number = 0
    while row["kills"] < kills:
        folder = new_folder(work / slug / f"kills-{number}")
        done, failure = disturb(settings, folder, min(5, kills - row["kills"]), rng, seconds, writes)
        row["kills"] += done
        compare(f"after {done} kills", folder, failure)
        number += 1
    for k in range(1, writes + 1) if full_disk else []:
        folder = new_folder(work / slug / f"full-{k}")
        status, output, *_ = train(command(settings, folder), folder, lambda: fill_disk(k))  # noqa: B023
        failure = "" if status == 2 and output.count("error: ") == 1 and "Traceback" not in output else output
        compare(f"disk full at file {k}", folder, failure or finish(settings, folder))
        row["full disks"] += 1
    return row


def new_folder(folder):
    folder.mkdir(parents=True)
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="over all variants")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS])
    parser.add_argument("--full_disk", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", help="folder for kill.json, in place of benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng, variants = random.Random(arguments.seed), arguments.variants
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        generate_dataset(work / "data", work / "c.txt", 24, validation_images=8, test_images=10)
        kills = -(-arguments.kills // len(variants))
        rows = [check_variant(name, work, kills, arguments.full_disk, rng) for name in variants]
    report("kill", rows, folder=arguments.results)
    return 1 if any(row["differences"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

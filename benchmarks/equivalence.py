"""Compare the results of short training runs with those of an earlier commit, tensor by tensor.

    python benchmarks/equivalence.py --reference 4c3953c

Both code bases train the same configurations on the same synthetic images with the same seeds, each run in a process
of its own, on one thread. Every configuration runs twice:

- float32, with the tiled loss in both. The loss is computed by the same operations, so the weights are expected to be
  identical to the last bit.
- float64, with the loss that the code chooses (dense where the matrix is small). Dense and tiled losses differ by
  rounding alone, but in float32 that rounding does not stay small: where a gradient is close to zero, AdamW divides
  rounding error by rounding error, and weights differ by up to 2e-3 after six steps. In float64 the same effect stays
  below 1e-7, so a larger difference means that the code computes something else. Ranks are not compared here: rounding
  decides which of two equal captions scores higher.

The comparison covers the last checkpoint (weights, EMA, optimizer moments), the best model, the GAN if there is one,
and the metrics. The script prints a table and exits with status 1 if any value differs by more than 1e-5.
"""

import argparse
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TOLERANCE = 1e-5  # largest absolute difference
MIN_SCALE = 1e-6  # smallest scale of relative differences: some gradients are zero but for rounding
PRECISIONS = {"float32": "float32, tiled loss", "float64": "float64, default loss"}
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--")
# A narrow shared space: the GAN whitens the caption embeddings, and axes along which they do not vary are arbitrary.
GAN = (
    *("--preset", "demo", "--batch_size", "32", "--epochs", "1", "--projection_dim", "16"),
    *("--gan_size", "32", "--gan_width", "8", "--gan_epochs", "2", "--gan_batch_size", "16"),
    *("--gan_start", "0", "--gan_end", "1"),
)
DEMO = ("--preset", "demo", "--batch_size", "32", "--epochs", "2")
CONFIGURATIONS = {
    "demo": DEMO,
    "from scratch with EMA": ("--preset", "scratch", "--batch_size", "32", "--epochs", "1"),
    "gradient caching with dropout": (*DEMO, "--micro_batch_size", "8", "--dropout", "0.1"),
    "two processes": DEMO,
    "gan pairs": (*GAN, "--gan", "pairs", "--gan_filter_top_k", "50"),
    "gan joint": (*GAN, "--gan", "joint", "--gan_filter_top_k", "100"),
    "one caption per image with dropout": (*DEMO, "--captions_per_image", "1", "--dropout", "0.1"),
}
# Flags and results whose names the reference may not know yet: {new: old}, {old: new}.
RENAMED_FLAGS = {"--gan_filter_top_k": "--gan_gate", "scratch": "best"}
RENAMED_RESULTS = {
    "first/": "stage1/",
    "last.pt:generated:": "last.pt:augmentation:",
    ":average:": ":ema:",
    "augmentation:copy:": "augmentation:clip_ema:",
    ":right_caption_in_first_10_of_100": ":image_to_caption_R@10_of_100",
    ":dropped_by_gate": ":dropped_by_filter",
}
TENSOR_FILES = ("last.pt", "best/model.safetensors", "gan/last.pt", "gan/generator.safetensors")
METRIC_FILES = ("metrics.jsonl", "results.json", "gan/metrics.jsonl")
COUNT_METRICS = re.compile(r"R@|rank|rsum|above")
TIMES = ("seconds", "images_per_second", "waiting_share", "data_time_share")


def main():
    parser = argparse.ArgumentParser(description="Compare the results of short training runs with another commit.")
    parser.add_argument("--reference", default="4c3953c", help="commit to compare with (default: %(default)s)")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=CONFIGURATIONS,
        metavar="NAME",
        help=f"configurations (default: all): {', '.join(CONFIGURATIONS)}",
    )
    parser.add_argument("--old", type=Path, help=argparse.SUPPRESS)  # a folder in place of the reference commit
    parser.add_argument("--new", type=Path, help=argparse.SUPPRESS)  # a folder in place of this repository
    parser.add_argument("--keep", type=Path, help=argparse.SUPPRESS)  # a new folder that keeps all runs
    arguments = parser.parse_args()
    # Not at the top: the training processes start from this file, too, and import the modules of the code they run.
    from common import ROOT, report

    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.keep or Path(temporary)).resolve()
        codes = {"old": arguments.old or check_out(arguments.reference, ROOT, folder / "code")}
        codes["new"] = arguments.new or ROOT
        write_data(folder / "data")
        names = arguments.only or list(CONFIGURATIONS)
        rows = [compare(*key, *runs) for key, runs in train_all(codes, names, folder).items()]
    official = not (arguments.only or arguments.old or arguments.new)
    report("equivalence", rows, folder=None if official else tempfile.mkdtemp(), reference=arguments.reference)
    if any(row["result"] not in ("identical", f"within {TOLERANCE:g}") for row in rows):
        raise SystemExit(1)


def check_out(commit, repository, folder):
    """The files of a commit, in a new folder."""
    archive = subprocess.run(["git", "archive", commit], cwd=repository, stdout=subprocess.PIPE, check=True).stdout
    folder.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def write_data(folder):
    """Synthetic images with five captions each in `folder`, and with one caption each in `folder`/single."""
    from utils.synthetic import generate_dataset

    generate_dataset(folder / "Images", folder / "captions.txt", 96, validation_images=32, test_images=32)
    (folder / "single").mkdir()
    header, *lines = (folder / "captions.txt").read_text(encoding="utf-8").splitlines()
    (folder / "single" / "captions.txt").write_text("\n".join([header, *lines[::5]]) + "\n", encoding="utf-8")
    for path in folder.glob("*Images.txt"):
        shutil.copy(path, folder / "single")


# ---- training ---------------------------------------------------------------------------------------------------


def train_all(codes, names, folder):
    """{(configuration, precision): [old run, new run]}, trained two at a time; a run is what `train` returns."""
    jobs = [(name, precision, code) for name in names for precision in PRECISIONS for code in codes]
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda job: train(*job, codes[job[2]], folder), jobs))
    found = {}
    for (name, precision, _), run in zip(jobs, runs, strict=True):
        found.setdefault((name, precision), []).append(run)
    return found


def train(name, precision, code, code_folder, folder):
    """Train one run in its own process; returns (run folder, log of its steps, its output if it failed)."""
    run = folder / f"{name}, {precision}, {code}"
    data = folder / "data" / ("single" if name.startswith("one caption") else "")
    flags = [*CONFIGURATIONS[name], "--image_path", folder / "data" / "Images", "--captions_path", data]
    flags += ["--run", run, "--cache_path", folder / f"{run.name}, cache"]
    flags += ["--device", "cpu", "--precision", "float32", "--num_workers", "0"]
    if "gan_filter_top_k" not in (code_folder / "config.py").read_text(encoding="utf-8"):
        flags = [RENAMED_FLAGS.get(flag, flag) for flag in flags]
    launcher = TORCHRUN if name == "two processes" else ()
    log = folder / f"{run.name}.json"
    command = [sys.executable, *launcher, Path(__file__).resolve(), "child", precision, log, *flags]
    done = subprocess.run(
        [str(word) for word in command],
        cwd=code_folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(f"{run.name}: {'done' if done.returncode == 0 else 'failed'}", flush=True)
    return run, log, None if done.returncode == 0 else done.stdout[-3000:]


def train_here(precision, log, flags):
    """Run the main.py of the working directory; writes the L1 norms of the parameters after each step to `log`."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    sys.path[0], sys.argv = os.getcwd(), ["main.py", *flags]  # not the modules beside this file
    if precision == "float64":
        torch.set_default_dtype(torch.float64)
        torch.Tensor.float = torch.Tensor.double
    else:
        import clip

        clip.MAX_DENSE_LOGITS = -1  # the tiled loss whatever the size of the batch, as in the reference
    steps = []

    def note(optimizer, *_):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        steps.append([p.detach().double().abs().sum().item() for p in parameters])

    register_optimizer_step_post_hook(note)
    runpy.run_path("main.py", run_name="__main__")
    if os.environ.get("RANK", "0") == "0":
        Path(log).write_text(json.dumps(steps), encoding="utf-8")


# ---- comparison -------------------------------------------------------------------------------------------------


def compare(name, precision, old, new):
    """The table's row for a configuration: the largest differences between the results of both runs."""
    row = {"configuration": name, "arithmetic": PRECISIONS[precision]}
    for _, _, error in (old, new):
        if error:
            print(f"\n{name}, {precision} failed:\n{error}")
            return {**row, "steps": "", "values": "", "difference": "", "relative difference": "", "result": "FAILED"}
    before, after = read_results(old[0]), read_results(new[0])
    if precision == "float64":
        before = {key: value for key, value in before.items() if not COUNT_METRICS.search(key)}
    missing = sorted(key for key in before if key not in after or before[key].shape != after[key].shape)
    differences = {key: difference(before[key], after[key]) for key in before if key not in missing}
    absolute, relative = (max(values) for values in zip(*differences.values(), strict=True))
    result = "identical" if absolute == 0 else f"within {TOLERANCE:g}" if absolute <= TOLERANCE else "DIFFERENT"
    steps = [json.loads(log.read_text(encoding="utf-8")) for _, log, _ in (old, new)]
    if missing or result == "DIFFERENT" or len(steps[0]) != len(steps[1]):
        result = "DIFFERENT"
        print(f"\n{name}, {precision}: {len(missing)} results are missing or have another shape {missing[:5]}")
        print(f"not in the reference: {sorted(after.keys() - before.keys())[:5]}")
        describe(differences, *steps)
    return {
        **row,
        "steps": len(steps[0]),
        "values": len(differences),
        "difference": f"{absolute:.1e}",
        "relative difference": f"{relative:.1e}",
        "result": result,
    }


def describe(differences, old_steps, new_steps):
    """Print the values that differ most, and the first optimizer step after which weights differ."""
    largest = sorted(differences.items(), key=lambda item: -item[1][0])[:8]
    for key, (absolute, relative) in largest:
        print(f"  {absolute:.1e} (relative {relative:.1e}) {key}")
    print(f"optimizer steps: {len(old_steps)} and {len(new_steps)}")
    for number, (old, new) in enumerate(zip(old_steps, new_steps, strict=False), 1):
        if len(old) != len(new) or any(abs(a - b) > TOLERANCE for a, b in zip(old, new, strict=True)):
            print(f"weights differ from optimizer step {number} on")
            return


def difference(a, b):
    """Largest absolute difference of two tensors of one shape, and its ratio to the largest value of the first."""
    a, b = a.double(), b.double()
    if a.numel() == 0 or a.equal(b):
        return 0.0, 0.0
    absolute = (a - b).abs().max().item()
    absolute = float("inf") if absolute != absolute else absolute  # NaN
    return absolute, absolute / max(a.abs().max().item(), MIN_SCALE)


def read_results(run):
    """{name: tensor} of all tensors and metrics that a run leaves, named as in the new code."""
    import torch
    from safetensors.torch import load_file

    found = {}
    for stage in ("", "stage1", "first"):
        for path in (run / stage / name for name in TENSOR_FILES + METRIC_FILES):
            if not path.exists():
                continue
            if path.suffix == ".safetensors":
                content = load_file(path)
            elif path.suffix == ".pt":
                content = torch.load(path, weights_only=True)
            else:
                lines = path.read_text(encoding="utf-8")
                content = [json.loads(line) for line in (lines.splitlines() if path.suffix == ".jsonl" else [lines])]
            for name, tensor in flatten(content, path.relative_to(run).as_posix()):
                for old, new in RENAMED_RESULTS.items():
                    name = name.replace(old, new)
                found[name] = tensor
    return found


def flatten(content, name):
    """(name, tensor) of all tensors and numbers in nested dicts and lists, except times."""
    import torch

    if isinstance(content, dict):
        for key, value in content.items():
            if key not in TIMES:
                yield from flatten(value, f"{name}:{key}")
    elif isinstance(content, (list, tuple)):
        for number, value in enumerate(content):
            yield from flatten(value, f"{name}:{number}")
    elif isinstance(content, (torch.Tensor, int, float)):
        yield name, torch.as_tensor(content)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:  # one training run, in each of its processes
        train_here(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        main()

"""Damaged and hostile run folders: each is answered with results or one line, and nothing happens outside it.

    python benchmarks/fuzz.py --folders 100

A file of a trained run (settings, tokenizer, weights, index, match threshold, GAN, checkpoint) is cut, overwritten,
emptied, or replaced by a FIFO, a folder, a link, a 40 GB file without content or a pickle that runs code, or a value in
it is changed. Then the command that reads it runs. A traceback, a hang, a file outside the run, and a file that only
code in the folder could write are counted. Linux only.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from common import in_fork, report  # noqa: E402
from kill import GAN_SETTINGS, SETTINGS  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import gan  # noqa: E402
import inference  # noqa: E402
import main as training  # noqa: E402
from utils.synthetic import generate_dataset  # noqa: E402

SECONDS = 60  # after which a command hangs
FILES = ("config.json", "best/config.json", "best/tokenizer/*.json", "best/model.safetensors", "best/weights_hash.json")
FILES += ("index/*.safetensors", "index/match_threshold-*.json", "gan/config.json", "gan/generator.safetensors")
FILES += ("last.pt", "gan/last.pt")
VALUES = (None, True, -1, 0, 3.5, 2**40, -(2**70), "", "x", "../../victim", [], {}, [[]], 1e308, float("nan"))
VALUES += ("a" * 10**6, "\0", "http://localhost/x", {"auto_map": {"AutoModel": "evil.Evil"}})
ADDED = {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}, "checkpoint_path": "evil.pth"}
ADDED |= {
    "model_args": {"checkpoint_path": "evil.pth"},
    "trust_remote_code": True,
    "pretrained_cfg": {"file": "evil.pth"},
}


class Evil:
    """A pickle of it creates the canary file."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return open, (self.canary, "w")


# ---- mutations --------------------------------------------------------------------------------------------------


def cut(path, rng, _):
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content) + 1)])


def overwrite(path, rng, _):
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 10, 1000))):
        content[rng.randrange(len(content))] = rng.randrange(256)
    path.write_bytes(content)


def replace_by(make):
    def mutate(path, rng, canary):
        path.unlink()
        make(path, canary)

    return mutate


def make_sparse(path, _):
    with open(path, "wb") as file:
        file.truncate(40 * 10**9)


def make_pickle(path, canary):
    torch.save({"model": Evil(canary), "gan": Evil(canary)}, path)


def change(path, rng, canary):
    """Change a value of a JSON or safetensors file."""
    if path.suffix == ".safetensors":
        return change_tensor(path, rng)
    if path.suffix != ".json":
        return make_pickle(path, canary)
    content = json.loads(path.read_text(encoding="utf-8"))
    parents = [content]
    for value in parents:
        items = value.values() if isinstance(value, dict) else value[:50]
        parents += [item for item in items if isinstance(item, (dict, list)) and item]
    parent, action = rng.choice(parents), rng.choice(("change", "change", "delete", "add", "nest"))
    key = rng.choice([*parent]) if isinstance(parent, dict) else rng.randrange(len(parent))
    if action == "change":
        parent[key] = rng.choice(VALUES)
    elif action == "delete":
        del parent[key]
    elif action == "add" and isinstance(parent, dict):
        parent.update(ADDED)
    text = json.dumps(content)
    return path.write_text("[" * 10**5 + text if action == "nest" else text, encoding="utf-8")


def change_tensor(path, rng):
    """Change the values, the type or the shape of a tensor, or its name."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    choices = [tensor[:0] if tensor.ndim else tensor[None], tensor.to(torch.float16), tensor[None].clone()]
    if tensor.is_floating_point():
        choices += [torch.full_like(tensor, value) for value in (float("nan"), float("inf"), 1e30)]
    new_name = rng.choice((name, name, name, "x"))
    save_file({**tensors, new_name: rng.choice(choices).contiguous()}, path, metadata)


MUTATIONS = {
    "cut": cut,
    "overwritten": overwrite,
    "empty": replace_by(lambda path, _: path.write_bytes(b"")),
    "FIFO": replace_by(lambda path, _: os.mkfifo(path)),
    "folder": replace_by(lambda path, _: path.mkdir()),
    "40 GB": replace_by(make_sparse),
    "pickle": replace_by(make_pickle),
    "changed": change,
}


def link_folder(run, rng, victim):
    """Replace a subfolder by a link to a folder outside the run with the same content; returns its name."""
    name = rng.choice(("best", "index", "gan", "best/tokenizer"))
    shutil.copytree(run / name, victim / name)
    shutil.rmtree(run / name)
    (run / name).symlink_to(victim / name)
    return name


def mutate(run, rng, canary, victim):
    """Damage a run; returns what was done to which file."""
    if rng.random() < 0.05:
        return "linked folder", link_folder(run, rng, victim)
    files = sorted(run.glob(rng.choice(FILES)))
    path, kind = rng.choice(files), rng.choice((*MUTATIONS, "link", "changed", "changed", "changed", "changed"))
    name = path.relative_to(run).as_posix()
    if kind == "link":
        path.unlink()
        (victim / path.name).write_text("a victim", encoding="utf-8")
        path.symlink_to(victim / path.name)
    else:
        MUTATIONS[kind](path, rng, canary)
    return kind, name


# ---- commands ---------------------------------------------------------------------------------------------------


def flags(settings):
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def read_run(name, data):
    """Run the command that reads the file of the run with this name."""
    if name.startswith("gan"):
        gan_pairs = {"gan": "pairs", "gan_run": "damaged/run", "gan_start": 0.0, "epochs": 1}
        kept = {key: value for key, value in SETTINGS.items() if key != "epochs"}
        training.main(flags({**kept, **data, **gan_pairs, "run": "new", "cache_path": "new/cache"}))
        gan.main(["--resume", "--run", "damaged/run", "--gan_epochs", "1", "--cache_path", "new/cache"])
    elif name == "last.pt":
        training.main(["--resume", "--run", "damaged/run", "--cache_path", "new/cache", "--epochs", "1"])
    else:
        words = ["--run", "damaged/run", "--device", "cpu", "--output", "new.png"]
        inference.main(["a red circle", "--images", data["image_path"], *words])
        inference.main(["--image", str(next(Path(data["image_path"]).iterdir())), *words])


def snapshot(folder):
    """{path: size and time of modification} of all files outside the damaged run and the outputs."""
    outputs = ("damaged", "new", "new.png", "new_captions.png")
    files = [path for path in folder.rglob("*") if path.relative_to(folder).parts[0] not in outputs]
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in files if not path.is_dir()}


def fuzz_folders(count, seed):
    """Rows of mutations, with the number of folders and of faults."""
    rng, rows = random.Random(seed), {}
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        data = {"image_path": str(work / "data"), "captions_path": str(work / "c.txt")}
        generate_dataset(*data.values(), 24, validation_images=20, test_images=10)
        settings = {**SETTINGS, **data, "epochs": 1}
        prepare(work, flags(settings), data)
        for number in range(count):
            shutil.copytree(work / "run", work / "damaged" / "run")
            (work / "victim").mkdir()
            canary = work / "canary"
            kind, name = mutate(work / "damaged" / "run", rng, canary, work / "victim")
            before = snapshot(work)
            status, output, seconds = in_fork(lambda: read_run(name, data), work, SECONDS)  # noqa: B023
            after = snapshot(work)
            changed = [str(path) for path in {*before, *after} if before.get(path) != after.get(path)]
            bad = status not in (0, 1, 2) or "Traceback" in output or changed or canary.exists()
            row = rows.setdefault(kind, {"mutation": kind, "folders": 0, "faults": 0, "longest, s": 0.0})
            row["folders"] += 1
            row["longest, s"] = max(row["longest, s"], round(seconds, 1))
            if bad:
                row["faults"] += 1
                print(f"{number}: {name} {kind}: status {status}, {sorted(changed)}\n{output[-3000:]}", flush=True)
            for folder in ("damaged", "victim", "new"):
                shutil.rmtree(work / folder, ignore_errors=True)
            for file in (canary, work / "new.png", work / "new_captions.png"):
                file.unlink(missing_ok=True)
    return list(rows.values())


def prepare(work, argv, data):
    """Train the run that is damaged, with a GAN, and search with it."""
    small = {name: value for name, value in GAN_SETTINGS.items() if name in ("gan_size", "gan_width", "gan_batch_size")}

    def train():
        training.main(argv)
        gan.main(["--run", "run", *flags({**small, "gan_epochs": 1})])
        inference.main(["a dog", "--run", "run", "--images", data["image_path"], "--output", "new.png"])

    status, output, _ = in_fork(train, work)
    if status:
        raise RuntimeError(output)
    (work / "new.png").unlink()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folders", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", help="folder for fuzz.json, in place of benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = fuzz_folders(arguments.folders, arguments.seed)
    report("fuzz", rows, folder=arguments.results)
    return 1 if any(row["faults"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

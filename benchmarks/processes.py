"""One process against two on the same global batch, both started by torchrun.

    python benchmarks/processes.py

With two GPUs each process has one. Without, both run on the CPU and share its cores evenly, so the most that can be
hoped for is what one process reaches: the table then shows what the exchange of embeddings and gradients costs.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from common import benchmark_config, in_fresh_process, report, spread

COUNTS = (1, 2)
PICTURES, ROUNDS, STEPS = 400, 2, 3  # so many pictures that one epoch holds all steps
DEFAULTS = {
    "model_name": "resnet18",
    "size": 96,
    "text_layers": 2,
    "text_width": 128,
    "batch_size": 64,
    "captions_per_image": 5,
    "num_workers": 1,
}


def main():
    seconds = {count: [] for count in COUNTS}
    with tempfile.TemporaryDirectory() as folder:
        config = benchmark_config(folder, sys.argv[1:], PICTURES, **DEFAULTS)
        for number in range(ROUNDS):
            for count in COUNTS:
                settings = {**vars(config), "run": str(Path(folder) / f"run-{count}-{number}")}
                launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}")
                os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // count))  # the children's
                found = in_fresh_process("measure", json.dumps(settings), launcher=launcher)
                seconds[count].append(found["seconds"])
    pairs = config.batch_size * config.captions_per_image
    rows = [
        {
            "processes": count,
            "device": "one GPU each" if found["device"] == "cuda" else "CPU, cores shared",
            "step, s": spread(seconds[count], 3),
            "pairs/s": spread([pairs / s for s in seconds[count]], 0),
            "times one process": spread([a / b for a, b in zip(seconds[1], seconds[count], strict=True)]),
        }
        for count in COUNTS
    ]
    report("processes", rows, settings={key: getattr(config, key) for key in DEFAULTS})


def measure(settings):
    """Seconds per step, on every process; two steps come before."""
    import torch
    import torch.distributed as dist

    from config import build_config
    from training import Trainer, start_processes

    if torch.cuda.device_count() < max(COUNTS):
        settings["device"] = "cpu"
    config = build_config(settings)
    start_processes(config)
    trainer = Trainer(config)
    trainer.model.train()
    batches = trainer.batches()
    for step in range(2 + STEPS):
        if step == 2:
            started = settle(trainer.device)
        trainer.train_step(next(batches))
    seconds = (settle(trainer.device) - started) / STEPS
    batches.close()
    trainer.loader = None  # ends its processes
    if dist.is_initialized():
        dist.destroy_process_group()
    return {"seconds": seconds, "device": trainer.device.type}


def settle(device):
    """The time once all processes are here and the device has done what it was given."""
    import torch
    import torch.distributed as dist

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if dist.is_initialized():
        dist.barrier()
    return time.perf_counter()


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:  # one measurement, on each of torchrun's processes
        result = measure(json.loads(sys.argv[2]))
        if os.environ["RANK"] == "0":
            print(json.dumps(result))
    else:
        main()

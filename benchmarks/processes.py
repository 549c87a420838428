"""Training throughput of two processes compared with one on the same global batch, both started by torchrun.

    python benchmarks/processes.py

With two GPUs each process has its own. Otherwise both run on the CPU and share its cores evenly, so that they can at
best reach the throughput of one process: the table then shows the cost of exchanging embeddings and gradients. Any
setting of the program can be given as a flag.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

from common import TrainingLoop, benchmark_config, in_fresh_process, report, spread, synchronized_time

COUNTS = (1, 2)  # processes
NUM_IMAGES, NUM_ROUNDS, NUM_STEPS = 400, 2, 3
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
    seconds, devices = {count: [] for count in COUNTS}, {}
    with tempfile.TemporaryDirectory() as folder:
        config = benchmark_config(folder, sys.argv[1:], NUM_IMAGES, **DEFAULTS)
        for number in range(NUM_ROUNDS):
            for count in COUNTS:
                settings = {**vars(config), "run": str(Path(folder) / f"run-{count}-{number}")}
                launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}")
                os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // count))  # of the child processes
                found = in_fresh_process("measure", json.dumps(settings), launcher=launcher)
                seconds[count].append(found["seconds"])
                devices[count] = "one GPU each" if found["device"] == "cuda" else "CPU, cores shared"
    pairs = config.batch_size * config.captions_per_image
    rows = [
        {
            "processes": count,
            "device": devices[count],
            "step, s": spread(seconds[count], 3),
            "pairs/s": spread([pairs / s for s in seconds[count]], 0),
            "times one process": spread([a / b for a, b in zip(seconds[1], seconds[count], strict=True)]),
        }
        for count in COUNTS
    ]
    report("processes", rows, settings={key: getattr(config, key) for key in DEFAULTS})


def measure(settings):
    """Seconds per step, in every process, after two untimed steps."""
    import torch
    import torch.distributed as dist

    from config import build_config

    if torch.cuda.device_count() < max(COUNTS):
        settings["device"] = "cpu"
    loop = TrainingLoop(build_config(settings))
    loop.train(2)
    start = synchronized_time(loop.device)
    loop.train(NUM_STEPS)
    seconds = (synchronized_time(loop.device) - start) / NUM_STEPS
    if dist.is_initialized():
        dist.destroy_process_group()
    return {"seconds": seconds, "device": loop.device.type}


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:  # one measurement, in each of torchrun's processes
        result = measure(json.loads(sys.argv[2]))
        if os.environ["RANK"] == "0":
            print(json.dumps(result))
    else:
        main()

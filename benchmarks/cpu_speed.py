"""CPU speed with and without `utils.device.keep_freed_memory`, and of the batch size for encoding.

Images per second of encoding (`before`: 128 images at once, glibc's defaults; `now`: `CPU_IMAGES` at once, freed memory
kept) and of training steps (the same batch of 32 images, only the memory setting differs), at 224 pixels, channels
last, random weights. Every measurement is a process of its own; `before` and `now` take turns.

    python benchmarks/cpu_speed.py [--models tf_efficientnet_lite0 resnet50] [--rounds 3] [--seconds 8]
"""

import argparse
import json
import statistics
import sys
import time

from common import in_fresh_process, report, spread

SIZE, BEFORE_IMAGES, TRAIN_IMAGES = 224, 128, 32


def measure(name, job, mode, seconds):
    """Images per second of one encoder, printed as JSON."""
    import timm
    import torch

    from utils.device import keep_freed_memory
    from utils.embed import CPU_IMAGES

    if mode == "now":
        keep_freed_memory()
    model = timm.create_model(name, num_classes=0).to(memory_format=torch.channels_last).train(job == "train")
    count = TRAIN_IMAGES if job == "train" else CPU_IMAGES if mode == "now" else BEFORE_IMAGES
    images = torch.randn(count, 3, SIZE, SIZE).to(memory_format=torch.channels_last)

    def step():
        with torch.set_grad_enabled(job == "train"):
            features = model(images)
        if job == "train":
            model.zero_grad(set_to_none=True)
            features.square().mean().backward()

    step()
    start, number = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        step()
        number += count
    print(json.dumps(number / (time.perf_counter() - start)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["tf_efficientnet_lite0", "resnet50"], help="timm models")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (default: 3)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement (default: 8)")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models:
        for job in ("encode", "train"):
            speeds = {"before": [], "now": []}
            for _ in range(arguments.rounds):
                for mode, found in speeds.items():
                    found.append(in_fresh_process("measure", name, job, mode, arguments.seconds))
            ratios = [now / before for before, now in zip(*speeds.values(), strict=True)]
            row = {"encoder": name, "job": job, **{f"{mode}, images/s": spread(v, 1) for mode, v in speeds.items()}}
            rows.append({**row, "ratio": spread(ratios)})
            print(rows[-1], f"median ratio {statistics.median(ratios):.2f}", file=sys.stderr)
    report("cpu_speed", rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(*sys.argv[2:5], float(sys.argv[5]))
    else:
        main()

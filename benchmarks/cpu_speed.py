"""CPU speed of encoding images and of training steps, side by side.

Images per second at 224 pixels, channels last, random weights. Encoding: 128 images at once with glibc's defaults
(`before`), `CPU_IMAGES` at once with freed memory kept (`now`), the latter with folded BatchNorm (`folded`), in bf16
(`bf16`), and both. Training: steps of 32 images with glibc's defaults, with freed memory kept, and in bf16. Every
measurement is a process of its own, and the modes take turns; ratios are relative to `before`.

    python benchmarks/cpu_speed.py [--models tf_efficientnet_lite0 resnet50] [--rounds 3] [--seconds 8]
"""

import argparse
import json
import sys
import time

from common import in_fresh_process, report, spread

SIZE, BEFORE_IMAGES, TRAIN_IMAGES = 224, 128, 32
MODES = {"encode": ("before", "now", "folded", "bf16", "folded bf16"), "train": ("before", "now", "bf16")}


def measure(name, job, mode, seconds):
    """Images per second of one encoder, printed as JSON."""
    import timm
    import torch

    from utils.device import autocast, keep_freed_memory
    from utils.embed import CPU_IMAGES
    from utils.fold import fold_batchnorm

    if mode != "before":
        keep_freed_memory()
    model = timm.create_model(name, num_classes=0).to(memory_format=torch.channels_last).train(job == "train")
    count = TRAIN_IMAGES if job == "train" else BEFORE_IMAGES if mode == "before" else CPU_IMAGES
    images = torch.randn(count, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
    if "folded" in mode:
        model = fold_batchnorm(model, images)
    amp_dtype = torch.bfloat16 if "bf16" in mode else None

    def step():
        with torch.set_grad_enabled(job == "train"), autocast(torch.device("cpu"), amp_dtype):
            features = model(images)
        if job == "train":
            model.zero_grad(set_to_none=True)
            features.float().square().mean().backward()

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
        for job, modes in MODES.items():
            speeds = {mode: [] for mode in modes}
            for _ in range(arguments.rounds):
                for mode, found in speeds.items():
                    found.append(in_fresh_process("measure", name, job, mode, arguments.seconds))
            for mode, found in speeds.items():
                ratios = [now / before for before, now in zip(speeds["before"], found, strict=True)]
                row = {"encoder": name, "job": job, "mode": mode, "images/s": spread(found, 1)}
                rows.append({**row, "ratio": spread(ratios)})
                print(rows[-1], file=sys.stderr)
    report("cpu_speed", rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(*sys.argv[2:5], float(sys.argv[5]))
    else:
        main()

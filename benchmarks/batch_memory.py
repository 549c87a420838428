"""Peak memory of one training step as the batch grows and `micro_batch_size` stays 64.

    python benchmarks/batch_memory.py

Each batch size gets a process of its own. "Peak" is the whole process (on a GPU: all that PyTorch allocated there):
the libraries, the model, its gradients and the optimizer's state, the batch itself, and the step. The first row is a
plain batch of 64, without gradient caching; the others are compared with it. The images are random numbers. Any
setting of the program may be given as a flag; the defaults here are small, so that 4,096 images pass in minutes.
"""

import json
import sys
import time

from common import in_fresh_process, peak_memory, report

from config import build_config, parse_flags

MICRO_BATCH = 64
BATCHES = (64, 512, 4096)
DEFAULTS = {
    "model_name": "resnet18",
    "size": 64,
    "text_tokenizer": "captions",
    "text_layers": 2,
    "text_width": 128,
    "max_length": 32,
    "pretrained": False,
}
LIMIT = 1.15


def main():
    flags, rows, plain = sys.argv[1:], [], None
    settings = {**DEFAULTS, **parse_flags(flags)}
    for number in BATCHES:
        found = in_fresh_process("measure", number, *flags)
        plain = plain or found["bytes"]
        rows.append(
            {
                "batch": number,
                "micro-batches": -(-number // MICRO_BATCH),
                "peak, MB": round(found["bytes"] / 1e6),
                "of it before the step, MB": round(found["before"] / 1e6),
                "times a plain batch of 64": round(found["bytes"] / plain, 3),
                "images/s": round(number / found["seconds"], 1),
            }
        )
    ratio = rows[-1]["times a plain batch of 64"]
    report("batch_memory", rows, limit=LIMIT, within_limit=ratio <= LIMIT, settings=settings)


def measure(number, flags):
    """Peak bytes of the process before and after one step on `number` images, and the seconds it took.

    A step on eight images comes before, so that the libraries are loaded and the optimizer has its state.
    """
    import torch

    from clip import CLIP, setup_device
    from dataset import train_tokenizer
    from training import build_optimizer

    config = build_config({**DEFAULTS, **parse_flags(flags)})
    device, dtype = setup_device(config.device, config.precision)
    torch.manual_seed(0)
    model = CLIP(config, train_tokenizer([f"w{word} w{word}" for word in range(5000)]))
    model.to(device, memory_format=torch.channels_last).train()
    optimizer = build_optimizer(model, config, device)
    train_step(model, optimizer, [random_micro_batch(config, 8)], device, dtype)
    before = peak_memory(device)
    batch = [random_micro_batch(config, min(MICRO_BATCH, number - i)) for i in range(0, number, MICRO_BATCH)]
    started = time.perf_counter()
    train_step(model, optimizer, batch, device, dtype)
    return {"seconds": time.perf_counter() - started, "before": before, "bytes": peak_memory(device)}


def train_step(model, optimizer, micro_batches, device, dtype):
    import torch

    from clip import contrastive_backward

    contrastive_backward(model, micro_batches, device, dtype)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()


def random_micro_batch(config, images):
    """As the loader's: uint8 images, channels last, with one caption each."""
    import torch

    ids = torch.randint(5, 5000, (images, config.max_length))
    pixels = torch.randint(0, 256, (images, 3, config.size, config.size), dtype=torch.uint8)
    return {
        "image_index": torch.arange(images),
        "images": pixels.contiguous(memory_format=torch.channels_last),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:  # one measurement, in a process of its own
        print(json.dumps(measure(int(sys.argv[2]), sys.argv[3:])))
    else:
        main()

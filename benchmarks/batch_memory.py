"""Peak memory of one training step for increasing batch sizes, in micro-batches of 64 images.

    python benchmarks/batch_memory.py

Each batch size is measured in its own process. "Peak" is that of the whole process (on a GPU: of PyTorch's allocations
there): libraries, model, gradients, optimizer state, the batch, and the step. The first row is a plain batch of 64
without gradient caching; the others are compared with it. The images are random numbers. Any setting of the program can
be given as a flag; the defaults here are small, so that 4,096 images take minutes.
"""

import json
import sys

from common import build_state, in_fresh_process, peak_memory, report, synchronized_time, train_steps

from config import build_config
from utils.flags import parse_flags

MICRO_BATCH_SIZE = 64
BATCH_SIZES = (64, 512, 4096)
MAX_RATIO = 1.15  # of the peak to that of a plain batch of 64
DEFAULTS = {
    "model_name": "resnet18",
    "size": 64,
    "text_tokenizer": "wordpiece",
    "text_layers": 2,
    "text_width": 128,
    "max_length": 32,
    "pretrained": False,
}


def main():
    flags, rows, plain = sys.argv[1:], [], None
    settings = {**DEFAULTS, **parse_flags(flags, "batch_memory.py", __doc__.split("\n")[0])[0]}
    for number in BATCH_SIZES:
        found = in_fresh_process("measure", number, *flags)
        plain = plain or found["bytes"]
        rows.append(
            {
                "batch": number,
                "micro-batches": -(-number // MICRO_BATCH_SIZE),
                "peak, MB": round(found["bytes"] / 1e6),
                "in use before the step, MB": round(found["before"] / 1e6),
                "times a plain batch of 64": round(found["bytes"] / plain, 3),
                "images/s": round(number / found["seconds"], 1),
            }
        )
    ratio = rows[-1]["times a plain batch of 64"]
    report("batch_memory", rows, limit=MAX_RATIO, within_limit=ratio <= MAX_RATIO, settings=settings)


def measure(number, flags):
    """Peak bytes of the process before and after one step on `number` images, and the seconds of the step.

    An earlier step on eight images loads the libraries and creates the optimizer state.
    """
    import torch

    from clip import CLIP
    from utils.captions import train_tokenizer
    from utils.device import setup_device

    config = build_config({**DEFAULTS, **parse_flags(flags, "batch_memory.py", __doc__.split("\n")[0])[0]})
    device, amp_dtype = setup_device(config.device, config.precision)
    torch.manual_seed(0)
    model = CLIP(config, train_tokenizer([f"w{word} w{word}" for word in range(5000)]))
    model.to(device, memory_format=torch.channels_last)
    state = build_state(model, config, amp_dtype)
    train_steps(state, [random_batch(config, 8)], [1], config, amp_dtype)
    before = peak_memory(device)
    sizes = [min(MICRO_BATCH_SIZE, number - start) for start in range(0, number, MICRO_BATCH_SIZE)]
    batches = [random_batch(config, size) for size in sizes]
    start = synchronized_time(device)
    train_steps(state, batches, [len(batches)], config, amp_dtype)
    return {"seconds": synchronized_time(device) - start, "before": before, "bytes": peak_memory(device)}


def random_batch(config, num_images):
    """A `Batch` as the loader returns it: uint8 images in channels-last layout, with one caption each."""
    import torch

    from dataset import Batch

    input_ids = torch.randint(5, 5000, (num_images, config.max_length))
    images = torch.randint(0, 256, (num_images, 3, config.size, config.size), dtype=torch.uint8)
    return Batch(
        image_index=torch.arange(num_images),
        image_ids=torch.arange(num_images),
        images=images.contiguous(memory_format=torch.channels_last),
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:  # one measurement, in its own process
        print(json.dumps(measure(int(sys.argv[2]), sys.argv[3:])))
    else:
        main()

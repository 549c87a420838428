"""Time and peak memory of the contrastive loss, forward and backward: dense and in tiles.

    python benchmarks/loss.py

The dense loss of `clip.contrastive_loss` holds several T x T matrices for T captions; the tiled loss
(`utils.tiled_loss`) holds one tile at a time. `contrastive_loss` switches from the first to the second where a T x T
matrix has more than `clip.MAX_DENSE_LOGITS` elements; here both are measured at every size at which they fit into
memory. Each image has one caption. "Memory" is what forward and backward add to the peak of the process: it includes
the gradients of the embeddings, but not the embeddings.
"""

import argparse
import json
import math
import os
import sys
import time

from common import in_fresh_process, peak_memory, report, spread

SIZES = (1024, 2048, 4096, 8192, 16384, 32768)  # images, and captions
WIDTH = 256  # of the embeddings
NUM_DENSE_MATRICES = 9  # T x T float32 matrices that the dense loss holds at its peak, rounded up
MAX_TILED_BYTES = 700e6  # that the tiled loss may add at the largest size


def main():
    argparse.ArgumentParser(description=__doc__.split("\n")[0].replace("`", "")).parse_args()
    rows = []
    for number in SIZES:
        row = {"T": number, "one T x T matrix, MB": round(4 * number**2 / 1e6)}
        for kind in ("tiled", "dense"):
            found = in_fresh_process("measure", kind, number)
            row[f"{kind}: memory, MB"] = round(found["bytes"] / 1e6) if found else "does not fit"
            row[f"{kind}: time, s"] = spread(found["seconds"]) if found else ""
        rows.append(row)
    from clip import MAX_DENSE_LOGITS  # not before the measurements, see `in_fresh_process`

    for row in rows:
        row["contrastive_loss uses"] = "dense" if row["T"] ** 2 <= MAX_DENSE_LOGITS else "tiled"
    limit = MAX_TILED_BYTES / 1e6
    report(
        "loss",
        rows,
        width=WIDTH,
        dense_up_to=f"{math.isqrt(MAX_DENSE_LOGITS)} captions (MAX_DENSE_LOGITS = {MAX_DENSE_LOGITS})",
        limit_MB=limit,
        within_limit=rows[-1]["tiled: memory, MB"] <= limit,
    )


def measure(kind, number):
    """Seconds of each forward and backward pass, and the bytes they add; None if the dense loss does not fit."""
    import torch

    import clip

    clip.MAX_DENSE_LOGITS = math.inf if kind == "dense" else 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "dense" and NUM_DENSE_MATRICES * 4 * number**2 > free_memory(device):
        return None
    torch.manual_seed(0)
    forward_backward(256, device)  # loads the libraries
    before = peak_memory(device)
    seconds, inputs = forward_backward(number, device)
    added = peak_memory(device) - before - inputs
    again = [forward_backward(number, device)[0] for _ in range(2 if number < 16384 else 0)]
    return {"seconds": [seconds, *again], "bytes": added}


def forward_backward(number, device):
    """Seconds of one forward and backward pass, and the bytes of the embeddings."""
    import torch

    from clip import contrastive_loss

    inputs = [torch.randn(number, WIDTH, device=device) for _ in range(2)]
    inputs = [x.div_(x.norm(dim=1, keepdim=True)).requires_grad_() for x in inputs]
    t = torch.tensor(2.66, device=device, requires_grad=True)
    start = time.perf_counter()
    contrastive_loss(*inputs, t).backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, sum(x.nbytes for x in inputs)


def free_memory(device):
    """Free memory of the device in bytes."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:  # one measurement, in its own process
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]))))
    else:
        main()

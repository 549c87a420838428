"""Time and peak memory of the contrastive loss, tiled (the program's) against dense, forward and backward.

    python benchmarks/loss.py

The dense loss holds the N x N matrix, as the paper's pseudocode does; it is run where it fits into memory. "Memory" is
what forward and backward add to the process's peak: the gradients of the embeddings count, the embeddings do not.
"""

import json
import os
import sys
import time

from common import in_fresh_process, peak_memory, report, spread

SIZES = (1024, 4096, 8192, 16384, 32768)
WIDTH = 256  # of the embeddings
DENSE_MATRICES = 7  # N x N float32 matrices that the dense loss holds at its peak, rounded up
LIMIT = 700e6  # bytes that the tiled loss may add at the largest size


def main():
    rows = []
    for number in SIZES:
        row = {"N": number, "one N x N matrix, MB": round(4 * number**2 / 1e6)}
        for kind in ("tiled", "dense"):
            found = in_fresh_process("measure", kind, number)
            row[f"{kind}: memory, MB"] = round(found["bytes"] / 1e6) if found else "does not fit"
            row[f"{kind}: time, s"] = spread(found["seconds"]) if found else ""
        rows.append(row)
    report("loss", rows, width=WIDTH, limit_MB=LIMIT / 1e6, within_limit=rows[-1]["tiled: memory, MB"] <= LIMIT / 1e6)


def measure(kind, number):
    """Seconds of each forward and backward pass and the bytes they add; None where the dense loss does not fit."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "dense" and DENSE_MATRICES * 4 * number**2 > free_memory(device):
        return None
    torch.manual_seed(0)
    forward_backward(kind, 256, device)  # loads the libraries
    before = peak_memory(device)
    seconds, inputs = forward_backward(kind, number, device)
    added = peak_memory(device) - before - inputs
    again = [forward_backward(kind, number, device)[0] for _ in range(2 if number < 16384 else 0)]
    return {"seconds": [seconds, *again], "bytes": added}


def forward_backward(kind, number, device):
    """Seconds that one forward and backward pass took, and the bytes of the embeddings it was given."""
    import torch

    from clip import contrastive_loss

    loss = {"tiled": contrastive_loss, "dense": dense_loss}[kind]
    inputs = [torch.randn(number, WIDTH, device=device) for _ in range(2)]
    inputs = [x.div_(x.norm(dim=1, keepdim=True)).requires_grad_() for x in inputs]
    t = torch.tensor(2.66, device=device, requires_grad=True)
    started = time.perf_counter()
    loss(*inputs, t).backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, sum(x.nbytes for x in inputs)


def dense_loss(images, texts, t):
    """The paper's pseudocode (Radford et al. 2021, figure 3)."""
    import torch
    import torch.nn.functional as F

    logits = t.exp() * images @ texts.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def free_memory(device):
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:  # one measurement, in a process of its own
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]))))
    else:
        main()

"""Device and mixed precision."""

import contextlib
import ctypes
import sys

import torch

from config import InputError
from utils.cli import one_line


def setup_device(device="auto", precision="auto"):
    """The torch device and the autocast dtype of the encoders (None: float32); raises InputError."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # which one depends on the torch build
        raise InputError(f"device {str(device)!r} is not available on this machine ({str(error)[:80]})") from None
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
        torch.set_float32_matmul_precision("high")  # TF32, as convolutions; see `full_float32`
    if precision == "auto":
        precision = "float32"
        if device.type == "cuda":
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if precision == "fp16" and device.type == "cpu":
        raise InputError("precision is fp16, which is not supported on a CPU: use bf16 or float32")
    return device, {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def search_dtype(model):
    """The autocast dtype in which a search embeds: that of the training on a CUDA GPU, else None (float32)."""
    return setup_device(model.device, model.config.precision)[1] if model.device.type == "cuda" else None


def check_compiler(device):
    """Raise InputError unless torch.compile works for the device; takes seconds."""
    try:
        torch.compile(torch.neg)(torch.ones(8, device=device))
    except Exception as error:  # the classes differ between versions and backends
        message = f"compile is true, which needs a C++ compiler ({one_line(error)}): install one, or drop --compile"
        raise InputError(message) from error


def keep_freed_memory():
    """Let glibc keep freed blocks instead of returning them to the system; does nothing with another C library.

    By default it returns every block above 32 MB at once and unmaps it. The activations of each layer are then new
    pages that the system has to clear, which takes longer than the arithmetic (see docs/benchmarks.md).
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # musl has no mallopt
            libc = ctypes.CDLL(None)
            for parameter, size in ((-3, 2**30), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
                libc.mallopt(parameter, size)


@contextlib.contextmanager
def full_float32():
    """Within the block float32 matrix products are exact on a CUDA GPU, too: TF32 has 10 bits of mantissa."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def to_device(tensor, device):
    """The tensor on the device; the copy does not make the host wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def autocast(device, amp_dtype):
    """The context in which encoders run: mixed precision if `amp_dtype` is given, else float32."""
    return torch.autocast(device.type, amp_dtype) if amp_dtype else contextlib.nullcontext()

"""Device and precision."""

import contextlib

import pytest
import torch

from config import InputError
from utils.device import autocast, setup_device

CPU = torch.device("cpu")


def test_setup_device_chooses_the_precision():
    assert setup_device("cpu", "auto") == (CPU, None)
    assert setup_device("cpu", "float32") == (CPU, None)
    assert setup_device("cpu", "bf16") == (CPU, torch.bfloat16)
    assert setup_device()[0].type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize(
    ("device", "precision", "message"),
    [
        ("toaster", "auto", "device 'toaster' is not available on this machine"),
        ("cuda:99", "auto", "device 'cuda:99' is not available on this machine"),
        ("cpu", "fp16", "precision is fp16, which is not supported on a CPU"),
    ],
)
def test_setup_device_refuses(device, precision, message):
    with pytest.raises(InputError, match=message):
        setup_device(device, precision)


def test_autocast_without_a_dtype_does_nothing():
    assert isinstance(autocast(CPU, None), contextlib.nullcontext)
    layer = torch.nn.Linear(2, 2)
    with autocast(CPU, torch.bfloat16):
        assert layer(torch.ones(1, 2)).dtype == torch.bfloat16

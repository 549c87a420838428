"""What a training run prints and records."""

from types import SimpleNamespace

import pytest
import torch

from config import DivergenceError
from utils.log import check_training, describe_generated, describe_model


def test_check_training_raises_a_divergence_error():
    state = SimpleNamespace(scaler=torch.amp.GradScaler("cpu", enabled=False), step=7)
    check_training(state, torch.tensor(1.0))
    for value in (float("nan"), float("inf")):
        with pytest.raises(DivergenceError, match=rf"the loss is {value} at step 7: lower the learning rates"):
            check_training(state, torch.tensor(value))


def test_describe_model_counts_trained_parameters(tiny_model):
    model = tiny_model()
    device, line = describe_model(model.config, model, None).splitlines()
    assert device == "device: cpu, float32"
    total = sum(p.numel() for p in model.parameters()) / 1e6
    names = "test_resnet (from scratch) and distilbert-base-uncased (1 layer, width 64, from scratch)"
    assert line == f"model: {names}, {total:.1f} M parameters"
    model.requires_grad_(False)
    device, line = describe_model(model.config, model, torch.bfloat16).splitlines()
    assert device == "device: cpu, mixed precision (bfloat16)"
    assert line.endswith(" M parameters (0.0 M trained)")


def test_describe_generated_reports_what_the_filter_dropped():
    assert describe_generated({}) == describe_generated({"generated": 0, "dropped_by_filter": 0}) == ""
    assert describe_generated({"generated": 8, "dropped_by_filter": 3}).endswith(
        "8 images generated, 3 dropped by the CLIP filter"
    )
    text = describe_generated({"generated": 8, "dropped_by_filter": 8})
    assert "dropped all 8 generated images" in text and "--gan_filter_top_k" in text

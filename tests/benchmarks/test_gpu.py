"""benchmarks/gpu.py runs, on the CPU with tiny sizes; without a GPU it says that nothing is measured."""

import json
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu

import clip
from utils import tiled_loss

EXPECTED = {
    "waits": {"case", "waits"},
    "parity": {"precision", "kind", "loss_difference", "gradient_error"},
    "overflow": {"state_finite", "loss_sum", "scale"},
    "loss": {"N", "D", "tile", "ms"},
    "gan": {"size", "batch", "compiled_generator", "ms", "host_ms"},
    "embedding": {"precision", "encoder_images_per_second", "with_decoding"},
    "steps": {"encoders", "batch", "option", "ms", "host_ms", "images_per_second"},
    "loader": {"workers", "micro_batch", "images_per_second", "waiting"},
    "flickr8k": {"status"},
}


@pytest.fixture
def restored(monkeypatch):
    """Undo the global changes of the parts, each of which has its own process otherwise."""
    monkeypatch.setattr(clip, "MAX_DENSE_LOGITS", clip.MAX_DENSE_LOGITS)
    monkeypatch.setattr(tiled_loss, "TILE", tiled_loss.TILE)
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("name", gpu.LIMITS)
def test_part_runs_and_notes_its_numbers(name, tmp_path, monkeypatch, capsys, restored):
    if name == "steps":
        monkeypatch.setattr(gpu, "ENCODERS", dict(list(gpu.ENCODERS.items())[:1]))
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 1)
    part = gpu.Part(name, True, tmp_path / "gpu.jsonl", tmp_path)
    getattr(gpu, f"measure_{name}")(part)
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines and all(line["part"] == name and line.keys() >= EXPECTED[name] for line in lines)
    assert capsys.readouterr().out.count("\n") >= len(lines)
    if name == "parity":
        assert all(line["gradient_error"] < 1e-3 for line in lines)
    if name == "overflow":
        assert lines[0]["state_finite"] and lines[0]["scale"] == 2**15


def test_all_parts_are_in_a_call_of_at_most_ten_minutes():
    calls = [parts for name, parts in gpu.CALLS.items() if name != "all"]
    assert sorted(sum(calls, [])) == sorted(gpu.LIMITS) == sorted(EXPECTED)
    assert all(sum(gpu.LIMITS[part] for part in parts) <= 600 for parts in calls)


def test_without_a_gpu_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "first", "--output", str(tmp_path / "gpu.jsonl")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main()
    (line,) = (tmp_path / "gpu.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["status"] == "not measured: no CUDA GPU"

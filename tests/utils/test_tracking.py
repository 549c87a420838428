"""Metrics for TensorBoard and Weights & Biases."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import flags
from gan_fixtures import TINY, as_flags

import gan
import main
from config import InputError
from utils.checkpoint import read_checkpoint
from utils.tracking import Tracker, flatten


def read_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def test_training_and_gan_are_logged_for_tensorboard(tiny_config, tmp_path):
    pytest.importorskip("tensorboard")
    run = tmp_path / "logged"
    config = tiny_config(log="tensorboard", epochs=2, run=str(run))
    main.main(flags(config))
    events = read_events(run)
    losses = events.Scalars("epoch/train_loss")
    history = read_checkpoint(run / "last.pt", "")["history"]
    assert [event.value for event in losses] == pytest.approx([line["train_loss"] for line in history])
    assert [event.step for event in losses] == [line["steps"] for line in history]
    assert {"epoch/temperature", "epoch/learning_rates/heads", "epoch/text_to_image_R@1"} <= {*events.Tags()["scalars"]}
    assert "matches" in events.Tags()["images"]
    gan.main(["--run", str(run), *as_flags({**TINY, "gan_epochs": 1})])
    events = read_events(run)
    assert "gan/samples" in events.Tags()["images"]
    assert any(name.startswith("gan/") for name in events.Tags()["scalars"])


def test_wandb_run_is_resumed_by_the_run_folder(monkeypatch, tmp_path):
    logged, opened = [], []
    run = SimpleNamespace(log=lambda values, step: logged.append((values, step)))
    module = SimpleNamespace(init=lambda **options: opened.append(options) or run, Image=np.shape)
    monkeypatch.setitem(sys.modules, "wandb", module)
    for _ in range(2):
        tracker = Tracker(SimpleNamespace(log="wandb", run=str(tmp_path / "x")))
        tracker.numbers({"a": {"b": 1.5}, "c": "text"}, 7)
    assert logged == [({"a/b": 1.5}, 7)] * 2
    assert opened[0]["id"] == opened[1]["id"] and opened[0]["resume"] == "allow"


@pytest.mark.parametrize(("kind", "package"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_missing_package_is_named_before_the_data_is_read(tiny_config, monkeypatch, kind, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"log is {kind}, a package that is not installed: pip install {kind}"):
        main.train(tiny_config(log=kind, image_path="missing"))


def test_flatten_keeps_numbers_only():
    assert flatten({"a": 1, "b": {"c": 2.0, "d": None}, "e": "f"}) == {"a": 1, "b/c": 2.0}


def test_log_none_writes_nothing(tmp_path):
    tracker = Tracker(SimpleNamespace(log="none", run=str(tmp_path / "x")))
    tracker.numbers({"a": 1}, 1)
    tracker.figure("b", tmp_path / "missing.png", 1)
    assert [*tmp_path.iterdir()] == []

"""Training in several processes."""

from pathlib import Path

import pytest
import torch
from conftest import ROOT, flags, save_text_folder, start_python

import main
from config import InputError
from utils.distributed import (
    all_gather_rows,
    first_process_first,
    global_sum,
    is_first_process,
    process_group,
    rank_and_world_size,
    row_counts,
    rows_before,
)
from utils.files import read_json

pytestmark = pytest.mark.usefixtures("no_plots")


def torchrun(*words, output):
    """Two processes. The `--` is needed: without it torchrun takes our --run for a flag of its own."""
    return start_python("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--", *words,
                        output=output)  # fmt: skip


def test_two_processes_train_as_one(tiny_config, tmp_path):
    """Five steps of four or five images, so that the processes have different numbers of them."""
    text_folder = save_text_folder(tmp_path / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    settings = {
        "model_name": "test_vit",  # no BatchNorm, whose statistics come from one process's images
        "text_encoder_model": str(text_folder),
        "text_layers": 0,
        "text_width": 0,
        "dropout": 0.0,
        "captions_per_image": 5,
        "batch_size": 5,
        "image_encoder_lr": 1e-4,
        "text_encoder_lr": 1e-4,
    }
    together = tiny_config(**settings, run=str(tmp_path / "together"))
    process = torchrun(ROOT / "main.py", *flags(together), output=tmp_path / "output.txt")
    alone = tiny_config(**settings, run=str(tmp_path / "alone"))
    main.train(alone)
    assert process.wait() == 0, (tmp_path / "output.txt").read_text(encoding="utf-8")

    found, expected = (torch.load(Path(config.run) / "last.pt", weights_only=True) for config in (together, alone))
    assert found["step"] == expected["step"] == 5
    (line,), (expected_line,) = found["history"], expected["history"]
    for name in ("train_loss", "validation_loss", "temperature"):
        assert line[name] == pytest.approx(expected_line[name], rel=1e-5), name
    for name, tensor in expected["model"].items():
        assert torch.allclose(found["model"][name], tensor, rtol=1e-5, atol=1e-5), name
    assert {name: line[name] for name in line if "R@" in name} == {n: expected_line[n] for n in line if "R@" in n}
    assert read_json(tmp_path / "together" / "results.json") == read_json(tmp_path / "alone" / "results.json")
    output = (tmp_path / "output.txt").read_text(encoding="utf-8")
    assert output.count("epoch 1: loss") == 1  # only the first process prints
    assert "device: cpu x 2 processes, float32" in output


DIES = """
import os, signal, sys, threading, time
from pathlib import Path
import main

def die():
    while not Path("run/last.pt").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        threading.Thread(target=die, daemon=True).start()
    main.main()
"""


def test_killed_process_ends_the_run_with_a_message(tiny_config, tmp_path):
    config = tiny_config(epochs=100_000, save_every_minutes=0.0, captions_per_image=5)
    (tmp_path / "dies.py").write_text(DIES, encoding="utf-8")
    process = torchrun(tmp_path / "dies.py", *flags(config), output=tmp_path / "output.txt")
    try:
        assert process.wait(timeout=120) != 0
    finally:
        process.kill()
    output = (tmp_path / "output.txt").read_text(encoding="utf-8")
    assert "ChildFailedError" in output
    assert "rank      : 1" in output
    last = torch.load(Path(config.run) / "last.pt", weights_only=True)  # complete, so that the run can be resumed
    assert last["step"] >= 1


def test_batch_size_too_small_for_the_processes_is_refused(tiny_config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(InputError, match="batch_size is 8, for 8 processes: give at least 16"):
        main.train(tiny_config())


def test_device_for_one_process_is_refused_in_several(tiny_config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="device is cuda:1, for 2 processes: give auto, cuda or cpu"):
        main.train(tiny_config(device="cuda:1"))


@pytest.mark.parametrize("argv", [["--gan", "joint", "--gan_run", "x"], ["--gan", "pairs"]])
def test_gan_training_in_several_processes_is_refused(refused, monkeypatch, argv):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refused(main.main, argv)
    assert f"gan is {argv[1]} in several processes" in line
    assert "python gan.py --run" in line


def test_functions_of_a_single_process_do_nothing():
    assert process_group() is None
    assert is_first_process()
    assert rank_and_world_size() == (0, 1)
    x = torch.arange(6).view(3, 2)
    assert all_gather_rows(x, None) is x
    assert (row_counts(3, x.device, None), rows_before(3, x.device, None)) == ([3], 0)
    assert global_sum(torch.tensor(2.0), None) == 2
    assert first_process_first(lambda: 7) == 7

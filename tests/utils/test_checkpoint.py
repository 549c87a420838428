"""Checkpoints: a run that is killed, stopped or cut short resumes exactly."""

import dataclasses
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, flags, read_json_lines, start_python, tiny_settings
from safetensors.torch import load_file

import main
import utils.checkpoint
from config import Config, DivergenceError, InputError
from utils.checkpoint import read_checkpoint, save_checkpoint
from utils.files import TEMPORARY

TIMING = ("seconds", "images_per_second", "data_time_share")

# All that could make resuming inexact: dropout, crops, jitter, two captions per image, micro-batches, EMA, BatchNorm,
# the cosine schedule. 9 steps per epoch.
EXACT = {
    "epochs": 3,
    "captions_per_image": 2,
    "micro_batch_size": 5,
    "ema_decay": 0.9,
    "scheduler": "cosine",
    "warmup_steps": 3,
    "save_every_minutes": 0.0,
}

pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, sample):
    """The folder of an uninterrupted run with the settings EXACT."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = Config(**tiny_settings(folder, **sample, **EXACT))
    main.train(config)
    return config.run


def outcome(folder):
    """Everything a run writes except plots and timings, {name: tensor or text}."""
    folder = Path(folder)
    checkpoint = torch.load(folder / "last.pt", weights_only=True)
    lines = read_json_lines(folder / "metrics.jsonl")
    assert [line["epoch"] for line in lines] == list(range(1, len(lines) + 1))
    lines = [{name: value for name, value in line.items() if name not in TIMING} for line in lines]
    found = {"metrics": json.dumps(lines), "results": (folder / "results.json").read_text(encoding="utf-8")}
    found |= {f"best {name}": tensor for name, tensor in load_file(folder / "best" / "model.safetensors").items()}
    for part in ("model", "ema"):
        found |= {f"{part} {name}": tensor for name, tensor in checkpoint[part].items()}
    for number, state in checkpoint["optimizer"]["state"].items():
        found |= {f"optimizer {number} {name}": value for name, value in state.items()}
    positions = ("scheduler", "scaler", "epoch", "batch", "step", "best_rsum", "loss_sum")
    return {**found, **{name: str(checkpoint[name]) for name in positions}}


def assert_identical(folder, expected_folder):
    found, expected = outcome(folder), outcome(expected_folder)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        assert same, name


# ---- exact resume -----------------------------------------------------------------------------------------------


def wait_for_checkpoints(process, path, number):
    """Wait until the process has written `path` that many times."""
    seen, last = 0, path.stat().st_mtime_ns if path.exists() else 0
    while seen < number:
        assert process.poll() is None, "the process ended before it was killed"
        time.sleep(0.001)
        now = path.stat().st_mtime_ns if path.exists() else 0
        seen, last = seen + (now != last), now


def test_run_killed_five_times_equals_the_uninterrupted_one(tiny_config, uninterrupted, tmp_path):
    """SIGKILL to a real process, at random moments of the 27 steps."""
    config, output, random = tiny_config(**EXACT, num_workers=1), tmp_path / "output.txt", np.random.default_rng()
    words = [ROOT / "main.py", *flags(config)]
    for _ in range(5):
        process = start_python(*words, output=output)
        wait_for_checkpoints(process, Path(config.run) / "last.pt", random.integers(1, 5))
        time.sleep(random.uniform(0, 0.02))  # in the middle of a step, or of the next checkpoint
        process.kill()
        assert process.wait() != 0
        assert not (Path(config.run) / "results.json").exists()
        words = [ROOT / "main.py", "--resume", "--run", config.run]
    assert start_python(*words, output=output).wait() == 0, output.read_text(encoding="utf-8")
    assert output.read_text(encoding="utf-8").count("resuming") == 5
    assert_identical(config.run, uninterrupted)


class PowerCut(Exception):
    pass


@pytest.mark.parametrize(
    "moment", ["first step", "mid-epoch", "last step of an epoch", "best saved", "checkpoint", "history"]
)
def test_run_cut_short_anywhere_resumes_exactly(tiny_config, uninterrupted, monkeypatch, moment):
    config = tiny_config(**EXACT)

    def cut_after(owner, name, number):
        function, calls = getattr(owner, name), []

        def cut(*arguments):
            result = function(*arguments)
            calls.append(0)
            if len(calls) == number:
                raise PowerCut
            return result

        monkeypatch.setattr(owner, name, cut)

    if moment == "best saved":  # the best model is ahead of the checkpoint
        cut_after(main, "save_model", 1)
    elif moment == "checkpoint":  # written, but not yet renamed
        cut_after(torch, "save", 7)
    elif moment == "history":  # the checkpoint of the first epoch is complete
        cut_after(utils.checkpoint, "write_history", 10)
    else:  # called once per step, after the optimizer
        cut_after(main.CLIP, "clamp_temperature", {"first step": 1, "mid-epoch": 5, "last step of an epoch": 9}[moment])
    with pytest.raises(PowerCut):
        main.train(config)
    monkeypatch.undo()
    monkeypatch.setattr(main, "plot_curves", lambda *_: None)
    monkeypatch.setattr(main, "plot_matches", lambda *_: None)
    main.main(["--resume", "--run", config.run])
    assert_identical(config.run, uninterrupted)


@pytest.mark.parametrize(
    ("number", "step", "position"),
    [(signal.SIGINT, 12, "epoch 2, batch 3"), (signal.SIGTERM, 18, "epoch 2, batch 9")],
    ids=["Ctrl-C in an epoch", "terminated at the end of an epoch"],
)
def test_stopped_run_says_how_to_continue_and_does(
    tiny_config, uninterrupted, monkeypatch, capsys, number, step, position
):
    config = tiny_config(**{**EXACT, "save_every_minutes": 10.0})
    clamp_temperature, calls = main.CLIP.clamp_temperature, []

    def interrupted(model):
        calls.append(0)
        if len(calls) == step:
            signal.raise_signal(number)
        clamp_temperature(model)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(main.CLIP, "clamp_temperature", interrupted)
        main.main(flags(config))
    assert exit.value.code == 130
    assert f"stopped; to continue: python main.py --resume --run {config.run}" in capsys.readouterr().out
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert torch.load(Path(config.run) / "last.pt", weights_only=True)["step"] == step  # the step was completed
    main.main(["--resume", "--run", config.run, "--save_every_minutes", "0", "--num_workers", "1"])
    assert f"at {position}" in capsys.readouterr().out
    assert_identical(config.run, uninterrupted)


@pytest.mark.parametrize("moment", ["evaluation", "image lost", "last model saved"])
def test_run_stopped_between_epochs_resumes_exactly(tiny_config, uninterrupted, monkeypatch, capsys, moment):
    config = tiny_config(**{**EXACT, "save_every_minutes": 10.0})
    name, number = ("save_checkpoint", 3) if moment == "last model saved" else ("evaluate", 2)
    function, calls = getattr(main, name), []

    def fail(*arguments):
        calls.append(0)
        if len(calls) == number and moment == "image lost":
            raise InputError("image x is missing")
        if len(calls) == number:
            signal.raise_signal(signal.SIGTERM)
        return function(*arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(main, name, fail)
        main.main(flags(config))
    assert exit.value.code == (2 if moment == "image lost" else 130)
    output = capsys.readouterr()
    line = "error: image x is missing" if moment == "image lost" else "stopped; to continue"
    assert line in output.out + output.err
    epochs = torch.load(Path(config.run) / "last.pt", weights_only=True)["epoch"]
    assert epochs == (3 if moment == "last model saved" else 1)
    main.main(["--resume", "--run", config.run, "--save_every_minutes", "0"])
    assert ("at epoch 2, batch 9" in capsys.readouterr().out) == (epochs == 1)
    assert_identical(config.run, uninterrupted)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="Windows has no process groups")
def test_terminated_process_group_leaves_a_checkpoint(tiny_config, tmp_path):
    config, output = tiny_config(**{**EXACT, "epochs": 1000}, num_workers=2), tmp_path / "output.txt"
    process = start_python(ROOT / "main.py", *flags(config), output=output, start_new_session=True)
    wait_for_checkpoints(process, Path(config.run) / "last.pt", 3)
    os.killpg(process.pid, signal.SIGTERM)  # the loader processes too, as batch systems do
    assert process.wait(timeout=60) == 130, output.read_text(encoding="utf-8")
    text = output.read_text(encoding="utf-8")
    assert f"stopped; to continue: python main.py --resume --run {config.run}" in text
    assert "Traceback" not in text


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
@pytest.mark.parametrize("fault", ["hangup", "loader killed"])
def test_run_that_loses_its_terminal_or_a_loader_process_leaves_a_checkpoint(tiny_config, tmp_path, fault):
    config, output = tiny_config(**{**EXACT, "epochs": 1000}, num_workers=2), tmp_path / "output.txt"
    process = start_python(ROOT / "main.py", *flags(config), output=output)
    wait_for_checkpoints(process, Path(config.run) / "last.pt", 3)
    if fault == "hangup":
        process.send_signal(signal.SIGHUP)
    else:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not children.exists():
            process.kill()
            pytest.skip("the children of a process are not known")
        os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    assert process.wait(timeout=60) == (130 if fault == "hangup" else 2)
    text = output.read_text(encoding="utf-8")
    assert "Traceback" not in text
    assert ("stopped; to continue" if fault == "hangup" else "error: a data loading process ended") in text
    assert torch.load(Path(config.run) / "last.pt", weights_only=True)["step"] >= 3
    assert not (Path(config.run) / ".lock").exists()


def test_history_behind_the_checkpoint_is_completed(trained_run, tmp_path):
    run = Path(shutil.copytree(trained_run, tmp_path / "copy"))
    lines = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(lines.splitlines(keepends=True)[0])  # killed between the two files
    main.main(["--resume", "--run", str(run), "--cache_path", str(tmp_path / "cache")])
    assert (run / "metrics.jsonl").read_bytes() == lines


def test_results_are_written_last(tiny_config, monkeypatch):
    """Where results.json exists, a stage is not repeated, so everything else must have been written."""
    config, written = tiny_config(), []
    for name in ("write_json", "plot_curves", "plot_matches", "save_match_threshold"):
        monkeypatch.setattr(main, name, lambda *_, name=name: written.append(name))
    main.train(config)
    assert sorted(written[:-1]) == ["plot_curves", "plot_matches", "save_match_threshold"]
    assert written[-1] == "write_json"


def test_run_stopped_before_its_first_step_says_so(tiny_config, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "open_images", stop)
    with pytest.raises(SystemExit) as exit:
        main.main(flags(tiny_config()))
    assert exit.value.code == 130
    assert "stopped; no step was completed" in capsys.readouterr().out


def test_runs_with_another_seed_differ(tiny_config, uninterrupted):
    config = tiny_config(**EXACT, seed=7)
    main.train(config)
    with pytest.raises(AssertionError):
        assert_identical(config.run, uninterrupted)


def test_finished_run_resumes_to_its_results(tiny_config, capsys):
    config = tiny_config(epochs=1)
    results = main.train(config)
    assert main.train(config) == results
    assert "resuming" not in capsys.readouterr().out
    longer = dataclasses.replace(config, epochs=2)
    main.train(longer)
    assert len(read_json_lines(Path(config.run) / "metrics.jsonl")) == 2


def test_resume_trains_the_remaining_epochs(trained_run, tmp_path, capsys):
    run = shutil.copytree(trained_run, tmp_path / "copy")
    main.main(["--resume", "--run", str(run), "--epochs", "3", "--cache_path", str(tmp_path / "cache")])
    old, new = read_json_lines(trained_run / "metrics.jsonl"), read_json_lines(run / "metrics.jsonl")
    assert new[:2] == old
    assert [line["steps"] for line in new] == [15, 30, 45]
    assert "at epoch 3, batch 0" in capsys.readouterr().out


def test_temporary_file_of_a_killed_run_is_removed(trained_run, tmp_path):
    run = Path(shutil.copytree(trained_run, tmp_path / "copy"))
    for name in (f".last.pt.x1y2z3{TEMPORARY}", f"best/.config.json.x1y2z3{TEMPORARY}"):  # as `atomic_write` names them
        (run / name).mkdir()
        (run / name / "last.pt").write_bytes(b"half of a checkpoint")
    main.main(["--resume", "--run", str(run), "--epochs", "3", "--cache_path", str(tmp_path / "cache")])
    assert not list(run.rglob(".*"))


# ---- what a checkpoint holds ------------------------------------------------------------------------------------


def test_checkpoint_names_its_parts(uninterrupted, trained_run):
    positions = {"epoch", "batch", "step", "best_rsum", "history", "loss_sum"}
    checkpoint = torch.load(Path(uninterrupted) / "last.pt", weights_only=True)
    assert checkpoint.keys() == positions | {"model", "ema", "optimizer", "scheduler", "scaler"}
    assert (checkpoint["epoch"], checkpoint["batch"], checkpoint["step"]) == (3, 0, 27)
    checkpoint = torch.load(trained_run / "last.pt", weights_only=True)
    assert checkpoint.keys() == positions | {"model", "optimizer", "scheduler", "scaler"}


def test_save_checkpoint_refuses_a_diverged_state(tiny_config, fit):
    config = tiny_config(epochs=1, captions_per_image=5)
    state, _ = fit(config)
    before = (Path(config.run) / "last.pt").read_bytes()
    state.loss_sum.fill_(float("nan"))
    with pytest.raises(DivergenceError, match="the loss is nan at step 3"):
        save_checkpoint(state, config.run)
    assert (Path(config.run) / "last.pt").read_bytes() == before


# ---- refused checkpoints ----------------------------------------------------------------------------------------


def test_damaged_checkpoint_is_refused(trained_run, tmp_path, refused):
    run = shutil.copytree(trained_run, tmp_path / "copy")
    argv = ["--resume", "--run", run, "--epochs", "3", "--cache_path", tmp_path / "cache"]
    for content in (b"", b"not a zip file", b"a victim", (trained_run / "last.pt").read_bytes()[:-100]):
        (run / "last.pt").write_bytes(content)
        assert "last.pt cannot be read as a checkpoint of this run" in refused(main.main, argv)
    for content in ({"model": {}}, [1, 2], torch.zeros(3)):
        torch.save(content, run / "last.pt")
        assert "last.pt cannot be read as a checkpoint of this run" in refused(main.main, argv)


def test_checkpoint_with_the_names_of_an_earlier_version_is_resumed(uninterrupted, tmp_path):
    weights = []
    for name in ("new", "old"):
        run = shutil.copytree(uninterrupted, tmp_path / name)
        if name == "old":
            checkpoint = torch.load(run / "last.pt", weights_only=True)
            checkpoint["average"], checkpoint["generated"] = checkpoint.pop("ema"), None
            torch.save(checkpoint, run / "last.pt")
        main.main(["--resume", "--run", str(run), "--epochs", "4", "--cache_path", str(tmp_path / "cache")])
        weights.append(torch.load(run / "last.pt", weights_only=True)["ema"])
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_refused_resume_leaves_the_run_unchanged(uninterrupted, tmp_path, refused):
    run = shutil.copytree(uninterrupted, tmp_path / "copy")
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    del checkpoint["ema"]
    torch.save(checkpoint, run / "last.pt")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    line = refused(main.main, ["--resume", "--run", run, "--epochs", "4", "--cache_path", tmp_path / "cache"])
    assert "last.pt cannot be read as a checkpoint of this run and version ('average'): start a new run" in line
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_checkpoint_of_another_model_is_refused(trained_run, tmp_path, refused, tiny_config):
    config = tiny_config(projection_dim=16, epochs=3)
    Path(config.run).mkdir()
    (Path(config.run) / "config.json").write_text(json.dumps(vars(config)), encoding="utf-8")
    shutil.copy(trained_run / "last.pt", config.run)
    assert "last.pt cannot be read as a checkpoint" in refused(main.main, ["--resume", "--run", config.run])


class Explosive:
    def __reduce__(self):
        return (open, ("opened", "w"))


def test_read_checkpoint_runs_no_code(tmp_path):
    torch.save({"model": Explosive()}, tmp_path / "last.pt")
    with pytest.raises(InputError, match=r"last\.pt cannot be read as a checkpoint") as error:
        read_checkpoint(tmp_path / "last.pt", "a checkpoint")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "opened").exists()

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, flags, tiny_settings
from safetensors.torch import load_file, save_file

import clip
import main
import modules
import training
from config import Config, InputError, read_json
from dataset import load_splits, train_tokenizer
from training import Trainer, build_optimizer, build_scheduler, train, update_average

TIMING = ("seconds", "images_per_second", "waiting_share")


@pytest.fixture(autouse=True)
def one_thread():
    """Started processes compute with one thread (see `start`); what is compared with them does so too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than the training here; other tests look at the pictures."""
    monkeypatch.setattr(training, "draw_curves", lambda *_: None)
    monkeypatch.setattr(training, "draw_queries", lambda *_: None)


def start(*words, output, **options):
    """A Python process in the current folder, its output going to a file."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, *map(str, words)]
    with open(output, "a", encoding="utf-8") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment, **options)


def outcome(folder):
    """All that a run leaves behind but its pictures and its timings, as {name: tensor or text}."""
    folder = Path(folder)
    checkpoint = torch.load(folder / "last.pt", weights_only=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, len(lines) + 1))
    lines = [{name: value for name, value in line.items() if name not in TIMING} for line in lines]
    found = {"metrics": json.dumps(lines), "results": (folder / "results.json").read_text(encoding="utf-8")}
    found |= {f"best {name}": tensor for name, tensor in load_file(folder / "best" / "model.safetensors").items()}
    for part in ("model", "average"):
        found |= {f"{part} {name}": tensor for name, tensor in (checkpoint[part] or {}).items()}
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

# Everything that could break exactness is on: dropout, crops, jitter, two captions an image, micro-batches, moving
# average, BatchNorm, the cosine schedule. 9 steps an epoch.
EXACT = {
    "epochs": 3,
    "captions_per_image": 2,
    "micro_batch_size": 5,
    "ema_decay": 0.9,
    "scheduler": "cosine",
    "warmup_steps": 3,
    "save_every_minutes": 0.0,
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, sample):
    """The folder of a run with the settings EXACT that nothing disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = Config(**tiny_settings(folder, **sample, **EXACT))
    torch.set_num_threads(1)
    train(config)
    return config.run


def wait_for_checkpoints(process, path, number):
    """Wait until the process has written `path` that many times more."""
    seen, last = 0, path.stat().st_mtime_ns if path.exists() else 0
    while seen < number:
        assert process.poll() is None, "the process ended before it was killed"
        time.sleep(0.001)
        now = path.stat().st_mtime_ns if path.exists() else 0
        seen, last = seen + (now != last), now


def test_a_run_killed_five_times_equals_the_uninterrupted_one(tiny_config, uninterrupted, tmp_path):
    """SIGKILL (on Windows its like) to a real process: five times, each at a random moment of the first 27 steps."""
    config, output, random = tiny_config(**EXACT, num_workers=1), tmp_path / "output.txt", np.random.default_rng()
    words = [ROOT / "main.py", *flags(config)]
    for _ in range(5):
        process = start(*words, output=output)
        wait_for_checkpoints(process, Path(config.run) / "last.pt", random.integers(1, 5))
        time.sleep(random.uniform(0, 0.02))  # in the middle of a step, or of the next checkpoint
        process.kill()
        assert process.wait() != 0
        assert not (Path(config.run) / "results.json").exists()
        words = [ROOT / "main.py", "--resume", "--run", config.run]
    assert start(*words, output=output).wait() == 0, output.read_text(encoding="utf-8")
    assert output.read_text(encoding="utf-8").count("resuming") == 5
    assert_identical(config.run, uninterrupted)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="Windows knows no process groups")
def test_a_process_group_told_to_end_leaves_a_checkpoint(tiny_config, tmp_path):
    config, output = tiny_config(**{**EXACT, "epochs": 1000}, num_workers=2), tmp_path / "output.txt"
    process = start(ROOT / "main.py", *flags(config), output=output, start_new_session=True)
    wait_for_checkpoints(process, Path(config.run) / "last.pt", 3)
    os.killpg(process.pid, signal.SIGTERM)  # the loader's processes, too, as batch systems do
    assert process.wait(timeout=60) == 130, output.read_text(encoding="utf-8")
    text = output.read_text(encoding="utf-8")
    assert f"stopped; to go on: python main.py --resume --run {config.run}" in text
    assert "Traceback" not in text


def test_a_run_stopped_before_its_first_step_says_so(tiny_config, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "open_images", stop)
    with pytest.raises(SystemExit) as exit:
        main.main(flags(tiny_config()))
    assert exit.value.code == 130
    assert "stopped; before the first step" in capsys.readouterr().out


def test_a_picture_with_very_many_captions_is_named(tiny_config, data_set, capsys):
    captions = {f"{n}.jpg": ["A dog ."] for n in range(24)} | {"many.jpg": [f"Cat {n} ." for n in range(30)]}
    paths = data_set(captions, train=list(captions)[4:], dev=list(captions)[:4])
    Trainer(tiny_config(**paths))
    assert "many.jpg has 30 captions, which makes 30 batches of 1 images" in capsys.readouterr().err
    Trainer(tiny_config(**paths, captions_per_image=5, run="other"))
    assert "many.jpg" not in capsys.readouterr().err


class PowerCut(Exception):
    pass


@pytest.mark.parametrize("moment", ["first step", "mid-epoch", "last step of an epoch", "best saved", "checkpoint"])
def test_a_run_cut_short_anywhere_resumes_exactly(tiny_config, uninterrupted, monkeypatch, moment):
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

    if moment == "best saved":  # the best model is a step ahead of the checkpoint
        cut_after(training, "save_model", 1)
    elif moment == "checkpoint":  # written, but not yet in its place
        cut_after(torch, "save", 7)
    else:
        cut_after(Trainer, "train_step", {"first step": 1, "mid-epoch": 5, "last step of an epoch": 9}[moment])
    with pytest.raises(PowerCut):
        train(config)
    monkeypatch.undo()
    main.main(["--resume", "--run", config.run])
    assert_identical(config.run, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "terminated"])
def test_an_interrupted_run_says_how_to_go_on_and_does(tiny_config, uninterrupted, monkeypatch, capsys, number):
    config = tiny_config(**{**EXACT, "save_every_minutes": 10.0})
    step = Trainer.train_step

    def interrupted(trainer, micro_batches):
        if trainer.step == 11:
            signal.raise_signal(number)
        return step(trainer, micro_batches)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit:
        train(config)
    monkeypatch.setattr(Trainer, "train_step", step)
    assert exit.value.code == 130
    assert f"python main.py --resume --run {config.run}" in capsys.readouterr().out
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert torch.load(Path(config.run) / "last.pt", weights_only=True)["step"] == 12
    main.main(["--resume", "--run", config.run, "--save_every_minutes", "0", "--num_workers", "1"])
    assert "resuming" in capsys.readouterr().out
    assert_identical(config.run, uninterrupted)


def test_runs_with_another_seed_differ(tiny_config, uninterrupted):
    config = tiny_config(**EXACT, seed=7)
    train(config)
    with pytest.raises(AssertionError):
        assert_identical(config.run, uninterrupted)


def test_a_damaged_checkpoint_is_refused(tiny_config, trained_run, refused, tmp_path):
    config = tiny_config()
    for content in (b"", b"no zip", (trained_run / "last.pt").read_bytes()[:-100]):
        trainer_folder = Path(config.run)
        trainer_folder.mkdir(exist_ok=True)
        (trainer_folder / "config.json").write_bytes((trained_run / "config.json").read_bytes())
        (trainer_folder / "last.pt").write_bytes(content)
        line = refused(main.main, ["--resume", "--run", config.run])
        assert "last.pt cannot be read as a checkpoint" in line
    torch.save({"model": {}}, trainer_folder / "last.pt")
    assert "last.pt cannot be read as a checkpoint" in refused(main.main, ["--resume", "--run", config.run])


def test_a_finished_run_resumes_to_its_results(tiny_config, capsys):
    config = tiny_config(epochs=1)
    results = train(config)
    assert train(config) == results
    longer = dataclasses.replace(config, epochs=2)
    train(longer)
    assert len((Path(config.run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 2


# ---- several processes ------------------------------------------------------------------------------------------


def save_text_folder(folder, captions=None, **changes):
    """A local folder of a small random BERT, its tokenizer made from captions if given; nothing to fetch."""
    from transformers import BertConfig, BertModel

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    tokenizer = train_tokenizer(captions) if captions else None
    vocab_size = len(tokenizer) if tokenizer else 100
    BertModel(BertConfig(vocab_size=vocab_size, max_position_embeddings=40, **size, **changes)).save_pretrained(folder)
    if tokenizer:
        tokenizer.save_pretrained(folder)
    return folder


def torchrun(*words, output):
    """Two processes. The `--` is needed: without it torchrun takes our --run for one of its own flags."""
    return start("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--", *words, output=output)


def test_two_processes_train_as_one(tiny_config, tmp_path):
    """Five steps of four or five images, so that the processes hold different numbers of them."""
    text_folder = save_text_folder(tmp_path / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    settings = {
        "model_name": "test_vit",  # no BatchNorm, which sees each process's images alone
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
    train(alone)
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


def test_a_killed_process_ends_the_run_with_a_message(tiny_config, tmp_path):
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
    last = torch.load(Path(config.run) / "last.pt", weights_only=True)  # whole, and so to be resumed
    assert last["step"] >= 1


def test_too_small_a_batch_for_the_processes_is_refused(tiny_config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(InputError, match="batch_size is 8, for 8 processes: give at least 16"):
        train(tiny_config())


# ---- learning ---------------------------------------------------------------------------------------------------


def test_training_learns_a_tiny_data_set_by_heart(data_set, tiny_config):
    words = ["red dog", "green cat", "blue bird", "white horse", "black cow", "grey fish"]
    captions = {f"{number}.jpg": [f"A {text} .", f"The {text} runs"] for number, text in enumerate(words)}
    paths = data_set(captions, train=list(captions)[:5], dev=["5.jpg"], test=[])
    config = tiny_config(
        **paths, batch_size=5, epochs=60, captions_per_image=2, dropout=0.0, crop_scale=1.0, color_jitter=0.0
    )
    trainer = Trainer(config)
    trainer.fit()
    losses = [line["train_loss"] for line in trainer.history]
    assert losses[0] > 1
    assert losses[-1] < 0.1 * losses[0]
    metrics, _ = trainer.evaluate("train")
    assert metrics["rsum"] == 600


def test_frozen_encoders_are_encoded_once_and_stay_as_they_were(tiny_config, tmp_path, monkeypatch):
    config = pretrained_config(tiny_config, tmp_path, trainable=False, epochs=3, head_lr=1e-2)
    pictures = []
    encode = clip.CLIP.image_features
    monkeypatch.setattr(clip.CLIP, "image_features", lambda model, x: pictures.append(len(x)) or encode(model, x))
    trainer = Trainer(config)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.fit()
    assert sum(pictures) == 24 + 8  # training and validation images, once in three epochs
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("encoder" in name), name
    losses = [line["train_loss"] for line in trainer.history]
    assert losses[-1] < losses[0]
    cached, _ = trainer.evaluate("validation")
    trainer.features = {}
    direct, _ = trainer.evaluate("validation")
    assert cached == pytest.approx(direct)
    assert trainer.report()["images"] == 10


def test_one_frozen_encoder_lets_the_other_learn(tiny_config, tmp_path):
    config = pretrained_config(tiny_config, tmp_path, trainable_text_encoder=False)
    trainer = Trainer(config)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.fit()
    after = trainer.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after if name.startswith("text_encoder"))
    name = next(name for name in after if name.startswith("image_encoder") and after[name].ndim == 4)
    assert not torch.equal(before[name], after[name])


def test_the_best_epoch_is_chosen_by_rsum(tiny_config, monkeypatch):
    """The validation loss falls throughout; rsum is highest in the second epoch."""
    rsums, losses = iter([100.0, 300.0, 200.0]), iter([3.0, 2.0, 1.0])
    names = [f"text_to_image_R@{k}" for k in (1, 5, 10)]
    trainer = Trainer(tiny_config(epochs=3, captions_per_image=5))
    states = []

    def evaluate(split):
        states.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
        return {**dict.fromkeys(names, 0.0), "rsum": next(rsums)}, next(losses)

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    trainer.fit()
    best = load_file(trainer.folder / "best" / "model.safetensors")
    assert trainer.best_rsum == 300
    assert [all(torch.equal(best[name], state[name]) for name in best) for state in states] == [False, True, False]


def test_a_loss_that_is_not_finite_ends_the_run(tiny_config, refused):
    config = tiny_config(head_lr=1.0, image_encoder_lr=1.0, text_encoder_lr=1.0)
    trainer = Trainer(config)
    with torch.no_grad():
        trainer.model.text_projection.layers[-1].weight.fill_(math.nan)
    with pytest.raises(InputError, match="the loss is nan at step"):
        trainer.fit()


# ---- optimisation -----------------------------------------------------------------------------------------------


def test_weight_decay_is_for_matrices_only_and_each_part_has_its_rate(tiny_model):
    model = tiny_model(
        weight_decay=0.3, image_encoder_lr=1e-3, text_encoder_lr=2e-3, head_lr=3e-3, num_projection_layers=2
    )
    groups = build_optimizer(model, model.config, torch.device("cpu")).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(names)  # each once
    rates = {"image_encoder": 1e-3, "text_encoder": 2e-3, "image_projection": 3e-3, "text_projection": 3e-3}
    for name, parameter in model.named_parameters():
        rate = 3e-3 if name == "logit_scale" else rates[name.split(".")[0]]
        assert found[name] == (rate, 0.3 if parameter.ndim >= 2 else 0.0), name
    assert found["logit_scale"] == (3e-3, 0.0)
    assert found["image_projection.layers.1.bias"] == (3e-3, 0.0)


def test_the_plateau_scheduler_cuts_when_the_validation_loss_stays(tiny_config, monkeypatch):
    trainer = Trainer(tiny_config(epochs=6, captions_per_image=5, patience=1, factor=0.5))
    losses = iter([2.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    names = [f"text_to_image_R@{k}" for k in (1, 5, 10)]
    monkeypatch.setattr(trainer, "evaluate", lambda _: ({**dict.fromkeys(names, 0.0), "rsum": 0.0}, next(losses)))
    trainer.fit()
    # Two epochs without a better loss are one more than `patience`: a cut, and so every second epoch from there on.
    rates = [line["learning_rates"]["heads"] for line in trainer.history]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4])
    assert trainer.history[-1]["learning_rates"]["image_encoder"] == pytest.approx(2.5e-4)


def test_cosine_schedule_warms_up_and_ends_at_nothing(tiny_config):
    config = tiny_config(scheduler="cosine", warmup_steps=4, epochs=2)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=8.0)
    scheduler = build_scheduler(optimizer, config, steps_per_epoch=10)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    expected = [2.0, 4.0, 6.0, 8.0] + [4 * (1 + math.cos(math.pi * step / 16)) for step in range(16)]
    assert rates == pytest.approx(expected)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)


def test_the_average_of_the_weights_follows_them():
    model, average = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    expected = average.weight.detach().clone()
    for step in range(40):
        torch.nn.init.normal_(model.weight)
        model.num_batches_tracked += 1
        update_average(average, model, 0.7, step)
        decay = min(0.7, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    assert torch.allclose(average.weight, expected, atol=1e-6)
    assert average.num_batches_tracked == 40


def test_the_average_is_what_is_evaluated_and_saved(tiny_config):
    trainer = Trainer(tiny_config(captions_per_image=5, ema_decay=0.9))
    trainer.fit()
    best, average, own = clip.load_model(trainer.folder), trainer.average.state_dict(), trainer.model.state_dict()
    assert all(torch.equal(tensor, average[name]) for name, tensor in best.state_dict().items())
    assert not torch.equal(average["text_projection.layers.1.weight"], own["text_projection.layers.1.weight"])
    metrics, loss = trainer.evaluate("validation", best)
    assert metrics == {name: trainer.history[-1][name] for name in metrics}
    # The saved model lies in memory in another order than the trained one, and a sum in another order rounds otherwise.
    assert loss == pytest.approx(trainer.history[-1]["validation_loss"], rel=1e-5)


# ---- encoders from folders --------------------------------------------------------------------------------------


def save_timm_folder(folder):
    """A timm model in a folder as the hub has them: config.json and model.safetensors."""
    model = timm.create_model("test_resnet", pretrained=False)
    folder.mkdir()
    own = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    details = {"architecture": "test_resnet", "num_classes": 1000, "pretrained_cfg": {**model.pretrained_cfg, **own}}
    (folder / "config.json").write_text(json.dumps(details), encoding="utf-8")
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def pretrained_config(tiny_config, tmp_path, **changes):
    """Both encoders from local folders of "pretrained" weights."""
    captions = load_splits(tiny_config())["train"].captions
    text_folder = save_text_folder(tmp_path / "bert", captions)
    image_folder = save_timm_folder(tmp_path / "resnet")
    folders = {
        "pretrained": True,
        "model_name": str(image_folder),
        "text_encoder_model": str(text_folder),
        "text_tokenizer": str(text_folder),
        "text_layers": 0,
        "text_width": 0,
        "captions_per_image": 5,
    }
    return tiny_config(**{**folders, **changes})


def test_local_folders_of_pretrained_encoders_work(tiny_config, tmp_path):
    config = pretrained_config(tiny_config, tmp_path)
    trainer = Trainer(config)
    for encoder, folder in ((trainer.model.text_encoder, "bert"), (trainer.model.image_encoder, "resnet")):
        stored = load_file(tmp_path / folder / "model.safetensors")
        own = encoder.backbone.state_dict()
        assert set(own) <= set(stored)
        assert all(torch.equal(own[name], stored[name]) for name in own)
    assert trainer.model.max_length == 32
    assert trainer.model.image_encoder.mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])
    trainer.fit()
    results = trainer.report()
    assert results["split"] == "test"
    assert results["images"] == 10
    loaded = clip.load_model(config.run)  # no more need of the folders
    assert loaded.image_encoder.std.flatten().tolist() == pytest.approx([0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_tokenizer": "nobody/nothing"}, "text_tokenizer is 'nobody/nothing'"),
        ({"text_encoder_model": "nobody/nothing"}, "text_encoder_model is 'nobody/nothing'"),
        ({"model_name": "resnet18"}, "model_name is 'resnet18'"),
    ],
)
def test_a_missing_network_is_one_clear_line(tiny_config, tmp_path, refused, monkeypatch, changes, message):
    monkeypatch.setattr(modules, "hub_answers", lambda: False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    config = pretrained_config(tiny_config, tmp_path, **changes)
    line = refused(main.main, flags(config))
    assert message in line
    assert "give a local folder" in line

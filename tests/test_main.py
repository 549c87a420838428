"""The training command: a run from its flags to its files, the training loop, optimisation, one step."""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, flags, read_json_lines, save_text_folder
from naive import naive_loss
from PIL import Image
from safetensors.torch import load_file, save_file

import clip
import inference
import main
import modules
from config import PRESETS, DivergenceError, build_config
from dataset import derive_seed, load_splits
from main import build_optimizer, build_scheduler
from utils.ema import EMA
from utils.files import read_json

METRICS = {f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
METRICS |= {"image_to_text_median_rank", "text_to_image_median_rank", "rsum"}


# ---- a run ------------------------------------------------------------------------------------------------------


def test_run_writes_its_files(trained_run):
    written = {file.relative_to(trained_run).as_posix() for file in trained_run.rglob("*") if file.is_file()}
    expected = {"config.json", "metrics.jsonl", "last.pt", "results.json", "curves.png", "matches.png"}
    expected |= {"best/model.safetensors", "best/config.json", "best/tokenizer/tokenizer.json"}
    expected |= {"best/tokenizer/tokenizer_config.json"}
    assert expected <= written
    assert not [name for name in written if name.endswith(".tmp")]
    for name in ("curves.png", "matches.png"):
        with Image.open(trained_run / name) as plot:
            assert min(plot.size) > 200
            assert np.asarray(plot.convert("L")).std() > 10


def test_run_names_its_metrics(trained_run):
    results = read_json(trained_run / "results.json")
    assert set(results) == METRICS | {"split", "images", "ci95"}
    assert (results["split"], results["images"]) == ("test", 10)
    epochs = read_json_lines(trained_run / "metrics.jsonl")
    for metrics in (results, *epochs):
        recalls = [value for name, value in metrics.items() if "_R@" in name]
        assert len(recalls) == 6
        assert all(0 <= value <= 100 for value in recalls)
        assert metrics["rsum"] == pytest.approx(sum(recalls))
    assert [line["epoch"] for line in epochs] == [1, 2]
    assert [line["steps"] for line in epochs] == [15, 30]  # 24 images, 5 captions each, 8 pairs per step
    assert epochs[1]["train_loss"] < epochs[0]["train_loss"]
    others = {"epoch", "steps", "train_loss", "validation_loss", "temperature", "learning_rates"}
    others |= {"seconds", "images_per_second", "data_time_share"}
    assert set(epochs[0]) == METRICS | others
    assert 0 <= epochs[0]["data_time_share"] <= 1


def test_run_saves_its_resolved_settings(trained_run):
    saved = read_json(trained_run / "config.json")
    assert build_config(saved).epochs == 2
    assert Path(saved["run"]) == trained_run
    assert read_json(trained_run / "best" / "config.json")["settings"]["epochs"] == 2


def test_saved_run_is_rebuilt_from_its_own_settings(trained_run, sample, capsys):
    # Neither from flags nor from the current defaults: the command is given only the folder.
    arguments = ["--evaluate", "--run", str(trained_run), "--json", "--device", "cpu"]
    inference.main([*arguments, "--image_path", sample["image_path"], "--captions_path", sample["captions_path"]])
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == METRICS | {"split", "images", "captions", "protocol", "ci95"}
    assert (printed["images"], printed["captions"]) == (42, 210)


def test_startup_output_is_a_short_block(tiny_config, no_plots, capsys):
    config = tiny_config(captions_per_image=5, trainable_text_encoder=True)
    main.main(flags(config))
    printed = capsys.readouterr().out
    block = printed.split("epoch 1:")[0].splitlines()
    assert block[0] == f"run: {config.run}"
    assert block[1].startswith("flag: ")
    text = " ".join(" ".join(block).split())
    assert "captions_per_image=5" in text
    assert "factor" not in text and "preset" not in text
    assert block[-5].startswith("data: train 24 / validation 8 / test 10 images, 210 captions, shapes.train")
    assert block[-4] == "captions: captions.txt, table with commas (image, caption), UTF-8"
    assert block[-3].startswith("note: the test split has 10 images: ")
    assert block[-2] == "device: cpu, float32"
    names = "test_resnet (from scratch) and distilbert-base-uncased (1 layer, width 64, from scratch)"
    assert block[-1].startswith(f"model: {names}, 0.")
    assert block[-1].endswith(" M parameters")
    assert len(block) <= 13  # long paths take more lines
    assert "test split, 10 images:" in printed
    assert f'python inference.py "a sentence" --run {config.run}' in printed


# ---- the training loop ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_plots")
def test_training_memorises_a_tiny_data_set(data_set, tiny_config, fit):
    words = ["red dog", "green cat", "blue bird", "white horse", "black cow", "grey fish"]
    captions = {f"{number}.jpg": [f"A {text} .", f"The {text} runs"] for number, text in enumerate(words)}
    paths = data_set(captions, train=list(captions)[:5], dev=["5.jpg"], test=[])
    config = tiny_config(
        **paths, batch_size=5, epochs=60, captions_per_image=2, dropout=0.0, crop_scale=1.0, color_jitter=0.0
    )
    state, splits = fit(config)
    losses = [line["train_loss"] for line in state.history]
    assert losses[0] > 1
    assert losses[-1] < 0.1 * losses[0]
    metrics, _ = main.evaluate(state.eval_model, splits["train"], None, config)
    assert metrics["rsum"] == 600


def test_training_masks_the_captions_of_a_repeated_image(data_set, tiny_config, fit, monkeypatch):
    """The loss of every batch, some of which hold an image twice, equals the naive one with those pairs masked."""
    captions = {f"{n}.jpg": [f"A dog {n} ."] for n in range(12)} | {"many.jpg": [f"Cat {n} ." for n in range(12)]}
    paths = data_set(captions, train=list(captions)[2:], dev=list(captions)[:2])
    contrastive_loss, repeated, losses = main.contrastive_loss, [], []

    def checked(images, texts, logit_scale, image_index=None, image_ids=None, weights=None, **options):
        loss = contrastive_loss(images, texts, logit_scale, image_index, image_ids, weights, **options)
        if image_ids is not None:  # training
            repeated.append(len(image_ids) - len(image_ids.unique()))
            expected = naive_loss(images.double(), texts.double(), logit_scale.double(), image_index, image_ids)
            assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
            losses.append(loss.item())
        return loss

    monkeypatch.setattr(main, "contrastive_loss", checked)
    for changes in ({}, {"micro_batch_size": 3}):
        state, _ = fit(tiny_config(**paths, batch_size=6, run=f"run{len(changes)}", **changes))
        assert len(repeated) == 4  # 22 pairs
        assert sum(repeated) >= 4 and math.isfinite(sum(losses))
        assert state.history[0]["train_loss"] == pytest.approx(np.mean(losses))
        repeated.clear(), losses.clear()


@pytest.mark.usefixtures("no_plots")
def test_equal_captions_are_no_negatives_and_decide_on_the_best_epoch(data_set, tiny_config, fit, monkeypatch):
    captions = {f"{n:02d}.png": [f"a {'red' if n % 2 else 'blue'} wall"] for n in range(20)}
    config = tiny_config(**data_set(captions, dev=list(captions)[:6]), batch_size=7)
    losses, contrastive_loss = [], main.contrastive_loss

    def checked(images, texts, logit_scale, image_index=None, **options):
        loss = contrastive_loss(images, texts, logit_scale, image_index, **options)
        ids, text_ids = options.get("image_ids"), options["text_ids"]
        expected = naive_loss(images.double(), texts.double(), logit_scale.double(), image_index, ids, None, text_ids)
        losses.append((loss.item(), expected.item()))
        return loss

    monkeypatch.setattr(main, "contrastive_loss", checked)
    state, splits = fit(config)
    assert len(losses) == 3 and [a for a, _ in losses] == pytest.approx([b for _, b in losses], rel=1e-4)
    line = state.history[0]
    assert state.best_rsum == line["equal_captions"]["rsum"] > line["rsum"]
    results = main.report(state, splits, config, torch.device("cpu"), None)
    assert results["equal_captions"]["rsum"] > results["rsum"]


@pytest.mark.usefixtures("no_plots")
def test_evaluate_computes_the_loss_of_consecutive_batches(tiny_config, fit):
    config = tiny_config(captions_per_image=2, batch_size=3)
    state, splits = fit(config)
    pairs = splits["validation"]  # 8 images
    metrics, loss = main.evaluate(state.model, pairs, None, config)
    images, texts = main.embed_split(state.model, pairs, None, config)
    expected = []
    for start in range(0, 8, 3):
        rows = range(start, min(start + 3, 8))
        chosen = [j for i in rows for j in list(pairs.captions_of(i))[:2]]
        index = torch.arange(len(rows)).repeat_interleave(2)
        value = naive_loss(images[rows].double(), texts[chosen].double(), state.model.logit_scale.double(), index)
        expected += [value.item()] * len(rows)
    assert loss == pytest.approx(np.mean(expected), rel=1e-5)
    assert metrics == clip.retrieval_metrics(images, texts, pairs.image_index)


@pytest.mark.usefixtures("no_plots")
def test_frozen_encoders_run_once_and_stay_unchanged(tiny_config, tmp_path, monkeypatch, fit):
    config = pretrained_config(tiny_config, tmp_path, trainable=False, epochs=3, head_lr=1e-2)
    encoded, before = [], {}
    forward, build_model = modules.ImageEncoder.forward, main.build_model

    def build(*arguments):
        model = build_model(*arguments)
        before.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return model

    monkeypatch.setattr(modules.ImageEncoder, "forward", lambda e, x: encoded.append(len(x)) or forward(e, x))
    monkeypatch.setattr(main, "build_model", build)
    state, splits = fit(config)
    encoded = [count for count in encoded if count > 1]  # without the example image of the check
    assert sum(encoded) == 24 + 8  # training and validation images, once in three epochs
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("encoder" in name), name
    losses = [line["train_loss"] for line in state.history]
    assert losses[-1] < losses[0]
    validation = splits["validation"]
    cached, _ = main.evaluate(state.eval_model, validation, None, config)
    validation.image_features = validation.text_features = None
    direct, _ = main.evaluate(state.eval_model, validation, None, config)
    assert cached == pytest.approx(direct)
    assert main.report(state, splits, config, torch.device("cpu"), None)["images"] == 10


def test_one_frozen_encoder_lets_the_other_train(tiny_config, tmp_path, monkeypatch, fit, capsys):
    config = pretrained_config(tiny_config, tmp_path, trainable_text_encoder=False)
    before, build_model = {}, main.build_model

    def build(*arguments):
        model = build_model(*arguments)
        before.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return model

    monkeypatch.setattr(main, "build_model", build)
    state, _ = fit(config)
    after = state.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after if name.startswith("text_encoder"))
    name = next(name for name in after if name.startswith("image_encoder") and after[name].ndim == 4)
    assert not torch.equal(before[name], after[name])
    assert " M trained)" in capsys.readouterr().out


@pytest.mark.usefixtures("no_plots")
def test_fine_tuning_starts_from_trained_heads_and_resumes(tiny_config, tmp_path, monkeypatch):
    config = pretrained_config(tiny_config, tmp_path, head_epochs=2, freeze_batchnorm=True)
    starts, build_optimizer = [], main.build_optimizer

    def spy(model, config):
        starts.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return build_optimizer(model, config)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "build_optimizer", spy)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):  # after the heads are trained
        patch.setattr(main, "load_model", stop)
        main.main(flags(config))
    assert (Path(config.run) / "heads" / "results.json").exists() is False  # stopped in the report of the heads
    main.main(["--resume", "--run", config.run])
    heads = load_file(Path(config.run) / "heads" / "best" / "model.safetensors")
    assert read_json(Path(config.run) / "heads" / "config.json")["epochs"] == 2
    copied = ["logit_scale", *(name for name in heads if "projection" in name and name.endswith("weight"))]
    assert len(copied) > 2 and all(torch.equal(starts[-1][name], heads[name]) for name in copied)
    final = load_file(Path(config.run) / "best" / "model.safetensors")
    statistics = [name for name in final if "running_" in name]
    assert statistics and all(torch.equal(final[name], starts[-1][name]) for name in statistics)
    weights = [name for name in final if name.startswith("image_encoder") and final[name].ndim == 4]
    assert weights and not any(torch.equal(final[name], heads[name]) for name in weights)


def fixed_evaluation(monkeypatch, rsums, losses, states=None):
    """Replace `main.evaluate` by given results; the evaluated weights are appended to `states`."""
    rsums, losses = iter(rsums), iter(losses)
    names = [f"text_to_image_R@{k}" for k in (1, 5, 10)]

    def evaluate(model, *_):
        if states is not None:
            states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {**dict.fromkeys(names, 0.0), "rsum": next(rsums)}, next(losses)

    monkeypatch.setattr(main, "evaluate", evaluate)


def test_best_epoch_is_chosen_by_rsum(tiny_config, monkeypatch, fit):
    """The validation loss falls throughout; rsum is highest in the second epoch."""
    states, config = [], tiny_config(epochs=3, captions_per_image=5)
    fixed_evaluation(monkeypatch, [100.0, 300.0, 200.0], [3.0, 2.0, 1.0], states)
    state, _ = fit(config)
    best = load_file(Path(config.run) / "best" / "model.safetensors")
    assert state.best_rsum == 300
    assert [all(torch.equal(best[name], state[name]) for name in best) for state in states] == [False, True, False]


def test_diverged_training_ends_with_status_1_and_one_line(tiny_config, monkeypatch, capsys):
    build_model = main.build_model

    def build(*arguments):
        model = build_model(*arguments)
        with torch.no_grad():
            model.text_projection.layers[-1].weight.fill_(math.nan)
        return model

    monkeypatch.setattr(main, "build_model", build)
    config = tiny_config(captions_per_image=5)
    with pytest.raises(DivergenceError, match="the loss is nan at step 3"):
        main.train(config)
    assert not (Path(config.run) / "last.pt").exists()
    with pytest.raises(SystemExit) as exit:
        main.main(["--resume", "--run", config.run])
    assert exit.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the loss is nan at step 3: lower the learning rates")


def test_derive_seed_depends_on_every_number():
    assert derive_seed(1, 2, 3) == int(np.random.SeedSequence((1, 2, 3)).generate_state(1)[0])
    assert len({derive_seed(a, b) for a in range(5) for b in range(5)}) == 25


# ---- optimisation -----------------------------------------------------------------------------------------------


def test_build_optimizer_decays_only_matrices_and_uses_a_learning_rate_per_part(tiny_model):
    model = tiny_model(
        weight_decay=0.3, image_encoder_lr=1e-3, text_encoder_lr=2e-3, head_lr=3e-3, num_projection_layers=2
    )
    groups = build_optimizer(model, model.config).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(names)  # each once
    rates = {"image_encoder": 1e-3, "text_encoder": 2e-3, "image_projection": 3e-3, "text_projection": 3e-3}
    for name, parameter in model.named_parameters():
        rate = 3e-3 if name == "logit_scale" else rates[name.split(".")[0]]
        assert found[name] == (rate, 0.3 if parameter.ndim >= 2 else 0.0), name
    assert found["logit_scale"] == (3e-3, 0.0)
    assert found["image_projection.layers.1.bias"] == (3e-3, 0.0)


def test_plateau_scheduler_reduces_the_rate_when_the_validation_loss_stagnates(tiny_config, monkeypatch, fit):
    fixed_evaluation(monkeypatch, [0.0] * 6, [2.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    state, _ = fit(tiny_config(epochs=6, captions_per_image=5, patience=1, factor=0.5))
    # Two epochs without a lower loss are one more than `patience`: a reduction, then one every second epoch.
    rates = [line["learning_rates"]["heads"] for line in state.history]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4])
    assert state.history[-1]["learning_rates"]["image_encoder"] == pytest.approx(2.5e-4)


def test_cosine_schedule_warms_up_and_ends_at_zero(tiny_config):
    config = tiny_config(scheduler="cosine", warmup_steps=4)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=8.0)
    scheduler = build_scheduler(optimizer, config, steps=20)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    expected = [2.0, 4.0, 6.0, 8.0] + [4 * (1 + math.cos(math.pi * step / 16)) for step in range(16)]
    assert rates == pytest.approx(expected)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)


def test_ema_follows_the_weights_with_a_growing_decay():
    """Called as in `train_one_epoch`; buffers are averaged, counters copied."""
    model = torch.nn.BatchNorm1d(3)
    ema = EMA(model, 0.7)
    expected, mean = model.weight.detach().clone(), model.running_mean.clone()
    for step in range(40):
        torch.nn.init.normal_(model.weight)
        torch.nn.init.normal_(model.running_mean)
        model.num_batches_tracked += 1
        ema.update(step)
        decay = min(0.7, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
        mean = decay * mean + (1 - decay) * model.running_mean
    assert torch.allclose(ema.module.weight, expected, atol=1e-6)
    assert torch.allclose(ema.module.running_mean, mean, atol=1e-6)
    assert ema.module.num_batches_tracked == 40
    assert not ema.module.training and not any(p.requires_grad for p in ema.module.parameters())


def test_ema_during_training_equals_the_naive_one(tiny_config, monkeypatch, fit):
    seen, clamp_temperature, build_model = [], clip.CLIP.clamp_temperature, main.build_model

    def weight(model):
        return model.text_projection.layers[-1].weight.detach().double().clone()

    def build(*arguments):
        model = build_model(*arguments)
        seen.append(weight(model))
        return model

    monkeypatch.setattr(main, "build_model", build)
    monkeypatch.setattr(clip.CLIP, "clamp_temperature", lambda m: clamp_temperature(m) or seen.append(weight(m)))
    state, _ = fit(tiny_config(captions_per_image=2, ema_decay=0.5))
    expected = seen[0]
    for step, value in enumerate(seen[1:]):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert len(seen) == 10
    assert torch.allclose(weight(state.eval_model), expected, atol=1e-7)


def test_ema_is_evaluated_and_saved(tiny_config, fit):
    config = tiny_config(captions_per_image=5, ema_decay=0.9)
    state, splits = fit(config)
    assert state.eval_model is state.ema.module
    best, ema, own = clip.load_model(config.run), state.ema.module.state_dict(), state.model.state_dict()
    assert all(torch.equal(tensor, ema[name]) for name, tensor in best.state_dict().items())
    assert not torch.equal(ema["text_projection.layers.1.weight"], own["text_projection.layers.1.weight"])
    metrics, loss = main.evaluate(best, splits["validation"], None, config)
    assert metrics == {name: state.history[-1][name] for name in metrics}
    # The saved model has another memory layout than the trained one, and sums in another order round differently.
    assert loss == pytest.approx(state.history[-1]["validation_loss"], rel=1e-5)


def test_bf16_training_has_a_float32_loss(tiny_config, monkeypatch, fit):
    dtypes, contrastive_loss = set(), main.contrastive_loss

    def checked(*arguments, **options):
        loss = contrastive_loss(*arguments, **options)
        dtypes.add((arguments[0].dtype, loss.dtype))
        return loss

    monkeypatch.setattr(main, "contrastive_loss", checked)
    for changes in ({}, {"micro_batch_size": 4}):
        state, _ = fit(tiny_config(precision="bf16", captions_per_image=5, run=f"run{len(changes)}", **changes))
        assert math.isfinite(state.history[0]["train_loss"])
    assert dtypes == {(torch.float32, torch.float32)}


# ---- encoders from folders --------------------------------------------------------------------------------------


def save_timm_folder(folder):
    """A timm model in a folder in the layout of the hub: config.json and model.safetensors."""
    model = timm.create_model("test_resnet", pretrained=False)
    folder.mkdir()
    own = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    details = {"architecture": "test_resnet", "num_classes": 1000, "pretrained_cfg": {**model.pretrained_cfg, **own}}
    (folder / "config.json").write_text(json.dumps(details), encoding="utf-8")
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def pretrained_config(tiny_config, tmp_path, **changes):
    """A `Config` with both encoders from local folders of "pretrained" weights."""
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


def test_frozen_preset_with_pretrained_encoders_on_photographs(flickr8k, pretrained, tmp_path):
    """400 training and 200 validation photographs; chance is 5% for R@10."""
    for split, count in (("train", 400), ("dev", 200)):
        names = (flickr8k / f"Flickr_8k.{split}Images.txt").read_text(encoding="utf-8").split()[:count]
        (tmp_path / f"{split}Images.txt").write_text("\n".join(names), encoding="utf-8")
    shutil.copy(flickr8k / "captions.txt", tmp_path)
    text_encoder = str(pretrained / "all-MiniLM-L6-v2")
    argv = ["--preset", "frozen", "--image_path", str(flickr8k / "Images"), "--captions_path", str(tmp_path)]
    argv += ["--model_name", str(pretrained / "tf_efficientnet_lite0"), "--text_encoder_model", text_encoder]
    argv += [
        "--text_tokenizer",
        text_encoder,
        "--batch_size",
        "64",
        "--epochs",
        "10",
        "--device",
        "cpu",
        "--size",
        "160",
    ]
    results = main.main([*argv, "--run", "run"])
    assert results["images"] == 200
    assert results["text_to_image_R@10"] > 35
    assert results["image_to_text_R@10"] > 35
    assert main.main([*argv, "--run", "again"]) == results  # from cached features


@pytest.mark.usefixtures("no_plots")
def test_local_folders_of_pretrained_encoders_are_used(tiny_config, tmp_path):
    config = pretrained_config(tiny_config, tmp_path)
    model = main.build_model(config, [], torch.device("cpu"))
    for encoder, folder in ((model.text_encoder, "bert"), (model.image_encoder, "resnet")):
        stored = load_file(tmp_path / folder / "model.safetensors")
        own = encoder.backbone.state_dict()
        assert set(own) <= set(stored)
        assert all(torch.equal(own[name], stored[name]) for name in own)
    assert model.max_length == 32
    assert model.image_encoder.mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])
    results = main.train(config)
    assert results["split"] == "test"
    assert results["images"] == 10
    loaded = clip.load_model(config.run)  # the folders are no longer needed
    assert loaded.image_encoder.std.flatten().tolist() == pytest.approx([0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_tokenizer": "nobody/nothing"}, "text_tokenizer is 'nobody/nothing'"),
        ({"text_encoder_model": "nobody/nothing"}, "text_encoder_model is 'nobody/nothing'"),
        ({"model_name": "resnet18"}, "model_name is 'resnet18'"),
    ],
)
def test_missing_network_gives_a_one_line_error(tiny_config, tmp_path, refused, monkeypatch, changes, message):
    monkeypatch.setattr("utils.pretrained.hub_is_reachable", lambda: False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    config = pretrained_config(tiny_config, tmp_path, **changes)
    line = refused(main.main, flags(config))
    assert message in line
    assert "use a local folder" in line


# ---- one step ---------------------------------------------------------------------------------------------------


def trace_step(config, monkeypatch, fit):
    """The project functions that run in this process between the requests for the second and the third batch.

    A set of (file, qualified name); comprehensions, generator expressions and lambdas count as part of the function
    that contains them.
    """
    seen, make_loader = {("main.py", "train_one_epoch")}, main.make_loader
    sources = {*ROOT.glob("*.py"), *ROOT.glob("utils/*.py"), *ROOT.glob("extras/*.py")}

    def profile(frame, event, _):
        file, name = Path(frame.f_code.co_filename), frame.f_code.co_qualname
        if event == "call" and file in sources and name[-1] != ">":
            seen.add((file.relative_to(ROOT).as_posix(), name))

    class MarkedLoader:
        def __init__(self, loader):
            self.loader = loader

        def __iter__(self):
            batches = iter(self.loader)
            for number in range(1, 4):
                sys.setprofile(profile if number == 2 else None)
                yield next(batches)

    monkeypatch.setattr(
        main, "make_loader", lambda *arguments, **options: MarkedLoader(make_loader(*arguments, **options))
    )
    try:
        fit(config)
    finally:
        sys.setprofile(None)
    return sorted(seen)


def demo_config(tiny_config, **changes):
    """The demo on the small sample: three steps of 8 images with 5 captions each."""
    own = {name: getattr(tiny_config(), name) for name in ("image_path", "captions_path", "cache_path", "run")}
    return build_config({**PRESETS["demo"], **own, "sample_images": 0, "epochs": 1, "batch_size": 8,
                         "device": "cpu", **changes})  # fmt: skip


@pytest.mark.skipif(sys.version_info < (3, 11), reason="code objects have no co_qualname")
def test_one_step_of_the_demo_runs_few_functions(tiny_config, monkeypatch, fit):
    found = trace_step(demo_config(tiny_config), monkeypatch, fit)
    assert ("clip.py", "contrastive_loss") in found
    assert len(found) <= 20 and len({file for file, _ in found}) <= 4, "\n".join(map(": ".join, found))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="code objects have no co_qualname")
def test_one_step_with_data_loading_runs_few_functions(tiny_config, monkeypatch, fit):
    """Without loader processes, the transforms and the collation of the batch run in this process too."""
    found = trace_step(demo_config(tiny_config, num_workers=0), monkeypatch, fit)
    assert ("dataset.py", "TrainingPairs.collate") in found
    assert len(found) <= 30 and len({file for file, _ in found}) <= 6, "\n".join(map(": ".join, found))

"""Many trainings at once equal single ones; every arm of the feature GAN benchmark runs."""

import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, flags
from gan_fixtures import TINY, as_flags
from scipy import stats
from test_main import pretrained_config

sys.path.insert(0, str(ROOT / "benchmarks"))

import gan_features
import stacked
from common import build_state

import gan
import main
from clip import contrastive_loss, save_model
from config import InputError
from dataset import load_splits
from utils.cli import StopRequest
from utils.files import read_json


@pytest.fixture
def frozen_config(tiny_config, tmp_path):
    frozen = {"trainable": False, "captions_per_image": 5, "scheduler": "cosine", "warmup_steps": 2, "epochs": 3}
    frozen |= {"dropout": 0.0, "head_lr": 1e-2}
    return lambda **changes: pretrained_config(tiny_config, tmp_path, **{**frozen, **changes})


def options(*argv):
    return gan_features.parse_options([*argv])[0]


def test_loss_of_several_runs_equals_the_loss_of_each():
    torch.manual_seed(0)
    index = torch.arange(6).repeat_interleave(torch.tensor([2, 1, 3, 1, 1, 2]))
    images, texts = (F.normalize(torch.randn(3, n, 8, dtype=torch.float64), dim=-1) for n in (6, len(index)))
    ids, text_ids = torch.randint(4, (3, 6)), torch.randint(6, (3, len(index)))
    t, weights = torch.tensor([0.5, 1.0, 2.6], dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    found = stacked.contrastive_losses(images, texts, t, index, ids, weights, text_ids)
    for run in range(3):
        expected = contrastive_loss(images[run], texts[run], t[run], index, ids[run], weights, text_ids=text_ids[run])
        assert found[run].item() == pytest.approx(expected.item(), abs=1e-12)


def test_stacked_heads_equal_those_of_the_training_loop(frozen_config):
    seeds, config = [5, 6], frozen_config()
    model, train, _ = gan_features.load(config)
    data = gan_features.choose_data(train, options("--share", "0.5"), seeds, torch.device("cpu"))
    start = stacked.Heads(model, seeds, 1).parameters
    found = stacked.train_heads(model, data, None, 1, config, seeds).parameters
    for number, seed in enumerate(seeds):
        own = replace(config, seed=seed)
        pairs = data.pairs[number]
        pairs.image_features, pairs.text_features = (
            data.images[data.real_images[number]],
            data.texts[data.real_captions[number]],
        )
        for name in ("image", "text"):
            getattr(model, f"{name}_projection").layers[-1].weight.data.copy_(start[name, "weight"][number, 0])
        model.logit_scale.data.copy_(start["t", ""][number, 0])
        sampler, loader = main.build_loader(model, pairs, own)
        state = build_state(model, own, None, pairs, own.epochs * sampler.num_batches)
        for state.epoch in range(own.epochs):
            main.train_one_epoch(state, sampler, loader, own, None, StopRequest())
            state.batch = 0
        for name in ("image", "text"):
            weight = getattr(model, f"{name}_projection").layers[-1].weight
            assert (weight - start[name, "weight"][number, 0]).abs().max() > 1e-2
            assert torch.allclose(found[name, "weight"][number, 0], weight, atol=1e-5)
        assert found["t", ""][number, 0].item() == pytest.approx(model.logit_scale.item(), abs=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5])
def test_dropout_drops_a_share_and_keeps_the_mean(p):
    x = torch.ones(300, 1001)
    torch.manual_seed(0)
    found = stacked.dropout(x, p)
    assert (found == 0).double().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5)
    assert found.max().item() == pytest.approx(1 / (1 - p))
    torch.manual_seed(0)
    assert found.equal(stacked.dropout(x, p)) and (p == 0 or not found.equal(stacked.dropout(x, p)))


@pytest.mark.parametrize("seeds", [[1], [1, 2]])
def test_stacked_networks_equal_single_ones(seeds):
    texts = torch.randn(len(seeds), 50, 16)
    network = stacked.Stacked(lambda: stacked.FeatureGenerator(16, 4), texts, seeds, torch.device("cpu"))
    noise = torch.randn(len(seeds), 3, stacked.NOISE_DIM)
    found = network(texts[:, :3], noise)
    for number, seed in enumerate(seeds):
        torch.manual_seed(seed)
        single = stacked.FeatureGenerator(16, 4)
        single.caption.fit(texts[number])
        assert torch.allclose(found[number], single(texts[number, :3], noise[number]), atol=1e-5)


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(stacked, "GAN_STEPS", 20)
    monkeypatch.setattr(gan_features, "report", lambda name, rows, details: None)


def test_every_arm_runs_and_finished_seeds_are_kept(frozen_config, tmp_path, fast, capsys):
    arms = [arm for arm in gan_features.ARMS if "images" not in arm and arm != "blurred"]
    argv = ["--share", "0.5", "--seeds", "3", "--at_once", "2", "--folder", str(tmp_path / "out")]
    argv += ["--arms", *arms, *flags(frozen_config(dropout=0.2))]
    gan_features.main(argv)
    found = [read_json(tmp_path / "out" / f"{seed}.json") for seed in (101, 102, 103)]
    assert all(list(results) == arms for results in found)
    assert len({results["real"]["rsum"] for results in found}) > 1
    printed = capsys.readouterr().out
    gan_features.main(argv)
    again = capsys.readouterr().out
    assert "103 mixup" in printed and "103 mixup" not in again and "| mixup |" in again


def test_gan_features_depend_on_the_caption_and_regression_fits(frozen_config, monkeypatch):
    monkeypatch.setattr(stacked, "GAN_STEPS", 400)
    model, train, _ = gan_features.load(frozen_config())
    data = gan_features.choose_data(train, options("--share", "1"), [1], torch.device("cpu"))
    assert data.pool_captions.equal(data.real_captions)
    network = stacked.train_regression(data, [1])
    target = data.standard(data.images[data.image_index[data.real_captions]])
    assert F.mse_loss(network(data.texts[data.real_captions]), target) < 0.7 * target.square().mean()
    monkeypatch.setattr(stacked, "GAN_STEPS", 30)
    generator, noise = stacked.train_feature_gan(data, [1]), torch.randn(1, 2, stacked.NOISE_DIM)
    same_noise = noise[:, :1].expand(-1, 2, -1)
    a, b = generator(data.texts[None, [0, 50]], same_noise)[0]
    assert (a - b).abs().max() > 1e-3
    a, b = generator(data.texts[None, [0, 0]], noise)[0]
    assert (a - b).abs().max() > 1e-3


def test_images_of_a_seed_are_its_own(frozen_config):
    _, train, _ = gan_features.load(frozen_config())
    data = gan_features.choose_data(train, options("--share", "0.25"), [1, 2], torch.device("cpu"))
    assert data.real_images.shape == (2, 6) and not data.real_images[0].equal(data.real_images[1])
    for real, pool in zip(data.real_captions, data.pool_captions, strict=True):
        assert not set(real.tolist()) & set(pool.tolist()) and len(real) + len(pool) == len(train.captions)
    assert data.image_index[data.real_captions[0]].unique().tolist() == data.real_images[0].tolist()


def test_variants_belong_to_images_of_their_seed(frozen_config):
    model, train, validation = gan_features.load(config := frozen_config())
    data = gan_features.choose_data(train, options("--share", "0.5"), [1, 2], model.device)
    num_captions, last = len(train.captions), data.texts[-1]
    made = SimpleNamespace(variants=gan_features.add_variants(model, data, validation, config))
    assert data.texts[num_captions - 1].equal(last) and len(data.texts) == len(data.image_index) == len(data.text_ids)
    assert not set(data.text_ids[num_captions:].tolist()) & set(data.text_ids[:num_captions].tolist())
    features, texts, ids, found = gan_features.Arms(["captions"], data, made, 1.0, [1, 2])(0, 16)
    for seed, table in enumerate(made.variants):
        assert (table >= num_captions).all()
        assert set(ids[seed, 0].tolist()) <= set(data.real_images[seed].tolist())
        assert features[seed, 0].equal(data.images[ids[seed, 0]])
        chosen = [(data.text_ids == each).nonzero()[0, 0].item() for each in found[seed, 0]]
        assert texts[seed, 0].equal(data.texts[chosen])


def test_images_with_different_numbers_of_captions_are_refused(frozen_config):
    _, train, _ = gan_features.load(frozen_config())
    train.caption_offsets = np.concatenate([train.caption_offsets[:1], [2], train.caption_offsets[2:]])
    with pytest.raises(InputError, match="2 to 8 captions"):
        gan_features.choose_data(train, options(), [1], torch.device("cpu"))


def test_claims_are_corrected_for_their_number():
    rng = np.random.default_rng(0)
    results = {
        seed: {
            arm: {"text_to_image_R@10": 50 + gain + rng.normal(0, 0.5), "rsum": 300 + rng.normal()}
            for arm, gain in {"real": 0, "noise": 1.0, "gan": 1.2}.items()
        }
        for seed in range(10)
    }
    rows = gan_features.against_controls(results, ["real", "noise", "gan"])
    assert [(row["metric"], row["control"]) for row in rows[:2]] == [
        ("text_to_image_R@10", c) for c in ("real", "noise")
    ]
    differences = [
        [run["gan"]["text_to_image_R@10"] - run[c]["text_to_image_R@10"] for run in results.values()]
        for c in ("real", "noise")
    ]
    p = [stats.ttest_1samp(each, 0).pvalue for each in differences]
    assert float(rows[0]["p"]) == pytest.approx(2 * p[0], rel=0.05)  # the smaller of two
    assert float(rows[1]["p"]) == pytest.approx(max(2 * p[0], p[1]), rel=0.05)


def test_image_quality_of_real_and_of_foreign_features(frozen_config, tmp_path, monkeypatch):
    config = frozen_config()
    model, train, validation = gan_features.load(config)
    save_model(model, tmp_path / "evaluator" / "best")
    chosen = options("--share", "0.5", "--gan_run", "x", "--evaluator", str(tmp_path / "evaluator"))
    real = train.image_features[train.image_index]
    monkeypatch.setattr(gan_features, "names_of_gan_run", lambda run: train.names[::2])
    monkeypatch.setattr(gan_features, "image_gan_features", lambda *_: (real, train.image_features))
    rows = gan_features.image_quality(chosen, config, model, train, validation)
    assert [row["images"] for row in rows] == ["generated", "real, at the GAN's resolution", "real", rows[-1]["images"]]
    assert rows[0]["top 10"] == rows[1]["top 10"] == rows[2]["top 10"]
    distance = [float(row["kernel distance x 1000"].split()[0]) for row in rows]
    monkeypatch.setattr(gan_features, "image_gan_features", lambda *_: (5 + 3 * real, train.image_features))
    worse = gan_features.image_quality(chosen, config, model, train, validation)
    assert float(worse[0]["kernel distance x 1000"].split()[0]) > 10 * abs(distance[0]) + 10


def test_image_arms_use_the_images_of_the_gan_run(frozen_config, tmp_path, fast):
    config, part = frozen_config(), tmp_path / "part"
    part.mkdir()
    for split, pairs in load_splits(config).items():
        name = {"train": "train", "validation": "dev", "test": "test"}[split]
        (part / f"{name}Images.txt").write_text("".join(f"{each}\n" for each in pairs.names), encoding="utf-8")
    shutil.copy(config.captions_path, part / "captions.txt")
    whole = shutil.copytree(part, tmp_path / "whole")
    gan_features.main(["--share", "0.5", "--write_split", str(part / "trainImages.txt"), *flags(config)])
    main.main(flags(replace(config, captions_path=str(part), run="run", epochs=1)))
    gan.main(["--run", "run", *as_flags({**TINY, "gan_epochs": 1})])
    argv = ["--share", "0.5", "--gan_run", "run", "--seeds", "2", "--folder", "out"]
    argv += ["--arms", "real", "images", "shuffled_images", "blurred"]
    gan_features.main([*argv, *flags(replace(config, captions_path=str(whole)))])
    assert list(read_json("out/102.json")) == ["real", "images", "shuffled_images", "blurred"]
    with pytest.raises(InputError, match="ratio is 1.0, but out contains runs with 2.0: pass another --folder"):
        gan_features.main([*argv, "--ratio", "1", *flags(replace(config, captions_path=str(whole)))])
    gan_features.main([*argv, *flags(replace(config, captions_path=str(whole)))])
    names = load_splits(replace(config, captions_path=str(part)))["train"].names
    model, train, _ = gan_features.load(replace(config, captions_path=str(whole), run="out"))
    data = gan_features.choose_data(train, options("--share", "0.5", "--gan_run", "run"), [1, 2], model.device)
    assert all([train.names[i] for i in images] == names for images in data.real_images.tolist())
    generated, blurred = torch.load("out/images.pt")
    assert generated.any(1).nonzero()[:, 0].tolist() == data.pool_captions[0].tolist()
    made = SimpleNamespace(generated=generated, blurred=blurred)
    arms = gan_features.Arms(["images", "shuffled_images", "blurred"], data, made, 2.0, [1, 2])
    features, _, ids, _ = arms(0, 8)
    assert features[:, 0].equal(features[:, 1]) and not ids[:, 0].equal(ids[:, 1])
    assert features[:, 2].equal(blurred[ids[:, 2]])

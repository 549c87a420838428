"""The model, the contrastive loss, retrieval metrics, saving and loading."""

import dataclasses
import json
import math
import os
import pickle
import shutil
import socket

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from naive import loss_and_gradients, loss_cases, naive_loss, random_embeddings, relative_error
from safetensors.torch import load_file, save_file
from torch import nn

import clip
from clip import (
    contrastive_loss,
    format_metrics,
    load_model,
    read_saved_model,
    retrieval_metrics,
    save_model,
)
from config import DivergenceError, InputError
from dataset import Batch
from utils.device import autocast
from utils.model_checks import check_model

CPU = torch.device("cpu")


# ---- the loss ---------------------------------------------------------------------------------------------------


def paper_loss(image_embeddings, text_embeddings, t):
    """The pseudocode of figure 3 of the paper, in NumPy."""
    logits = image_embeddings @ text_embeddings.T * np.exp(t)
    labels = np.arange(len(logits))

    def cross_entropy_loss(logits):
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        return -np.log((exponentials / exponentials.sum(1, keepdims=True))[labels, labels]).mean()

    return (cross_entropy_loss(logits) + cross_entropy_loss(logits.T)) / 2


@pytest.fixture(params=["dense", "tiled"])
def each_loss(request, monkeypatch):
    """The test runs with the dense and with the tiled loss."""
    if request.param == "tiled":
        monkeypatch.setattr(clip, "MAX_DENSE_LOGITS", 0)


@pytest.mark.usefixtures("each_loss")
@pytest.mark.parametrize("t", [0.0, math.log(1 / 0.07), math.log(100)])
def test_contrastive_loss_with_one_caption_equals_the_paper(t):
    images, texts = random_embeddings(torch.arange(40))
    expected = paper_loss(images.double().numpy(), texts.double().numpy(), t)
    in_double = contrastive_loss(images.double(), texts.double(), torch.tensor(t, dtype=torch.float64))
    assert in_double.item() == pytest.approx(expected, rel=1e-9)  # softplus is linear above 20
    assert contrastive_loss(images, texts, torch.tensor(t)).item() == pytest.approx(expected, rel=2e-6)


@pytest.mark.usefixtures("each_loss")
@pytest.mark.parametrize("t", [math.log(1 / 0.07), math.log(100)], ids=["initial t", "maximum t"])
@pytest.mark.parametrize("case", loss_cases())
def test_contrastive_loss_and_gradients_equal_the_naive_ones(case, t):
    targets = loss_cases()[case]
    images, texts = random_embeddings(targets["image_index"])
    expected = loss_and_gradients(naive_loss, images, texts, t, torch.float64, **targets)
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-5)):
        found = loss_and_gradients(contrastive_loss, images, texts, t, dtype, **targets)
        for name, value, expected_value in zip(("loss", "images", "texts", "t"), found, expected, strict=True):
            assert value.dtype == dtype
            assert relative_error(value, expected_value) < tolerance, name


@pytest.mark.parametrize("case", loss_cases())
def test_dense_and_tiled_loss_agree(case, monkeypatch):
    targets = loss_cases()[case]
    images, texts = random_embeddings(targets["image_index"])
    dense = loss_and_gradients(contrastive_loss, images, texts, 2.0, torch.float64, **targets)
    monkeypatch.setattr(clip, "MAX_DENSE_LOGITS", 0)
    tiled = loss_and_gradients(contrastive_loss, images, texts, 2.0, torch.float64, **targets)
    for a, b in zip(dense, tiled, strict=True):
        assert relative_error(a, b) < 1e-8


def test_contrastive_loss_is_tiled_above_the_maximum_size(monkeypatch):
    calls = []
    tiled = clip.tiled_contrastive_loss
    monkeypatch.setattr(clip, "tiled_contrastive_loss", lambda *args: calls.append(len(args[1])) or tiled(*args))
    monkeypatch.setattr(clip, "MAX_DENSE_LOGITS", 10**2)
    for number in (9, 10, 11):
        images, texts = random_embeddings(torch.arange(number))
        contrastive_loss(images, texts, torch.tensor(1.0))
    assert calls == [11]
    image_index = torch.arange(3).repeat_interleave(4)  # 3 x 12 logits, but the dense loss needs 12 x 12
    images, texts = random_embeddings(image_index)
    contrastive_loss(images, texts, torch.tensor(1.0), image_index)
    assert calls == [11, 12]


@pytest.mark.usefixtures("each_loss")
def test_contrastive_loss_is_float32_under_autocast():
    images, texts = random_embeddings(torch.arange(8))
    expected = contrastive_loss(images, texts, torch.tensor(4.0))
    with torch.autocast("cpu", torch.bfloat16):
        found = contrastive_loss(images, texts, torch.tensor(4.0))
    assert found.dtype == torch.float32
    assert found == expected


@pytest.mark.usefixtures("each_loss")
def test_contrastive_loss_of_perfect_and_of_constant_embeddings():
    one_hot = torch.eye(6)
    assert contrastive_loss(one_hot, one_hot, torch.tensor(math.log(100))).item() < 1e-12
    same = one_hot[:1].expand(6, 6)
    assert contrastive_loss(same, same, torch.tensor(0.0)).item() == pytest.approx(math.log(6))


@pytest.mark.usefixtures("each_loss")
@pytest.mark.parametrize("rows", [1, 3])
def test_contrastive_loss_of_one_image_is_zero(rows):
    """One image with three captions, or the same image three times: there are no negatives."""
    image_index = torch.arange(3) if rows == 3 else torch.zeros(3, dtype=torch.int64)
    images, texts = random_embeddings(image_index)
    targets = {"image_index": image_index, "image_ids": torch.full((rows,), 5)}
    loss, *gradients = loss_and_gradients(contrastive_loss, images, texts, 1.0, torch.float32, **targets)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.usefixtures("each_loss")
def test_contrastive_loss_of_a_repeated_image_ignores_its_other_captions():
    """The captions of a repeated image are not negatives of its other rows: moving them away changes only their own
    terms."""
    targets = {"image_index": torch.arange(4), "image_ids": torch.tensor([1, 2, 1, 3])}
    images, texts = random_embeddings(targets["image_index"])
    t = torch.tensor(2.0, dtype=torch.float64)
    inputs = images.double().requires_grad_(), texts.double().requires_grad_()
    contrastive_loss(*inputs, t, **targets, weights=torch.tensor([1.0, 0, 0, 0])).backward()
    assert (inputs[0].grad[2] == 0).all() and (inputs[1].grad[2] == 0).all()
    assert (inputs[0].grad[[0, 1, 3]] != 0).any(1).all() and (inputs[1].grad[[0, 1, 3]] != 0).any(1).all()


def test_contrastive_loss_needs_image_index_for_several_captions():
    with pytest.raises(ValueError, match="2 images and 4 captions: pass image_index"):
        contrastive_loss(torch.eye(4)[:2], torch.eye(4), torch.tensor(0.0))


# ---- the model --------------------------------------------------------------------------------------------------


def test_temperature_starts_as_in_the_paper_and_is_clamped(tiny_model):
    model = tiny_model()
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    for given, clamped in ((9.0, math.log(100)), (math.log(100), math.log(100)), (2.0, 2.0), (-1.0, 0.0)):
        model.logit_scale.data.fill_(given)
        model.clamp_temperature()
        assert model.logit_scale.item() == pytest.approx(clamped)


def test_encoders_return_unit_vectors_in_float32(tiny_model):
    model = tiny_model(projection_dim=20)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    tokens = model.tokenizer(["A red circle .", "on grass"], padding=True, return_tensors="pt")
    for dtype in (None, torch.bfloat16):
        with torch.no_grad(), autocast(CPU, dtype):
            embeddings = model.encode_image(images), model.encode_text(tokens.input_ids, tokens.attention_mask)
        for found, count in zip(embeddings, (3, 2), strict=True):
            assert found.shape == (count, 20)
            assert found.dtype == torch.float32
            assert torch.allclose(found.norm(dim=-1), torch.ones(count), atol=1e-6)


def test_forward_encodes_a_batch_or_takes_precomputed_features(tiny_model):
    model = tiny_model()
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    tokens = model.tokenizer(["A red circle .", "on grass", "a star"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model.encode_image(images), model.encode_text(tokens.input_ids, tokens.attention_mask)
        image_features = model.image_encoder(images)
        text_features = model.text_encoder(tokens.input_ids, tokens.attention_mask)
        rows = {"image_index": torch.arange(3), "image_ids": torch.arange(3)}
        text = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
        for inputs in (
            {"images": images, **text},
            {"image_features": image_features, **text},
            {"images": images, "text_features": text_features},
            {"image_features": image_features, "text_features": text_features},
        ):
            found = model(Batch(**rows, **inputs))
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_encode_image_takes_bytes_and_floats(tiny_model):
    model = tiny_model()
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(model.encode_image(images), model.encode_image(images.float() / 255))


def test_encode_text_ignores_padding(tiny_model):
    model = tiny_model()
    short, long = model.tokenizer(["a star"])["input_ids"][0], model.tokenizer(["A blue star on sand"])["input_ids"][0]
    padded = torch.tensor([short + [model.tokenizer.pad_token_id] * (len(long) - len(short)), long])
    mask = (torch.arange(len(long)) < torch.tensor([[len(short)], [len(long)]])).long()
    with torch.no_grad():
        alone = model.encode_text(torch.tensor([short]), torch.ones(1, len(short), dtype=torch.int64))
        assert torch.allclose(model.encode_text(padded, mask)[:1], alone, atol=1e-6)


def test_frozen_encoders_have_no_gradient_and_stay_in_evaluation_mode(tiny_model):
    model = tiny_model()
    frozen = {"trainable_image_encoder": False, "pretrained_image_encoder": True}
    model.config = dataclasses.replace(model.config, **frozen)
    model.train()
    assert not any(module.training for module in model.image_encoder.modules())
    assert model.text_encoder.training
    assert model.image_projection.training
    changed = clip.CLIP(model.config, model.tokenizer, saved=saved_content(model))
    assert not any(parameter.requires_grad for parameter in changed.image_encoder.parameters())
    assert all(parameter.requires_grad for parameter in changed.text_encoder.parameters())


def saved_content(model):
    return {"image_encoder": model.image_config, "text_encoder": model.text_encoder.model_config}


# ---- retrieval metrics ------------------------------------------------------------------------------------------


def naive_metrics(images, texts, image_index, text_ids=None):
    """Recalls and median ranks from all pairs; a tie counts against the right answer.

    With text ids a caption belongs to all images that have an equal one.
    """
    text_ids = range(len(texts)) if text_ids is None else text_ids.tolist()
    own_texts = [{text_ids[j] for j, row in enumerate(image_index) if row == i} for i in range(len(images))]
    image_ranks, text_ranks = [], []
    for j in range(len(texts)):
        scores = [float(images[i] @ texts[j]) for i in range(len(images))]
        right = [i for i in range(len(images)) if text_ids[j] in own_texts[i]]
        best = max(scores[i] for i in right)
        text_ranks.append(1 + sum(scores[i] >= best for i in range(len(images)) if i not in right))
    for i in range(len(images)):
        scores = [float(images[i] @ text) for text in texts]
        right = [j for j in range(len(texts)) if text_ids[j] in own_texts[i]]
        best = max(scores[j] for j in right)
        image_ranks.append(1 + sum(scores[j] >= best for j in range(len(texts)) if j not in right))
    metrics = {}
    for name, ranks in (("image_to_text", image_ranks), ("text_to_image", text_ranks)):
        for k in (1, 5, 10):
            metrics[f"{name}_R@{k}"] = 100 * sum(rank <= k for rank in ranks) / len(ranks)
        ranks = sorted(ranks)
        metrics[f"{name}_median_rank"] = (ranks[(len(ranks) - 1) // 2] + ranks[len(ranks) // 2]) / 2
    metrics["rsum"] = sum(metrics[f"{name}_R@{k}"] for name in ("image_to_text", "text_to_image") for k in (1, 5, 10))
    return metrics


def ragged_index(images):
    counts = torch.randint(1, 7, (images,))
    return torch.arange(images).repeat_interleave(counts)


@pytest.mark.parametrize("tile", [7, 2048])
def test_retrieval_metrics_of_equal_captions_equal_the_naive_ones(monkeypatch, tile):
    monkeypatch.setattr(clip, "TILE", tile)
    monkeypatch.setattr(clip, "IMAGE_TILE", tile + 2)
    index = ragged_index(30)
    images, texts = random_embeddings(index)
    text_ids = torch.randint(0, 60, (len(index),))
    texts = texts[[text_ids.tolist().index(each) for each in text_ids.tolist()]]  # equal captions, equal embeddings
    standard = retrieval_metrics(images, texts, index)
    found = retrieval_metrics(images, texts, index, text_ids=text_ids, num_draws=10)
    equal = found.pop("equal_captions")
    assert {name: value for name, value in found.items() if name != "ci95"} == standard
    assert standard == pytest.approx(naive_metrics(images, texts, index.tolist()))
    assert equal.pop("ci95").keys() == found["ci95"].keys()
    assert equal == pytest.approx(naive_metrics(images, texts, index.tolist(), text_ids))
    assert equal["rsum"] > standard["rsum"]
    table = clip.format_metrics({**found, "equal_captions": equal})
    assert "every image that has the caption" in table and table.count("rsum") == 2


def test_contrastive_loss_without_equal_captions_is_bit_identical():
    index = ragged_index(20)
    images, texts = random_embeddings(index)
    for limit in (0, 2**20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(clip, "MAX_DENSE_LOGITS", limit)
            plain, with_ids = (
                loss_and_gradients(contrastive_loss, images, texts, 2.0, torch.float32, image_index=index, **ids)
                for ids in ({}, {"text_ids": torch.randperm(len(index))})
            )
            assert all(torch.equal(a, b) for a, b in zip(plain, with_ids, strict=True))


@pytest.mark.parametrize(("tile", "image_tile"), [(7, 9), (7, 40), (2048, 13), (2048, 16384)])
def test_retrieval_metrics_equal_a_double_loop(monkeypatch, tile, image_tile):
    monkeypatch.setattr(clip, "TILE", tile)
    monkeypatch.setattr(clip, "IMAGE_TILE", image_tile)
    image_index = ragged_index(40)
    image_index = image_index[torch.randperm(len(image_index))]
    # Small integers: exact in any order of summation, and full of ties.
    images = torch.randint(-2, 3, (40, 6)).float()
    texts = images[image_index] + torch.randint(-2, 3, (len(image_index), 6))
    found = retrieval_metrics(images, texts, image_index)
    expected = naive_metrics(images, texts, image_index.tolist())
    assert list(found) == list(expected)
    assert found == pytest.approx(expected)
    assert 0 < found["text_to_image_R@1"] < found["text_to_image_R@10"] < 100


def test_retrieval_metrics_of_a_perfect_model_are_100():
    image_index = ragged_index(12)
    metrics = retrieval_metrics(torch.eye(12), torch.eye(12)[image_index], image_index.numpy())
    recalls = [value for name, value in metrics.items() if "R@" in name]
    assert recalls == [100.0] * 6
    assert metrics["rsum"] == 600
    assert metrics["image_to_text_median_rank"] == metrics["text_to_image_median_rank"] == 1


def test_retrieval_metrics_of_a_collapsed_model_are_zero():
    image_index = torch.arange(30).repeat_interleave(5)
    metrics = retrieval_metrics(torch.ones(30, 4), torch.ones(150, 4), image_index)
    assert metrics["rsum"] == 0
    assert metrics["text_to_image_median_rank"] == 30
    assert metrics["image_to_text_median_rank"] == 146  # after all captions of the other images
    with pytest.raises(DivergenceError, match="image embeddings are not finite"):
        retrieval_metrics(torch.full((30, 4), math.nan), torch.ones(150, 4), image_index)


def test_format_metrics_prints_every_metric():
    image_index = torch.arange(20).repeat_interleave(2)
    metrics = retrieval_metrics(*random_embeddings(image_index), image_index)
    lines = format_metrics(metrics).splitlines()
    assert lines[0].split() == ["R@1", "R@5", "R@10", "median", "rank"]
    for line, name in zip(lines[1:3], ("image_to_text", "text_to_image"), strict=True):
        assert line.startswith(name.replace("_", " "))
        recalls = [f"{metrics[f'{name}_R@{k}']:.1f}" for k in (1, 5, 10)]
        assert line.split()[3:] == [*recalls, f"{metrics[f'{name}_median_rank']:.0f}"]
    assert lines[3] == f"rsum {metrics['rsum']:.1f}"


# ---- saving and loading -----------------------------------------------------------------------------------------


@pytest.fixture
def saved(tiny_model, tmp_path):
    """A model with random weights and BatchNorm statistics, and the folder it is saved in."""
    model = tiny_model(captions_per_image=2, num_projection_layers=2)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.01 * torch.rand_like(tensor))
    save_model(model, tmp_path / "best")
    return model, tmp_path / "best"


@pytest.mark.parametrize("name", ["best", "."], ids=["best folder", "run folder"])
def test_load_model_restores_a_model_bit_for_bit(saved, name):
    model, folder = saved
    loaded = load_model(folder.parent / name)
    assert not loaded.training
    assert dataclasses.replace(loaded.config, run=model.config.run) == model.config
    own, other = model.state_dict(), loaded.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    captions = ["A red circle is left of a blue star .", "on sand", "zebra"]
    assert model.tokenizer(captions)["input_ids"] == loaded.tokenizer(captions)["input_ids"]
    tokens = loaded.tokenizer(captions, padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model.encode_image(images), loaded.encode_image(images))
        expected = model.encode_text(tokens.input_ids, tokens.attention_mask)
        assert torch.equal(expected, loaded.encode_text(tokens.input_ids, tokens.attention_mask))


def test_save_model_replaces_earlier_weights(saved):
    model, folder = saved
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
    save_model(model, folder)
    assert load_model(folder).logit_scale.item() == 1.5
    assert not list(folder.glob("*.tmp")) + list(folder.glob(".*.tmp"))


def test_load_model_reads_the_settings_of_earlier_versions(saved):
    _, folder = saved

    def rename(content):
        settings = content["settings"]
        settings["gan_gate"], settings["gan_match"] = settings.pop("gan_filter_top_k"), settings.pop("gan_clip_weight")
        settings["text_tokenizer"], settings["gan_gate"] = "captions", 7

    change_json(folder, rename)
    config = load_model(folder).config
    assert (config.gan_filter_top_k, config.gan_clip_weight, config.text_tokenizer) == (7, 0.25, "wordpiece")
    assert read_saved_model(folder)[1]["settings"]["gan_filter_top_k"] == 7


def change_json(folder, change):
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    change(content)
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")


def change_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


class Explosive:
    def __reduce__(self):
        return (open, ("opened", "w"))


HEAD = "image_projection.layers.1.weight"
SPARSE = 40 * 2**30  # bytes
DAMAGES = {
    "pickle": (
        lambda f: (f / "model.safetensors").write_bytes(pickle.dumps(Explosive())),
        "not a safetensors file",
    ),
    "torch file": (lambda f: torch.save({}, f / "model.safetensors"), "not a safetensors file"),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
        "not a safetensors file",
    ),
    "sparse weights": (lambda f: os.truncate(f / "model.safetensors", SPARSE), "not a safetensors file"),
    "sparse config": (lambda f: os.truncate(f / "config.json", SPARSE), "config.json has 42,949,672,960 bytes"),
    "sparse tokenizer": (lambda f: os.truncate(f / "tokenizer/tokenizer.json", SPARSE), "tokenizer.json has 42,949"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "no settings": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "invalid JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[1]"), "does not contain a JSON object"),
    "missing setting": (lambda f: change_json(f, lambda c: c["settings"].pop("size")), "lacks settings.size"),
    "no settings in it": (lambda f: change_json(f, lambda c: c.pop("settings")), "lacks settings"),
    "settings in a list": (lambda f: change_json(f, lambda c: c.update(settings=["size"])), "lacks settings"),
    "missing mean": (lambda f: change_json(f, lambda c: c["image_encoder"].pop("mean")), "lacks image_encoder.mean"),
    "missing part": (lambda f: change_json(f, lambda c: c.pop("text_encoder")), "lacks text_encoder"),
    "impossible setting": (lambda f: change_json(f, lambda c: c["settings"].update(size=-1)), "size is -1"),
    "unknown setting": (lambda f: change_json(f, lambda c: c["settings"].update(sizes=1)), "unknown setting 'sizes'"),
    "missing tensor": (lambda f: change_weights(f, lambda s: s.pop(HEAD)), f"lacks the tensor {HEAD}"),
    "unknown tensor": (lambda f: change_weights(f, lambda s: s.update(x=torch.zeros(1))), "has an unknown tensor x"),
    "wrongly shaped tensor": (
        lambda f: change_weights(f, lambda s: s.update({HEAD: s[HEAD][:, :5].contiguous()})),
        f"has a tensor {HEAD} of another shape or type",
    ),
    "tensor of integers": (
        lambda f: change_weights(f, lambda s: s.update({HEAD: s[HEAD].int()})),
        f"has a tensor {HEAD} of another shape or type",
    ),
    "NaN": (lambda f: change_weights(f, lambda s: s[HEAD].fill_(math.nan)), f"not finite in tensor {HEAD}"),
    "infinity": (lambda f: change_weights(f, lambda s: s[HEAD][3, 2].fill_(math.inf)), f"not finite in tensor {HEAD}"),
    "wider projection": (
        lambda f: change_json(f, lambda c: c["settings"].update(projection_dim=33)),
        "of another shape or type",
    ),
    "wide text encoder": (
        lambda f: change_json(f, lambda c: c["text_encoder"].update(hidden_dim=2**24)),
        "larger model than that in model.safetensors",
    ),
    "deep text encoder": (
        lambda f: change_json(f, lambda c: c["text_encoder"].update(n_layers=2**24)),
        "larger model than that in model.safetensors",
    ),
    "size beyond all": (
        lambda f: change_json(f, lambda c: c["text_encoder"].update(n_layers=2**60)),
        "text_encoder.n_layers is '1152921504606846976', which is not possible",
    ),
    "another image encoder": (
        lambda f: change_json(f, lambda c: c["image_encoder"].update(architecture="vit_giant_patch14_224")),
        "larger model than that in model.safetensors",
    ),
    "size that the encoder cannot take": (
        lambda f: change_json(f, lambda c: c["text_encoder"].update(n_heads=3)),
        "does not describe a model that can be built",
    ),
    "more tokens than embeddings": (lambda f: add_token(f, 10**6), "text_tokenizer has a token id 1000000, but there"),
    "tokenizer with a slow pattern": (lambda f: add_pattern(f, "(a+)+$"), "retry-limit-in-match"),
}


def add_token(folder, token_id):
    """Add a special token with an id without an embedding to every caption."""
    path = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    (name,) = [token for token in content["post_processor"]["special_tokens"] if "SEP" in token]
    content["post_processor"]["special_tokens"][name]["ids"] = [token_id]
    path.write_text(json.dumps(content), encoding="utf-8")


def add_pattern(folder, pattern):
    """Let the tokenizer replace a regular expression first."""
    path = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": pattern}, "content": "b"}
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("damage", DAMAGES)
def test_load_model_refuses_a_damaged_model(saved, damage, tmp_path):
    change, message = DAMAGES[damage]
    change(saved[1])
    with pytest.raises(InputError, match=message) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "opened").exists()  # the pickle would have created it


# What a stranger may write into config.json, and the beginning of the answer ("": the entry is ignored)
HOSTILE = {
    "checkpoint": (
        ("image_encoder", "model_args"),
        {"checkpoint_path": "evil.pth"},
        "unknown entry image_encoder.model_args.che",
    ),
    "pretrained weights": (("image_encoder", "pretrained_cfg"), {"file": "evil.pth"}, "has an unknown entry image_enc"),
    "architecture of the hub": (("image_encoder", "architecture"), "hf-hub:evil/model", "image_encoder.archit"),
    "architecture in a folder": (("image_encoder", "architecture"), "local-dir:evil", "image_encoder.archit"),
    "code of the hub": (("text_encoder", "auto_map"), {"AutoModel": "evil/model--evil.Model"}, ""),
    "code in the folder": (("text_encoder", "auto_map"), {"AutoModel": "evil.Model", "AutoConfig": "evil.C"}, ""),
    "name": (("text_encoder", "_name_or_path"), "evil/model", ""),
    "kernels": (("text_encoder", "_attn_implementation"), "evil/kernels", ""),
    "quantization": (("text_encoder", "quantization_config"), {"quant_method": "hqq"}, ""),
    "timm in transformers": (("text_encoder", "model_type"), "timm_wrapper", "text_encoder.model_t"),
    "unknown type": (("text_encoder", "model_type"), ["evil"], "text_encoder.model_t"),
    "function as dtype": (("text_encoder", "dtype"), "load", "text_encoder.dtype is 'load', which is not possible"),
    "text instead of a number": (("text_encoder", "dim"), "evil", "text_encoder.dim is 'evil', which is not possible"),
    "names in the settings": (("settings", "model_name"), "hf-hub:evil/model", ""),
}


@pytest.fixture
def no_network(monkeypatch):
    """The hub is not switched off, but every connection fails and is recorded in the list that this returns."""
    contacted = []

    def refuse(*arguments, **_):
        contacted.append(arguments)
        raise OSError("no network in tests")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return contacted


@pytest.mark.parametrize("attack", HOSTILE)
def test_load_model_uses_only_known_entries_of_a_config(saved, attack, no_network, monkeypatch):
    model, folder = saved
    (part, name), value, message = HOSTILE[attack]
    torch.save(Explosive(), "evil.pth")
    for path in (folder, folder / "tokenizer"):
        (path / "evil.py").write_text("open('opened', 'w')\nclass Model: pass\nclass C: pass\n", encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a prompt"))
    change_json(folder, lambda content: content[part].update({name: value}))
    if message:
        with pytest.raises(InputError, match=message) as error:
            load_model(folder)
        assert "\n" not in str(error.value)
    else:
        tokens = torch.tensor([[2, 5, 3]])
        assert torch.equal(load_model(folder).encode_text(tokens, tokens), model.encode_text(tokens, tokens))
    assert not os.path.exists("opened")
    assert not no_network


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer/tokenizer.json", "tokenizer/x.json"])
def test_load_model_refuses_a_fifo(saved, name):
    """Opening it would wait for a writer for ever."""
    file = saved[1] / name
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    with pytest.raises(InputError, match=f"{file.name} is not a regular file"):
        load_model(saved[1])
    file.unlink()
    file.symlink_to("/dev/zero")
    with pytest.raises(InputError, match=f"{file.name} is not a regular file"):
        load_model(saved[1])


def test_load_model_refuses_a_file_in_place_of_the_tokenizer(saved, no_network):
    shutil.rmtree(saved[1] / "tokenizer")
    (saved[1] / "tokenizer").write_text("distilbert-base-uncased", encoding="utf-8")
    with pytest.raises(InputError, match="tokenizer is not a folder"):
        load_model(saved[1])
    assert not no_network


def test_load_model_allocates_nothing_for_a_model_that_does_not_fit(saved):
    """The config describes an embedding matrix of 2 GB."""
    resource = pytest.importorskip("resource")
    change_json(saved[1], lambda content: content["text_encoder"].update(vocab_size=2**24, dim=32, hidden_dim=32))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="it describes a larger model than that in"):
        load_model(saved[1])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_load_model_has_defaults_for_settings_of_later_versions(saved):
    def remove(content):
        for name in ("freeze_batchnorm", "head_epochs", "gan_clip_weight"):
            del content["settings"][name]

    change_json(saved[1], remove)
    assert dataclasses.replace(load_model(saved[1]).config, run=saved[0].config.run) == saved[0].config


def test_saved_config_does_not_tell_whether_the_run_was_resumed(tiny_model, tmp_path):
    model = tiny_model()
    for resume in (False, True):
        model.config = dataclasses.replace(model.config, resume=resume)
        save_model(model, tmp_path / str(resume))
    first, second = (tmp_path / name / "config.json" for name in ("False", "True"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.skipif(os.name == "nt", reason="no modes")
def test_saved_files_have_the_mode_that_the_umask_allows(tiny_model, tmp_path):
    before = os.umask(0o027)
    try:
        save_model(tiny_model(), tmp_path / "best")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "best").rglob("*") if path.is_file()}
    assert modes["model.safetensors"] == 0o640
    assert set(modes.values()) == {0o640}


# ---- the check before training ----------------------------------------------------------------------------------


def test_check_model_leaves_the_model_and_the_random_state(tiny_model):
    model = tiny_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, requires_grad = torch.get_rng_state(), [p.requires_grad for p in model.parameters()]
    check_model(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training and all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == requires_grad
    assert all(p.grad is None for p in model.parameters())


def shares_tensors(model):
    model.image_projection.layers[-1].weight = model.text_projection.layers[-1].weight


def has_another_parameter(model):
    model.scale = nn.Parameter(torch.ones(1))


def has_another_config(model):
    model.text_encoder.backbone.config.n_heads = 2


def is_not_finite(model):
    model.image_encoder.backbone.conv1[0].weight.data.fill_(math.nan)


def keeps_the_tokens(model):
    model.text_encoder.forward = lambda ids, mask: torch.zeros(*ids.shape, 64)


def fails(model):
    model.image_encoder.forward = lambda images: images.no_such_attribute


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shares_tensors, "could not be loaded after training .some of its tensors share memory"),
        (has_another_parameter, "could not be loaded after training .model.safetensors has an unknown tensor scale"),
        (has_another_config, "could not be loaded after training .its features would not be the same"),
        (is_not_finite, "model_name is test_resnet, whose features are not finite"),
        (keeps_the_tokens, r"text_encoder_model is .*its features have the shape \(2, 8, 64\) instead of \(2, 64\)"),
        (fails, "model_name is test_resnet, which does not work here .*no_such_attribute"),
    ],
)
def test_check_model_refuses_a_model_that_cannot_be_trained_or_saved(tiny_model, change, message):
    model = tiny_model(text_width=64)
    change(model)
    with pytest.raises(InputError, match=message) as error:
        check_model(model)
    assert "\n" not in str(error.value)


def test_compile_without_a_compiler_is_refused(tiny_model, monkeypatch):
    def compile(function):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(InputError, match="compile is true, which needs a C.. compiler .*: install one, or drop --comp"):
        check_model(tiny_model(compile=True))


def test_load_model_refuses_a_folder_without_a_model(tmp_path):
    with pytest.raises(InputError, match="is not a trained run"):
        load_model(tmp_path)
    with pytest.raises(InputError, match="is not a trained run"):
        load_model(tmp_path / "nowhere")


def test_save_model_leaves_frozen_layers_in_evaluation_mode(saved):
    loaded = load_model(saved[1])
    assert all(not layer.training for layer in loaded.modules() if isinstance(layer, nn.BatchNorm2d))

"""The model, the contrastive loss, retrieval metrics, saving and loading."""

import dataclasses
import json
import math
import pickle

import numpy as np
import pytest
import torch
from naive import loss_and_gradients, loss_cases, naive_loss, random_embeddings, relative_error
from safetensors.torch import load_file, save_file
from torch import nn

import clip
from clip import contrastive_loss, format_metrics, load_model, read_saved_model, retrieval_metrics, save_model
from config import InputError
from dataset import Batch
from utils.device import autocast

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


def naive_metrics(images, texts, image_index):
    """Recalls and median ranks from all pairs; a tie counts against the right answer."""
    image_ranks, text_ranks = [], []
    for j, own in enumerate(image_index):
        scores = [float(images[i] @ texts[j]) for i in range(len(images))]
        text_ranks.append(1 + sum(scores[i] >= scores[own] for i in range(len(images)) if i != own))
    for i in range(len(images)):
        scores = [float(images[i] @ text) for text in texts]
        best = max(scores[j] for j in range(len(texts)) if image_index[j] == i)
        image_ranks.append(1 + sum(scores[j] >= best for j in range(len(texts)) if image_index[j] != i))
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
    assert retrieval_metrics(torch.full((30, 4), math.nan), torch.ones(150, 4), image_index)["rsum"] == 0


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
    assert loaded.config == model.config
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
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "no settings": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "invalid JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[1]"), "does not contain a JSON object"),
    "missing setting": (lambda f: change_json(f, lambda c: c["settings"].pop("size")), "lacks settings.size"),
    "no settings in it": (lambda f: change_json(f, lambda c: c.pop("settings")), "lacks settings.image_path"),
    "missing mean": (lambda f: change_json(f, lambda c: c["image_encoder"].pop("mean")), "lacks image_encoder.mean"),
    "missing part": (lambda f: change_json(f, lambda c: c.pop("text_encoder")), "lacks text_encoder.model_type"),
    "impossible setting": (lambda f: change_json(f, lambda c: c["settings"].update(size=-1)), "size is -1"),
    "unknown setting": (lambda f: change_json(f, lambda c: c["settings"].update(sizes=1)), "unknown setting 'sizes'"),
    "missing tensor": (lambda f: change_weights(f, lambda s: s.pop(HEAD)), f"lacks the tensor {HEAD}"),
    "unknown tensor": (lambda f: change_weights(f, lambda s: s.update(x=torch.zeros(1))), "has an unknown tensor x"),
    "wrongly shaped tensor": (
        lambda f: change_weights(f, lambda s: s.update({HEAD: s[HEAD][:, :5].contiguous()})),
        f"has a wrongly shaped tensor {HEAD}",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_load_model_refuses_a_damaged_model(saved, damage, tmp_path):
    change, message = DAMAGES[damage]
    change(saved[1])
    with pytest.raises(InputError, match=message) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "opened").exists()  # the pickle would have created it


def test_load_model_refuses_a_folder_without_a_model(tmp_path):
    with pytest.raises(InputError, match="is not a trained run"):
        load_model(tmp_path)
    with pytest.raises(InputError, match="is not a trained run"):
        load_model(tmp_path / "nowhere")


def test_save_model_leaves_frozen_layers_in_evaluation_mode(saved):
    loaded = load_model(saved[1])
    assert all(not layer.training for layer in loaded.modules() if isinstance(layer, nn.BatchNorm2d))

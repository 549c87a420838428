import contextlib
import dataclasses
import json
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import clip
from clip import CLIP, contrastive_backward, contrastive_loss, load_model, retrieval_metrics, save_model
from config import InputError
from dataset import PairSampler, TokenStore, TrainingPairs, load_splits, train_tokenizer
from images import ImageStore, stored_side

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


def naive_loss(images, texts, t, image_index):
    """The loss pair by pair from the whole matrix: an image's other captions are out of a positive's denominator."""
    logits = t.exp() * images @ texts.T
    image_loss, text_loss = 0, 0
    for j, i in enumerate(image_index.tolist()):
        others = image_index == i
        count = others.sum()
        others[j] = False
        negatives_and_j = logits[i].masked_fill(others, -math.inf)
        image_loss = image_loss + (negatives_and_j.logsumexp(0) - logits[i, j]) / count
        text_loss = text_loss + logits[:, j].logsumexp(0) - logits[i, j]
    return (image_loss / len(images) + text_loss / len(texts)) / 2


def random_embeddings(image_index, dim=16, images=None, closeness=0.5):
    """Unit vectors (B, D) and (T, D), float32; a caption's lies near its image's as in a model half trained."""
    images = F.normalize(torch.randn(images or int(image_index.max()) + 1, dim), dim=-1)
    noise = F.normalize(torch.randn(len(image_index), dim), dim=-1)
    return images, F.normalize(closeness * images[image_index] + noise, dim=-1)


def loss_and_gradients(function, images, texts, t, image_index, dtype):
    inputs = [x.to(dtype).requires_grad_() for x in (images, texts, torch.as_tensor(t))]
    loss = function(*inputs, image_index)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("t", [0.0, math.log(1 / 0.07), math.log(100)])
def test_contrastive_loss_with_one_caption_is_the_papers(t):
    images, texts = random_embeddings(torch.arange(40))
    expected = paper_loss(images.double().numpy(), texts.double().numpy(), t)
    in_double = contrastive_loss(images.double(), texts.double(), torch.tensor(t).double())
    assert in_double.item() == pytest.approx(expected, rel=1e-6)  # t itself went through float32
    assert contrastive_loss(images, texts, torch.tensor(t)).item() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("t", [math.log(1 / 0.07), math.log(100)], ids=["start", "clamp"])
@pytest.mark.parametrize("tile", [5, 2048], ids=["uneven tiles", "one tile"])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, "ragged"])
def test_contrastive_loss_and_gradients_equal_the_naive_ones(monkeypatch, k, tile, t):
    monkeypatch.setattr(clip, "TILE", tile)
    counts = torch.tensor([1, 5, 2, 1, 3, 4, 1, 2, 7, 1, 1]) if k == "ragged" else torch.full((11,), k)
    image_index = torch.arange(11).repeat_interleave(counts)
    if k == "ragged":
        image_index = image_index[torch.randperm(len(image_index))]
    images, texts = random_embeddings(image_index)
    expected = loss_and_gradients(naive_loss, images, texts, t, image_index, torch.float64)
    found = loss_and_gradients(contrastive_loss, images, texts, t, image_index, torch.float32)
    for name, mine, theirs in zip(("loss", "images", "texts", "temperature"), found, expected, strict=True):
        assert relative_error(mine, theirs) < 1e-5, name


def test_contrastive_loss_is_float32_under_autocast():
    images, texts = random_embeddings(torch.arange(8))
    expected = contrastive_loss(images, texts, torch.tensor(4.0))
    with torch.autocast("cpu", torch.bfloat16):
        found = contrastive_loss(images, texts, torch.tensor(4.0))
    assert found.dtype == torch.float32
    assert found == expected


def test_contrastive_loss_of_a_perfect_and_of_a_useless_batch():
    one_hot = torch.eye(6)
    assert contrastive_loss(one_hot, one_hot, torch.tensor(math.log(100))).item() < 1e-12
    same = one_hot[:1].expand(6, 6)
    assert contrastive_loss(same, same, torch.tensor(0.0)).item() == pytest.approx(math.log(6))


def test_contrastive_loss_of_one_image_is_nothing():
    images, texts = random_embeddings(torch.zeros(3, dtype=torch.int64))
    loss, *gradients = loss_and_gradients(contrastive_loss, images, texts, 1.0, torch.zeros(3).long(), torch.float32)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_contrastive_loss_wants_to_know_whose_captions_they_are():
    with pytest.raises(ValueError, match="2 images and 4 captions"):
        contrastive_loss(torch.eye(4)[:2], torch.eye(4), torch.tensor(0.0))


# ---- the model --------------------------------------------------------------------------------------------------


def test_temperature_starts_at_the_papers_and_is_clamped(tiny_model):
    model = tiny_model()
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    for given, clamped in ((9.0, math.log(100)), (math.log(100), math.log(100)), (2.0, 2.0)):
        model.logit_scale.data.fill_(given)
        model.clamp_temperature()
        assert model.logit_scale.item() == pytest.approx(clamped)


def test_encoders_give_unit_vectors_in_float32(tiny_model):
    model = tiny_model(projection_dim=20)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    tokens = model.tokenizer(["A red circle .", "on grass"], padding=True, return_tensors="pt")
    for dtype in (None, torch.bfloat16):
        with torch.no_grad(), clip.autocast(CPU, dtype):
            embeddings = model.encode_image(images), model.encode_text(tokens.input_ids, tokens.attention_mask)
        for found, count in zip(embeddings, (3, 2), strict=True):
            assert found.shape == (count, 20)
            assert found.dtype == torch.float32
            assert torch.allclose(found.norm(dim=-1), torch.ones(count), atol=1e-6)


def test_encode_image_takes_bytes_and_floats(tiny_model):
    model = tiny_model()
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(model.encode_image(images), model.encode_image(images.float() / 255))


def test_encode_text_does_not_see_the_padding(tiny_model):
    model = tiny_model()
    short, long = model.tokenizer(["a star"])["input_ids"][0], model.tokenizer(["A blue star on sand"])["input_ids"][0]
    padded = torch.tensor([short + [model.tokenizer.pad_token_id] * (len(long) - len(short)), long])
    mask = (torch.arange(len(long)) < torch.tensor([[len(short)], [len(long)]])).long()
    with torch.no_grad():
        alone = model.encode_text(torch.tensor([short]), torch.ones(1, len(short), dtype=torch.int64))
        assert torch.allclose(model.encode_text(padded, mask)[:1], alone, atol=1e-6)


def test_frozen_encoders_take_no_gradient_and_stay_in_evaluation_mode(tiny_model):
    model = tiny_model()
    frozen = {"trainable_image_encoder": False, "pretrained_image_encoder": True}
    model.config = dataclasses.replace(model.config, **frozen)
    model.train()
    assert not any(module.training for module in model.image_encoder.modules())
    assert model.text_encoder.training
    assert model.image_projection.training


# ---- gradient caching -------------------------------------------------------------------------------------------


def micro_batches_of(config, sizes):
    """Micro-batches with these numbers of images, with two captions each, as the loader makes them."""
    pairs = load_splits(config)["train"]
    model = CLIP(config, train_tokenizer(pairs.captions))
    store = ImageStore(pairs.files, stored_side(config.size))
    tokens = TokenStore(model.tokenizer, pairs.captions, model.max_length)
    dataset = TrainingPairs(pairs, store, tokens, model.tokenizer.pad_token_id, config)
    keys = [key for micro_batch in PairSampler(pairs, config) for key in micro_batch]
    ends = np.cumsum(sizes)
    parts = [keys[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    return model, [dataset.collate([dataset[key] for key in part]) for part in parts]


def batchnorms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_cached_gradients_equal_the_whole_batchs_with_dropout(tiny_config):
    config = tiny_config(captions_per_image=2, dropout=0.3, num_projection_layers=2)
    model, micro_batches = micro_batches_of(config, (4, 4, 3))
    model.train()
    for layer in batchnorms(model):
        layer.eval()
    dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.training and m.p]
    assert len(dropouts) > 4
    state = torch.get_rng_state()
    found_loss = contrastive_backward(model, micro_batches, CPU)
    after = torch.get_rng_state()
    found = gradients(model)
    model.zero_grad()

    # The whole batch in one graph, its parts encoded in the same order and so with the same dropout masks.
    torch.set_rng_state(state)
    embeddings = [model(batch) for batch in micro_batches]
    rows = np.cumsum([0, 4, 4])
    image_index = torch.cat([batch["image_index"] + row for batch, row in zip(micro_batches, rows, strict=True)])
    images, texts = (torch.cat(parts) for parts in zip(*embeddings, strict=True))
    loss = naive_loss(images.double(), texts.double(), model.logit_scale.double(), image_index)
    loss.backward()
    expected = gradients(model)
    assert found_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert found.keys() == expected.keys()
    assert "logit_scale" in found
    whole = torch.cat([grad.flatten() for grad in expected.values()]).norm().item()
    for name in expected:
        assert (found[name] - expected[name]).norm().item() < 1e-5 * max(whole * 1e-2, expected[name].norm().item()), (
            name
        )
    assert torch.equal(torch.get_rng_state(), after)  # the second pass draws what the first drew, and no more


def test_dropout_masks_matter_in_that_comparison(tiny_config):
    model, micro_batches = micro_batches_of(tiny_config(captions_per_image=2, dropout=0.3), (4, 4))
    model.train()
    losses = {contrastive_backward(model, micro_batches, CPU).item() for _ in range(3)}
    assert len(losses) == 3


def test_one_micro_batch_equals_caching_it(tiny_config):
    model, (batch,) = micro_batches_of(tiny_config(captions_per_image=2), (6,))
    model.eval()
    whole = contrastive_backward(model, [batch], CPU)
    expected = gradients(model)
    model.zero_grad()
    cut = int((batch["image_index"] < 3).sum())
    halves = [
        {name: x[:3] if name == "images" else x[:cut] for name, x in batch.items()},
        {name: x[3:] if name == "images" else x[cut:] for name, x in batch.items()},
    ]
    halves[1]["image_index"] = halves[1]["image_index"] - 3
    assert contrastive_backward(model, halves, CPU).item() == pytest.approx(whole.item(), rel=1e-6)
    for name, grad in gradients(model).items():
        assert (grad - expected[name]).norm().item() < 1e-5 * max(1e-2, expected[name].norm().item()), name


def test_batchnorm_statistics_move_once_per_step_by_the_mean(tiny_config):
    model, micro_batches = micro_batches_of(tiny_config(captions_per_image=2), (4, 4, 3))
    model.train()
    first = batchnorms(model)[0]
    seen = []
    first.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0].detach()))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    contrastive_backward(model, micro_batches, CPU)
    assert len(seen) == 6  # each micro-batch twice
    mean = torch.stack([x.mean((0, 2, 3)) for x in seen[3:]]).mean(0)
    variance = torch.stack([x.var((0, 2, 3)) for x in seen[3:]]).mean(0)
    assert torch.allclose(first.running_mean, 0.1 * mean, rtol=1e-4, atol=1e-6)
    assert torch.allclose(first.running_var, 0.9 + 0.1 * variance, rtol=1e-4)
    for layer in batchnorms(model):
        assert layer.num_batches_tracked == 1
        assert layer.momentum == 0.1
    moved = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert {name for name in before if "running_" in name} <= moved


def test_batchnorm_statistics_of_equal_micro_batches_are_those_of_one(tiny_config):
    config = tiny_config(captions_per_image=2, dropout=0.0)
    one, (batch,) = micro_batches_of(config, (6,))
    several = CLIP(config, one.tokenizer)
    several.load_state_dict(one.state_dict())
    contrastive_backward(one.train(), [batch], CPU)
    contrastive_backward(several.train(), [batch, batch, batch], CPU)
    for a, b in zip(batchnorms(one), batchnorms(several), strict=True):
        assert torch.allclose(a.running_mean, b.running_mean, rtol=1e-5, atol=1e-7)
        assert torch.allclose(a.running_var, b.running_var, rtol=1e-5)


def test_contrastive_backward_scales_for_the_gradient_scaler(tiny_config):
    model, micro_batches = micro_batches_of(tiny_config(captions_per_image=2), (3, 3))
    model.eval()
    loss = contrastive_backward(model, micro_batches, CPU)
    plain = model.logit_scale.grad.clone()
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    assert contrastive_backward(model, micro_batches, CPU, scaler=scaler) == loss
    assert model.logit_scale.grad.item() == pytest.approx(64 * plain.item(), rel=1e-5)


# ---- retrieval metrics ------------------------------------------------------------------------------------------


def naive_metrics(images, texts, image_index):
    """Recalls and median ranks by looking at every pair; a tie counts against the right answer."""
    image_ranks, text_ranks = [], []
    for j, owner in enumerate(image_index):
        scores = [float(images[i] @ texts[j]) for i in range(len(images))]
        text_ranks.append(1 + sum(scores[i] >= scores[owner] for i in range(len(images)) if i != owner))
    for i in range(len(images)):
        scores = [float(images[i] @ text) for text in texts]
        best = max(scores[j] for j in range(len(texts)) if image_index[j] == i)
        image_ranks.append(1 + sum(scores[j] >= best for j in range(len(texts)) if image_index[j] != i))
    metrics = {}
    for name, ranks in (("image_to_text", image_ranks), ("text_to_image", text_ranks)):
        for k in (1, 5, 10):
            metrics[f"{name}_R@{k}"] = 100 * sum(rank <= k for rank in ranks) / len(ranks)
        metrics[f"{name}_median_rank"] = sorted(ranks)[(len(ranks) - 1) // 2]
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
    # Small whole numbers: exact in any order of summation, and full of ties.
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


def test_retrieval_metrics_of_a_collapsed_model_are_nothing():
    image_index = torch.arange(30).repeat_interleave(5)
    metrics = retrieval_metrics(torch.ones(30, 4), torch.ones(150, 4), image_index)
    assert metrics["rsum"] == 0
    assert metrics["text_to_image_median_rank"] == 30
    assert metrics["image_to_text_median_rank"] == 146  # after all captions of the others
    assert retrieval_metrics(torch.full((30, 4), math.nan), torch.ones(150, 4), image_index)["rsum"] == 0


# ---- saving and loading -----------------------------------------------------------------------------------------


@pytest.fixture
def saved(tiny_model, tmp_path):
    """A model with weights of its own, BatchNorm's statistics included, and the folder it is saved in."""
    model = tiny_model(captions_per_image=2, num_projection_layers=2)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.01 * torch.rand_like(tensor))
    save_model(model, tmp_path / "best")
    return model, tmp_path / "best"


@pytest.mark.parametrize("name", ["best", "."], ids=["best folder", "run folder"])
def test_a_saved_model_comes_back_bit_for_bit(saved, name):
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
        mine = model.encode_text(tokens.input_ids, tokens.attention_mask)
        assert torch.equal(mine, loaded.encode_text(tokens.input_ids, tokens.attention_mask))


def test_save_model_again_replaces_the_weights(saved):
    model, folder = saved
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
    save_model(model, folder)
    assert load_model(folder).logit_scale.item() == 1.5
    assert not list(folder.glob("*.tmp"))


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


def pickle_in_place_of(path):
    path.write_bytes(pickle.dumps(Explosive()))


HEAD = "image_projection.layers.1.weight"
DAMAGES = {
    "pickle": (lambda f: pickle_in_place_of(f / "model.safetensors"), "not a safetensors file"),
    "torch file": (lambda f: torch.save({}, f / "model.safetensors"), "not a safetensors file"),
    "cut off": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
        "not a safetensors file",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
    "no settings": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[1]"), "holds no JSON object"),
    "missing setting": (lambda f: change_json(f, lambda c: c["settings"].pop("size")), "lacks settings.size"),
    "missing mean": (lambda f: change_json(f, lambda c: c["image_encoder"].pop("mean")), "lacks image_encoder.mean"),
    "missing part": (lambda f: change_json(f, lambda c: c.pop("text_encoder")), "lacks text_encoder.model_type"),
    "impossible setting": (lambda f: change_json(f, lambda c: c["settings"].update(size=-1)), "size is -1"),
    "unknown setting": (lambda f: change_json(f, lambda c: c["settings"].update(sizes=1)), "unknown setting 'sizes'"),
    "missing tensor": (lambda f: change_weights(f, lambda s: s.pop(HEAD)), f"lacks tensor {HEAD}"),
    "unknown tensor": (lambda f: change_weights(f, lambda s: s.update(x=torch.zeros(1))), "unknown tensor x"),
    "misshapen tensor": (
        lambda f: change_weights(f, lambda s: s.update({HEAD: s[HEAD][:, :5].contiguous()})),
        f"misshapen tensor {HEAD}",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_load_model_refuses_what_is_damaged(saved, damage, tmp_path):
    change, message = DAMAGES[damage]
    change(saved[1])
    with pytest.raises(InputError, match=message) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "opened").exists()  # what a pickle would have done


def test_load_model_refuses_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(InputError, match="is not a trained run"):
        load_model(tmp_path)
    with pytest.raises(InputError, match="is not a trained run"):
        load_model(tmp_path / "nowhere")


# ---- device and precision ---------------------------------------------------------------------------------------


def test_setup_device_chooses_and_refuses():
    assert clip.setup_device("cpu", "auto") == (CPU, None)
    assert clip.setup_device("cpu", "bf16") == (CPU, torch.bfloat16)
    for device, precision, message in (
        ("toaster", "auto", "device is 'toaster'"),
        ("cuda:99", "auto", "device is 'cuda:99'"),
        ("cpu", "fp16", "precision is fp16"),
    ):
        with pytest.raises(InputError, match=message):
            clip.setup_device(device, precision)
    assert isinstance(clip.autocast(CPU, None), contextlib.nullcontext)

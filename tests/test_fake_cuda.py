"""The whole program on a simulated GPU (fake_cuda.py): no device mix, and the host does not wait inside a step."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import save_text_folder
from fake_cuda import CUDA, CudaTensor, DeviceMix, fake_cuda
from gan_fixtures import TINY, as_flags, gan_run_fixture, with_gan_fixture  # noqa: F401

import clip
import gan
import inference
import main
from dataset import TrainingPairs, load_splits
from modules import READY_MASK, TextEncoder, build_text_backbone
from utils.device import search_dtype
from utils.device_augmentation import LoaderWithImages, augment_images
from utils.tiled_loss import DROPPED

CASES = {
    "plain": {},
    "one caption in float32": {"precision": "float32", "captions_per_image": 1},
    "transformer": {"text_encoder_model": "transformer"},
    "cbow": {"text_encoder_model": "cbow", "text_layers": 0},
    "gradient caching": {"micro_batch_size": 4, "dropout": 0.5},
    "EMA": {"ema_decay": 0.9, "scheduler": "cosine"},
    "fp16": {"precision": "fp16", "ema_decay": 0.9},
    "fp16 and gradient caching": {"precision": "fp16", "micro_batch_size": 4},
    "generated pairs": {"gan": "pairs"},
    "generated pairs and gradient caching": {"gan": "pairs", "micro_batch_size": 4},
    "joint": {"gan": "joint"},
}
ALLOWED = ("log_step", "save_checkpoint")  # twice a second, and every ten minutes


@pytest.fixture
def cuda(monkeypatch):
    with fake_cuda(monkeypatch) as mode:
        yield mode


# ---- the simulation


READ, SHAPE = "read of a value", "shape that depends on values"
DOWN, UP, UNPINNED = "blocking copy to the host", "blocking copy to the device", "copy of memory that is not pinned"


@pytest.mark.parametrize(
    ("operation", "kinds"),
    [
        (lambda x: x.sum().item(), {READ}),
        (lambda x: float(x[0, 0]), {READ}),
        (lambda x: bool(x.isfinite().all()), {READ}),
        (lambda x: f"{x.sum():.3f}", {READ}),
        (lambda x: x.tolist(), {DOWN}),
        (lambda x: x.cpu(), {DOWN}),
        (lambda x: torch.zeros(2, 3).copy_(x), {DOWN}),
        (lambda x: x[x > 2], {SHAPE}),
        (lambda x: (x > 2).nonzero(), {SHAPE}),
        (lambda x: x.repeat_interleave(x[0].long(), 1), {SHAPE}),
        (lambda x: torch.tensor([1.0], device=x.device), {UP}),
        (lambda x: torch.zeros(3).to(x.device), {UP}),
        (lambda x: x[torch.tensor([0])], {UP}),
        (lambda x: torch.zeros(3).to(x.device, non_blocking=True), {UNPINNED}),
        (lambda x: torch.zeros(3).pin_memory().to(x.device, non_blocking=True), set()),
        (lambda x: x.masked_fill_(x > 2, 1.0) + x.sum() + torch.tensor(1.0), set()),
        (lambda x: torch.where(x > 2, x, 0.0).topk(2), set()),
    ],
)
def test_simulation_records_each_kind_of_wait(cuda, operation, kinds):
    operation(torch.arange(6.0, device="cuda").reshape(2, 3))
    assert {kind for kind, _ in cuda.waits} == kinds


def test_simulation_refuses_a_mix_of_devices_and_computes_real_values(cuda):
    x = torch.arange(3.0, device="cuda", requires_grad=True)
    assert x.device == CUDA and x.is_cuda
    with pytest.raises(DeviceMix):
        x + torch.ones(3)
    with pytest.raises(TypeError):
        x.detach().numpy()
    with torch.autocast("cuda", torch.float16):
        product = x[None] @ x[:, None]
    product.sum().backward()
    assert product.dtype == torch.float16 and product.item() == 5
    assert isinstance(x.grad, CudaTensor) and x.grad.tolist() == [0, 2, 4]


def test_simulation_finds_a_read_in_the_training_step(cuda, tiny_config, no_plots, monkeypatch):
    clamp = clip.CLIP.clamp_temperature
    monkeypatch.setattr(clip.CLIP, "clamp_temperature", lambda model: clamp(model) or model.logit_scale.item())
    main.train(tiny_config(device="cuda"))
    found = cuda.waits_in("train_one_epoch", ALLOWED)
    assert [kind for kind, _ in found] == [READ]
    assert sum(found.values()) == 15


def test_simulation_finds_a_device_mix_in_the_training_step(cuda, tiny_config, no_plots, monkeypatch):
    project = clip.CLIP.project_image
    monkeypatch.setattr(clip.CLIP, "project_image", lambda model, x: project(model, x) * torch.ones(x.shape[0], 1))
    with pytest.raises(DeviceMix):
        main.train(tiny_config(device="cuda"))


# ---- the program


@pytest.mark.parametrize("case", CASES)
def test_training_and_evaluation_do_not_wait_for_the_gpu(cuda, with_gan, no_plots, case):
    changes = {"gan": "none", "gan_ratio": 1.0, "captions_per_image": 2, "precision": "auto", **CASES[case]}
    results = main.train(with_gan(device="cuda", **changes))
    assert results["rsum"] > 0
    assert cuda.waits_in("train_one_epoch", ALLOWED) == {}
    assert cuda.waits_in("encode_dataset") == {}
    assert any("train_one_epoch" not in path for _, path in cuda.waits)  # waits elsewhere are seen


def test_training_with_a_frozen_encoder_does_not_wait_for_the_gpu(monkeypatch, tiny_config, no_plots, tmp_path):
    captions = load_splits(tiny_config())["train"].captions
    text = {"text_encoder_model": str(save_text_folder(tmp_path / "bert", captions)), "text_layers": 0, "text_width": 0}
    text |= {"text_tokenizer": text["text_encoder_model"], "pretrained_text_encoder": True}
    config = tiny_config(device="cuda", trainable_text_encoder=False, **text)
    model = main.build_model(config, captions, torch.device("cpu"))  # reading weights uses the memory of tensors
    with fake_cuda(monkeypatch) as mode:
        monkeypatch.setattr(main, "build_model", lambda *_: model.to("cuda"))
        main.train(config)
    assert mode.waits_in("train_one_epoch", ALLOWED) == {}
    assert mode.waits_in("encode_dataset") == {}


def test_training_on_the_gpu_equals_that_on_the_cpu(monkeypatch, tiny_config, fit):
    """Except for rounding: on a CPU, captions of similar length are encoded together."""
    settings = {"captions_per_image": 2, "dropout": 0.0, "text_encoder_model": "transformer", "precision": "float32"}
    expected, _ = fit(tiny_config(**settings))
    monkeypatch.setattr(main, "TrainingPairs", lambda *args, on_device: TrainingPairs(*args))  # the CPU's augmentation
    with fake_cuda(monkeypatch):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 2**35))
        found, _ = fit(tiny_config(**settings, device="cuda", run="cuda"))
        (line,), (expected_line,) = found.history, expected.history
        for name in ("train_loss", "validation_loss", "temperature"):
            assert line[name] == pytest.approx(expected_line[name], rel=1e-4), name


@pytest.mark.parametrize("free", [2**34, 10_000])
def test_images_are_augmented_on_the_gpu(cuda, tiny_config, no_plots, monkeypatch, free):
    """Whether all of them are kept there or not."""
    seen, kept = [], []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**35))
    monkeypatch.setattr(main, "LoaderWithImages", lambda *args: kept.append(args[1].shape) or LoaderWithImages(*args))

    def spy(images, *arguments):
        seen.append((images.device, tuple(images.shape)))
        return augment_images(images, *arguments)

    monkeypatch.setattr(main, "augment_images", spy)
    main.train(tiny_config(device="cuda", micro_batch_size=4))
    assert set(seen) == {(CUDA, (4, 3, 37, 37))}  # as stored, for an input of 32 pixels
    assert len(seen) == 30
    assert kept == [(24, 37, 37, 3)] * (free > 10_000)


def test_gan_training_does_not_wait_for_the_gpu(cuda, trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "run")
    gan.main(["--run", str(tmp_path / "run"), "--device", "cuda", *as_flags({**TINY, "gan_batch_size": 4})])
    for function in ("batch", "mix", "train_step"):
        assert cuda.waits_in(function) == {}
    assert cuda.waits_in("train_epoch", ("check_finite", "<genexpr>", "<dictcomp>")) == {}


def test_search_on_the_gpu_finds_the_same_images(monkeypatch, capsys, trained_run, sample):
    def search(device):
        capsys.readouterr()
        words = ["a red circle", "--run", trained_run, "--images", sample["image_path"], "--device", device, "--json"]
        inference.main([*map(str, words)])
        return json.loads(capsys.readouterr().out)[0]["results"]

    expected = search("cpu")
    with fake_cuda(monkeypatch) as mode:
        found = search("cuda")
    assert [result["file"] for result in found] == [result["file"] for result in expected]
    assert mode.waits_in("encode_dataset") == {}


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("float32", None)])
def test_search_embeds_in_the_precision_of_training_on_the_gpu_only(cuda, precision, dtype):
    config = SimpleNamespace(precision=precision)
    assert search_dtype(SimpleNamespace(device=torch.device("cuda"), config=config)) == dtype
    assert search_dtype(SimpleNamespace(device=torch.device("cpu"), config=config)) is None


@pytest.mark.parametrize("model_type", [*READY_MASK, "clip_text_model"])
def test_ready_mask_gives_the_same_features(model_type):
    sizes = {"vocab_size": 100, "max_position_embeddings": 40, "bos_token_id": 1, "eos_token_id": 2}
    sizes |= {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}
    if model_type == "distilbert":
        sizes = {"vocab_size": 100, "dim": 64, "n_heads": 2, "n_layers": 2, "hidden_dim": 64}
    encoder = TextEncoder(build_text_backbone({"model_type": model_type, **sizes}), "mean").eval()
    mask = (torch.arange(12) < torch.tensor([12, 3, 7])[:, None]).long()
    ids = torch.randint(5, 99, mask.shape) * mask + 1 - mask
    ready = encoder.ready_mask(mask)
    assert ready is None if model_type == "clip_text_model" else ready.shape == (3, 1, 1, 12)
    hidden, expected = (
        encoder.backbone(input_ids=ids, attention_mask=each).last_hidden_state[mask.bool()] for each in (ready, mask)
    )
    assert torch.allclose(hidden, expected, atol=1e-6)


def test_dropped_generated_images_take_no_part_on_the_gpu(monkeypatch, with_gan):
    """A batch in which some images are dropped has fixed shapes, and the loss of the images that are kept."""
    images, texts = (torch.nn.functional.normalize(torch.randn(6, 8), dim=1) for _ in range(2))
    kept = torch.tensor([False, True, True, False, True, False])
    with fake_cuda(monkeypatch) as mode:
        rows, valid = gan.kept_rows(kept.to("cuda"))
        assert {kind for kind, _ in mode.waits} == {UP}
        rows, valid = rows.cpu(), valid.cpu()
    assert rows.tolist() == [1, 2, 4, 1, 2, 4] and valid.tolist() == [True] * 3 + [False] * 3
    ids = torch.arange(6)[rows].masked_fill(~valid, DROPPED)
    t = torch.tensor(1.0)
    expected = clip.contrastive_loss(images[kept], texts[kept], t)
    for limit in (clip.MAX_DENSE_LOGITS, 0):  # densely, and in tiles
        monkeypatch.setattr(clip, "MAX_DENSE_LOGITS", limit)
        found = clip.contrastive_loss(images[rows], texts[rows], t, None, ids, valid.float())
        assert torch.allclose(found, expected, rtol=1e-6)
    assert gan.kept_rows(kept)[0].tolist() == [1, 2, 4]
    none = gan.kept_rows(torch.zeros(3, dtype=torch.bool))
    assert len(none[0]) == 0

"""The GAN: networks and losses against naive computations, GAN training, and generated pairs in CLIP training."""

import copy
import dataclasses
import math
import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import flags, run_python
from gan_fixtures import CPU, TINY, as_flags, build, gan_run_fixture, unit, with_gan_fixture  # noqa: F401
from safetensors.torch import load_file, save_file

import gan
import main
from clip import contrastive_loss, load_model
from config import InputError
from dataset import Batch, filter_pairs, load_splits, pair_targets
from utils.embed import embed_captions
from utils.files import read_json, write_json
from utils.gan_data import augment
from utils.gan_layers import NOISE_DIM, CaptionConditioning
from utils.gan_settings import gan_settings
from utils.grad_cache import cached_backward
from utils.runs import resolve_run


def tiny_gan(dim=16, generator="affine"):
    architecture = {"generator": generator, "size": 32, "width": 4, "dim": dim}
    discriminator = gan.Discriminator(32, 4, dim)
    return gan.GAN(architecture, discriminator, unit(20, dim), 1e-3, CPU, None)


def weights_of(folder):
    return load_file(folder / "model.safetensors")


# ---- networks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["affine", "style"])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_networks_of_every_size(name, size):
    images = gan.build_generator(name, size, 4, 16)(torch.randn(3, NOISE_DIM), unit(3, 16))
    assert images.shape == (3, 3, size, size)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1
    assert gan.Discriminator(size, 4, 16)(images, unit(3, 16)).shape == (3,)


def test_discriminator_logit_is_realness_plus_match_of_image_and_caption():
    discriminator, images, embeddings = gan.Discriminator(32, 4, 16), torch.randn(3, 3, 32, 32), unit(3, 16)
    features, conditions = discriminator.features(images), discriminator.caption(embeddings)
    for logit, h, c in zip(discriminator(images, embeddings), features, conditions, strict=True):
        match = sum(a * b for a, b in zip(discriminator.projection(h).tolist(), c.tolist(), strict=True))
        assert logit.item() == pytest.approx(discriminator.realness(h).item() + match / math.sqrt(len(c)), abs=1e-5)


def test_caption_conditioning_whitens_and_damps_low_variance_directions():
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(16, 16)).Q
    stds = torch.tensor([1.0] * 3 + [0.3] * 3 + [1e-4] * 10)
    embeddings = (torch.randn(5000, 16) * stds) @ axes.T + 0.7
    conditioning = CaptionConditioning(16)
    conditioning.fit(embeddings)
    whitened = (embeddings - conditioning.mean) @ conditioning.whitening
    variances = torch.linalg.eigvalsh(whitened.T @ whitened / len(whitened)).flip(0)
    assert (variances[:6] > 0.9).all() and (variances[:6] < 1.001).all()
    assert (variances[6:] < 1e-4).all()


# ---- losses -----------------------------------------------------------------------------------------------------


def test_losses_are_binary_cross_entropies():
    real, fake, mismatched = torch.randn(3, 5).double()

    def cross_entropy(logits, target):
        p = 1 / (1 + np.exp(-logits.numpy()))
        return -np.mean(target * np.log(p) + (1 - target) * np.log(1 - p))

    expected = cross_entropy(real, 1) + cross_entropy(fake, 0) / 2 + cross_entropy(mismatched, 0) / 2
    assert gan.discriminator_loss(real, fake, mismatched).item() == pytest.approx(expected)
    assert gan.generator_loss(fake).item() == pytest.approx(cross_entropy(fake, 1))


def test_gradient_penalty_is_the_squared_gradient_norm_and_differentiable():
    slope = torch.randn(3, 8, 8, requires_grad=True)
    images = torch.randn(4, 3, 8, 8)

    def quadratic(x, _):  # its gradient at x is slope * x
        return 0.5 * (slope * x.square()).sum((1, 2, 3))

    penalty = gan.gradient_penalty(quadratic, images, None)
    expected = np.mean([((slope * image) ** 2).sum().item() for image in images])
    assert penalty.item() == pytest.approx(expected, rel=1e-5)
    penalty.backward()
    torch.testing.assert_close(slope.grad, 2 * slope.detach() * images.square().mean(0))


def test_augment_shifts_and_cuts_each_image_independently():
    size = 32
    positions = torch.arange(1, size * size + 1.0).view(1, 1, size, size)
    images = positions.expand(50, 3, -1, -1).clone().requires_grad_()
    augmented = augment(images)
    augmented.sum().backward()
    shifts = set()
    for image, gradient in zip(augmented.detach(), images.grad, strict=True):
        assert (image[0] == image[1]).all()  # no change of colour
        y, x = torch.nonzero(image[0], as_tuple=True)
        value = image[0][y, x].long() - 1
        (dy,), (dx,) = (value // size - y).unique().tolist(), (value % size - x).unique().tolist()
        assert max(abs(dy), abs(dx)) <= size // 8
        shifts.add((dy, dx))
        hidden = size * size - len(y) - (size * size - (size - abs(dy)) * (size - abs(dx)))
        assert 0 <= hidden <= (size // 3) ** 2
        assert gradient[0].sum() == len(y)  # visible pixels have a gradient, others none
    assert len(shifts) > 20


# ---- same-caption groups and weights in the contrastive loss ----------------------------------------------------


def naive_loss(images, texts, t, image_index, image_ids, weights):
    """The contrastive loss with double loops."""
    s = (math.exp(t) * images @ texts.T).tolist()
    text_ids = [image_ids[i] for i in image_index]
    image_loss = text_loss = image_weight = text_weight = 0.0
    for i in range(len(images)):
        own = [j for j in range(len(texts)) if image_index[j] == i]
        negatives = sum(math.exp(s[i][j]) for j in range(len(texts)) if text_ids[j] != image_ids[i])
        losses = [-math.log(math.exp(s[i][j]) / (math.exp(s[i][j]) + negatives)) for j in own]
        image_loss += weights[i] * sum(losses) / len(own)
        image_weight += weights[i]
    for j in range(len(texts)):
        i = image_index[j]
        negatives = sum(math.exp(s[k][j]) for k in range(len(images)) if image_ids[k] != text_ids[j])
        text_loss += weights[i] * -math.log(math.exp(s[i][j]) / (math.exp(s[i][j]) + negatives))
        text_weight += weights[i]
    return (image_loss / image_weight + text_loss / text_weight) / 2


def test_loss_with_groups_and_weights_equals_the_naive_one():
    image_index = [0, 0, 1, 2, 2, 3, 4, 5]
    image_ids, weights = [7, 3, 9, 7, 7, -2], [1.0, 1.0, 1.0, 0.5, 0.25, 0.5]
    images, texts, t = unit(6, 8).double(), unit(8, 8).double(), torch.tensor(1.5).double()
    loss = contrastive_loss(
        images,
        texts,
        t,
        torch.tensor(image_index),
        image_ids=torch.tensor(image_ids),
        weights=torch.tensor(weights).double(),
    )
    assert loss.item() == pytest.approx(naive_loss(images, texts, 1.5, image_index, image_ids, weights), rel=1e-9)


def test_images_of_one_group_are_not_negatives():
    # Two images of one group and nothing else: no negatives, so no loss and no gradient.
    images, texts = unit(2, 8).requires_grad_(), unit(2, 8).requires_grad_()
    loss = contrastive_loss(images, texts, torch.tensor(2.0), image_ids=torch.tensor([4, 4]))
    loss.backward()
    assert loss.item() == 0
    assert not images.grad.any()
    assert not texts.grad.any()


# ---- training ---------------------------------------------------------------------------------------------------


def test_ema_half_life():
    trainer = tiny_gan()
    for parameter in trainer.ema.parameters():
        parameter.data.zero_()
    for parameter in trainer.generator.parameters():
        parameter.data.fill_(1.0)
    trainer.step = 10**6  # the half-life is at its maximum, 10,000 images
    for _ in range(100):
        trainer.update_ema(100)
    for parameter in trainer.ema.parameters():
        torch.testing.assert_close(parameter, torch.full_like(parameter, 0.5))


def test_discriminator_learns_to_detect_mismatched_captions():
    # Images of one colour in four colours, with one caption embedding for each colour.
    colours = torch.eye(3)[[0, 1, 2, 2]]
    colours[3, 0] = 1
    embeddings, real = torch.eye(16)[:4], (2 * colours - 1)[:, :, None, None].expand(-1, -1, 32, 32)
    untrained = []
    for seed in range(5):
        torch.manual_seed(seed)
        trainer = tiny_gan()
        trainer.generator.caption.fit(embeddings), trainer.discriminator.caption.fit(embeddings)
        step = partial(trainer.train_step, real, embeddings, embeddings.roll(1, 0)[:, None])
        untrained.append(step()["real_above_mismatched"].item())
    accuracies = [step()["real_above_mismatched"].item() for _ in range(60)]
    assert np.mean(accuracies[-10:]) > 0.9 > np.mean(untrained)


def test_subset_restricts_training_and_generation(tiny_config, trained_run, tmp_path, refused):
    shutil.copytree(trained_run, tmp_path / "run")
    gan.main(["--run", "run", "--gan_subset", "ring, Hoop", *as_flags({**TINY, "gan_epochs": 1})])
    assert read_json(tmp_path / "run/gan/config.json")["settings"]["gan_subset"] == "ring, Hoop"
    pairs = load_splits(tiny_config())["train"]
    with_rings = {
        int(i)
        for c, i in zip(pairs.captions, pairs.image_index, strict=True)
        if {"ring", "hoop"} & set(c.lower().split())
    }
    subset = filter_pairs(pairs, "ring,hoop")
    assert subset.names == [pairs.names[i] for i in sorted(with_rings)] and 0 < len(with_rings) < 24
    assert subset.captions == [c for c, i in zip(pairs.captions, pairs.image_index, strict=True) if i in with_rings]
    config = tiny_config(
        gan="pairs", gan_run="run", gan_ratio=4.0, gan_filter_top_k=100, gan_start=0.0, gan_end=1.0, run="with"
    )
    model, augmentation, _ = build(config)
    batches = augmentation.sample(16, 0, 0.5)
    decode = model.tokenizer.batch_decode
    texts = [text for batch in batches for text in decode(batch.input_ids, skip_special_tokens=True)]
    assert texts and all({"ring", "hoop"} & set(text.split()) for text in texts)
    line = refused(gan.main, ["--run", str(trained_run), "--gan_subset", "zebra", *as_flags(TINY)])
    assert "gan_subset is 'zebra'" in line
    line = refused(main.main, flags(tiny_config(gan="joint", gan_run="run", run="joint")))
    assert "trained on a subset" in line


def test_resumed_training_equals_an_uninterrupted_one(gan_run, trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "run")
    gan.main(["--run", "run", *as_flags({**TINY, "gan_epochs": 1})])
    gan.main(["--run", "run", "--resume", "--gan_epochs", "2"])
    expected, folder = gan_run / "gan", tmp_path / "run" / "gan"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generator.safetensors",
        "last.pt",
        "metrics.jsonl",
        "samples.png",
    ]
    whole, resumed = load_file(expected / "generator.safetensors"), load_file(folder / "generator.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert len((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_training_stopped_in_its_first_epoch_resumes_with_its_settings(trained_run, tmp_path, monkeypatch):
    shutil.copytree(trained_run, tmp_path / "run")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(gan, "train_epoch", stop)
        gan.main(["--run", "run", *as_flags({**TINY, "gan_generator": "style"})])
    gan.main(["--run", "run", "--resume"])
    assert gan.load_generator("run/gan").architecture["generator"] == "style"


def test_gan_that_diverged_at_once_can_be_started_again(trained_run, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained_run, tmp_path / "run")
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as exit:
        patched.setattr(gan.GAN, "train_step", lambda *_: {"discriminator_loss": torch.tensor(math.nan)})
        gan.main(["--run", "run", *as_flags(TINY)])
    line = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code == 1
    assert line.startswith("error: the GAN's discriminator_loss is nan") and "lower --gan_lr" in line
    gan.main(["--run", "run", *as_flags({**TINY, "gan_lr": 5e-4})])
    assert gan_settings("run/gan")["gan_lr"] == 5e-4


def test_sigterm_keeps_the_finished_epochs(trained_run, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained_run, tmp_path / "run")
    train_epoch, handler = gan.train_epoch, signal.getsignal(signal.SIGTERM)

    def terminated(*arguments):
        if (tmp_path / "run/gan/last.pt").exists():
            signal.raise_signal(signal.SIGTERM)
        return train_epoch(*arguments)

    monkeypatch.setattr(gan, "train_epoch", terminated)
    with pytest.raises(SystemExit) as exit:
        gan.main(["--run", "run", *as_flags(TINY)])
    assert exit.value.code == 130
    assert "python gan.py --resume --run run" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == handler
    assert len((tmp_path / "run/gan/metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 1


def test_lost_generator_is_written_again_and_lost_checkpoint_is_refused(gan_run, tmp_path, refused):
    shutil.copytree(gan_run, tmp_path / "run")
    before = (tmp_path / "run/gan/generator.safetensors").read_bytes()
    (tmp_path / "run/gan/generator.safetensors").unlink()
    gan.main(["--run", "run", "--resume"])
    assert (tmp_path / "run/gan/generator.safetensors").read_bytes() == before
    (tmp_path / "run/gan/last.pt").unlink()
    assert "lacks last.pt" in refused(gan.main, ["--run", "run", "--resume"])
    assert (tmp_path / "run/gan/generator.safetensors").read_bytes() == before


def test_damaged_checkpoint_is_refused(gan_run, tmp_path, refused):
    shutil.copytree(gan_run, tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run/gan/last.pt", weights_only=True)
    del checkpoint["gan"]["discriminator"]
    torch.save(checkpoint, tmp_path / "run/gan/last.pt")
    assert "is not a checkpoint of this GAN" in refused(gan.main, ["--run", "run", "--resume"])
    (tmp_path / "run/gan/last.pt").write_bytes(b"x")
    assert "cannot be read as a checkpoint of this GAN" in refused(gan.main, ["--run", "run", "--resume"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "architecture.size is '0'"),
        ({"size": 2**20}, "architecture.size is '1048576'"),
        ({"width": 2.5}, "architecture.width is '2.5'"),
        ({"dim": 8192}, "a larger model than that in generator.safetensors"),
        ({"generator": ["style"]}, "architecture.generator is"),
        ({"generator": "style"}, "generator.safetensors (lacks the|has an unknown) tensor"),
        ({"more": 1}, "unknown entry architecture.more"),
    ],
)
def test_generator_of_a_wrong_architecture_is_refused(gan_run, tmp_path, change, message):
    shutil.copytree(gan_run / "gan", tmp_path / "gan")
    content = read_json(tmp_path / "gan/config.json")
    content["architecture"].update(change)
    write_json(tmp_path / "gan/config.json", content)
    with pytest.raises(InputError, match=message):
        gan.load_generator(tmp_path / "gan")


def test_generator_without_finite_weights_is_refused(gan_run, tmp_path):
    shutil.copytree(gan_run / "gan", tmp_path / "gan")
    path = tmp_path / "gan/generator.safetensors"
    state = load_file(path)
    save_file({name: tensor * torch.nan for name, tensor in state.items()}, path)
    with pytest.raises(InputError, match="generator.safetensors has values that are not finite"):
        gan.load_generator(tmp_path / "gan")
    save_file({name: tensor[:0] if tensor.ndim else tensor for name, tensor in state.items()}, path)
    with pytest.raises(InputError, match="of another shape or type"):
        gan.load_generator(tmp_path / "gan")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match="is not a regular file"):
        gan.load_generator(tmp_path / "gan")


@pytest.mark.parametrize("content", [{"settings": {"gan_subset": 3}}, {"settings": [1]}, {"settings": {"x": 1}}])
def test_gan_settings_of_a_wrong_type_are_refused(tmp_path, content):
    write_json(tmp_path / "gan/config.json", content)
    with pytest.raises(InputError, match="config.json is damaged"):
        gan_settings(tmp_path / "gan")


def test_files_behind_the_checkpoint_are_completed(gan_run, tmp_path):
    run = Path(shutil.copytree(gan_run, tmp_path / "run"))
    lines, plot = (run / "gan/metrics.jsonl").read_bytes(), (run / "gan/samples.png").read_bytes()
    (run / "gan/metrics.jsonl").write_bytes(lines.splitlines(keepends=True)[0])
    (run / "gan/samples.png").write_bytes(b"older")
    gan.main(["--run", str(run), "--resume"])
    assert (run / "gan/metrics.jsonl").read_bytes() == lines
    assert (run / "gan/samples.png").read_bytes() == plot


def test_gan_of_an_earlier_version_is_resumed(gan_run, trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "run")
    gan.main(["--run", "run", *as_flags({**TINY, "gan_epochs": 1})])
    folder = tmp_path / "run/gan"
    content = read_json(folder / "config.json")
    content["settings"]["gan_match"] = content["settings"].pop("gan_clip_weight")
    write_json(folder / "config.json", content)
    checkpoint = torch.load(folder / "last.pt", weights_only=True)
    checkpoint["gan"]["average"] = checkpoint["gan"].pop("ema")
    torch.save(checkpoint, folder / "last.pt")
    gan.main(["--run", "run", "--resume", "--gan_epochs", "2"])
    whole, resumed = (load_file(path / "generator.safetensors") for path in (gan_run / "gan", folder))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert read_json(folder / "config.json")["settings"]["gan_clip_weight"] == 0.25


def test_generate_uses_the_saved_ema(gan_run):
    checkpoint = torch.load(gan_run / "gan" / "last.pt", weights_only=True)["gan"]
    generator = gan.load_generator(gan_run / "gan")
    for name, value in generator.state_dict().items():
        assert torch.equal(value, checkpoint["ema"][name])
    embeddings = unit(3, 32)
    images = gan.generate(generator, embeddings, seed=5, size=48)
    assert images.shape == (3, 3, 48, 48)
    assert 0 <= images.min() <= images.max() <= 1
    assert torch.equal(images, gan.generate(generator, embeddings, seed=5, size=48))
    assert torch.equal(images, gan.generate(generator, embeddings, torch.Generator().manual_seed(5), size=48))
    assert not torch.equal(images, gan.generate(generator, embeddings, seed=6, size=48))


# ---- the command ------------------------------------------------------------------------------------------------


def test_help_shows_only_the_settings_of_the_gan(capsys):
    with pytest.raises(SystemExit):
        gan.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "usage: gan.py" in printed
    assert "--gan_width" in printed and "--run" in printed
    assert "--micro_batch_size" not in printed and "--gan_ratio" not in printed and "--preset" not in printed
    assert "default: that of the run)" in printed


def test_settings_are_parsed_without_torch():
    code = "import sys, utils.gan_settings as s; s.parse_gan_config(['--run', 'nowhere'])"
    result = run_python("-c", f"try:\n {code}\nexcept ValueError as e:\n print(e, 'torch' in sys.modules)")
    assert "which is not a run folder" in result.stdout and "False" in result.stdout, result.stderr


def test_command_refuses_bad_input(gan_run, trained_run, tmp_path, refused):
    assert "--run" in refused(gan.main, [])
    assert "which is not a run folder" in refused(gan.main, ["--run", "nowhere"])
    assert "batch_size is not a GAN setting" in refused(gan.main, ["--run", trained_run, "--batch_size", 4])
    assert "already contains a GAN" in refused(gan.main, ["--run", gan_run])
    assert "was started with 4" in refused(gan.main, ["--run", gan_run, "--resume", "--gan_width", 8])
    assert "renamed to --gan_clip_weight" in refused(gan.main, ["--run", gan_run, "--resume", "--gan_match", 0.5])
    line = refused(gan.main, ["--run", trained_run, *as_flags({**TINY, "gan_batch_size": 25})])
    assert "gan_batch_size is 25" in line
    shutil.copytree(gan_run / "gan", tmp_path / "gan")
    (tmp_path / "gan" / "generator.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="does not contain a generator"):
        gan.load_generator(tmp_path / "gan")
    (tmp_path / "gan" / "config.json").write_text('{"settings": "mine"}')
    with pytest.raises(InputError, match="config.json is damaged"):
        gan_settings(tmp_path / "gan")


# ---- generated pairs in a step ----------------------------------------------------------------------------------


def test_generated_pairs_depend_on_seed_step_and_rank_alone(with_gan):
    _, augmentation, _ = build(with_gan(gan_ratio=1.0, gan_filter_top_k=100))
    (a,), (b,), (c,) = (augmentation.sample(8, step, 0.5) for step in (3, 3, 4))
    assert all(torch.equal(vars(a)[name], vars(b)[name]) for name in vars(a) if vars(a)[name] is not None)
    assert not torch.equal(a.images, c.images)
    assert a.images.shape == (8, 3, 32, 32)
    assert augmentation.sample(8, 0, 0.5, rank=1)[0].images.ne(a.images).any()


def test_generated_pairs_are_added_between_gan_start_and_gan_end(with_gan):
    _, augmentation, _ = build(with_gan(gan_filter_top_k=100, gan_start=0.25, gan_end=0.75))
    lengths = [len(augmentation.sample(8, 0, progress)) for progress in (0.2, 0.25, 0.7, 0.75)]
    assert lengths == [0, 1, 1, 0]


def test_clip_filter_keeps_images_with_a_high_rank_and_counts_the_rest(with_gan, gan_run):
    config = with_gan(gan_ratio=2.0, gan_filter_top_k=30)
    _, augmentation, _ = build(config)
    splits, chosen = load_splits(config), torch.arange(0, 40)
    images = augmentation.generate_images(chosen, torch.Generator().manual_seed(0))
    clip = load_model(gan_run)
    with torch.no_grad():
        image_embeddings = clip.encode_image(images)
    kept, image_index, texts = [], splits["train"].image_index, augmentation.embeddings
    for caption, image in zip(chosen.tolist(), image_embeddings, strict=True):
        others = [o for o in range(120) if image_index[o] != image_index[caption]]
        others = sorted(others, key=lambda o: -float(texts[o] @ texts[caption]))[:99]
        above = [o for o in others if float(image @ texts[o]) >= float(image @ texts[caption])]
        if len(above) < 30:
            kept.append(caption)
    assert 0 < len(kept) < 40
    batch = augmentation.generate_batch(chosen, torch.Generator().manual_seed(0))
    assert torch.equal(batch.images, images[kept])
    assert batch.image_ids.tolist() == [image_index[caption] for caption in kept]
    assert augmentation.end_epoch(None) == {"generated": 40, "dropped_by_filter": 40 - len(kept)}
    assert augmentation.end_epoch(None) == {"generated": 0, "dropped_by_filter": 0}


def test_training_captions_are_distractors_of_a_caption_list(with_gan, tmp_path, gan_run):
    train = load_splits(with_gan())["train"]
    new = ["A red circle is left of a blue square on snow .", "A box on grass .", train.captions[7]]
    (tmp_path / "list.txt").write_text("\n".join(new) + "\n", encoding="utf-8")
    _, augmentation, _ = build(with_gan(gan_captions=str(tmp_path / "list.txt"), gan_filter_top_k=30))
    clip, chosen = load_model(gan_run), torch.arange(3)
    images = augmentation.generate_images(chosen, torch.Generator().manual_seed(0))
    with torch.no_grad():
        image_embeddings = clip.encode_image(images)
    own, distractors = embed_captions(clip, new), embed_captions(clip, [*new, *train.captions])
    groups, expected = [-1, -2, train.image_index[7], *train.image_index.tolist()], []
    for i, image in enumerate(image_embeddings):
        others = [j for j in range(123) if groups[j] != groups[i]]
        others = sorted(others, key=lambda j: -float(distractors[j] @ own[i]))[:99]
        expected.append(sum(float(image @ distractors[j]) >= float(image @ own[i]) for j in others) < 30)
    assert augmentation.clip_filter(images, chosen).tolist() == expected
    assert not all(expected)  # among the three captions of the list alone, all would be in the top 30


def test_equal_captions_are_no_distractors_and_never_negatives(with_gan, tmp_path, gan_run):
    """Text ids reach the filter and the generated batches, where training captions of two images are equal."""
    config = with_gan()
    pairs = load_splits(config)["train"]
    pairs.captions = [*pairs.captions]
    pairs.captions[7] = pairs.captions[3].upper() + " ."
    pairs.captions[60] = pairs.captions[3]
    model = main.build_model(config, pairs.captions, torch.device("cpu"))
    augmentation = gan.GANAugmentation(with_gan(gan_filter_top_k=99), pairs, model, model.device, None)
    texts = augmentation.clip_filter.distractor_texts
    assert texts[3] == texts[7] == texts[60] and (texts == texts[3]).sum() == 3
    images = torch.rand(2, 3, 32, 32)
    similarities = []
    topk = torch.Tensor.topk
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "topk", lambda x, *rest: similarities.append(x.clone()) or topk(x, *rest))
        augmentation.clip_filter(images, torch.tensor([3, 20]))
    assert (similarities[0][0, [3, 7, 60]] == -2).all() and (similarities[0][1, [3, 7, 60]] > -2).all()
    augmentation.clip_filter.top_k = 100  # keeps all
    batch = augmentation.generate_batch(torch.tensor([3, 20, 60]), torch.Generator().manual_seed(0))
    assert torch.equal(batch.text_ids, texts[[3, 20, 60]])


def test_filter_that_drops_everything_is_reported(with_gan, monkeypatch, capsys):
    monkeypatch.setattr(gan.CLIPFilter, "__call__", lambda self, images, captions: torch.zeros(len(captions)).bool())
    main.main(flags(with_gan(gan_ratio=1.0, epochs=1)))
    assert "the CLIP filter dropped all 120 generated images" in capsys.readouterr().out


def test_caption_list_replaces_the_training_captions(with_gan, tmp_path):
    train = load_splits(with_gan())["train"]
    new = ["A red circle is left of a blue square on snow .", train.captions[7]]
    (tmp_path / "list.txt").write_text("\n".join([*new, "", new[0]]) + "\n", encoding="utf-8")
    _, augmentation, _ = build(with_gan(gan_captions=str(tmp_path / "list.txt")))
    assert augmentation.image_ids.tolist() == [-1, train.image_index[7]]
    lines = ["7\tA red ring .", "A box", "7\tA ring that is red .", f"8\t{train.captions[7]}", "A box"]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _, augmentation, _ = build(with_gan(gan_captions=str(tmp_path / "list.txt"), run=str(tmp_path / "grouped")))
    first, alone, second, known = augmentation.image_ids.tolist()
    assert first == second < 0 and alone < 0 and alone != first  # captions of one group are never negatives
    assert known == train.image_index[7]
    (tmp_path / "list.txt").write_text("one\n", encoding="utf-8")
    with pytest.raises(InputError, match="contains 1 captions"):
        build(with_gan(gan_captions=str(tmp_path / "list.txt"), run=str(tmp_path / "other")))


def test_batchnorm_statistics_stay_those_of_real_images(with_gan):
    model, augmentation, batch = build(with_gan(gan_ratio=1.0, gan_filter_top_k=100))
    generated = augmentation.sample(8, 0, 0.5)
    without, with_generated = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    backward(without, batch, [])
    backward(with_generated, batch, generated)
    for name, buffer in without.named_buffers():
        assert torch.equal(buffer, dict(with_generated.named_buffers())[name]), name
    parameters = zip(without.parameters(), with_generated.parameters(), strict=True)
    assert max((p.grad - q.grad).abs().max() for p, q in parameters) > 1e-4  # they did change the loss


def backward(model, batch, generated):
    """The backward pass of `main.train_one_epoch`; returns the loss."""
    embeddings = main.encode(model, batch, generated, None)
    loss = contrastive_loss(*embeddings, model.logit_scale, **pair_targets([batch, *generated]))
    loss.backward()
    return loss


def test_gradient_caching_with_generated_pairs_gives_the_same_gradient(with_gan):
    model, augmentation, batch = build(with_gan(gan_ratio=1.0, gan_filter_top_k=100))
    (generated,) = augmentation.sample(8, 0, 0.5)
    whole, cached = copy.deepcopy(model).double().eval(), copy.deepcopy(model).double().eval()
    batch = dataclasses.replace(batch, images=batch.images.double() / 255)
    generated = dataclasses.replace(generated, images=generated.images.double())
    expected = backward(whole, batch, [generated])
    halves = [half(batch, 0), half(batch, 1)]
    loss_function = partial(
        contrastive_loss, logit_scale=cached.logit_scale, **pair_targets([*halves, generated]), group=None
    )
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss = cached_backward(cached, halves, [generated], loss_function, None, scaler)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, p), q in zip(whole.named_parameters(), cached.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7, msg=name)


def half(batch, number):
    """Four of the eight images of a batch with one caption each."""
    rows = slice(4 * number, 4 * number + 4)
    part = Batch(**{name: tensor[rows] for name, tensor in vars(batch).items() if tensor is not None})
    return dataclasses.replace(part, image_index=part.image_index - 4 * number)


# ---- whole runs -------------------------------------------------------------------------------------------------


def test_ratio_zero_gives_bit_identical_weights(with_gan, tmp_path):
    for name, changes in {"without": {"gan": "none"}, "zero": {"gan_ratio": 0.0}}.items():
        main.main(flags(with_gan(run=str(tmp_path / name), epochs=2, **changes)))
    without, zero = weights_of(tmp_path / "without" / "best"), weights_of(tmp_path / "zero" / "best")
    assert all(torch.equal(without[name], zero[name]) for name in without)


def test_all_stages_are_trained_once(tiny_config, tmp_path, capsys):
    config = tiny_config(gan="pairs", gan_start=0.0, gan_end=1.0, gan_filter_top_k=100, **TINY)
    main.main(flags(config))
    run = tmp_path / "run"
    printed = capsys.readouterr().out
    assert "3 of 3" in printed
    assert "GAN, epoch 2/2: real above generated" in printed
    results = [read_json(folder / "results.json")["rsum"] for folder in (run / "stage1", run)]
    assert re.search(rf"rsum +{results[0]:.1f} +{results[1]:.1f}\n", printed)
    line = (run / "metrics.jsonl").read_text(encoding="utf-8")
    assert '"generated": 30,' in line  # a quarter of the 24 images in 5 rounds
    assert '"dropped_by_filter": 0' in line
    assert read_json(run / "stage1" / "config.json")["gan"] == "none"
    finished = [run / "stage1" / "best" / "model.safetensors", run / "stage1" / "gan" / "last.pt"]
    before = [path.stat().st_mtime_ns for path in finished]
    main.main(["--resume", "--run", "run", "--epochs", "2"])
    assert [path.stat().st_mtime_ns for path in finished] == before
    assert "real images only" not in capsys.readouterr().out  # the numbers of epochs differ
    assert len((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_gan_training_in_several_processes_is_refused(tiny_config, monkeypatch, refused):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "a GAN is trained in one" in refused(main.main, flags(tiny_config(gan="pairs", **TINY)))


def test_ratio_too_small_for_the_batch_is_refused(with_gan, monkeypatch):
    with pytest.raises(InputError, match="gan_ratio is 0.2"):
        build(with_gan(gan_ratio=0.2, batch_size=4))
    _, augmentation, _ = build(with_gan(gan_ratio=0.25, batch_size=8))
    monkeypatch.setattr("utils.clip_filter.rank_and_world_size", lambda: (0, 2))  # four real images for each
    with pytest.raises(InputError, match="fewer than two generated images per 4 real ones"):
        gan.GANAugmentation(augmentation.config, load_splits(augmentation.config)["train"], None, None, None)


@pytest.mark.parametrize(
    "change",
    [
        {"gan_batch_size": 500},
        {"gan_subset": "zebra"},
        {"image_path": "nowhere"},
        {"gan_ratio": 0.05},
        {"gan": "joint", "gan_subset": "ring"},
    ],
)
def test_bad_settings_of_later_stages_are_refused_before_anything_is_written(tiny_config, tmp_path, refused, change):
    config = tiny_config(**{"gan": "pairs", "run": "run", **TINY, **change})
    name = list(change)[-1]
    assert name in refused(main.main, flags(config))
    assert not (tmp_path / "run").exists()


def test_caption_list_without_words_of_the_subset_is_refused_before_training(tiny_config, tmp_path, refused):
    (tmp_path / "list.txt").write_text("A dog .\nA cat .\nA ring .\n")
    config = tiny_config(gan="pairs", gan_captions="list.txt", gan_subset="ring", **TINY)
    assert "1 captions contain a word of the GAN's subset (ring)" in refused(main.main, flags(config))
    assert not (tmp_path / "run").exists()


def test_missing_caption_list_is_refused_before_training(tiny_config, tmp_path, refused):
    config = tiny_config(gan="pairs", gan_captions="nowhere.txt", **TINY)
    assert "gan_captions is nowhere.txt" in refused(main.main, flags(config))
    assert not (tmp_path / "run").exists()


def test_interval_without_a_step_is_refused(with_gan):
    with pytest.raises(InputError, match="none of the 15 steps is in between"):
        build(with_gan(epochs=1, gan_start=0.41, gan_end=0.45))


@pytest.mark.parametrize("stage_1", ["stage1", "first"])
def test_gan_is_found_in_stage_1_of_a_run(with_gan, gan_run, tmp_path, stage_1):
    shutil.copytree(gan_run, tmp_path / "all" / stage_1)
    _, augmentation, _ = build(with_gan(gan_run="all"))
    assert augmentation.clip_run == Path("all") / stage_1


def test_caption_list_may_be_moved_but_not_changed(with_gan, tmp_path, refused):
    lines = [f"A {colour} {shape} on snow ." for colour in ("red", "blue") for shape in ("ring", "box", "plus")]
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n")
    main.main(flags(with_gan(gan_captions="a.txt", gan_filter_top_k=100, epochs=1)))
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    main.main(["--resume", "--run", "run", "--epochs", "2", "--gan_captions", "b.txt"])
    (tmp_path / "b.txt").write_text("\n".join(lines[:-1] + ["A cat ."]) + "\n")
    line = refused(main.main, ["--resume", "--run", "run", "--epochs", "3", "--gan_captions", "b.txt"])
    assert "gan_captions differs from the captions" in line


def test_settings_of_a_trained_gan_are_adopted(with_gan, tmp_path, refused, gan_run):
    given = flags(dataclasses.replace(with_gan(), gan_width=64, gan_epochs=300))  # the defaults: no flags
    config, _ = resolve_run(given)
    assert (config.gan_width, config.gan_epochs) == (4, 2)
    assert "gan_size is 64, but the GAN of" in refused(main.main, [*given, "--gan_size", "64"])
    assert resolve_run([*given, "--gan_size=32"])[0].gan_size == 32
    assert not (tmp_path / "run").exists()


def test_gan_of_another_data_set_is_refused(with_gan, data_set):
    names = [f"{n}.jpg" for n in range(12)]
    other = data_set({name: ["A dog .", "A cat ."] for name in names}, train=names[:8], dev=names[8:])
    with pytest.raises(InputError, match="trained on 24 images that are not training images here .*--seed 42"):
        build(with_gan(**other))


def test_run_without_a_gan_is_refused(tiny_config, trained_run, tmp_path, refused):
    config = tiny_config(gan="pairs", gan_run=str(trained_run), **TINY)
    assert "python gan.py --run" in refused(main.main, flags(config))
    assert not (tmp_path / "run" / "config.json").exists()

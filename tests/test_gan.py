"""The GAN: its networks and losses against naive computations, its training, its pictures in CLIP's training."""

import copy
import dataclasses
import math
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import flags
from safetensors.torch import load_file

import gan
import main
from clip import contrastive_backward, contrastive_loss, load_model
from config import Config, InputError, read_json
from dataset import load_splits, pairs_naming
from gan_networks import GENERATORS, NOISE, Architecture, CaptionInput, Discriminator, ModulatedConv
from generated import group_captions, read_caption_list
from index import embed_captions
from training import Trainer

TINY = {"gan_size": 32, "gan_width": 4, "gan_epochs": 2, "gan_batch_size": 8, "gan_lr": 1e-3}


@pytest.fixture(scope="session")
def gan_run(tmp_path_factory, trained_run):
    """A trained run with a GAN of two epochs; only for reading."""
    folder = tmp_path_factory.mktemp("gan") / "run"
    shutil.copytree(trained_run, folder)
    gan.main(["--run", str(folder), *words(TINY)])
    return folder


def words(settings):
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def tiny_gan(dim=16, generator="affine"):
    architecture = Architecture(generator, 32, 4, dim)
    return gan.GAN(architecture, unit(20, dim), 1e-3, torch.device("cpu"), None)


def weights_of(folder):
    return load_file(folder / "model.safetensors")


# ---- networks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(GENERATORS))
@pytest.mark.parametrize("size", [32, 64, 128])
def test_networks_make_and_judge_pictures_of_every_size(name, size):
    architecture = Architecture(name, size, 4, 16)
    pictures = architecture.build_generator()(torch.randn(3, NOISE), unit(3, 16))
    assert pictures.shape == (3, 3, size, size)
    assert pictures.dtype == torch.float32
    assert pictures.abs().max() <= 1
    assert Discriminator(16, size, 4)(pictures, unit(3, 16)).shape == (3,)


def test_modulated_convolution_equals_one_with_weights_of_its_own_per_sample():
    layer, h, w = ModulatedConv(5, 7), torch.randn(3, 5, 6, 6), torch.randn(3, layer_input())
    torch.nn.init.normal_(layer.bias)
    for sample, style, result in zip(h, layer.style(w), layer(h, w), strict=True):
        weight = layer.weight * style[None, :, None, None]
        weight = weight / weight.square().sum((1, 2, 3), keepdim=True).sqrt()
        expected = torch.nn.functional.conv2d(sample[None], weight, layer.bias, padding=1)[0]
        torch.testing.assert_close(result, expected)


def layer_input():
    return ModulatedConv(1, 1).style.in_features


def test_logit_is_realness_plus_match_of_picture_and_caption():
    discriminator, pictures, embeddings = Discriminator(16, 32, 4), torch.randn(3, 3, 32, 32), unit(3, 16)
    features, caption = discriminator.features(pictures), discriminator.caption(embeddings)
    for logit, h, c in zip(discriminator(pictures, embeddings), features, caption, strict=True):
        match = sum(a * b for a, b in zip(discriminator.projection(h).tolist(), c.tolist(), strict=True))
        assert logit.item() == pytest.approx(discriminator.realness(h).item() + match / math.sqrt(len(c)), abs=1e-5)


# ---- losses -----------------------------------------------------------------------------------------------------


def test_losses_are_binary_cross_entropies():
    real, fake, mismatched = torch.randn(3, 5).double()

    def cross_entropy(logits, target):
        p = 1 / (1 + np.exp(-logits.numpy()))
        return -np.mean(target * np.log(p) + (1 - target) * np.log(1 - p))

    expected = cross_entropy(real, 1) + cross_entropy(fake, 0) / 2 + cross_entropy(mismatched, 0) / 2
    assert gan.discriminator_loss(real, fake, mismatched).item() == pytest.approx(expected)
    assert gan.generator_loss(fake).item() == pytest.approx(cross_entropy(fake, 1))


def test_gradient_penalty_is_the_squared_slope_and_can_be_learned_from():
    slope = torch.randn(3, 8, 8, requires_grad=True)
    pictures = torch.randn(4, 3, 8, 8)

    def quadratic(x, _):  # its gradient at x is slope * x
        return 0.5 * (slope * x.square()).sum((1, 2, 3))

    penalty = gan.gradient_penalty(quadratic, pictures, None)
    expected = np.mean([((slope * picture) ** 2).sum().item() for picture in pictures])
    assert penalty.item() == pytest.approx(expected, rel=1e-5)
    penalty.backward()
    torch.testing.assert_close(slope.grad, 2 * slope.detach() * pictures.square().mean(0))


def test_augment_shifts_and_cuts_each_picture_for_itself():
    side = 32
    place = torch.arange(1, side * side + 1.0).view(1, 1, side, side)
    pictures = place.expand(50, 3, -1, -1).clone().requires_grad_()
    shown = gan.augment(pictures)
    shown.sum().backward()
    shifts = set()
    for picture, gradient in zip(shown.detach(), pictures.grad, strict=True):
        assert (picture[0] == picture[1]).all()  # no change of colour
        y, x = torch.nonzero(picture[0], as_tuple=True)
        value = picture[0][y, x].long() - 1
        (dy,), (dx,) = (value // side - y).unique().tolist(), (value % side - x).unique().tolist()
        assert max(abs(dy), abs(dx)) <= side // 8
        shifts.add((dy, dx))
        hidden = side * side - len(y) - (side * side - (side - abs(dy)) * (side - abs(dx)))
        assert 0 <= hidden <= (side // 3) ** 2
        assert gradient[0].sum() == len(y)  # what is seen has a gradient, and nothing else
    assert len(shifts) > 20


def test_average_forgets_half_in_its_half_life():
    player = tiny_gan()
    for parameter in player.average.parameters():
        parameter.data.zero_()
    for parameter in player.generator.parameters():
        parameter.data.fill_(1.0)
    player.step = 10**6  # long since at its longest half-life, 10,000 pictures
    for _ in range(100):
        player.update_average(100)
    for parameter in player.average.parameters():
        torch.testing.assert_close(parameter, torch.full_like(parameter, 0.5))


def test_captions_are_whitened_so_that_small_differences_count():
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(16, 16)).Q
    deviations = torch.tensor([1.0] * 3 + [0.3] * 3 + [1e-4] * 10)
    embeddings = (torch.randn(5000, 16) * deviations) @ axes.T + 0.7
    caption = CaptionInput(16)
    caption.measure(embeddings)
    seen = (embeddings - caption.mean) @ caption.whitening
    variances = torch.linalg.eigvalsh(seen.T @ seen / len(seen)).flip(0)
    assert (variances[:6] > 0.9).all() and (variances[:6] < 1.001).all()
    assert (variances[6:] < 1e-4).all()  # far below the others: noise, which fades


# ---- training ---------------------------------------------------------------------------------------------------


def test_discriminator_learns_to_see_wrong_captions():
    # Plain pictures in four colours, a caption embedding for each colour: what does not fit can be told.
    player, colours = tiny_gan(), torch.eye(3)[[0, 1, 2, 2]]
    colours[3, 0] = 1
    embeddings = torch.eye(16)[:4] * 1.0
    player.generator.caption.measure(embeddings), player.discriminator.caption.measure(embeddings)
    real = (2 * colours - 1)[:, :, None, None].expand(-1, -1, 32, 32)
    shares = [
        player.train_step(real, embeddings, embeddings.roll(1, 0)[:, None])["real_above_mismatched"].item()
        for _ in range(60)
    ]
    assert np.mean(shares[-10:]) > 0.9 > np.mean(shares[:5])


def test_wrong_captions_are_those_of_other_pictures_most_like_the_own(tiny_config, trained_run):
    model = load_model(trained_run)
    config = tiny_config()
    store = gan.PictureStore(model, load_splits(config)["train"], config, 32, torch.device("cpu"))
    images, chosen = torch.arange(24), store.first[:-1]
    wrong, likeness = store.wrong_captions(images, chosen), store.embeddings @ store.embeddings.T
    assert wrong.shape == (24, gan.WRONG)
    for image, numbers in zip(images.tolist(), wrong, strict=True):
        assert image not in store.image_index[numbers]
        others = likeness[chosen[image]][store.image_index != image]
        least = likeness[chosen[image], numbers].min()
        assert (others > least + 1e-6).sum() <= 0.25 * len(others)  # 256 were drawn of 120


def test_a_subset_is_learned_and_only_its_captions_are_painted(tiny_config, trained_run, tmp_path, refused):
    shutil.copytree(trained_run, tmp_path / "run")
    gan.main(["--run", "run", "--gan_subset", "ring, Hoop", *words({**TINY, "gan_epochs": 1})])
    assert read_json(tmp_path / "run/gan/config.json")["settings"]["gan_subset"] == "ring, Hoop"
    pairs = load_splits(tiny_config())["train"]
    with_rings = {
        int(i)
        for c, i in zip(pairs.captions, pairs.image_index, strict=True)
        if {"ring", "hoop"} & set(c.lower().split())
    }
    subset = pairs_naming(pairs, "ring,hoop")
    assert subset.names == [pairs.names[i] for i in sorted(with_rings)] and 0 < len(with_rings) < 24
    assert subset.captions == [c for c, i in zip(pairs.captions, pairs.image_index, strict=True) if i in with_rings]
    trainer = Trainer(tiny_config(gan="pairs", gan_run="run", gan_ratio=4.0, gan_gate=100, run="with"))
    batches = trainer.generated.micro_batches(16, 0, 0.5)
    decode = trainer.model.tokenizer.batch_decode
    texts = [text for batch in batches for text in decode(batch["input_ids"], skip_special_tokens=True)]
    assert texts and all({"ring", "hoop"} & set(text.split()) for text in texts)
    assert "give other words" in refused(gan.main, ["--run", str(trained_run), "--gan_subset", "zebra", *words(TINY)])
    line = refused(main.main, flags(tiny_config(gan="joint", gan_run="run", run="joint")))
    assert "learned from a subset" in line


def test_a_training_that_is_resumed_goes_on_as_if_it_had_not_stopped(gan_run, trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "run")
    gan.main(["--run", "run", *words({**TINY, "gan_epochs": 1})])
    gan.main(["--run", "run", "--resume", "--gan_epochs", "2"])
    there, here = gan_run / "gan", tmp_path / "run" / "gan"
    assert sorted(path.name for path in here.iterdir()) == [
        "config.json",
        "generator.safetensors",
        "last.pt",
        "metrics.jsonl",
        "samples.png",
    ]
    whole, resumed = load_file(there / "generator.safetensors"), load_file(here / "generator.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert len((here / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_a_training_stopped_in_its_first_epoch_goes_on_as_it_was_asked_for(trained_run, tmp_path, monkeypatch):
    shutil.copytree(trained_run, tmp_path / "run")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(gan, "train_epoch", stop)
        gan.main(["--run", "run", *words({**TINY, "gan_generator": "style"})])
    gan.main(["--run", "run", "--resume"])
    assert gan.load_generator("run/gan").architecture.generator == "style"


def test_a_gan_that_diverged_at_once_is_begun_anew(trained_run, tmp_path, refused, monkeypatch):
    shutil.copytree(trained_run, tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(gan.GAN, "train_step", lambda *_: {"discriminator_loss": torch.tensor(math.nan)})
        line = refused(gan.main, ["--run", "run", *words(TINY)])
    assert "the GAN's discriminator_loss is nan" in line and "lower --gan_lr" in line
    gan.main(["--run", "run", *words({**TINY, "gan_lr": 5e-4})])
    assert gan.gan_settings("run/gan")["gan_lr"] == 5e-4


def test_a_gan_that_is_told_to_end_keeps_its_last_whole_epoch(trained_run, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained_run, tmp_path / "run")
    train_epoch, handler = gan.train_epoch, signal.getsignal(signal.SIGTERM)

    def terminated(*arguments):
        if (tmp_path / "run/gan/last.pt").exists():
            signal.raise_signal(signal.SIGTERM)
        return train_epoch(*arguments)

    monkeypatch.setattr(gan, "train_epoch", terminated)
    with pytest.raises(SystemExit) as exit:
        gan.main(["--run", "run", *words(TINY)])
    assert exit.value.code == 130
    assert "python gan.py --resume --run run" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == handler
    assert len((tmp_path / "run/gan/metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 1


def test_help_shows_the_settings_of_a_gan_alone(capsys):
    with pytest.raises(SystemExit):
        gan.main(["--help"])
    printed = capsys.readouterr().out
    assert "usage: gan.py" in printed
    assert "--gan_width" in printed and "--run" in printed
    assert "--micro_batch_size" not in printed and "--gan_ratio" not in printed and "--preset" not in printed
    assert "(default: the run's)" in printed


def test_lost_files_of_a_gan_are_written_again_or_missed(gan_run, tmp_path, refused):
    shutil.copytree(gan_run, tmp_path / "run")
    before = (tmp_path / "run/gan/generator.safetensors").read_bytes()
    (tmp_path / "run/gan/generator.safetensors").unlink()
    gan.main(["--run", "run", "--resume"])
    assert (tmp_path / "run/gan/generator.safetensors").read_bytes() == before
    (tmp_path / "run/gan/last.pt").unlink()
    assert "lacks last.pt" in refused(gan.main, ["--run", "run", "--resume"])
    assert (tmp_path / "run/gan/generator.safetensors").read_bytes() == before


def test_samples_of_few_captions_and_of_dollars_are_drawn(gan_run, tiny_config, tmp_path):
    clip, generator = load_model(gan_run), gan.load_generator(gan_run / "gan")
    pairs = load_splits(tiny_config())["validation"]
    store = gan.PictureStore(clip, pairs, clip.config, 32, torch.device("cpu"))
    pairs.captions[:] = [f"costs $5 and x__y$ {caption}" for caption in pairs.captions]
    gan.draw_samples(generator, pairs, store, tmp_path / "samples.png", rows=20, columns=3)
    assert (tmp_path / "samples.png").stat().st_size > 10_000


def test_generated_pictures_are_those_of_the_saved_average(gan_run):
    checkpoint = torch.load(gan_run / "gan" / "last.pt", weights_only=True)["gan"]
    generator = gan.load_generator(gan_run / "gan")
    for name, value in generator.state_dict().items():
        assert torch.equal(value, checkpoint["average"][name])
    embeddings = unit(3, 32)
    pictures = gan.generate(generator, embeddings, seed=5, size=48)
    assert pictures.shape == (3, 3, 48, 48)
    assert 0 <= pictures.min() <= pictures.max() <= 1
    assert torch.equal(pictures, gan.generate(generator, embeddings, seed=5, size=48))
    assert not torch.equal(pictures, gan.generate(generator, embeddings, seed=6, size=48))


def test_matched_share_counts_captions_in_the_first_ten():
    class Sees:  # a CLIP that reads the caption off the picture, wrongly for every third
        config = dataclasses.replace(Config(), size=32)

        def encode_image(self, pictures):
            return embeddings.roll(1, 0).where(torch.arange(30)[:, None] % 3 == 0, embeddings)

    embeddings = torch.eye(30)
    generator = Architecture("affine", 32, 4, 30).build_generator()
    # A wrong one has its own caption among 29 that are equally far.
    assert gan.matched_share(Sees(), generator, embeddings, embeddings) == pytest.approx(100 * 20 / 30)
    # Nine rivals and the own caption: whatever is seen is in the first ten.
    three = dataclasses.replace(Config(), size=32)

    class Blind:
        config = three

        def encode_image(self, pictures):
            return torch.zeros(3, 30)

    assert gan.matched_share(Blind(), generator, embeddings[:3], embeddings[:10]) == 100
    assert gan.matched_share(Blind(), generator, embeddings[:3], embeddings[:11]) == 0


def test_command_refuses_what_it_cannot_do(gan_run, trained_run, tmp_path, refused):
    assert "--run" in refused(gan.main, [])
    assert "holds no run" in refused(gan.main, ["--run", "nowhere"])
    assert "batch_size is no setting of the GAN" in refused(gan.main, ["--run", trained_run, "--batch_size", 4])
    assert "already holds a GAN" in refused(gan.main, ["--run", gan_run])
    assert "was started with 4" in refused(gan.main, ["--run", gan_run, "--resume", "--gan_width", 8])
    assert "gan_batch_size is 25" in refused(gan.main, ["--run", trained_run, *words({**TINY, "gan_batch_size": 25})])
    shutil.copytree(gan_run / "gan", tmp_path / "gan")
    (tmp_path / "gan" / "generator.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="does not hold a generator"):
        gan.load_generator(tmp_path / "gan")
    (tmp_path / "gan" / "config.json").write_text('{"settings": "mine"}')
    with pytest.raises(InputError, match="config.json is damaged"):
        gan.gan_settings(tmp_path / "gan")


# ---- siblings and weights in the loss ---------------------------------------------------------------------------


def naive_loss(images, texts, t, image_index, image_ids, weights):
    """The contrastive loss by double loops, in Python's numbers."""
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


def test_loss_with_siblings_and_weights_equals_the_naive_one():
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


def test_siblings_push_each_other_nowhere():
    # Two images of one group and nothing else: no negatives, so no loss and no gradient.
    images, texts = unit(2, 8).requires_grad_(), unit(2, 8).requires_grad_()
    loss = contrastive_loss(images, texts, torch.tensor(2.0), image_ids=torch.tensor([4, 4]))
    loss.backward()
    assert loss.item() == 0
    assert not images.grad.any()
    assert not texts.grad.any()


# ---- generated pictures in a step -------------------------------------------------------------------------------


@pytest.fixture
def with_gan(tiny_config, gan_run):
    """`with_gan(gan_ratio=1.0)`: settings of a run with the pictures of `gan_run`, all through the training."""

    def make(**changes):
        return tiny_config(
            **{"gan": "pairs", "gan_run": str(gan_run), "gan_start": 0.0, "gan_end": 1.0, **TINY, **changes}
        )

    return make


def first_batch(trainer):
    return next(iter(trainer.loader))


def test_pictures_depend_on_seed_and_step_alone(with_gan):
    config = with_gan(gan_ratio=1.0, gan_gate=100)
    trainer = Trainer(config)
    (a,), (b,), (c,) = (trainer.generated.micro_batches(8, step, 0.5) for step in (3, 3, 4))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["images"], c["images"])
    assert a["images"].shape == (8, 3, 32, 32)
    assert trainer.generated.micro_batches(8, 0, 0.5, rank=1)[0]["images"].ne(a["images"]).any()


def test_pictures_come_only_in_their_part_of_the_training(with_gan):
    pairs = Trainer(with_gan(gan_gate=100, gan_start=0.25, gan_end=0.75)).generated
    assert [pairs.micro_batches(8, 0, progress) is None for progress in (0.2, 0.25, 0.7, 0.75)] == [
        True,
        False,
        False,
        True,
    ]


def test_gate_keeps_what_the_judge_ranks_high_and_counts_the_rest(with_gan, gan_run):
    trainer = Trainer(with_gan(gan_ratio=2.0, gan_gate=30))
    pairs, splits = trainer.generated, load_splits(trainer.config)
    chosen = torch.arange(0, 40)
    random = torch.Generator().manual_seed(0)
    pictures = pairs.paint(chosen, random)
    judge = load_model(gan_run)
    with torch.no_grad():
        images = judge.encode_image(pictures)
    kept, owner, texts = [], splits["train"].image_index, pairs.embeddings
    for caption, image in zip(chosen.tolist(), images, strict=True):
        others = [o for o in range(120) if owner[o] != owner[caption]]
        others = sorted(others, key=lambda o: -float(texts[o] @ texts[caption]))[:99]
        above = [o for o in others if float(image @ texts[o]) >= float(image @ texts[caption])]
        if len(above) < 30:
            kept.append(caption)
    assert 0 < len(kept) < 40
    batch = pairs.make(chosen, torch.Generator().manual_seed(0))
    assert torch.equal(batch["images"], pictures[kept])
    assert batch["image_ids"].tolist() == [owner[caption] for caption in kept]
    assert pairs.end_epoch(None) == {"generated": 40, "dropped_by_gate": 40 - len(kept)}
    assert pairs.end_epoch(None) == {"generated": 0, "dropped_by_gate": 0}


def test_gate_of_a_short_list_asks_the_training_captions_too(with_gan, tmp_path, gan_run):
    train = load_splits(with_gan())["train"]
    new = ["A red circle is left of a blue square on snow .", "A box on grass .", train.captions[7]]
    (tmp_path / "list.txt").write_text("\n".join(new) + "\n", encoding="utf-8")
    pairs = Trainer(with_gan(gan_captions=str(tmp_path / "list.txt"), gan_gate=30)).generated
    judge, chosen = load_model(gan_run), torch.arange(3)
    pictures = pairs.paint(chosen, torch.Generator().manual_seed(0))
    with torch.no_grad():
        images = judge.encode_image(pictures)
    own, rivals = embed_captions(judge, new), embed_captions(judge, [*new, *train.captions])
    owner, expected = [-1, -2, train.image_index[7], *train.image_index.tolist()], []
    for i, image in enumerate(images):
        others = sorted((j for j in range(123) if owner[j] != owner[i]), key=lambda j: -float(rivals[j] @ own[i]))[:99]
        expected.append(sum(float(image @ rivals[j]) >= float(image @ own[i]) for j in others) < 30)
    assert pairs.passes(pictures, chosen).tolist() == expected
    assert not all(expected)  # among the list's three alone, all would have been in the first 30


def test_a_gate_that_lets_nothing_pass_says_so(with_gan, monkeypatch, capsys):
    trainer = Trainer(with_gan(gan_ratio=1.0, epochs=1))
    monkeypatch.setattr(trainer.generated, "passes", lambda pictures, chosen: torch.zeros(len(chosen), dtype=bool))
    trainer.fit()
    assert "the gate dropped all 120 generated pictures" in capsys.readouterr().out


def test_a_list_of_captions_takes_the_place_of_the_training_captions(with_gan, tmp_path):
    train = load_splits(with_gan())["train"]
    new = ["A red circle is left of a blue square on snow .", train.captions[7]]
    (tmp_path / "list.txt").write_text("\n".join([*new, "", new[0]]) + "\n", encoding="utf-8")
    pairs = Trainer(with_gan(gan_captions=str(tmp_path / "list.txt"))).generated
    assert pairs.image_ids.tolist() == [-1, train.image_index[7]]
    lines = ["7\tA red ring .", "A box", "7\tA ring that is red .", f"8\t{train.captions[7]}", "A box"]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pairs = Trainer(with_gan(gan_captions=str(tmp_path / "list.txt"), run=str(tmp_path / "grouped"))).generated
    first, alone, second, known = pairs.image_ids.tolist()
    assert first == second < 0 and alone < 0 and alone != first  # one group says the same and is never a negative
    assert known == train.image_index[7]
    assert "holds 1 captions" in refusal_of_list(with_gan, tmp_path, "one\n")


def refusal_of_list(with_gan, tmp_path, text):
    (tmp_path / "list.txt").write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as error:
        Trainer(with_gan(gan_captions=str(tmp_path / "list.txt"), run=str(tmp_path / "other")))
    return str(error.value)


def test_running_statistics_stay_those_of_real_pictures(with_gan):
    trainer = Trainer(with_gan(gan_ratio=1.0, gan_gate=100))
    batch, added = first_batch(trainer), trainer.generated.micro_batches(8, 0, 0.5)
    alone, beside = copy.deepcopy(trainer.model).train(), copy.deepcopy(trainer.model).train()
    contrastive_backward(alone, [batch], torch.device("cpu"))
    contrastive_backward(beside, [batch], torch.device("cpu"), generated=added)
    for name, buffer in alone.named_buffers():
        assert torch.equal(buffer, dict(beside.named_buffers())[name]), name
    gradients = [(p.grad - q.grad).abs().max() for p, q in zip(alone.parameters(), beside.parameters(), strict=True)]
    assert max(gradients) > 1e-4  # they were in the loss all the same


def test_gradient_caching_gives_the_same_gradient_with_generated_pictures(with_gan):
    trainer = Trainer(with_gan(gan_ratio=1.0, gan_gate=100))
    batch, (added,) = first_batch(trainer), trainer.generated.micro_batches(8, 0, 0.5)
    whole, parts = copy.deepcopy(trainer.model).double().eval(), copy.deepcopy(trainer.model).double().eval()
    batch, added = ({**b, "images": b["images"].double() / (255 if b is batch else 1)} for b in (batch, added))
    images, texts = zip(whole(batch), whole(added), strict=True)
    loss = contrastive_loss(
        torch.cat(images),
        torch.cat(texts),
        whole.logit_scale,
        torch.cat([batch["image_index"], added["image_index"] + 8]),
        image_ids=torch.cat([batch["image_ids"], added["image_ids"]]),
        weights=torch.cat([torch.ones(8), added["weights"]]),
    )
    loss.backward()
    cached = contrastive_backward(parts, [half(batch, 0), half(batch, 1)], torch.device("cpu"), generated=[added])
    assert cached.item() == pytest.approx(loss.item(), rel=1e-5)
    for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7, msg=name)


def half(batch, number):
    """Four of the eight images of a batch of one caption each."""
    rows = slice(4 * number, 4 * number + 4)
    return {name: value[rows] - (4 * number if name == "image_index" else 0) for name, value in batch.items()}


# ---- whole runs -------------------------------------------------------------------------------------------------


def test_ratio_zero_gives_bit_identical_weights(with_gan, tmp_path):
    for name, changes in {"without": {"gan": "none"}, "zero": {"gan_ratio": 0.0}}.items():
        main.main(flags(with_gan(run=str(tmp_path / name), epochs=2, **changes)))
    without, zero = weights_of(tmp_path / "without" / "best"), weights_of(tmp_path / "zero" / "best")
    assert all(torch.equal(without[name], zero[name]) for name in without)


def test_chain_trains_clip_gan_and_clip_and_does_nothing_twice(tiny_config, tmp_path, capsys):
    config = tiny_config(gan="pairs", gan_start=0.0, gan_end=1.0, gan_gate=100, **TINY)
    main.main(flags(config))
    run = tmp_path / "run"
    printed = capsys.readouterr().out
    assert "3 of 3" in printed
    assert "GAN, epoch 2/2: real above generated" in printed
    results = [read_json(folder / "results.json")["rsum"] for folder in (run / "first", run)]
    assert re.search(rf"rsum +{results[0]:.1f} +{results[1]:.1f}\n", printed)
    line = (run / "metrics.jsonl").read_text(encoding="utf-8")
    assert '"generated": 30,' in line  # a quarter of the 24 images in 5 rounds
    assert '"dropped_by_gate": 0' in line
    assert read_json(run / "first" / "config.json")["gan"] == "none"
    done = [run / "first" / "best" / "model.safetensors", run / "first" / "gan" / "last.pt"]
    before = [path.stat().st_mtime_ns for path in done]
    main.main(["--resume", "--run", "run", "--epochs", "2"])
    assert [path.stat().st_mtime_ns for path in done] == before
    assert "real pictures only" not in capsys.readouterr().out  # the two have not been trained alike
    assert len((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_several_processes_do_not_train_one_gan(tiny_config, monkeypatch, refused):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "a GAN learns in one" in refused(main.main, flags(tiny_config(gan="pairs", **TINY)))


def test_a_captions_file_is_no_list_of_captions(tmp_path):
    (tmp_path / "list.txt").write_text("image,caption\na.jpg,A dog\nb.jpg,A cat\n")
    with pytest.raises(InputError, match="names images, too"):
        read_caption_list(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("my a.jpg#0\tA dog\na.jpg#1\tA cat\n")
    with pytest.raises(InputError, match="names images, too"):
        read_caption_list(tmp_path / "list.txt")


def test_a_ratio_too_small_for_the_batch_is_refused(with_gan, monkeypatch):
    with pytest.raises(InputError, match="gan_ratio is 0.2"):
        Trainer(with_gan(gan_ratio=0.2, batch_size=4))
    pairs = Trainer(with_gan(gan_ratio=0.25, batch_size=8)).generated
    monkeypatch.setattr("generated.world", lambda: True)
    monkeypatch.setattr("generated.dist.get_world_size", lambda: 2)  # four real pictures for each
    with pytest.raises(InputError, match="a process's batch of 4 is fewer than two"):
        type(pairs)(pairs.config, load_splits(pairs.config)["train"], None, None, None)


def test_more_pictures_than_memory_are_refused(tiny_config, trained_run, refused, monkeypatch):
    monkeypatch.setattr(gan, "MOST_BYTES", 24 * 32 * 32 * 3 - 1)
    assert "the GAN keeps all pictures in memory, of 24 at 32 pixels" in refused(
        gan.main, ["--run", trained_run, *words(TINY)]
    )


def test_a_group_with_a_caption_of_a_photograph_belongs_to_it(tiny_config):
    pairs = load_splits(tiny_config())["train"]
    own = pairs.captions[pairs.first[3]]
    captions, groups = ["Something new", own, "The same in other words", "Else"], ["b", "a", "a", "b"]
    found = group_captions(captions, groups, pairs)
    assert found[1] == found[2] and own in pairs.captions[pairs.first[found[1]] : pairs.first[found[1] + 1]]
    assert found[0] == found[3] < 0


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
def test_what_is_wrong_with_the_gan_is_said_before_anything_is_written(tiny_config, tmp_path, refused, change):
    config = tiny_config(**{"gan": "pairs", "run": "run", **TINY, **change})
    value = list(change)[-1]
    assert str(value) in refused(main.main, flags(config))
    assert not (tmp_path / "run").exists()


def test_a_list_without_the_subsets_words_is_refused_before_anything_is_trained(tiny_config, tmp_path, refused):
    (tmp_path / "list.txt").write_text("A dog .\nA cat .\nA ring .\n")
    config = tiny_config(gan="pairs", gan_captions="list.txt", gan_subset="ring", **TINY)
    assert "1 captions name what the GAN knows (ring)" in refused(main.main, flags(config))
    assert not (tmp_path / "run").exists()


def test_a_part_of_the_training_without_a_step_is_refused(with_gan):
    with pytest.raises(InputError, match="none of the 15 steps lies there"):
        Trainer(with_gan(epochs=1, gan_start=0.41, gan_end=0.45))


def test_a_chains_gan_is_found_in_its_run(with_gan, gan_run, tmp_path):
    shutil.copytree(gan_run, tmp_path / "chain" / "first")
    assert Trainer(with_gan(gan_run="chain")).generated.told_by == Path("chain/first")


def test_a_list_of_captions_may_be_moved_but_not_changed(with_gan, tmp_path, refused):
    lines = [f"A {colour} {shape} on snow ." for colour in ("red", "blue") for shape in ("ring", "box", "plus")]
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n")
    main.main(flags(with_gan(gan_captions="a.txt", gan_gate=100, epochs=1)))
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    main.main(["--resume", "--run", "run", "--epochs", "2", "--gan_captions", "b.txt"])
    (tmp_path / "b.txt").write_text("\n".join(lines[:-1] + ["A cat ."]) + "\n")
    line = refused(main.main, ["--resume", "--run", "run", "--epochs", "3", "--gan_captions", "b.txt"])
    assert "gan_captions holds other captions" in line


def test_a_missing_list_of_captions_is_refused_before_anything_is_trained(tiny_config, tmp_path, refused):
    config = tiny_config(gan="pairs", gan_captions="nowhere.txt", **TINY)
    assert "gan_captions is nowhere.txt" in refused(main.main, flags(config))
    assert not (tmp_path / "run").exists()


def test_settings_of_a_finished_gan_are_its_own(with_gan, tmp_path, refused, gan_run):
    asked = flags(dataclasses.replace(with_gan(), gan_width=64, gan_epochs=300))  # the file's own values: no flags
    config = main.resolve_config(asked)
    assert (config.gan_width, config.gan_epochs) == (4, 2)
    assert "gan_size is 64, but the GAN of" in refused(main.main, [*asked, "--gan_size", "64"])
    assert main.resolve_config([*asked, "--gan_size=32"]).gan_size == 32
    assert not (tmp_path / "run").exists()


def test_a_gan_of_other_pictures_is_refused(with_gan, data_set):
    names = [f"{n}.jpg" for n in range(12)]
    other = data_set({name: ["A dog .", "A cat ."] for name in names}, train=names[:8], dev=names[8:])
    with pytest.raises(InputError, match="learned from other pictures"):
        Trainer(with_gan(**other))


def test_a_run_without_a_gan_is_refused(tiny_config, trained_run, tmp_path, refused):
    config = tiny_config(gan="pairs", gan_run=str(trained_run), **TINY)
    assert "python gan.py --run" in refused(main.main, flags(config))
    assert not (tmp_path / "run" / "config.json").exists()


# ---- joint ------------------------------------------------------------------------------------------------------


def test_a_batch_is_told_the_same_blend_of_captions_by_every_encoder(with_gan):
    joint = Trainer(with_gan(gan="joint")).generated
    batch = joint.store.batch(torch.arange(12))
    for encode in (joint.store.embed, joint.encode):
        for i, vector in enumerate(batch.blend(encode)):
            a, b = encode(batch.captions[i : i + 1])[0], encode(batch.others[i : i + 1])[0]
            between = a + batch.share[i] * (b - a)
            torch.testing.assert_close(vector, between / between.norm())
    assert 0 < (batch.share == 0).sum() < 12  # half of them are no blends
    owner = joint.store.image_index
    assert owner[batch.captions].tolist() == owner[batch.others].tolist() == list(range(12))
    assert (owner[batch.wrong] != torch.arange(12)[:, None]).all()


def test_joint_terms_reach_the_parameters_they_are_meant_for(with_gan):
    trainer = Trainer(with_gan(gan="joint", gan_ratio=1.0, gan_gate=100))
    model, joint = trainer.model.train(), trainer.generated
    player, batch = joint.gan, first_batch(trainer)
    networks = {
        "clip": model,
        "copy": joint.copy,
        "judge": joint.judge,
        "generator": player.generator,
        "average": player.average,
        "discriminator": player.discriminator,
    }

    def reached():
        """The networks with a gradient other than zero; forgets it."""
        found = set()
        for name, network in networks.items():
            if any(p.grad is not None and p.grad.any() for p in network.parameters()):
                found.add(name)
            network.zero_grad(set_to_none=True)
        return found

    def temperature_reached():
        return model.logit_scale.grad is not None and bool(model.logit_scale.grad)

    # CE of real pairs; CE of real and generated pairs
    contrastive_backward(model, [batch], torch.device("cpu"))
    assert temperature_reached()
    assert reached() == {"clip"}
    contrastive_backward(model, [batch], torch.device("cpu"), generated=joint.micro_batches(8, 0, 0.5))
    assert temperature_reached()
    assert reached() == {"clip"}

    learned = joint.store.batch(batch["image_ids"])
    real, embeddings, wrong = learned.real, learned.blend(joint.store.embed), joint.store.embed(learned.wrong)
    fake = player.generator(torch.randn(8, NOISE), embeddings)
    # BCE and R1 of the discriminator
    player.step = 0
    player.discriminator_step(real, embeddings, wrong, fake.detach())
    assert reached() == {"discriminator"}
    # BCE of the generator, alone
    player.generator_step(fake, embeddings)
    assert reached() == {"generator"}
    # CLIP's match, alone: a gradient at the pictures, mu times as long as the discriminator's
    fake = player.generator(torch.randn(8, NOISE), embeddings)
    gradient = torch.randn_like(fake)
    pull = gan.match_gradient(joint.copy, learned.blend(joint.encode), 0.3, None, fake, gradient)
    assert reached() == set()
    assert pull.norm().item() == pytest.approx(0.3 * gradient.norm().item(), rel=1e-4)
    fake.backward(pull)
    assert reached() == {"generator"}


def test_a_joint_step_changes_the_players_alone_and_asks_the_slow_copy(with_gan, monkeypatch):
    trainer = Trainer(with_gan(gan="joint", gan_ratio=1.0, gan_gate=100))
    model, joint = trainer.model, trainer.generated
    player, step = joint.gan, joint.gan.discriminator_step
    networks = {
        "clip": model,
        "judge": joint.judge,
        "generator": player.generator,
        "discriminator": player.discriminator,
    }
    before = {name: copy.deepcopy(network.state_dict()) for name, network in networks.items()}

    def detached(real, embeddings, wrong, fake):
        assert not fake.requires_grad
        return step(real, embeddings, wrong, fake)

    def asked(*_):
        raise AssertionError("the learning CLIP was asked what matches")

    monkeypatch.setattr(player, "discriminator_step", detached)
    for name in ("encode_image", "encode_text", "image_features"):
        monkeypatch.setattr(model, name, asked)
    joint.learn(model, first_batch(trainer)["image_ids"], 3, 0.5)
    changed = {
        name
        for name, network in networks.items()
        if any(not torch.equal(tensor, before[name][key]) for key, tensor in network.state_dict().items())
    }
    assert changed == {"generator", "discriminator"}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_match_gradient_leads_to_pictures_that_match_better(with_gan):
    joint = Trainer(with_gan(gan="joint")).generated
    texts = joint.encode(torch.arange(0, 8))
    fake, gradient = torch.randn(8, 3, 32, 32).clamp(-1, 1), torch.ones(8, 3, 32, 32)

    def distance(pictures):
        torch.manual_seed(3)  # the same shifts and cuts
        with torch.no_grad():
            images = joint.copy.encode_image((gan.augment(pictures) + 1) / 2)
        return (1 - (images * texts).sum(1)).mean().item()

    torch.manual_seed(3)
    pull = gan.match_gradient(joint.copy, texts, 1.0, None, fake, gradient)
    assert distance(fake - 0.1 * pull) < distance(fake)


def test_joint_run_learns_all_three_and_resumes_exactly(with_gan, tmp_path, gan_run):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    for run, epochs in ((whole, 2), (parts, 1)):
        main.main(flags(with_gan(gan="joint", run=run, epochs=epochs, gan_gate=100)))
    main.main(["--resume", "--run", parts, "--epochs", "2"])
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts"))
    started = torch.load(gan_run / "gan" / "last.pt", weights_only=True)["gan"]
    for part in ("generator", "discriminator", "average"):
        for name, value in a["generated"]["gan"][part].items():
            assert torch.equal(value, b["generated"]["gan"][part][name]), (part, name)
        changed = [name for name, value in started[part].items() if not value.equal(a["generated"]["gan"][part][name])]
        assert len(changed) > len(started[part]) / 2
    assert all(torch.equal(value, b["model"][name]) for name, value in a["model"].items())
    # The two runs moved together know each other still; without the other, it is missed.
    shutil.copytree(gan_run, tmp_path / "moved" / "first")
    shutil.copytree(tmp_path / "whole", tmp_path / "moved" / "joint")
    told_by = read_json(tmp_path / "whole/gan/config.json")["told_by"]
    assert (tmp_path / "whole" / told_by).resolve() == gan_run.resolve()
    path = tmp_path / "moved/joint/gan/config.json"
    path.write_text(path.read_text(encoding="utf-8").replace(told_by, "../first"), encoding="utf-8")
    assert gan.conditioning_run("moved/joint") == Path("moved/first")
    shutil.rmtree(tmp_path / "moved" / "first")
    with pytest.raises(InputError, match=r"told its captions by the run moved.first, which is gone"):
        gan.conditioning_run("moved/joint")
    saved = load_file(tmp_path / "whole" / "gan" / "generator.safetensors")
    assert all(torch.equal(value, a["generated"]["gan"]["average"][name]) for name, value in saved.items())

"""Joint training of CLIP and the GAN: which term reaches which parameters, and exact resumption."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from conftest import flags
from gan_fixtures import CPU, build, gan_run_fixture, with_gan_fixture  # noqa: F401
from safetensors.torch import load_file

import gan
import main
from clip import contrastive_loss
from config import InputError
from dataset import pair_targets
from utils.files import read_json
from utils.gan_data import augment
from utils.gan_layers import NOISE_DIM
from utils.gan_settings import conditioning_run


def test_every_encoder_mixes_the_same_captions(with_gan):
    _, joint, _ = build(with_gan(gan="joint"))
    batch = joint.data.batch(torch.arange(12))
    for encode in (joint.data.embed, joint.encode):
        for i, vector in enumerate(batch.mix(encode)):
            a, b = encode(batch.captions[i : i + 1])[0], encode(batch.other_captions[i : i + 1])[0]
            between = a + batch.lam[i] * (b - a)
            torch.testing.assert_close(vector, between / between.norm())
    assert 0 < (batch.lam == 0).sum() < 12  # half of them are not mixed
    image_index = joint.data.image_index
    assert image_index[batch.captions].tolist() == image_index[batch.other_captions].tolist() == list(range(12))
    assert (image_index[batch.hard_negatives] != torch.arange(12)[:, None]).all()


def test_terms_reach_the_parameters_of_the_table(with_gan):
    model, joint, batch = build(with_gan(gan="joint", gan_ratio=1.0, gan_filter_top_k=100))
    model.train()
    trainer = joint.gan
    networks = {
        "clip": model,
        "clip_ema": joint.clip_ema,
        "filter": joint.clip,
        "generator": trainer.generator,
        "generator_ema": trainer.ema,
        "discriminator": trainer.discriminator,
    }

    def reached():
        """The names of the networks with a nonzero gradient; clears all gradients."""
        found = set()
        for name, network in networks.items():
            if any(p.grad is not None and p.grad.any() for p in network.parameters()):
                found.add(name)
            network.zero_grad(set_to_none=True)
        return found

    def temperature_reached():
        return model.logit_scale.grad is not None and bool(model.logit_scale.grad)

    # CE of real pairs; CE of real and generated pairs
    for generated in ([], joint.sample(8, 0, 0.5)):
        embeddings = main.encode(model, batch, generated, None)
        contrastive_loss(*embeddings, model.logit_scale, **pair_targets([batch, *generated])).backward()
        assert temperature_reached()
        assert reached() == {"clip"}

    gan_batch = joint.data.batch(batch.image_ids)
    real, embeddings = gan_batch.real, gan_batch.mix(joint.data.embed)
    mismatched = joint.data.embed(gan_batch.hard_negatives)
    fake = trainer.generator(torch.randn(8, NOISE_DIM), embeddings)
    # BCE and R1 of the discriminator
    trainer.step = 0
    trainer.discriminator_step(real, embeddings, mismatched, fake.detach())
    assert reached() == {"discriminator"}
    # BCE of the generator alone
    trainer.generator_step(fake, embeddings)
    assert reached() == {"generator"}
    # CLIP guidance alone: a gradient with respect to the images, with `weight` times the norm of the discriminator's
    fake = trainer.generator(torch.randn(8, NOISE_DIM), embeddings)
    gradient = torch.randn_like(fake)
    guidance = gan.clip_guidance(joint.clip_ema, gan_batch.mix(joint.encode), 0.3, None, fake, gradient)
    assert reached() == set()
    assert guidance.norm().item() == pytest.approx(0.3 * gradient.norm().item(), rel=1e-4)
    fake.backward(guidance)
    assert reached() == {"generator"}


def test_train_step_changes_the_gan_alone_and_uses_the_ema_of_clip(with_gan, monkeypatch):
    model, joint, batch = build(with_gan(gan="joint", gan_ratio=1.0, gan_filter_top_k=100))
    trainer, step = joint.gan, joint.gan.discriminator_step
    networks = {
        "clip": model,
        "filter": joint.clip,
        "generator": trainer.generator,
        "discriminator": trainer.discriminator,
    }
    before = {name: copy.deepcopy(network.state_dict()) for name, network in networks.items()}

    def detached(real, embeddings, mismatched, fake):
        assert not fake.requires_grad
        return step(real, embeddings, mismatched, fake)

    def called(*_):
        raise AssertionError("the CLIP in training was used for guidance")

    monkeypatch.setattr(trainer, "discriminator_step", detached)
    for name in ("encode_image", "encode_text", "forward"):
        monkeypatch.setattr(model, name, called)
    joint.train_step(model, batch.image_ids, 3, 0.5)
    changed = {
        name
        for name, network in networks.items()
        if any(not torch.equal(tensor, before[name][key]) for key, tensor in network.state_dict().items())
    }
    assert changed == {"generator", "discriminator"}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_clip_guidance_leads_to_images_that_match_better(with_gan):
    _, joint, _ = build(with_gan(gan="joint"))
    texts = joint.encode(torch.arange(0, 8))
    fake, gradient = torch.randn(8, 3, 32, 32).clamp(-1, 1), torch.ones(8, 3, 32, 32)

    def distance(images):
        torch.manual_seed(3)  # the same augmentation
        with torch.no_grad():
            image_embeddings = joint.clip_ema.encode_image((augment(images) + 1) / 2)
        return (1 - (image_embeddings * texts).sum(1)).mean().item()

    torch.manual_seed(3)
    guidance = gan.clip_guidance(joint.clip_ema, texts, 1.0, None, fake, gradient)
    assert distance(fake - 0.1 * guidance) < distance(fake)


def test_joint_run_trains_all_networks_and_resumes_exactly(with_gan, tmp_path, gan_run):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    for run, epochs in ((whole, 2), (parts, 1)):
        main.main(flags(with_gan(gan="joint", run=run, epochs=epochs, gan_filter_top_k=100)))
    main.main(["--resume", "--run", parts, "--epochs", "2"])
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts"))
    started = torch.load(gan_run / "gan" / "last.pt", weights_only=True)["gan"]
    for part in ("generator", "discriminator", "ema"):
        found = a["augmentation"]["gan"][part]
        for name, value in found.items():
            assert torch.equal(value, b["augmentation"]["gan"][part][name]), (part, name)
        changed = [name for name, value in started[part].items() if not value.equal(found[name])]
        assert len(changed) > len(started[part]) / 2
    assert all(torch.equal(value, b["model"][name]) for name, value in a["model"].items())
    saved = load_file(tmp_path / "whole" / "gan" / "generator.safetensors")
    assert all(torch.equal(value, a["augmentation"]["gan"]["ema"][name]) for name, value in saved.items())


@pytest.mark.parametrize("key", ["conditioning_run", "told_by"])  # told_by: an earlier version
def test_conditioning_run_is_found_relative_to_the_run(with_gan, tmp_path, gan_run, key):
    joint_run = tmp_path / "joint"
    _, joint, _ = build(with_gan(gan="joint", run=str(joint_run)))
    joint.end_epoch(joint_run)
    content = (joint_run / "gan/config.json").read_text(encoding="utf-8")
    relative = read_json(joint_run / "gan/config.json")["conditioning_run"]
    assert (joint_run / relative).resolve() == gan_run.resolve()
    # Both runs are moved together.
    shutil.copytree(gan_run, tmp_path / "moved" / "stage1")
    shutil.copytree(joint_run, tmp_path / "moved" / "joint")
    content = content.replace(relative, "../stage1").replace("conditioning_run", key)
    (tmp_path / "moved/joint/gan/config.json").write_text(content, encoding="utf-8")
    assert conditioning_run("moved/joint") == Path("moved/stage1")
    shutil.rmtree(tmp_path / "moved" / "stage1")
    with pytest.raises(InputError, match=r"conditioned on the CLIP of the run moved.stage1, which is missing"):
        conditioning_run("moved/joint")


def test_joint_training_requires_the_checkpoint_of_the_gan(with_gan, tmp_path, gan_run):
    shutil.copytree(gan_run, tmp_path / "moved")
    (tmp_path / "moved/gan/last.pt").unlink()
    with pytest.raises(InputError, match="contains no last.pt"):
        build(with_gan(gan="joint", gan_run="moved"))


def test_learning_rates_are_those_of_the_run(with_gan):
    _, joint, _ = build(with_gan(gan="joint", gan_lr=3e-4))
    rates = [optimizer.param_groups[0]["lr"] for optimizer in (joint.gan.generator_optimizer,)]
    rates += [joint.gan.discriminator_optimizer.param_groups[0]["lr"]]
    assert rates == [3e-4, 6e-4]
    assert joint.device == CPU

"""The discriminator on the features of a frozen image encoder."""

import shutil
from functools import partial

import numpy as np
import pytest
import torch
from conftest import flags
from gan_fixtures import CPU, TINY, as_flags, unit
from safetensors.torch import load_file
from torch import nn

import gan
import main
from config import InputError
from extras.projected_gan import NUM_HEADS, ProjectedDiscriminator
from modules import ImageEncoder
from utils.files import read_json

PROJECTED = {**TINY, "gan_discriminator": "projected", "gan_clip_weight": 0}


def build(name="test_resnet", size=32):
    encoder = ImageEncoder(name, 96 if name.startswith("test_resnet") else 160).eval().requires_grad_(False)
    return encoder, ProjectedDiscriminator(encoder, size, 16, 160)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_maxvit"])
def test_one_logit_per_head_and_gradients_only_where_trained(name):
    torch.manual_seed(0)
    encoder, discriminator = build(name)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    images = torch.rand(3, 3, 32, 32, requires_grad=True)
    features, embeddings = discriminator.features(images), unit(3, 16)
    logits = discriminator.score(features, embeddings)
    assert logits.shape == (3, NUM_HEADS)
    mismatched = torch.stack([embeddings, embeddings.roll(1, 0)], 1)  # the matching caption first
    found = discriminator.score(features[:, None], mismatched)
    assert found.shape == (3, 2, NUM_HEADS)
    torch.testing.assert_close(found[:, 0], logits)
    logits.sum().backward()
    assert images.grad.abs().sum() > 0
    random = {id(layer.weight) for layer in (*discriminator.mix_channels, *discriminator.mix_scales)}
    for key, parameter in discriminator.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in random), key
    assert not any(key.startswith("encoder") for key in discriminator.state_dict())
    assert all(value.equal(before[key]) for key, value in encoder.state_dict().items())


def test_heads_see_the_images_as_the_encoder_does():
    encoder, discriminator = build("test_vit")  # fixed resolution: 160
    images = torch.rand(2, 3, 160, 160)
    *_, last = discriminator.encode(2 * images - 1)
    expected = encoder.backbone.get_intermediate_layers((images - encoder.mean) / encoder.std, n=1, reshape=True)[0]
    torch.testing.assert_close(last, expected)


def test_it_learns_to_detect_mismatched_captions():
    colours = torch.eye(3)[[0, 1, 2, 2]]
    colours[3, 0] = 1
    embeddings, real = torch.eye(16)[:4], (2 * colours - 1)[:, :, None, None].expand(-1, -1, 32, 32)
    architecture, untrained = {"generator": "affine", "size": 32, "width": 4, "dim": 16}, []
    for seed in range(5):
        torch.manual_seed(seed)
        trainer = gan.GAN(architecture, build()[1], embeddings, 1e-3, CPU, None)
        step = partial(trainer.train_step, real, embeddings, embeddings.roll(1, 0)[:, None])
        untrained.append(step()["real_above_mismatched"].item())
    accuracies = [step()["real_above_mismatched"].item() for _ in range(60)]
    assert np.mean(accuracies[-10:]) > 0.9 > np.mean(untrained)


def test_training_resumes_exactly_alone_and_along_with_clip(tiny_config, trained_run, tmp_path):
    for run in ("whole", "parts"):
        shutil.copytree(trained_run, tmp_path / run)
    gan.main(["--run", "whole", *as_flags(PROJECTED)])
    gan.main(["--run", "parts", *as_flags({**PROJECTED, "gan_epochs": 1})])
    gan.main(["--run", "parts", "--resume", "--gan_epochs", "2"])
    whole, parts = (load_file(tmp_path / run / "gan/generator.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert read_json(tmp_path / "whole/gan/config.json")["settings"]["gan_discriminator"] == "projected"
    config = tiny_config(gan="joint", gan_run="whole", run="joint", gan_start=0.0, gan_end=1.0, gan_size=32)
    main.main(flags(config))
    state = torch.load(tmp_path / "joint/last.pt", weights_only=True)["augmentation"]["gan"]["discriminator"]
    started = torch.load(tmp_path / "whole/gan/last.pt", weights_only=True)["gan"]["discriminator"]
    assert state.keys() == started.keys() and not state["realness.weight"].equal(started["realness.weight"])


def test_encoder_without_feature_maps_is_refused():
    encoder, _ = build()
    encoder.backbone = nn.Identity()
    with pytest.raises(InputError, match="Identity, yields no feature maps .*: pass --gan_discriminator convolutional"):
        ProjectedDiscriminator(encoder, 32, 16, 160)

"""Fixtures of the tests that need a trained GAN."""

import shutil

import pytest
import torch

import gan
import main

TINY = {"gan_size": 32, "gan_width": 4, "gan_epochs": 2, "gan_batch_size": 8, "gan_lr": 1e-3}
CPU = torch.device("cpu")


def as_flags(settings):
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def unit(*shape):
    """Random unit vectors."""
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


@pytest.fixture(name="gan_run", scope="session")
def gan_run_fixture(tmp_path_factory, trained_run):
    """A trained run with a GAN trained for two epochs; read-only."""
    folder = tmp_path_factory.mktemp("gan") / "run"
    shutil.copytree(trained_run, folder)
    gan.main(["--run", str(folder), *as_flags(TINY)])
    return folder


@pytest.fixture(name="with_gan")
def with_gan_fixture(tiny_config, gan_run):
    """`with_gan(gan_ratio=1.0)`: a `Config` that adds pairs from the GAN of `gan_run` throughout training."""

    def make(**changes):
        return tiny_config(
            **{"gan": "pairs", "gan_run": str(gan_run), "gan_start": 0.0, "gan_end": 1.0, **TINY, **changes}
        )

    return make


def build(config):
    """(model, augmentation, the first real batch of a run), built as `main.train` does."""
    splits = main.load_data(config)
    model = main.build_model(config, splits["train"].captions, CPU)
    main.open_images(splits, config)
    sampler, loader = main.build_loader(model, splits["train"], config)
    steps = config.epochs * sampler.num_batches
    augmentation = main.build_gan_augmentation(model, splits["train"], None, config, steps)
    return model, augmentation, next(iter(loader))

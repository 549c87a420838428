"""What several test files share: drawn data sets, tiny settings, a tiny trained run. Nothing here needs a network."""

import csv
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported: a test that would fetch fails instead

import numpy as np
import pytest
import torch
from PIL import Image

from clip import CLIP
from config import Config
from dataset import load_splits, train_tokenizer
from shapes import draw_sample

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)  # the models are tiny: several threads would only wait for each other


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Each test starts in an empty folder, with the same random state: what it leaves behind is not in the tree."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """A drawn data set with split files, 24 training, 8 validation and 10 test images; only for reading."""
    folder = tmp_path_factory.mktemp("shapes")
    paths = {"image_path": str(folder / "Images"), "captions_path": str(folder / "captions.txt")}
    draw_sample(**paths, train_images=24, validation_images=8, test_images=10)
    return paths


def tiny_settings(folder, **changes):
    """Settings with which an epoch takes a second, everything they write in `folder`."""
    settings = {
        "cache_path": str(folder / "cache"),
        "run": str(folder / "run"),
        "model_name": "test_resnet",
        "text_tokenizer": "captions",
        "text_layers": 1,
        "text_width": 64,
        "pretrained": False,
        "size": 32,
        "max_length": 32,
        "projection_dim": 32,
        "batch_size": 8,
        "num_workers": 0,
        "image_encoder_lr": 1e-3,
        "text_encoder_lr": 1e-3,
        "device": "cpu",
        "precision": "float32",
    }
    return {**settings, **changes}


@pytest.fixture
def tiny_config(tmp_path, sample):
    """`tiny_config(epochs=2)`: a `Config` of a tiny model on the drawn data set, changed as asked."""
    return lambda **changes: Config(**tiny_settings(tmp_path, **{**sample, **changes}))


@pytest.fixture
def tiny_model(tiny_config):
    """`tiny_model(dropout=0.0)`: an untrained CLIP of `tiny_config`, in evaluation mode."""

    def make(**changes):
        config = tiny_config(**changes)
        return CLIP(config, train_tokenizer(load_splits(config)["train"].captions)).eval()

    return make


def flags(config):
    """The command line that gives a `Config`, a list of words."""
    words = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            words += [f"--{field.name}", str(value)]
    return words


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory, sample):
    """The folder of a run of two epochs on the drawn data set; only for reading."""
    import main

    folder = tmp_path_factory.mktemp("trained")
    config = Config(**tiny_settings(folder, **sample, epochs=2))
    main.main(flags(config))
    return Path(config.run)


def draw_picture(path, size=(60, 40), seed=0):
    """Save a picture of four plain quarters in random colours, (width, height) pixels."""
    colours = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(colours).resize(size, Image.Resampling.NEAREST).save(path)


def quarters(side, dtype=np.uint8):
    """A picture of four plain quarters, (side, side, 3)."""
    small = np.array([[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [250, 250, 0]]], dtype=dtype)
    return small.repeat(side // 2, 0).repeat(side // 2, 1)


@pytest.fixture
def data_set(tmp_path):
    """`data_set({"a.jpg": ["A dog .", ...], ...}, train=["a.jpg"])`: a data set in Kaggle's layout.

    Keyword arguments are the names in the official split files `train`, `dev` and `test`; one not given has no file.
    Returns {"image_path": ..., "captions_path": ...} for `tiny_config`.
    """

    def make(captions, **splits):
        for seed, name in enumerate(captions):
            draw_picture(tmp_path / "data" / "Images" / name, seed=seed)
        with open(tmp_path / "data" / "captions.txt", "w", newline="", encoding="utf-8") as file:
            rows = [(name, caption) for name, texts in captions.items() for caption in texts]
            csv.writer(file).writerows([("image", "caption"), *rows])
        for split, names in splits.items():
            listing = "".join(f"{name}\n" for name in names)
            (tmp_path / "data" / f"Flickr_8k.{split}Images.txt").write_text(listing, encoding="utf-8")
        data = tmp_path / "data"
        return {"image_path": str(data / "Images"), "captions_path": str(data / "captions.txt")}

    return make


@pytest.fixture
def refused(capsys):
    """`line = refused(main.main, argv)`: the command must end with exit status 2 and this one line on stderr."""

    def call(command, argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            command([str(word) for word in argv])
        printed = capsys.readouterr().err
        errors = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert exit.value.code == 2, printed
        assert len(errors) == 1, printed
        assert printed.endswith(errors[0] + "\n"), printed  # a progress bar may stand before it, nothing after it
        assert "Traceback" not in printed
        return errors[0].removeprefix("error: ")

    return call


@pytest.fixture
def flickr8k():
    """The folder of the real photographs, named by the environment variable FLICKR8K; without it, a test is skipped."""
    if not os.environ.get("FLICKR8K"):
        pytest.skip("FLICKR8K names no folder with Images/ and captions.txt")
    return Path(os.environ["FLICKR8K"])


def run_python(*words, timeout=120):
    """A Python process in the current folder that finds the modules; its `subprocess.CompletedProcess`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
        env=environment,
        check=False,
    )

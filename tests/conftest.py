"""Shared fixtures: a synthetic data set, tiny settings, a tiny trained run. Nothing here needs a network."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: a test that would download fails instead

import numpy as np
import pytest
import torch
from PIL import Image

from clip import CLIP
from config import Config
from dataset import load_splits, train_tokenizer
from utils.synthetic import generate_dataset

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)  # the models are tiny: more threads only add overhead


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Each test runs in an empty folder with the same random state."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """A synthetic data set with split files: 24 training, 8 validation and 10 test images; read-only."""
    folder = tmp_path_factory.mktemp("shapes")
    paths = {"image_path": str(folder / "Images"), "captions_path": str(folder / "captions.txt")}
    generate_dataset(**paths, train_images=24, validation_images=8, test_images=10)
    return paths


def tiny_settings(folder, **changes):
    """Settings for which an epoch takes about a second; all output goes to `folder`."""
    settings = {
        "cache_path": str(folder / "cache"),
        "run": str(folder / "run"),
        "model_name": "test_resnet",
        "text_tokenizer": "wordpiece",
        "text_layers": 1,
        "text_width": 64,
        "pretrained": False,
        "size": 32,
        "max_length": 32,
        "projection_dim": 32,
        "epochs": 1,
        "batch_size": 8,
        "scheduler": "plateau",
        "num_workers": 0,
        "image_encoder_lr": 1e-3,
        "text_encoder_lr": 1e-3,
        "device": "cpu",
        "precision": "float32",
    }
    return {**settings, **changes}


@pytest.fixture
def tiny_config(tmp_path, sample):
    """`tiny_config(epochs=2)`: a `Config` of a tiny model on the synthetic data set, with changes."""
    return lambda **changes: Config(**tiny_settings(tmp_path, **{**sample, **changes}))


@pytest.fixture
def tiny_model(tiny_config):
    """`tiny_model(dropout=0.0)`: an untrained CLIP of `tiny_config`, in evaluation mode."""

    def make(**changes):
        config = tiny_config(**changes)
        return CLIP(config, train_tokenizer(load_splits(config)["train"].captions)).eval()

    return make


def flags(config):
    """The command line of a `Config`, a list of words."""
    words = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            words += [f"--{field.name}", str(value)]
    return words


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory, sample):
    """The folder of a run of two epochs on the synthetic data set; read-only."""
    import main

    folder = tmp_path_factory.mktemp("trained")
    config = Config(**tiny_settings(folder, **sample, epochs=2))
    main.main(flags(config))
    return Path(config.run)


def draw_image(path, size=(60, 40), seed=0):
    """Save an image with four randomly coloured quadrants; `size` is (width, height) in pixels."""
    colors = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(colors).resize(size, Image.Resampling.NEAREST).save(path)


def quarters(size, dtype=np.uint8):
    """An image with four coloured quadrants, (size, size, 3)."""
    small = np.array([[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [250, 250, 0]]], dtype=dtype)
    return small.repeat(size // 2, 0).repeat(size // 2, 1)


@pytest.fixture
def data_set(tmp_path):
    """`data_set({"a.jpg": ["A dog .", ...], ...}, train=["a.jpg"])`: a data set in Kaggle's layout.

    Keyword arguments are the contents of the official split files `train`, `dev` and `test`.
    Returns {"image_path": ..., "captions_path": ...} for `tiny_config`.
    """

    def make(captions, **splits):
        for seed, name in enumerate(captions):
            draw_image(tmp_path / "data" / "Images" / name, seed=seed)
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
        assert printed.endswith(errors[0] + "\n"), printed  # only a progress bar may precede it
        assert "Traceback" not in printed
        return errors[0].removeprefix("error: ")

    return call


@pytest.fixture
def no_plots(monkeypatch):
    """Skip plotting, which takes longer than training a tiny model."""
    import main

    monkeypatch.setattr(main, "plot_curves", lambda *_: None)
    monkeypatch.setattr(main, "plot_matches", lambda *_: None)


@pytest.fixture
def fit(monkeypatch):
    """`state, splits = fit(config)`: train without the final report; the `main.TrainState` and the data."""
    import main

    def call(config):
        with monkeypatch.context() as patch:
            patch.setattr(main, "report", lambda state, splits, *_: (state, splits))
            return main.train(config)

    return call


@pytest.fixture
def pretrained():
    """The folder of pretrained encoders in the environment variable PRETRAINED; the test is skipped without it."""
    if not os.environ.get("PRETRAINED"):
        pytest.skip("PRETRAINED is not set to a folder with tf_efficientnet_lite0/ and all-MiniLM-L6-v2/")
    return Path(os.environ["PRETRAINED"])


@pytest.fixture
def flickr8k():
    """The Flickr8k folder in the environment variable FLICKR8K; the test is skipped without it."""
    if not os.environ.get("FLICKR8K"):
        pytest.skip("FLICKR8K is not set to a folder with Images/ and captions.txt")
    return Path(os.environ["FLICKR8K"])


def read_json_lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}


def run_python(*words, timeout=120):
    """Run Python in the current folder with the project on its path; returns the `subprocess.CompletedProcess`."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
        env={**os.environ, **ENVIRONMENT},
        check=False,
    )


def start_python(*words, output, **options):
    """Start Python in the same way, its output appended to a file; returns the `subprocess.Popen`."""
    with open(output, "a", encoding="utf-8") as file:
        return subprocess.Popen(
            [sys.executable, *map(str, words)], stdout=file, stderr=file, env={**os.environ, **ENVIRONMENT}, **options
        )


def save_text_folder(folder, captions=None, **changes):
    """Save a small random BERT, and a tokenizer if captions are given; returns the folder."""
    from transformers import BertConfig, BertModel

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    tokenizer = train_tokenizer(captions) if captions else None
    vocab_size = len(tokenizer) if tokenizer else 100
    BertModel(BertConfig(vocab_size=vocab_size, max_position_embeddings=40, **size, **changes)).save_pretrained(folder)
    if tokenizer:
        tokenizer.save_pretrained(folder)
    return folder

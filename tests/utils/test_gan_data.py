"""Training data of the GAN: hard negatives, memory, samples, and lists of captions."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gan_fixtures import CPU, TINY, as_flags, gan_run_fixture  # noqa: F401

import gan
from clip import load_model
from config import InputError
from dataset import SIDED, load_splits
from utils import gan_data
from utils.captions import group_captions, read_caption_list
from utils.gan_data import GANData


@pytest.fixture
def data(tiny_config, trained_run):
    """`GANData` of the training split."""
    config = tiny_config(gan_size=32)
    return GANData(load_model(trained_run), load_splits(config)["train"], config, SIDED, CPU)


def test_hard_negatives_are_the_most_similar_captions_of_other_images(data):
    images, captions = torch.arange(24), data.caption_offsets[:-1]
    negatives, similarity = data.hard_negatives(images, captions), data.embeddings @ data.embeddings.T
    assert negatives.shape == (24, gan_data.NUM_HARD_NEGATIVES)
    for image, numbers in zip(images.tolist(), negatives, strict=True):
        assert image not in data.image_index[numbers]
        others = similarity[captions[image]][data.image_index != image]
        least_similar = similarity[captions[image], numbers].min()
        assert (others > least_similar + 1e-6).sum() <= 0.25 * len(others)  # 256 draws from 120 captions


def test_equal_captions_of_other_images_are_no_hard_negatives(tiny_config, tiny_model, data_set, monkeypatch):
    monkeypatch.setattr(gan_data, "NUM_HARD_NEGATIVES", 100)
    captions = {f"{n}.jpg": [f"A dog {n} .", "Two dogs !" if n % 2 else f"cat {n}"] for n in range(24)}
    config = tiny_config(**data_set(captions, dev=["0.jpg"]), gan_size=32)
    train = load_splits(config)["train"]
    data = GANData(tiny_model(), train, config, SIDED, CPU)
    texts = np.array(train.captions)
    for captions in (data.caption_offsets[:-1], data.caption_offsets[1:] - 1):
        negatives = data.hard_negatives(torch.arange(23), captions)
        for image, numbers in enumerate(negatives):
            own = set(texts[train.captions_of(image)])
            assert own.isdisjoint(texts[numbers])
    assert not data.sided.any()
    assert GANData(tiny_model(), train, config.__class__(**{**vars(config), "flip": False}), SIDED, CPU).sided.all()


def test_images_are_flipped_unless_a_caption_says_left_or_right(data):
    originals = data.images.float() / 127.5 - 1
    torch.manual_seed(1)
    flipped = 0
    for _ in range(10):
        batch = data.batch(torch.arange(24))
        sided = data.sided[batch.captions] | (data.sided[batch.other_captions] & (batch.lam[:, 0] > 0))
        same = (batch.real == originals).flatten(1).all(1)
        assert same[sided].all()
        assert (batch.real == originals.flip(3)).flatten(1).all(1)[~same].all()
        flipped += int((~same).sum())
    assert flipped > 0


def test_images_that_exceed_the_memory_are_refused(trained_run, refused, monkeypatch):
    monkeypatch.setattr(gan_data, "MAX_BYTES", 24 * 32 * 32 * 3 - 1)
    line = refused(gan.main, ["--run", trained_run, *as_flags(TINY)])
    assert "the GAN keeps all images in memory: 24 images at 32 pixels" in line


def test_recall_counts_captions_in_the_top_10():
    embeddings = torch.eye(30)

    class TwoThirdsCorrect:  # a CLIP that embeds each image as its caption, but every third one as another caption
        config = SimpleNamespace(size=32)

        def encode_image(self, images):
            return embeddings.roll(1, 0).where(torch.arange(30)[:, None] % 3 == 0, embeddings)

    class Blind:
        config = SimpleNamespace(size=32)

        def encode_image(self, images):
            return torch.zeros(3, 30)

    def recall(clip, validation, train):
        splits = [SimpleNamespace(sample_embeddings=lambda part=part: part) for part in (validation, train)]
        return gan_data.recall_at_10(clip, lambda *_, **__: None, *splits)

    # With the embedding of another caption, an image's own caption ties with 28 others.
    assert recall(TwoThirdsCorrect(), embeddings, embeddings[:0]) == pytest.approx(100 * 20 / 30)
    # Among 10 candidates any rank is in the top 10.
    assert recall(Blind(), embeddings[:3], embeddings[3:10]) == 100
    assert recall(Blind(), embeddings[:3], embeddings[3:11]) == 0


def test_samples_are_plotted_for_few_captions_and_for_dollar_signs(tiny_config, gan_run, tmp_path):
    clip, generator = load_model(gan_run), gan.load_generator(gan_run / "gan")
    config = tiny_config(gan_size=32)
    data = GANData(clip, load_splits(config)["validation"], config, SIDED, CPU)
    data.captions = [f"costs $5 and x__y$ {caption}" for caption in data.captions]

    def generate(embeddings, seed):
        return gan.generate(generator, embeddings, seed)

    gan_data.plot_samples(generate, data, tmp_path / "samples.png", num_captions=60)
    assert (tmp_path / "samples.png").stat().st_size > 10_000


def test_captions_file_with_images_is_not_a_caption_list(tmp_path):
    (tmp_path / "list.txt").write_text("image,caption\na.jpg,A dog\nb.jpg,A cat\n")
    with pytest.raises(InputError, match="a captions file with images"):
        read_caption_list(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("my a.jpg#0\tA dog\na.jpg#1\tA cat\n")
    with pytest.raises(InputError, match="a captions file with images"):
        read_caption_list(tmp_path / "list.txt")


def test_group_with_a_caption_of_an_image_belongs_to_the_image(tiny_config):
    pairs = load_splits(tiny_config())["train"]
    own = pairs.captions[pairs.caption_offsets[3]]
    captions, groups = ["Something new", own, "The same in other words", "Else"], ["b", "a", "a", "b"]
    found = group_captions(captions, groups, pairs)
    assert found[1] == found[2] and own in [pairs.captions[j] for j in pairs.captions_of(found[1])]
    assert found[0] == found[3] < 0

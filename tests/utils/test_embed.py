"""Running an encoder over many images or captions."""

import dataclasses

import pytest
import torch
from safetensors.torch import save

from dataset import load_splits, open_images
from utils import embed
from utils.embed import (
    CaptionDataset,
    embed_captions,
    embed_split,
    encode_dataset,
    features_hash,
    own_share,
    precompute_features,
)

CPU = torch.device("cpu")
FROZEN = {"trainable": False, "text_tokenizer": "distilbert-base-uncased"}


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_encode_dataset_concatenates_the_batches(batch_size):
    rows = torch.randn(10, 4)
    state = torch.get_rng_state()
    found = encode_dataset(lambda x: 2 * x, rows, CPU, batch_size=batch_size)
    assert torch.equal(found, 2 * rows)
    assert torch.equal(torch.get_rng_state(), state)


def test_encode_dataset_returns_float32_without_gradient():
    layer = torch.nn.Linear(4, 2)
    found = encode_dataset(layer, torch.randn(10, 4), CPU, torch.bfloat16)
    assert found.dtype == torch.float32 and not found.requires_grad


def test_encode_dataset_passes_a_tuple_as_arguments():
    pairs = torch.utils.data.TensorDataset(torch.arange(5.0), torch.arange(5.0) ** 2)
    found = encode_dataset(torch.add, pairs, CPU, batch_size=2, collate_fn=lambda items: tuple(
        torch.stack(column) for column in zip(*items, strict=True)
    ))  # fmt: skip
    assert torch.equal(found, torch.arange(5.0) + torch.arange(5.0) ** 2)


def test_embed_captions_equals_encoding_one_by_one(tiny_model):
    model = tiny_model()
    captions = ["a star", "A blue star is left of a red circle on sand .", "word " * 100, "zebra"]
    found = embed_captions(model, captions, batch_size=3)
    for caption, embedding in zip(captions, found, strict=True):
        tokens = model.tokenizer([caption], truncation=True, max_length=32, return_tensors="pt")
        with torch.no_grad():
            expected = model.encode_text(tokens["input_ids"], tokens["attention_mask"])[0]
        assert torch.allclose(embedding, expected, atol=1e-6)


def test_caption_dataset_truncates_and_pads(tiny_model):
    tokenizer = tiny_model().tokenizer
    dataset = CaptionDataset(["a", "word " * 100], tokenizer, 7)
    input_ids, attention_mask = dataset.collate([dataset[0], dataset[1]])
    assert len(dataset) == 2
    assert input_ids.shape == attention_mask.shape == (2, 7)
    assert attention_mask.sum(1).tolist() == [3, 7]
    assert tokenizer.convert_ids_to_tokens(input_ids[0]) == ["[CLS]", "a", "[SEP]"] + ["[PAD]"] * 4


def test_embed_split_equals_the_encoders_and_uses_precomputed_features(tiny_config, tiny_model):
    config, model = tiny_config(batch_size=3), tiny_model()
    splits = load_splits(config)
    open_images(splits, config)
    pairs = splits["validation"]
    images, texts = embed_split(model, pairs, None, config)
    assert (len(images), len(texts)) == (8, 40)
    assert torch.allclose(texts, embed_captions(model, pairs.captions), atol=1e-6)
    frozen = tiny_config(batch_size=3, pretrained_image_encoder=True, trainable_image_encoder=False)
    precompute_features(model, splits, None, frozen)
    assert pairs.text_features is None
    assert torch.allclose(model.project_image(pairs.image_features), images, atol=1e-6)
    assert splits["train"].image_features.shape == (24, model.image_encoder.width)
    pairs.images = None  # no longer needed
    assert torch.allclose(embed_split(model, pairs, None, frozen)[0], images, atol=1e-6)


def frozen_features(config, model):
    """The number of images encoded by `precompute_features`, and the features of the validation split."""
    splits, encoded = load_splits(config), []
    open_images(splits, config)
    hook = model.image_encoder.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
    precompute_features(model, splits, None, config)
    hook.remove()
    return sum(encoded), splits["validation"].image_features, splits["validation"].text_features


def test_precomputed_features_are_cached_until_weights_or_size_change(tiny_config, tiny_model, tmp_path):
    config, model = tiny_config(pretrained=True, text_layers=0, text_width=0, **FROZEN), tiny_model()
    number, images, texts = frozen_features(config, model)
    assert number == 24 + 8
    again = frozen_features(config, model)
    assert again[0] == 0
    assert torch.equal(again[1], images) and torch.equal(again[2], texts)
    others = [save({"features": torch.zeros(shape)}) for shape in ((), (8, 3))]
    for content in (b"not a safetensors file", *others):
        for file in (tmp_path / "cache").glob("features-*"):  # damaged: encoded again
            file.write_bytes(content)
        number, images, texts = frozen_features(config, model)
        assert number == 32
    with torch.no_grad():
        next(model.image_encoder.parameters()).add_(1)
    number, changed, same_texts = frozen_features(config, model)
    assert number == 32 and torch.equal(same_texts, texts)
    assert not torch.equal(changed, images)
    features = {}
    for size in (32, 40):
        resized = tiny_model(size=size)
        resized.load_state_dict(model.state_dict())
        features[size] = frozen_features(dataclasses.replace(config, size=size), resized)
    assert features[32][0] == 0 and features[40][0] == 32


def test_features_hash_depends_on_all_that_determines_the_features(tiny_config, tiny_model):
    pairs = load_splits(tiny_config())["validation"]
    model = tiny_model()

    def hashes(**changes):
        other = tiny_model(**changes)
        with torch.no_grad():  # the same weights
            for own, new in zip(other.parameters(), model.parameters(), strict=True):
                own.copy_(new)
        return [features_hash(other, pairs, encoder, None) for encoder in ("image", "text")]

    image, text = hashes()
    assert hashes() == [image, text]
    assert features_hash(model, pairs, "image", torch.bfloat16) != image
    assert hashes(text_pooling="cls")[0] == image and hashes(text_pooling="cls")[1] != text
    assert hashes(max_length=5)[1] != text  # truncated captions
    model.image_config = {**model.image_config, "mean": [0, 0, 0]}
    assert features_hash(model, pairs, "image", None) != image
    pairs.captions[0] += " star"
    assert features_hash(model, pairs, "text", None) != text


def test_captions_are_encoded_by_length_and_returned_in_order(tiny_config, tiny_model, monkeypatch):
    config, model = tiny_config(pretrained=True, text_layers=0, text_width=0, **FROZEN), tiny_model()
    lengths = []
    collate = CaptionDataset.collate
    monkeypatch.setattr(
        CaptionDataset, "collate", lambda self, texts: lengths.append([len(t) for t in texts]) or collate(self, texts)
    )
    _, _, texts = frozen_features(config, model)
    flat = [length for batch in lengths[-5:] for length in batch]  # 40 validation captions in batches of 8
    assert flat == sorted(flat)
    captions = load_splits(config)["validation"].captions
    assert torch.allclose(model.project_text(texts), embed_captions(model, captions), atol=1e-6)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_own_shares_cover_everything_once(monkeypatch, world_size):
    for number in (7, 8, 100):
        shares = []
        for rank in range(world_size):
            monkeypatch.setattr(embed, "rank_and_world_size", lambda rank=rank: (rank, world_size))
            shares.append(own_share(number))
        assert [item for share in shares for item in share] == list(range(number))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1

"""Encoders and projection heads: what they compute, their parameters, and that they train."""

import numpy as np
import pytest
import torch
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers import BertConfig, BertModel

from clip import CLIP, contrastive_loss, load_model, save_model
from config import InputError
from dataset import Batch, pad_tokens, train_tokenizer
from modules import (
    CPU_CAPTIONS_TIMES_WIDTH,
    ImageEncoder,
    ProjectionHead,
    TextEncoder,
    build_image_encoder,
    build_text_encoder,
)

CAPTIONS = ["a red circle", "a blue square on a green ground, to the left of a red circle", "squares", "a red square"]
SMALL = ("RN50", "RN101", "ViT-B/32", "ViT-B/16")  # the paper's smaller encoders; the others are only built on "meta"


def on_meta(function, *arguments):
    """`function(*arguments)` with parameters that have shapes but no memory."""
    with torch.device("meta"):
        return function(*arguments)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def random_images(number=2, size=64):
    return torch.randint(0, 256, (number, 3, size, size), dtype=torch.uint8)


def tokenise(tokenizer):
    arrays = [np.array(ids, dtype=np.int32) for ids in tokenizer(CAPTIONS)["input_ids"]]
    return pad_tokens(arrays, tokenizer.pad_token_id)


@pytest.fixture
def tokenizer():
    return train_tokenizer(CAPTIONS * 2)


# ---- modules ----------------------------------------------------------------------------------------------------


def test_image_encoder_normalises_with_its_own_mean_and_std():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    encoder = ImageEncoder("test_resnet", 32, mean, std).eval()
    images = torch.rand(2, 3, 32, 32)
    normalised = torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    assert torch.allclose(encoder(images), encoder.backbone(normalised), atol=1e-5)
    assert encoder(images).shape == (2, encoder.width)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_text_encoder_pooling_ignores_padding(pooling):
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50)
    encoder = TextEncoder(BertModel(config), pooling).eval()
    ids = torch.randint(1, 50, (2, 7))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    features = encoder(ids, mask)
    for row, length in ((0, 7), (1, 4)):
        hidden = encoder.backbone(input_ids=ids[row : row + 1, :length]).last_hidden_state[0]
        expected = hidden[0] if pooling == "cls" else sum(hidden) / length
        assert torch.allclose(features[row], expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_text_encoder_result_does_not_depend_on_the_other_captions(pooling):
    """Captions are sorted by length and encoded in groups: features and gradients return in the original order."""
    torch.manual_seed(0)
    encoder, _ = build_text_encoder("distilbert-base-uncased", pooling, False, 100, layers=1, width=64)
    encoder.eval()
    lengths = torch.randint(2, 12, (2 * CPU_CAPTIONS_TIMES_WIDTH // 64 + 5,))
    mask = (torch.arange(12) < lengths[:, None]).long()
    ids = torch.randint(5, 100, mask.shape) * mask
    alone = [encoder(ids[j : j + 1, :n], mask[j : j + 1, :n]) for j, n in enumerate(lengths.tolist())]
    together, weights = encoder(ids, mask), torch.randn(len(ids), 64)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    expected = torch.autograd.grad((torch.cat(alone) * weights).sum(), parameters, allow_unused=True)
    found = torch.autograd.grad((together * weights).sum(), parameters, allow_unused=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_projection_head_with_one_layer_is_linear():
    head = ProjectionHead(5, 3).eval()
    features = torch.randn(4, 5)
    assert [name for name, _ in head.named_parameters()] == ["layers.1.weight"]
    assert np.allclose(head(features).detach(), features.numpy() @ head.layers[-1].weight.detach().numpy().T, atol=1e-6)


def test_projection_head_with_several_layers_is_not_linear():
    head = ProjectionHead(5, 3, num_layers=3).eval()
    features = torch.randn(4, 5)
    assert head(features).shape == (4, 3)
    assert not torch.allclose(head(2 * features), 2 * head(features), atol=1e-3)


# ---- the paper's encoders ---------------------------------------------------------------------------------------


def resnet_count(layers, width, dim, size=224):
    """Parameters of the paper's modified ResNet with attention pooling, from section 2.4 and table 19."""

    def conv(inputs, outputs, kernel):  # no bias, but the scale and shift of BatchNorm
        return inputs * outputs * kernel**2 + 2 * outputs

    total = conv(3, width // 2, 3) + conv(width // 2, width // 2, 3) + conv(width // 2, width, 3)
    inputs = width
    for stage, blocks in enumerate(layers):
        inner = width * 2**stage
        for block in range(blocks):
            total += conv(inputs, inner, 1) + conv(inner, inner, 3) + conv(inner, 4 * inner, 1)
            total += conv(inputs, 4 * inner, 1) if block == 0 else 0
            inputs = 4 * inner
    return total + ((size // 32) ** 2 + 1) * inputs + 3 * (inputs**2 + inputs) + (inputs + 1) * dim


def transformer_count(layers, width):
    """Parameters of Transformer layers: four projections, an MLP of four times the width, two LayerNorms."""
    return layers * (4 * (width**2 + width) + (8 * width**2 + 5 * width) + 4 * width)


def vit_count(patch, layers, width, dim, size=224):
    """Parameters of the paper's ViT: patch embedding without bias, class token, positions, two LayerNorms."""
    positions = (size // patch) ** 2 + 1
    return 3 * patch**2 * width + width + positions * width + 4 * width + transformer_count(layers, width) + width * dim


@pytest.mark.parametrize(
    "name, dim, expected",
    [
        ("RN50", 1024, resnet_count((3, 4, 6, 3), 64, 1024)),
        ("RN101", 512, resnet_count((3, 4, 23, 3), 64, 512)),
        ("RN50x4", 640, resnet_count((4, 6, 10, 6), 80, 640)),
        ("RN50x16", 768, resnet_count((6, 8, 18, 8), 96, 768)),
        ("RN50x64", 1024, resnet_count((3, 15, 36, 10), 128, 1024)),
        ("ViT-B/32", 512, vit_count(32, 12, 768, 512)),
        ("ViT-B/16", 512, vit_count(16, 12, 768, 512)),
        ("ViT-L/14", 768, vit_count(14, 24, 1024, 768)),
    ],
)
def test_paper_image_encoder_has_the_parameter_count_of_the_paper(name, dim, expected):
    encoder, image_config, projection = on_meta(build_image_encoder, name, 224, False)
    head = on_meta(ProjectionHead, encoder.width, dim, 1, 0.0, encoder.projection_bias)
    assert count(encoder) + count(head) == expected
    assert encoder(torch.zeros(2, 3, 224, 224, device="meta")).shape == (2, encoder.width)
    assert head(torch.zeros(2, encoder.width, device="meta")).shape == (2, dim)
    assert projection is None
    assert (tuple(image_config["mean"]), tuple(image_config["std"])) == (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)


def test_paper_vit_uses_quick_gelu_and_paper_resnet_uses_attention_pooling():
    vit, _, _ = on_meta(build_image_encoder, "ViT-B/32", 64, False)
    resnet, _, _ = on_meta(build_image_encoder, "RN50", 64, False)
    assert type(vit.backbone.blocks[0].mlp.act).__name__ == "QuickGELU"
    assert type(resnet.backbone.head).__name__ == "AttentionPool2d"


def test_transformer_has_63_million_parameters():
    encoder, projection = on_meta(build_text_encoder, "transformer", "mean", False, 49_408)
    expected = 49_408 * 512 + 76 * 512 + transformer_count(12, 512) + 2 * 512
    assert count(encoder) == expected
    assert round(count(encoder) / 1e6) == 63
    assert (encoder.backbone.config.num_attention_heads, encoder.max_tokens, projection) == (8, 76, None)


def test_transformer_scales_with_layers_and_width():
    encoder, _ = build_text_encoder("transformer", "mean", False, 50, layers=2, width=128)
    assert count(encoder) == 50 * 128 + 76 * 128 + transformer_count(2, 128) + 2 * 128
    assert encoder.backbone.config.num_attention_heads == 2


def test_transformer_is_causal_and_pools_the_last_token(tokenizer):
    encoder, _ = build_text_encoder("transformer", "mean", False, len(tokenizer), layers=2, width=64)
    encoder.eval()
    ids, mask = tokenise(tokenizer)
    hidden = encoder.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    changed = ids.clone()
    changed[0, 1] = ids[1, 3]
    after = encoder.backbone(input_ids=changed, attention_mask=mask).last_hidden_state
    assert torch.equal(hidden[0, 0], after[0, 0])  # a token does not attend to later ones
    assert not torch.allclose(hidden[0, 2], after[0, 2], atol=1e-5)  # but to earlier ones
    for row, caption in enumerate(CAPTIONS):
        alone = torch.tensor([tokenizer(caption)["input_ids"]])
        assert alone[0, -1] == tokenizer.sep_token_id
        expected = encoder.backbone(input_ids=alone).last_hidden_state[0, -1]
        assert torch.allclose(encoder(ids, mask)[row], expected, atol=1e-5)


def test_cbow_is_the_mean_of_the_token_embeddings(tokenizer):
    encoder, _ = build_text_encoder("cbow", "cls", False, len(tokenizer), width=128)
    ids, mask = tokenise(tokenizer)
    vectors = dict(encoder.named_parameters())["backbone.vectors.weight"]
    for row, caption in enumerate(CAPTIONS):
        expected = torch.stack([vectors[token] for token in tokenizer(caption)["input_ids"]]).mean(0)
        assert torch.allclose(encoder(ids, mask)[row], expected, atol=1e-6)
    assert (count(encoder), encoder.width) == (128 * len(tokenizer), 128)


def test_cbow_refuses_layers():
    with pytest.raises(InputError, match="cbow has no layers"):
        build_text_encoder("cbow", "mean", False, 50, layers=2)


@pytest.mark.parametrize(
    "model_name, text_encoder_model",
    [*((name, "cbow") for name in SMALL), ("test_resnet", "transformer"), ("test_resnet", "cbow")],
)
def test_paper_encoders_train_a_step(tiny_config, tokenizer, model_name, text_encoder_model):
    layers = 0 if text_encoder_model == "cbow" else 12
    changes = {"text_layers": layers, "text_width": 512, "dropout": 0.0}
    config = tiny_config(model_name=model_name, text_encoder_model=text_encoder_model, **changes)
    model = CLIP(config, tokenizer).train()
    ids, mask = tokenise(tokenizer)
    images = random_images(4, config.size)
    batch = Batch(torch.arange(4), torch.arange(4), images=images, input_ids=ids, attention_mask=mask)
    loss = contrastive_loss(*model(batch), model.logit_scale)
    loss.backward()
    without_gradient = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without_gradient == []
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    with torch.no_grad():
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for parameter in model.parameters():
            parameter -= 0.02 * parameter.grad
    assert norm > 0
    assert contrastive_loss(*model(batch), model.logit_scale) < loss


def test_saved_model_with_paper_encoders_gives_the_same_embeddings(tiny_config, tokenizer, tmp_path):
    ids, mask = tokenise(tokenizer)
    images = random_images(2, 32)
    for number, (text, layers) in enumerate((("transformer", 1), ("cbow", 0))):
        image = "RN50" if number else "test_vit"
        config = tiny_config(model_name=image, text_encoder_model=text, text_layers=layers)
        model = CLIP(config, tokenizer).eval()
        save_model(model, tmp_path / text)
        loaded = load_model(tmp_path / text)
        assert torch.equal(loaded.encode_text(ids, mask), model.encode_text(ids, mask))
        assert torch.equal(loaded.encode_image(images), model.encode_image(images))


@pytest.mark.parametrize(("count", "frozen"), [(0, ()), (2, ("conv1.", "bn1.", "layer1."))])
def test_frozen_stages_are_the_first_ones(tiny_model, count, frozen):
    backbone = tiny_model(model_name="test_resnet", frozen_stages=count).image_encoder.backbone
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad != name.startswith(frozen), name


def test_frozen_stages_must_leave_one(tiny_model):
    with pytest.raises(InputError, match="frozen_stages is 5, but the image encoder has 5: use a lower number"):
        tiny_model(model_name="test_resnet", frozen_stages=5)

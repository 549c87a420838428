"""Encoders and projection heads: what they compute, how they are found; a released CLIP starts as that CLIP."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)

import modules
from clip import CLIP, contrastive_backward, load_model, save_model
from config import InputError
from dataset import pad_tokens, train_tokenizer
from modules import (
    CLIP_MEAN,
    CLIP_STD,
    PAPER_IMAGE_ENCODERS,
    ImageEncoder,
    ProjectionHead,
    TextEncoder,
    load_image_encoder,
    load_text_encoder,
)

CPU = torch.device("cpu")
CAPTIONS = ["a red circle", "a blue square on a green ground, to the left of a red circle", "squares", "a red square"]
SMALL = ("RN50", "RN101", "ViT-B/32", "ViT-B/16")  # of the paper's; the others are only built on the meta device


def on_meta(function, *arguments):
    """`function(*arguments)` with parameters that have shapes and no memory."""
    with torch.device("meta"):
        return function(*arguments)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def some_images(number=2, size=64):
    return torch.randint(0, 256, (number, 3, size, size), dtype=torch.uint8)


def some_tokens(tokenizer):
    return pad_tokens(tokenizer(CAPTIONS)["input_ids"], tokenizer.pad_token_id)


@pytest.fixture
def tokenizer():
    return train_tokenizer(CAPTIONS * 2)


# ---- the modules ------------------------------------------------------------------------------------------------


def test_image_encoder_normalises_with_its_own_mean_and_std():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    encoder = ImageEncoder("test_resnet", 32, mean, std).eval()
    images = torch.rand(2, 3, 32, 32)
    normalised = torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    assert torch.allclose(encoder(images), encoder.backbone(normalised), atol=1e-5)
    assert encoder(images).shape == (2, encoder.width)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_text_encoder_pooling_does_not_see_the_padding(pooling):
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
def test_text_encoder_gives_each_caption_what_it_gives_it_alone(pooling):
    """Captions of like length are encoded together: features and gradients stay at their caption's place."""
    torch.manual_seed(0)
    encoder, _ = load_text_encoder("distilbert-base-uncased", pooling, False, 100, layers=1, width=64)
    encoder.eval()
    lengths = torch.randint(2, 12, (2 * modules.CPU_CAPTIONS_TIMES_WIDTH // 64 + 5,))
    mask = (torch.arange(12) < lengths[:, None]).long()
    ids = torch.randint(5, 100, mask.shape) * mask
    alone = [encoder(ids[j : j + 1, :n], mask[j : j + 1, :n]) for j, n in enumerate(lengths.tolist())]
    together, weights = encoder(ids, mask), torch.randn(len(ids), 64)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    expected = torch.autograd.grad((torch.cat(alone) * weights).sum(), parameters, allow_unused=True)
    found = torch.autograd.grad((together * weights).sum(), parameters, allow_unused=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_projection_head_of_one_layer_is_a_matrix():
    head = ProjectionHead(5, 3).eval()
    features = torch.randn(4, 5)
    assert [name for name, _ in head.named_parameters()] == ["layers.1.weight"]
    assert np.allclose(head(features).detach(), features.numpy() @ head.layers[-1].weight.detach().numpy().T, atol=1e-6)


def test_projection_head_of_more_layers_is_not_linear():
    head = ProjectionHead(5, 3, num_layers=3).eval()
    features = torch.randn(4, 5)
    assert head(features).shape == (4, 3)
    assert not torch.allclose(head(2 * features), 2 * head(features), atol=1e-3)


# ---- the paper's encoders ---------------------------------------------------------------------------------------


def resnet_count(layers, width, dim, size=224):
    """Parameters of the paper's modified ResNet with attention pooling, from its sections 2.4 and table 19."""

    def conv(inputs, outputs, kernel):  # followed by BatchNorm: no bias, but a scale and a shift
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
    """Parameters of the paper's ViT: patches without bias, class token, positions, LayerNorms before and after."""
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
def test_paper_image_encoder_has_the_papers_parameters(name, dim, expected):
    encoder, recipe, released = on_meta(load_image_encoder, name, 224, False)
    head = on_meta(ProjectionHead, encoder.width, dim, 1, 0.0, encoder.projection_bias)
    assert count(encoder) + count(head) == expected
    assert encoder(torch.zeros(2, 3, 224, 224, device="meta")).shape == (2, encoder.width)
    assert head(torch.zeros(2, encoder.width, device="meta")).shape == (2, dim)
    assert released is None
    assert (tuple(recipe["mean"]), tuple(recipe["std"])) == (CLIP_MEAN, CLIP_STD)


def test_paper_vit_uses_quick_gelu_and_paper_resnet_attention_pooling():
    vit, _, _ = on_meta(load_image_encoder, "ViT-B/32", 64, False)
    resnet, _, _ = on_meta(load_image_encoder, "RN50", 64, False)
    assert type(vit.backbone.blocks[0].mlp.act).__name__ == "QuickGELU"
    assert type(resnet.backbone.head).__name__ == "AttentionPool2d"


def test_transformer_has_63_million_parameters():
    encoder, released = on_meta(load_text_encoder, "transformer", "mean", False, 49_408)
    expected = 49_408 * 512 + 76 * 512 + transformer_count(12, 512) + 2 * 512
    assert count(encoder) == expected
    assert round(count(encoder) / 1e6) == 63
    assert (encoder.backbone.config.num_attention_heads, encoder.max_tokens, released) == (8, 76, None)


def test_transformer_scales_with_layers_and_width():
    encoder, _ = load_text_encoder("transformer", "mean", False, 50, layers=2, width=128)
    assert count(encoder) == 50 * 128 + 76 * 128 + transformer_count(2, 128) + 2 * 128
    assert encoder.backbone.config.num_attention_heads == 2


def test_transformer_is_causal_and_pools_at_the_end_of_the_text(tokenizer):
    encoder, _ = load_text_encoder("transformer", "mean", False, len(tokenizer), layers=2, width=64)
    encoder.eval()
    ids, mask = some_tokens(tokenizer)
    hidden = encoder.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    changed = ids.clone()
    changed[0, 1] = ids[1, 3]
    after = encoder.backbone(input_ids=changed, attention_mask=mask).last_hidden_state
    assert torch.equal(hidden[0, 0], after[0, 0])  # a token does not see those after it
    assert not torch.allclose(hidden[0, 2], after[0, 2], atol=1e-5)  # but those before it
    for row, caption in enumerate(CAPTIONS):
        alone = torch.tensor([tokenizer(caption)["input_ids"]])
        assert alone[0, -1] == tokenizer.sep_token_id
        expected = encoder.backbone(input_ids=alone).last_hidden_state[0, -1]
        assert torch.allclose(encoder(ids, mask)[row], expected, atol=1e-5)


def test_cbow_is_the_mean_of_the_word_vectors(tokenizer):
    encoder, _ = load_text_encoder("cbow", "cls", False, len(tokenizer), width=128)
    ids, mask = some_tokens(tokenizer)
    vectors = dict(encoder.named_parameters())["backbone.vectors.weight"]
    for row, caption in enumerate(CAPTIONS):
        expected = torch.stack([vectors[token] for token in tokenizer(caption)["input_ids"]]).mean(0)
        assert torch.allclose(encoder(ids, mask)[row], expected, atol=1e-6)
    assert (count(encoder), encoder.width) == (128 * len(tokenizer), 128)


def test_cbow_refuses_layers():
    with pytest.raises(InputError, match="cbow, which has none"):
        load_text_encoder("cbow", "mean", False, 50, layers=2)


@pytest.mark.parametrize(
    "model_name, text_encoder_model",
    [*((name, "cbow") for name in SMALL), ("test_resnet", "transformer"), ("test_resnet", "cbow")],
)
def test_paper_encoders_train_a_step(tiny_config, tokenizer, model_name, text_encoder_model):
    layers = 0 if text_encoder_model == "cbow" else 12
    changes = {"text_layers": layers, "text_width": 512, "dropout": 0.0}
    config = tiny_config(model_name=model_name, text_encoder_model=text_encoder_model, **changes)
    model = CLIP(config, tokenizer).train()
    ids, mask = some_tokens(tokenizer)
    batch = {
        "images": some_images(4, config.size),
        "input_ids": ids,
        "attention_mask": mask,
        "image_index": torch.arange(4),
    }
    before = contrastive_backward(model, [batch], CPU)
    untouched = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert untouched == []
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    with torch.no_grad():
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for parameter in model.parameters():
            parameter -= 0.02 * parameter.grad
    assert norm > 0
    assert contrastive_backward(model, [batch], CPU) < before


def test_saved_run_with_the_papers_encoders_loads_again(tiny_config, tokenizer, tmp_path):
    ids, mask = some_tokens(tokenizer)
    images = some_images(2, 32)
    for number, (text, layers) in enumerate((("transformer", 1), ("cbow", 0))):
        image = "RN50" if number else "test_vit"
        config = tiny_config(model_name=image, text_encoder_model=text, text_layers=layers)
        model = CLIP(config, tokenizer).eval()
        save_model(model, tmp_path / text)
        again = load_model(tmp_path / text)
        assert torch.equal(again.encode_text(ids, mask), model.encode_text(ids, mask))
        assert torch.equal(again.encode_image(images), model.encode_image(images))


# ---- names, sizes, and what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("name, size, good", [("RN50", 100, 96), ("RN50", 16, 32), ("ViT-L/14", 64, 70)])
def test_image_encoder_refuses_a_size_it_cannot_see(name, size, good):
    with pytest.raises(InputError, match=f"size is {size}.*--size {good}"):
        on_meta(load_image_encoder, name, size, False)


def test_image_encoder_unknown_name_suggests_others():
    with pytest.raises(InputError, match=r"model_name is 'resnet5'.*timm does not know.*RN50.*ViT-B/32"):
        load_image_encoder("resnet5", 32, False)


def test_image_encoder_unknown_tag_is_refused():
    with pytest.raises(InputError, match=r"'resnet50_clip.nobody', of which timm knows only .*resnet50_clip\.openai"):
        load_image_encoder("resnet50_clip.nobody", 32, False)


def test_image_encoder_folder_without_config_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"without a readable config\.json"):
        load_image_encoder(str(tmp_path), 32, False)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match=r"without a config\.json of timm or of a CLIPModel"):
        load_image_encoder(str(tmp_path), 32, False)


def test_text_encoder_that_is_nowhere_is_refused():
    with pytest.raises(InputError, match="text_encoder_model is 'no/such-model', which is neither here nor"):
        load_text_encoder("no/such-model", "mean", True, 50)


def test_text_encoder_refuses_a_tokenizer_with_more_tokens(tiny_clip):
    with pytest.raises(InputError, match="text_tokenizer has 1000 tokens, more than"):
        load_text_encoder(tiny_clip().folder, "mean", True, 1000)


# ---- timm's weights ---------------------------------------------------------------------------------------------


def timm_folder(folder, architecture, num_classes, **details):
    """A folder as timm's `save_for_hf` writes it, of a randomly initialised model; returns the model."""
    model = timm.create_model(architecture, num_classes=num_classes)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases and BatchNorm start as zeros and ones: too easily right
            torch.nn.init.normal_(parameter, std=0.3)
    folder.mkdir()
    content = {"architecture": architecture, "num_classes": num_classes, "pretrained_cfg": details}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    save_file(model.state_dict(), folder / "model.safetensors")
    return model.eval()


def test_timm_folder_gives_its_weights_and_normalisation(tmp_path):
    model = timm_folder(tmp_path / "own", "test_resnet", 7, mean=[0.4] * 3, std=[0.3] * 3, classifier="fc")
    encoder, recipe, released = load_image_encoder(str(tmp_path / "own"), 32, True)
    images = torch.rand(2, 3, 32, 32)
    expected = model.forward_head(model.forward_features((images - 0.4) / 0.3), pre_logits=True)
    assert torch.allclose(encoder.eval()(images), expected, atol=1e-5)
    assert released is None  # its head is a classifier
    again = ImageEncoder(size=32, **recipe).eval()
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again(images), encoder(images))


def test_timm_folder_without_safetensors_is_refused(tmp_path):
    timm_folder(tmp_path / "own", "test_resnet", 7)
    (tmp_path / "own" / "model.safetensors").rename(tmp_path / "own" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"without model\.safetensors"):
        load_image_encoder(str(tmp_path / "own"), 32, True)


def test_timm_folder_with_a_tensor_missing_is_refused(tmp_path):
    model = timm_folder(tmp_path / "own", "test_resnet", 7)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "conv1.weight"}
    save_file(state, tmp_path / "own" / "model.safetensors")
    with pytest.raises(InputError, match="own"):
        load_image_encoder(str(tmp_path / "own"), 32, True)


OPENAI = {"tag": "openai", "mean": list(CLIP_MEAN), "std": list(CLIP_STD), "input_size": [3, 224, 224]}


@pytest.fixture(scope="module")
def openai_rn50(tmp_path_factory):
    """A folder with random weights in the layout of timm's resnet50_clip.openai, and the timm model with its head."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("timm") / "rn50"
    model = timm_folder(folder, "resnet50_clip", 1024, **OPENAI, classifier="head.proj", fixed_input_size=True)
    return SimpleNamespace(folder=folder, model=model)


def test_openai_weights_bring_their_projection(openai_rn50, tiny_config, tokenizer, tmp_path):
    settings = {"size": 224, "projection_dim": 1024, "pretrained_image_encoder": True}
    model = CLIP(tiny_config(model_name=str(openai_rn50.folder), **settings), tokenizer).eval()
    images = some_images(2, 224)
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    with torch.no_grad():
        expected = openai_rn50.model((images / 255 - mean) / std)
        expected /= expected.norm(dim=-1, keepdim=True)
        assert torch.allclose(model.encode_image(images), expected, atol=1e-5)
        assert openai_rn50.model.head.proj.bias.abs().max() > 0.1  # the ResNets' projection has a bias
        save_model(model, tmp_path / "saved")
        assert torch.equal(load_model(tmp_path / "saved").encode_image(images), model.encode_image(images))
    assert model.logit_scale.item() == pytest.approx(np.log(1 / 0.07))  # the text encoder is no CLIP's


def test_openai_weights_at_another_size_keep_their_positions(openai_rn50):
    encoder, _, _ = load_image_encoder(str(openai_rn50.folder), 128, True)
    own, theirs = encoder.backbone.head.pos_embed, openai_rn50.model.head.pos_embed
    assert own.shape == (1 + 4 * 4, 2048)
    assert torch.equal(own[0], theirs[0])  # the pooled token's
    assert own[1:].mean().item() == pytest.approx(theirs[1:].mean().item(), abs=0.02)
    assert encoder(torch.rand(1, 3, 128, 128)).shape == (1, 2048)


def test_openai_weights_need_the_right_projection_dim(openai_rn50, tiny_config, tokenizer):
    config = tiny_config(model_name=str(openai_rn50.folder), projection_dim=256, pretrained_image_encoder=True)
    with pytest.raises(InputError, match="projection_dim is 256, but .*: give --projection_dim 1024"):
        CLIP(config, tokenizer)


def test_paper_name_finds_openai_weights_in_the_local_cache(openai_rn50, tmp_path, monkeypatch):
    from huggingface_hub import constants

    place = tmp_path / "models--timm--resnet50_clip.openai"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc", encoding="utf-8")
    (place / "snapshots" / "abc").mkdir(parents=True)
    weights = (openai_rn50.folder / "model.safetensors").read_bytes()
    (place / "snapshots" / "abc" / "model.safetensors").write_bytes(weights)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    encoder, _, released = load_image_encoder("RN50", 32, True)
    theirs = openai_rn50.model.state_dict()
    assert torch.equal(encoder.backbone.state_dict()["stem.conv1.conv.weight"], theirs["stem.conv1.conv.weight"])
    assert torch.equal(released.weight, theirs["head.proj.weight"])
    assert torch.equal(released.bias, theirs["head.proj.bias"])


@pytest.mark.parametrize("name", SMALL)
def test_paper_name_without_weights_at_hand_says_so(name):
    with pytest.raises(InputError, match="--pretrained_image_encoder false"):
        modules.pretrained_timm_state(f"{PAPER_IMAGE_ENCODERS[name]}.openai", PAPER_IMAGE_ENCODERS[name], 224, 512)


@pytest.mark.parametrize(
    "name, architecture",
    [
        ("vit_base_patch32_clip_224.openai", "vit_base_patch32_clip_quickgelu_224"),
        ("vit_base_patch32_clip_224.laion2b", "vit_base_patch32_clip_224"),
        ("resnet50_clip.openai", "resnet50_clip"),
        ("resnet50", "resnet50"),
    ],
)
def test_openai_vit_weights_get_the_activation_they_were_trained_with(name, architecture, tmp_path):
    assert modules.describe_timm(name)[0] == architecture
    plain, _, tag = name.partition(".")
    content = {"architecture": plain, "pretrained_cfg": {"tag": tag}}
    (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    assert modules.describe_timm(str(tmp_path))[0] == architecture


# ---- agreement with transformers' CLIPModel ---------------------------------------------------------------------

END = 98  # token ids of the tiny CLIP: 97 starts a caption, 98 ends it


@pytest.fixture
def tiny_clip(tmp_path):
    """`tiny_clip(eos=98)`: a random CLIPModel, saved in a folder; `.folder`, `.model`."""

    def make(name="clip", eos=END, **vision):
        shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
        text = {"vocab_size": 99, "hidden_size": 32, "max_position_embeddings": 20, "bos_token_id": 97, **shape}
        text |= {"eos_token_id": eos, "pad_token_id": eos}
        vision = {"hidden_size": 48, "image_size": 32, "patch_size": 8, **shape, **vision}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # HF starts biases at zero and norms at one: too easily right
                parameter.add_(0.1 * torch.randn_like(parameter))
            model.logit_scale.fill_(3.0)
        model.save_pretrained(tmp_path / name)
        return SimpleNamespace(folder=str(tmp_path / name), model=model)

    return make


def clip_tokens():
    """Captions as CLIP's tokenizer gives them: padded with the end-of-text token itself, beyond the mask."""
    captions = [[97, 5, 6, 7, END], [97, *range(10, 25), END], [97, END], [97, 50, 60, END]]
    return pad_tokens(captions, END)


def released_settings(folder, **changes):
    settings = {"model_name": folder, "text_encoder_model": folder, "projection_dim": 24, "text_layers": 0}
    return {**settings, "text_width": 0, "pretrained": True, "text_tokenizer": folder, **changes}


@pytest.mark.parametrize("eos", [END, 2])  # 2: OpenAI's released configs; transformers then pools at the highest id
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_agrees_with_transformers(tiny_clip, tiny_config, eos, activation, tmp_path):
    theirs = tiny_clip(eos=eos, hidden_act=activation)
    model = CLIP(tiny_config(**released_settings(theirs.folder)), train_tokenizer(CAPTIONS)).eval()
    images, (ids, mask) = some_images(3, 32), clip_tokens()
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    with torch.no_grad():
        expected = theirs.model(pixel_values=(images / 255 - mean) / std, input_ids=ids, attention_mask=mask)
        image_embeddings, text_embeddings = model.encode_image(images), model.encode_text(ids, mask)
        logits = model.logit_scale.exp() * image_embeddings @ text_embeddings.T
    assert (image_embeddings - expected.image_embeds).abs().max() < 1e-5
    assert (text_embeddings - expected.text_embeds).abs().max() < 1e-5
    assert (logits - expected.logits_per_image).abs().max() < 1e-5
    assert expected.logits_per_image.std() > 0.1  # they are not all alike
    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert torch.equal(again.encode_image(images), image_embeddings)
    assert torch.equal(again.encode_text(ids, mask), text_embeddings)
    assert again.logit_scale.item() == pytest.approx(3.0)


def test_clip_folder_at_another_size_resamples_the_positions_as_transformers_does(tiny_clip):
    theirs = tiny_clip()
    encoder, recipe, _ = load_image_encoder(theirs.folder, 64, True)
    images = torch.rand(2, 3, 64, 64)
    assert encoder.backbone.pos_embed.shape == (1, 1 + 8 * 8, 48)
    own = encoder.backbone.pos_embed[0, 1:].reshape(8, 8, 48)
    old = theirs.model.vision_model.embeddings.position_embedding.weight[1:].reshape(1, 4, 4, 48).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(old, (8, 8), mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
    assert torch.allclose(own, grid, atol=0.05)  # timm's resampling is anti-aliased
    assert encoder(images).shape == (2, 48)


@pytest.mark.parametrize("kind", [CLIPTextModelWithProjection, CLIPTextModel])
def test_clip_text_model_in_a_folder_gives_its_text_encoder(kind, tmp_path):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = CLIPTextConfig(vocab_size=99, max_position_embeddings=20, projection_dim=24, eos_token_id=END, **shape)
    theirs = kind(config).eval()
    theirs.save_pretrained(tmp_path / "text")
    encoder, released = load_text_encoder(str(tmp_path / "text"), "mean", True, 99)
    ids, mask = clip_tokens()
    features = encoder.eval()(ids, mask)
    expected = theirs(input_ids=ids, attention_mask=mask)
    if kind is CLIPTextModel:
        assert torch.allclose(features, expected.pooler_output, atol=1e-5)
        assert released is None
    else:
        assert torch.allclose(features @ released.weight.T, expected.text_embeds, atol=1e-5)


def test_clip_text_encoder_beside_another_image_encoder_keeps_the_first_temperature(tiny_clip, tiny_config):
    theirs = tiny_clip()
    settings = released_settings(theirs.folder, model_name="test_resnet", pretrained_image_encoder=False)
    model = CLIP(tiny_config(**settings), train_tokenizer(CAPTIONS))
    assert torch.equal(model.text_projection.layers[-1].weight, theirs.model.text_projection.weight)
    assert model.logit_scale.item() == pytest.approx(np.log(1 / 0.07))


def test_clip_folder_not_pretrained_gives_the_shape_only(tiny_clip, tiny_config, tokenizer):
    theirs = tiny_clip()
    settings = released_settings(theirs.folder, pretrained=False, projection_dim=16, text_tokenizer="captions")
    model = CLIP(tiny_config(**settings), tokenizer)
    assert model.text_encoder.backbone.config.vocab_size == len(tokenizer)
    assert (model.image_encoder.width, model.text_encoder.width) == (48, 32)
    assert not torch.allclose(
        model.image_encoder.backbone.patch_embed.proj.weight,
        theirs.model.vision_model.embeddings.patch_embedding.weight,
        atol=1e-3,
    )


def test_clip_with_a_deeper_head_starts_it_from_scratch(tiny_clip, tiny_config):
    config = tiny_config(**released_settings(tiny_clip().folder, projection_dim=16, num_projection_layers=2))
    assert CLIP(config, train_tokenizer(CAPTIONS)).logit_scale.item() == pytest.approx(np.log(1 / 0.07))


def test_clip_folder_needs_the_right_projection_dim(tiny_clip, tiny_config):
    config = tiny_config(**released_settings(tiny_clip().folder, projection_dim=16))
    with pytest.raises(InputError, match="projection_dim is 16, but .*: give --projection_dim 24"):
        CLIP(config, train_tokenizer(CAPTIONS))


def test_encoders_of_two_clips_are_refused(openai_rn50, tiny_clip, tiny_config):
    settings = released_settings(tiny_clip().folder, model_name=str(openai_rn50.folder))
    with pytest.raises(InputError, match="1024 values.* to 24: give the two encoders of one CLIP"):
        CLIP(tiny_config(**settings), train_tokenizer(CAPTIONS))


def test_clip_folder_with_an_unknown_activation_is_refused(tiny_clip):
    with pytest.raises(InputError, match="whose image encoder has relu"):
        load_image_encoder(tiny_clip(hidden_act="relu").folder, 32, False)

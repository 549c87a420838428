"""Encoders by name, folder or hub: what is found, what is refused, and agreement with the original models."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)

from clip import CLIP, load_model, save_model
from config import InputError
from dataset import pad_tokens, train_tokenizer
from modules import ImageEncoder, build_image_encoder, build_text_encoder
from utils.model_checks import check_model
from utils.pretrained import PAPER_ENCODERS, load_local_or_hub, load_timm_state, load_tokenizer, resolve_timm_name

CAPTIONS = ["a red circle", "a blue square on a green ground, to the left of a red circle", "squares", "a red square"]


def random_images(number=2, size=64):
    return torch.randint(0, 256, (number, 3, size, size), dtype=torch.uint8)


@pytest.fixture
def tokenizer():
    return train_tokenizer(CAPTIONS * 2)


# ---- names and sizes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, size, good", [("RN50", 100, 96), ("RN50", 16, 32), ("ViT-L/14", 64, 70)])
def test_image_encoder_refuses_an_unsupported_size(name, size, good):
    with pytest.raises(InputError, match=f"size is {size}.*--size {good}"), torch.device("meta"):
        build_image_encoder(name, size, False)


def test_unknown_image_encoder_is_refused_with_suggestions():
    with pytest.raises(InputError, match=r"model_name is 'resnet5'.*is not a timm model.*RN50.*ViT-B/32"):
        build_image_encoder("resnet5", 32, False)


def test_unknown_pretrained_tag_is_refused():
    with pytest.raises(InputError, match=r"'resnet50_clip.nobody', for which timm only has .*resnet50_clip\.openai"):
        build_image_encoder("resnet50_clip.nobody", 32, False)


def test_image_encoder_folder_without_config_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"config\.json does not exist"):
        build_image_encoder(str(tmp_path), 32, False)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match=r"without a config\.json of timm or of a CLIPModel"):
        build_image_encoder(str(tmp_path), 32, False)


def test_unknown_text_encoder_is_refused():
    with pytest.raises(InputError, match="text_encoder_model is 'no/such-model', .* neither locally nor on the hub"):
        build_text_encoder("no/such-model", "mean", True, 50)


def test_tokenizer_with_more_tokens_than_the_text_encoder_is_refused(tiny_clip):
    with pytest.raises(InputError, match="text_tokenizer has 1000 tokens, more than"):
        build_text_encoder(tiny_clip().folder, "mean", True, 1000)


@pytest.mark.parametrize(
    ("name", "size", "good"), [("crossvit_9_240", 224, 240), ("dla34", 100, 96), ("efficientformer_l1", 64, 224)]
)
def test_size_that_an_image_encoder_cannot_take_is_refused_with_the_nearest(name, size, good, tiny_config, tokenizer):
    with pytest.raises(InputError, match=f"size is {size}, which {name} cannot take .*: pass --size {good}$"):
        check_model(CLIP(tiny_config(model_name=name, size=size), tokenizer))


# ---- weights of timm ---------------------------------------------------------------------------------------------


def timm_folder(folder, architecture, num_classes, **details):
    """Save a randomly initialised model as timm's `save_for_hf` does; returns the model."""
    model = timm.create_model(architecture, num_classes=num_classes)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases and BatchNorm start as zeros and ones, which hide errors
            torch.nn.init.normal_(parameter, std=0.3)
    folder.mkdir()
    content = {"architecture": architecture, "num_classes": num_classes, "pretrained_cfg": details}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    save_file(model.state_dict(), folder / "model.safetensors")
    return model.eval()


def test_timm_folder_provides_weights_and_normalisation(tmp_path):
    model = timm_folder(tmp_path / "own", "test_resnet", 7, mean=[0.4] * 3, std=[0.3] * 3, classifier="fc")
    encoder, image_config, projection = build_image_encoder(str(tmp_path / "own"), 32, True)
    images = torch.rand(2, 3, 32, 32)
    expected = model.forward_head(model.forward_features((images - 0.4) / 0.3), pre_logits=True)
    assert torch.allclose(encoder.eval()(images), expected, atol=1e-5)
    assert projection is None  # its head is a classifier
    loaded = ImageEncoder(size=32, **image_config).eval()
    loaded.load_state_dict(encoder.state_dict())
    assert torch.equal(loaded(images), encoder(images))


def test_timm_folder_without_safetensors_is_refused(tmp_path):
    timm_folder(tmp_path / "own", "test_resnet", 7)
    (tmp_path / "own" / "model.safetensors").rename(tmp_path / "own" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"without model\.safetensors"):
        build_image_encoder(str(tmp_path / "own"), 32, True)


def test_timm_folder_with_a_missing_tensor_is_refused(tmp_path):
    model = timm_folder(tmp_path / "own", "test_resnet", 7)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "conv1.weight"}
    save_file(state, tmp_path / "own" / "model.safetensors")
    with pytest.raises(InputError, match="own"):
        build_image_encoder(str(tmp_path / "own"), 32, True)


OPENAI = {"tag": "openai", "mean": list(OPENAI_CLIP_MEAN), "std": list(OPENAI_CLIP_STD), "input_size": [3, 224, 224]}


@pytest.fixture(scope="module")
def openai_rn50(tmp_path_factory):
    """A folder in the layout of timm's resnet50_clip.openai with random weights, and the timm model with its head."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("timm") / "rn50"
    model = timm_folder(folder, "resnet50_clip", 1024, **OPENAI, classifier="head.proj", fixed_input_size=True)
    return SimpleNamespace(folder=folder, model=model)


def test_openai_weights_include_the_projection(openai_rn50, tiny_config, tokenizer, tmp_path):
    settings = {"size": 224, "projection_dim": 1024, "pretrained_image_encoder": True}
    model = CLIP(tiny_config(model_name=str(openai_rn50.folder), **settings), tokenizer).eval()
    images = random_images(2, 224)
    mean, std = torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1), torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1)
    with torch.no_grad():
        expected = openai_rn50.model((images / 255 - mean) / std)
        expected /= expected.norm(dim=-1, keepdim=True)
        assert torch.allclose(model.encode_image(images), expected, atol=1e-5)
        assert openai_rn50.model.head.proj.bias.abs().max() > 0.1  # the projection of the ResNets has a bias
        save_model(model, tmp_path / "saved")
        assert torch.equal(load_model(tmp_path / "saved").encode_image(images), model.encode_image(images))
    assert model.logit_scale.item() == pytest.approx(np.log(1 / 0.07))  # the text encoder is not that of a CLIP


def test_openai_weights_at_another_size_have_resampled_positions(openai_rn50):
    encoder, _, _ = build_image_encoder(str(openai_rn50.folder), 128, True)
    own, original = encoder.backbone.head.pos_embed, openai_rn50.model.head.pos_embed
    assert own.shape == (1 + 4 * 4, 2048)
    assert torch.equal(own[0], original[0])  # of the pooled token
    assert own[1:].mean().item() == pytest.approx(original[1:].mean().item(), abs=0.02)
    assert encoder(torch.rand(1, 3, 128, 128)).shape == (1, 2048)


def test_openai_weights_with_another_projection_dim_are_refused(openai_rn50, tiny_config, tokenizer):
    config = tiny_config(model_name=str(openai_rn50.folder), projection_dim=256, pretrained_image_encoder=True)
    with pytest.raises(InputError, match="projection_dim is 256, but .*: pass --projection_dim 1024"):
        CLIP(config, tokenizer)


def test_paper_name_finds_openai_weights_in_the_local_cache(openai_rn50, tmp_path, monkeypatch):
    repository = tmp_path / "models--timm--resnet50_clip.openai"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc", encoding="utf-8")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    weights = (openai_rn50.folder / "model.safetensors").read_bytes()
    (repository / "snapshots" / "abc" / "model.safetensors").write_bytes(weights)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    encoder, _, projection = build_image_encoder("RN50", 32, True)
    original = openai_rn50.model.state_dict()
    assert torch.equal(encoder.backbone.state_dict()["stem.conv1.conv.weight"], original["stem.conv1.conv.weight"])
    assert torch.equal(projection.weight, original["head.proj.weight"])
    assert torch.equal(projection.bias, original["head.proj.bias"])


@pytest.mark.parametrize("name", ["RN50", "RN101", "ViT-B/32", "ViT-B/16"])
def test_paper_name_without_local_weights_is_refused(name):
    with pytest.raises(InputError, match="neither locally nor on the hub .* or pass --no-pretrained_image_encoder"):
        load_timm_state(f"{PAPER_ENCODERS[name]}.openai", PAPER_ENCODERS[name], 224, 512)


@pytest.mark.parametrize(
    "name, architecture",
    [
        ("vit_base_patch32_clip_224.openai", "vit_base_patch32_clip_quickgelu_224"),
        ("vit_base_patch32_clip_224.laion2b", "vit_base_patch32_clip_224"),
        ("resnet50_clip.openai", "resnet50_clip"),
        ("resnet50", "resnet50"),
    ],
)
def test_openai_vit_weights_use_quick_gelu(name, architecture, tmp_path):
    assert resolve_timm_name(name)[1] == architecture
    plain, _, tag = name.partition(".")
    content = {"architecture": plain, "pretrained_cfg": {"tag": tag}}
    (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    assert resolve_timm_name(str(tmp_path))[1] == architecture


# ---- agreement with transformers' CLIPModel ---------------------------------------------------------------------

END = 98  # token ids of the tiny CLIP: 97 begins a caption, 98 ends it


@pytest.fixture
def tiny_clip(tmp_path):
    """`tiny_clip(eos=98)`: a random CLIPModel saved in a folder; has `.folder` and `.model`."""

    def make(name="clip", eos=END, **vision):
        shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
        text = {"vocab_size": 99, "hidden_size": 32, "max_position_embeddings": 20, "bos_token_id": 97, **shape}
        text |= {"eos_token_id": eos, "pad_token_id": eos}
        vision = {"hidden_size": 48, "image_size": 32, "patch_size": 8, **shape, **vision}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # biases start at zero and norms at one, which hides errors
                parameter.add_(0.1 * torch.randn_like(parameter))
            model.logit_scale.fill_(3.0)
        model.save_pretrained(tmp_path / name)
        return SimpleNamespace(folder=str(tmp_path / name), model=model)

    return make


def clip_tokens():
    """Captions as CLIP's tokenizer returns them: padded with the end-of-text token, which the mask excludes."""
    captions = [[97, 5, 6, 7, END], [97, *range(10, 25), END], [97, END], [97, 50, 60, END]]
    return pad_tokens([np.array(ids, dtype=np.int32) for ids in captions], END)


def clip_settings(folder, **changes):
    settings = {"model_name": folder, "text_encoder_model": folder, "projection_dim": 24, "text_layers": 0}
    return {**settings, "text_width": 0, "pretrained": True, "text_tokenizer": folder, **changes}


@pytest.mark.parametrize("eos", [END, 2])  # 2: OpenAI's published configs; transformers then pools at the highest id
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_agrees_with_transformers(tiny_clip, tiny_config, eos, activation, tmp_path):
    original = tiny_clip(eos=eos, hidden_act=activation)
    model = CLIP(tiny_config(**clip_settings(original.folder)), train_tokenizer(CAPTIONS)).eval()
    images, (ids, mask) = random_images(3, 32), clip_tokens()
    mean, std = torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1), torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1)
    with torch.no_grad():
        expected = original.model(pixel_values=(images / 255 - mean) / std, input_ids=ids, attention_mask=mask)
        image_embeddings, text_embeddings = model.encode_image(images), model.encode_text(ids, mask)
        logits = model.logit_scale.exp() * image_embeddings @ text_embeddings.T
    assert (image_embeddings - expected.image_embeds).abs().max() < 1e-5
    assert (text_embeddings - expected.text_embeds).abs().max() < 1e-5
    assert (logits - expected.logits_per_image).abs().max() < 1e-5
    assert expected.logits_per_image.std() > 0.1  # not all the same
    save_model(model, tmp_path / "saved")
    loaded = load_model(tmp_path / "saved")
    assert torch.equal(loaded.encode_image(images), image_embeddings)
    assert torch.equal(loaded.encode_text(ids, mask), text_embeddings)
    assert loaded.logit_scale.item() == pytest.approx(3.0)


def test_clip_folder_at_another_size_resamples_positions_like_transformers(tiny_clip):
    original = tiny_clip()
    encoder, image_config, _ = build_image_encoder(original.folder, 64, True)
    images = torch.rand(2, 3, 64, 64)
    assert encoder.backbone.pos_embed.shape == (1, 1 + 8 * 8, 48)
    own = encoder.backbone.pos_embed[0, 1:].reshape(8, 8, 48)
    old = original.model.vision_model.embeddings.position_embedding.weight[1:].reshape(1, 4, 4, 48).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(old, (8, 8), mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
    assert torch.allclose(own, grid, atol=0.05)  # timm's resampling is anti-aliased
    assert encoder(images).shape == (2, 48)


@pytest.mark.parametrize("model_class", [CLIPTextModelWithProjection, CLIPTextModel])
def test_clip_text_model_folder_provides_the_text_encoder(model_class, tmp_path):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = CLIPTextConfig(vocab_size=99, max_position_embeddings=20, projection_dim=24, eos_token_id=END, **shape)
    original = model_class(config).eval()
    original.save_pretrained(tmp_path / "text")
    encoder, projection = build_text_encoder(str(tmp_path / "text"), "mean", True, 99)
    ids, mask = clip_tokens()
    features = encoder.eval()(ids, mask)
    expected = original(input_ids=ids, attention_mask=mask)
    if model_class is CLIPTextModel:
        assert torch.allclose(features, expected.pooler_output, atol=1e-5)
        assert projection is None
    else:
        assert torch.allclose(features @ projection.weight.T, expected.text_embeds, atol=1e-5)


def test_clip_text_encoder_with_another_image_encoder_keeps_the_initial_temperature(tiny_clip, tiny_config):
    original = tiny_clip()
    settings = clip_settings(original.folder, model_name="test_resnet", pretrained_image_encoder=False)
    model = CLIP(tiny_config(**settings), train_tokenizer(CAPTIONS))
    assert torch.equal(model.text_projection.layers[-1].weight, original.model.text_projection.weight)
    assert model.logit_scale.item() == pytest.approx(np.log(1 / 0.07))


def test_clip_folder_without_pretrained_weights_provides_only_the_architecture(tiny_clip, tiny_config, tokenizer):
    original = tiny_clip()
    settings = clip_settings(original.folder, pretrained=False, projection_dim=16, text_tokenizer="wordpiece")
    model = CLIP(tiny_config(**settings), tokenizer)
    assert model.text_encoder.backbone.config.vocab_size == len(tokenizer)
    assert (model.image_encoder.width, model.text_encoder.width) == (48, 32)
    assert not torch.allclose(
        model.image_encoder.backbone.patch_embed.proj.weight,
        original.model.vision_model.embeddings.patch_embedding.weight,
        atol=1e-3,
    )


def test_clip_with_a_deeper_head_trains_it_from_scratch(tiny_clip, tiny_config):
    config = tiny_config(**clip_settings(tiny_clip().folder, projection_dim=16, num_projection_layers=2))
    assert CLIP(config, train_tokenizer(CAPTIONS)).logit_scale.item() == pytest.approx(np.log(1 / 0.07))


def test_clip_folder_with_another_projection_dim_is_refused(tiny_clip, tiny_config):
    config = tiny_config(**clip_settings(tiny_clip().folder, projection_dim=16))
    with pytest.raises(InputError, match="projection_dim is 16, but .*: pass --projection_dim 24"):
        CLIP(config, train_tokenizer(CAPTIONS))


def test_encoders_of_two_different_clips_are_refused(openai_rn50, tiny_clip, tiny_config):
    settings = clip_settings(tiny_clip().folder, model_name=str(openai_rn50.folder))
    with pytest.raises(InputError, match="1024 dimensions.* to 24: use the two encoders of one CLIP"):
        CLIP(tiny_config(**settings), train_tokenizer(CAPTIONS))


def test_clip_folder_with_an_unsupported_activation_is_refused(tiny_clip):
    with pytest.raises(InputError, match="whose image encoder has activation relu"):
        build_image_encoder(tiny_clip(hidden_act="relu").folder, 32, False)


# ---- other text encoders ----------------------------------------------------------------------------------------

BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
BART = {"d_model": 32, "max_position_embeddings": 24, "decoder_start_token_id": 2}
BART |= {f"{part}_{size}": 1 for part in ("encoder", "decoder") for size in ("layers", "attention_heads", "ffn_dim")}
VISION = {"vision_config": {**BERT, "image_size": 32, "patch_size": 16}}
# Small configs by model type: encoder-decoders, dual encoders, encoders, a decoder; and the maximum number of tokens
TEXT_MODELS = {
    "t5": (T5, 512),
    "mt5": (T5, 512),
    "bart": (BART, 24),
    "m2m_100": (BART, 24),  # NLLB
    "siglip": ({"text_config": {**BERT, "vocab_size": 99, "max_position_embeddings": 24}, **VISION}, 24),
    "chinese_clip": ({"text_config": {**BERT, "vocab_size": 99, "max_position_embeddings": 24}, **VISION}, 24),
    "roberta": ({**BERT, "max_position_embeddings": 24}, 22),  # positions start after the padding id, 1
    "mpnet": ({**BERT, "max_position_embeddings": 24}, 22),
    "bert": ({**BERT, "max_position_embeddings": 24}, 24),
    "xlnet": ({"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 32}, 512),
    "gpt2": ({"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 24}, 24),
}


def text_model(kind, folder):
    """A small random model of a type, saved in the folder, and the maximum number of tokens."""
    sizes, max_tokens = TEXT_MODELS[kind]
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    model = AutoModel.from_config(AutoConfig.for_model(kind, **{"vocab_size": 99, **ids, **sizes})).eval()
    model.save_pretrained(folder)
    return model, max_tokens


@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_text_encoder_takes_the_text_part_of_a_pretrained_model(kind, tmp_path):
    original, max_tokens = text_model(kind, tmp_path)
    part = getattr(original, "text_model", original)
    part = original.get_encoder() if original.config.is_encoder_decoder else part
    encoder, projection = build_text_encoder(str(tmp_path), "mean", True, 99)
    ids = torch.randint(3, 99, (2, max_tokens))
    expected = part(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.mean(1)
    torch.testing.assert_close(encoder.eval()(ids, torch.ones_like(ids)), expected)
    assert (encoder.max_tokens, projection) == (max_tokens, None)


@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_text_encoder_of_each_type_is_checked_saved_and_loaded(kind, tmp_path, tiny_config, tokenizer):
    _, max_tokens = text_model(kind, tmp_path)
    config = tiny_config(text_encoder_model=str(tmp_path), text_layers=0, text_width=0, max_length=200)
    model = CLIP(config, tokenizer)
    check_model(model)
    save_model(model.eval(), tmp_path / "best")
    loaded = load_model(tmp_path / "best")
    assert model.max_length == loaded.max_length == min(max_tokens, 200)
    ids = torch.randint(3, len(tokenizer), (2, model.max_length))
    assert torch.equal(loaded.encode_text(ids, torch.ones_like(ids)), model.encode_text(ids, torch.ones_like(ids)))


def test_model_that_is_no_text_encoder_is_refused(tmp_path):
    AutoConfig.for_model("vit").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="text_encoder_model is .*, a model of type vit, which is not a text encoder"):
        build_text_encoder(str(tmp_path), "mean", False, 99)


def test_sizes_that_do_not_go_together_are_refused(tmp_path):
    text_model("bert", tmp_path)
    AutoConfig.for_model("bert", **{**BERT, "num_attention_heads": 3}).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="cannot be built with these sizes .*: change --text_layers or --text_width"):
        build_text_encoder(str(tmp_path), "mean", False, 99)


@pytest.mark.parametrize(
    ("kind", "first_token_is_enough"), [("gpt2", False), ("siglip", True), ("bert", True), ("bart", True)]
)
def test_first_token_of_a_causal_model_is_refused(kind, first_token_is_enough, tmp_path, tiny_config, tokenizer):
    text_model(kind, tmp_path)
    sizes = {"text_layers": 0, "text_width": 0}
    model = CLIP(tiny_config(text_encoder_model=str(tmp_path), text_pooling="cls", **sizes), tokenizer)
    if first_token_is_enough:
        check_model(model)
    else:
        with pytest.raises(InputError, match="text_pooling is cls, but the first token .*: pass --text_pooling mean"):
            check_model(model)


def change_weights(folder, change):
    state = change(load_file(folder / "model.safetensors"))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (lambda state: {f"enc.{name}": tensor for name, tensor in state.items()}, "embeddings.LayerNorm.bias and 36"),
        (lambda state: {k: v for k, v in state.items() if "layer.1." not in k}, "encoder.layer.1.attention.* and 15"),
        (lambda state: {k: v for k, v in state.items() if "pooler" not in k}, None),
        (lambda state: {f"bert.{name}": tensor for name, tensor in state.items()}, None),  # as in a BertForMaskedLM
    ],
    ids=["prefixed", "half of the layers", "no pooler", "with a head"],
)
def test_text_weights_must_be_complete(change, missing, tmp_path):
    original, _ = text_model("bert", tmp_path)
    change_weights(tmp_path, change)
    if missing:
        with pytest.raises(InputError, match=f"the weights of .* lack {missing} more tensors"):
            build_text_encoder(str(tmp_path), "mean", True, 99)
    else:
        encoder, _ = build_text_encoder(str(tmp_path), "mean", True, 99)
        ids = torch.randint(3, 99, (2, 7))
        torch.testing.assert_close(encoder.eval()(ids, ids // ids), original(ids).last_hidden_state.mean(1))


def test_encoder_of_an_encoder_decoder_without_its_decoder_is_complete(tmp_path):
    """As in Sentence-T5."""
    original, _ = text_model("t5", tmp_path)
    change_weights(tmp_path, lambda state: {k: v for k, v in state.items() if not k.startswith("decoder")})
    encoder, _ = build_text_encoder(str(tmp_path), "mean", True, 99)
    ids = torch.randint(3, 99, (2, 7))
    torch.testing.assert_close(encoder.eval()(ids, ids // ids), original.encoder(ids).last_hidden_state.mean(1))
    change_weights(tmp_path, lambda state: {k: v for k, v in state.items() if "SelfAttention.q" not in k})
    with pytest.raises(InputError, match=r"lack encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight and 0 more"):
        build_text_encoder(str(tmp_path), "mean", True, 99)


# ---- tokenizers, and errors while loading -----------------------------------------------------------------------


def test_tokenizer_pads_on_the_right(tokenizer, tmp_path):
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert load_tokenizer(tmp_path / "tokenizer").padding_side == "right"


@pytest.mark.parametrize("content", ["{", "{}", '{"version": "9.0"}', '{"added_tokens": [], "model": {"type": "?"}}'])
def test_damaged_tokenizer_is_refused(tokenizer, tmp_path, content):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="text_tokenizer is .* could not be loaded from this folder") as caught:
        load_tokenizer(tmp_path / "tokenizer")
    assert caught.value.__cause__ is not None


def test_damaged_weights_are_refused(tiny_clip):
    folder = Path(tiny_clip().folder)
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    for build in (
        lambda: build_image_encoder(str(folder), 32, True),
        lambda: build_text_encoder(folder, "cls", True, 9),
    ):
        with pytest.raises(InputError, match="could not be loaded from this folder") as caught:
            build()
        assert isinstance(caught.value.__cause__, SafetensorError)


def test_bugs_while_loading_are_not_input_errors():
    def load():
        raise AssertionError

    with pytest.raises(AssertionError):
        load_local_or_hub(load, "model_name", "resnet50", "another model")


def test_local_files_come_before_the_hub(monkeypatch):
    """Offline first; the hub is asked only if it answers, and its error replaces the local one."""
    offline = []

    def load():
        offline.append(constants.HF_HUB_OFFLINE)
        raise OSError(f"attempt {len(offline)}")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for reachable, attempts in ((False, [True]), (True, [True, False])):
        offline.clear()
        monkeypatch.setattr("utils.pretrained.hub_is_reachable", lambda reachable=reachable: reachable)
        with pytest.raises(InputError, match=rf"neither locally nor on the hub \(attempt {len(attempts)}\)"):
            load_local_or_hub(load, "model_name", "no/such-model", "another model")
        assert offline == attempts

"""A run with CLIP's architecture becomes transformers' CLIPModel again; other runs do not."""

import pytest
import torch
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

from clip import CLIP
from dataset import train_tokenizer
from extras import export, export_clip

CAPTIONS = ["a dog runs on the green grass", "two cats sit on a mat"]


@pytest.fixture
def clip_run(tiny_config, tmp_path):
    """`clip_run()`: a CLIPModel of transformers with random weights, and the `CLIP` loaded from its folder."""

    def make(activation="quick_gelu", **changes):
        shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
        text = {"vocab_size": 99, "hidden_size": 64, "max_position_embeddings": 30, **shape}
        text |= {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
        vision = {"hidden_size": 48, "image_size": 32, "patch_size": 8, "hidden_act": activation, **shape}
        original = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
        with torch.no_grad():
            for parameter in original.parameters():  # biases start at zero and norms at one, which hides errors
                parameter.add_(0.1 * torch.randn_like(parameter))
        original.save_pretrained(tmp_path / "clip")
        folder = str(tmp_path / "clip")
        settings = {"model_name": folder, "text_encoder_model": folder, "text_tokenizer": folder, "text_layers": 0}
        settings |= {"text_width": 0, "projection_dim": 24, "pretrained": True, "max_length": 30}
        config = tiny_config(**{**settings, **changes})
        return original, CLIP(config, train_tokenizer(CAPTIONS)).eval()

    return make


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_export_equals_the_model_it_was_loaded_from(clip_run, activation, tmp_path):
    original, model = clip_run(activation)
    images, tokens = export.example_inputs(model, 3)
    assert export_clip.save_clip_model(model, tmp_path / "out", images, tokens) < 1e-5
    loaded = CLIPModel.from_pretrained(tmp_path / "out").eval()
    for name, parameter in original.named_parameters():
        assert torch.allclose(loaded.get_parameter(name), parameter, atol=1e-6), name
    assert loaded.config.vision_config.hidden_act == activation


def test_tokenizer_and_image_processor_are_loaded_with_it(clip_run, tmp_path):
    _, model = clip_run()
    assert export.export_transformers(model, tmp_path) < 1e-5
    loaded, tokenizer = (
        CLIPModel.from_pretrained(tmp_path / "transformers").eval(),
        AutoTokenizer.from_pretrained(tmp_path / "transformers"),
    )
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "transformers")
    pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8)
    inputs = tokenizer([*CAPTIONS, CAPTIONS[0] * 5], truncation=True, padding=True, return_tensors="pt")
    with torch.no_grad():
        result = loaded(
            pixel_values=processor(pixels.numpy(), return_tensors="pt")["pixel_values"],
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
        )
        assert torch.allclose(result.image_embeds, model.encode_image(pixels.permute(2, 0, 1)[None]), atol=1e-5)
        expected = model.encode_text(inputs["input_ids"], inputs["attention_mask"])
        assert torch.allclose(result.text_embeds, expected, atol=1e-5)


def test_other_architectures_are_not_exported(clip_run, tiny_model, tmp_path):
    images, tokens = export.example_inputs(model := tiny_model(), 2)
    assert export_clip.save_clip_model(model, tmp_path / "out", images, tokens) is None
    assert export_clip.clip_model(clip_run(num_projection_layers=2)[1]) is None
    assert not (tmp_path / "out").exists()

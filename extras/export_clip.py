"""A run with CLIP's architecture as a `CLIPModel` of transformers; see extras/export.py."""

import copy

import torch
import transformers

from utils.pretrained import CLIP_VIT_NAMES

ACTIVATIONS = {"GELU": "gelu", "QuickGELU": "quick_gelu"}  # class names in timm


def clip_config(model):
    """The `CLIPConfig` of a trained CLIP, or None if it does not have CLIP's architecture.

    That is a ViT with a class token and a norm before its blocks, CLIP's Transformer for the captions, and linear
    projections without a bias.
    """
    backbone, text = model.image_encoder.backbone, model.text_encoder.backbone.config
    is_vit = type(backbone).__name__ == "VisionTransformer" and getattr(backbone, "global_pool", "") == "token"
    if not is_vit or isinstance(backbone.norm_pre, torch.nn.Identity) or text.model_type != "clip_text_model":
        return None
    heads = [model.image_projection.layers, model.text_projection.layers]
    activation = ACTIVATIONS.get(type(backbone.blocks[0].mlp.act).__name__)
    start, *_, end = model.tokenizer("a")["input_ids"]
    if activation is None or any(len(layers) != 2 or layers[-1].bias is not None for layers in heads) or end == 2:
        return None  # id 2: transformers would take the largest id for the end of the text
    vision = {
        "hidden_size": backbone.embed_dim,
        "intermediate_size": backbone.blocks[0].mlp.fc1.out_features,
        "num_hidden_layers": len(backbone.blocks),
        "num_attention_heads": backbone.blocks[0].attn.num_heads,
        "image_size": model.config.size,
        "patch_size": backbone.patch_embed.patch_size[0],
        "hidden_act": activation,
        "layer_norm_eps": backbone.norm.eps,
    }
    dim = heads[0][-1].out_features
    tokens = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": model.tokenizer.pad_token_id}
    text = {**text.to_dict(), **tokens, "projection_dim": dim}
    return transformers.CLIPConfig(
        text_config=text, vision_config={**vision, "projection_dim": dim}, projection_dim=dim
    )


def vision_weights(names, backbone):
    """The weights of timm's ViT under the names of transformers' image encoder, a dict of tensors.

    names: those of transformers without the prefix "vision_model.".
    """
    state, found = backbone.state_dict(), {}
    for name in names:
        timm_name = name
        for old, new in CLIP_VIT_NAMES.items():
            timm_name = timm_name.replace(old, new)
        part = next((k for k in "qkv" if f"self_attn.{k}_proj" in name), None)
        if part:  # timm has one matrix for queries, keys and values
            stacked = state[timm_name.replace(f"self_attn.{part}_proj", "attn.qkv")]
            found[name] = stacked.chunk(3)["qkv".index(part)]
        else:
            found[name] = state[timm_name]
    found["embeddings.class_embedding"] = found["embeddings.class_embedding"].flatten()
    found["embeddings.position_embedding.weight"] = found["embeddings.position_embedding.weight"][0]
    return found


def clip_model(model):
    """The `CLIPModel` with the weights of a trained CLIP, or None if it does not have CLIP's architecture."""
    config = clip_config(model)
    if config is None:
        return None
    found = transformers.CLIPModel(config).eval()
    names = [name for name, _ in found.vision_model.named_parameters()]
    weights = {f"vision_model.{k}": v for k, v in vision_weights(names, model.image_encoder.backbone).items()}
    weights |= {f"text_model.{k}": v for k, v in model.text_encoder.backbone.state_dict().items()}
    weights["visual_projection.weight"] = model.image_projection.layers[-1].weight
    weights["text_projection.weight"] = model.text_projection.layers[-1].weight
    weights["logit_scale"] = model.logit_scale
    missing = found.load_state_dict({name: x.detach().clone() for name, x in weights.items()}, strict=False)
    if missing.unexpected_keys or any("position_ids" not in name for name in missing.missing_keys):
        raise RuntimeError(f"the names of CLIPModel's weights have changed: {missing}")
    return found


@torch.no_grad()
def save_clip_model(model, folder, images, tokens):
    """Write a folder for `CLIPModel.from_pretrained` and `AutoTokenizer`.

    Returns the largest difference of a cosine between the model as loaded from there and `model`, for images (B, 3, S,
    S) in [0, 1] and tokens, ids and mask (T, L). None, and nothing is written, without CLIP's architecture.
    """
    found = clip_model(model)
    if found is None:
        return None
    found.save_pretrained(folder)
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.model_max_length = model.max_length
    tokenizer.save_pretrained(folder)
    loaded = transformers.CLIPModel.from_pretrained(folder).eval()
    pixels = (images - model.image_encoder.mean) / model.image_encoder.std
    result = loaded(pixel_values=pixels, input_ids=tokens[0], attention_mask=tokens[1])
    vectors = [torch.cat([result.image_embeds, result.text_embeds])]
    vectors.append(torch.cat([model.encode_image(images), model.encode_text(*tokens)]))
    cosines = [x @ x.T for x in vectors]
    return (cosines[0] - cosines[1]).abs().max().item()

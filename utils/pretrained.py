"""Pretrained encoders and tokenizers by name or folder: configs, and weights from disk or the Hugging Face hub."""

import pickle
from functools import partial
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import transformers
from huggingface_hub import constants, get_session
from huggingface_hub.errors import HTTPError, StrictDataclassError
from safetensors import SafetensorError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.layers import resample_abs_pos_embed
from transformers.utils import logging as transformers_logging

from config import InputError
from utils.cli import one_line
from utils.files import read_json
from utils.saved_model import default_text_config

DISTILBERT = "distilbert-base-uncased"
# The image encoders of Radford et al. 2021 (tables 19 and 20) in timm. The ResNets have the paper's three stem
# convolutions, anti-aliased strides and attention pooling; the released ViTs were trained with QuickGELU.
PAPER_ENCODERS = {f"RN{size}": f"resnet{size}_clip" for size in ("50", "101", "50x4", "50x16", "50x64")}
PAPER_ENCODERS |= {f"ViT-B/{patch}": f"vit_base_patch{patch}_clip_quickgelu_224" for patch in (32, 16)}
PAPER_ENCODERS["ViT-L/14"] = "vit_large_patch14_clip_quickgelu_224"
# Parameter names of transformers' CLIP image encoder, and timm's names that replace them, in this order
CLIP_VIT_NAMES = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.patch_embedding": "patch_embed.proj",
    "embeddings.position_embedding.weight": "pos_embed",
    "pre_layrnorm": "norm_pre",  # the spelling in transformers
    "post_layernorm": "norm",
    "encoder.layers": "blocks",
    "layer_norm": "norm",
    "self_attn.out_proj": "attn.proj",
}
# Texts that every tokenizer must take; the repetitions are slow for regular expressions like (a+)+
PROBES = ["a photo of two dogs", *(char * 64 + "!" for char in ("a", "1", ".", " ", "a "))]
NO_IMAGE_WEIGHTS = "pass --no-pretrained_image_encoder"
# What timm, transformers and huggingface_hub raise for missing, damaged or unsuitable files, or without a network
LOAD_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, ImportError)
LOAD_ERRORS += (SafetensorError, StrictDataclassError, HTTPError, pickle.UnpicklingError)


class PretrainedProjection(NamedTuple):
    """The linear projection of a pretrained CLIP encoder, and the temperature if it is known."""

    weight: torch.Tensor  # (D, F)
    bias: torch.Tensor | None = None  # (D,)
    logit_scale: float | None = None


def read_image_config(name):
    """The arguments of `ImageEncoder` except the size, as a JSON-compatible dict; raises InputError.

    `name` is one of PAPER_ENCODERS, a timm model, a folder in timm's layout, or the folder of a Hugging Face CLIPModel
    whose image encoder is a ViT; it becomes timm's ViT with the same dimensions.
    """
    if read_folder_config(name).get("model_type") != "clip":
        _, architecture, details = resolve_timm_name(name)
        mean, std = details.get("mean") or IMAGENET_DEFAULT_MEAN, details.get("std") or IMAGENET_DEFAULT_STD
        return {"architecture": architecture, "mean": list(mean), "std": list(std)}
    config = transformers.CLIPConfig.from_pretrained(name).vision_config
    if config.hidden_act not in ("quick_gelu", "gelu") or config.layer_norm_eps != 1e-5:
        found = f"activation {config.hidden_act} and layer_norm_eps {config.layer_norm_eps}"
        raise InputError(f"model_name is {name}, whose image encoder has {found}: use quick_gelu or gelu, and 1e-5")
    model_args = {"patch_size": config.patch_size, "embed_dim": config.hidden_size, "depth": config.num_hidden_layers}
    model_args |= {"num_heads": config.num_attention_heads, "act_layer": config.hidden_act}
    model_args["mlp_ratio"] = config.intermediate_size / config.hidden_size
    preprocessing = Path(name) / "preprocessor_config.json"
    details = read_json(preprocessing) if preprocessing.is_file() else {}
    mean, std = details.get("image_mean") or OPENAI_CLIP_MEAN, details.get("image_std") or OPENAI_CLIP_STD
    image_config = {"architecture": PAPER_ENCODERS["ViT-B/32"], "mean": list(mean), "std": list(std)}
    return {**image_config, "model_args": model_args}


def read_folder_config(name):
    """The config.json of a model's folder; {} if `name` is not a folder; raises InputError."""
    return read_json(Path(name) / "config.json") if Path(name).is_dir() else {}


def resolve_timm_name(name):
    """timm's own name or the folder, the architecture, and timm's description of the pretrained weights, a dict."""
    name = f"{PAPER_ENCODERS[name]}.openai" if name in PAPER_ENCODERS else name
    if Path(name).is_dir():
        content = read_folder_config(name)
        if "architecture" not in content:
            raise InputError(f"model_name is the folder {name}, without a config.json of timm or of a CLIPModel")
        architecture, details = content["architecture"], {**content, **content.get("pretrained_cfg", {})}
    else:
        architecture = name.split(".")[0]
        try:
            found = timm.get_pretrained_cfg(name, allow_unregistered=True)
        except RuntimeError:  # the model exists, but not the tag after the dot
            known = ", ".join(timm.list_pretrained(f"{architecture}.*")) or architecture
            raise InputError(f"model_name is {name!r}, for which timm only has {known}") from None
        details = found.to_dict() if found else {}
    if details.get("tag") == "openai" and "quickgelu" not in architecture:
        # timm also offers OpenAI's ViT weights in a model with the exact GELU; they were trained with QuickGELU.
        architecture = architecture.replace("_clip_", "_clip_quickgelu_")
    return name, architecture, details


def load_image_weights(backbone, name, size):
    """Load pretrained weights into a timm model; returns a CLIP's `PretrainedProjection` or None; raises InputError."""
    projection = None
    if read_folder_config(name).get("model_type") == "clip":
        model, missing = load_transformers_model(transformers.CLIPModel, name, "model_name", NO_IMAGE_WEIGHTS)
        check_missing(missing, name)
        state = convert_clip_vit(model.vision_model.state_dict())
        projection = PretrainedProjection(model.visual_projection.weight.detach())
    else:
        source, architecture, details = resolve_timm_name(name)
        num_classes = details["num_classes"] if details.get("tag") == "openai" else 0
        state = load_timm_state(source, architecture, size, num_classes)
        if num_classes:
            head = details["classifier"]
            projection = PretrainedProjection(state.pop(f"{head}.weight"), state.pop(f"{head}.bias"))
    own = backbone.state_dict()
    check_missing([key for key in own if key not in state and not key.endswith("num_batches_tracked")], name)
    for key in ("pos_embed", "head.pos_embed"):  # ([1,] 1 + grid^2, F) of a ViT, of attention pooling
        if key in own and own[key].shape != state[key].shape:
            grid = round((own[key].shape[-2] - 1) ** 0.5)
            positions = state[key].reshape(1, *state[key].shape[-2:])
            state[key] = resample_abs_pos_embed(positions, [grid, grid]).reshape(own[key].shape)
    backbone.load_state_dict(state)
    return projection


def load_timm_state(name, architecture, size, num_classes=0):
    """The pretrained weights of a timm model by name or folder, as a state dict."""
    options, config = {"pretrained": True, "num_classes": num_classes}, timm.get_pretrained_cfg(architecture)
    if config is not None and config.fixed_input_size and not architecture.startswith("resnet"):
        options["img_size"] = size  # timm resamples the positions, but not in the ResNets with attention pooling
    load = partial(timm.create_model, f"local-dir:{name}" if Path(name).is_dir() else name, **options)
    return load_local_or_hub(load, "model_name", name, NO_IMAGE_WEIGHTS, "model.safetensors").state_dict()


def convert_clip_vit(state):
    """The weights of a Hugging Face CLIP image encoder under the names of timm's ViT."""
    converted = {}
    for name, tensor in state.items():
        if ".self_attn.k_proj." in name or ".self_attn.v_proj." in name:
            continue  # concatenated with q
        if ".self_attn.q_proj." in name:
            tensor = torch.cat([state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
            name = name.replace("self_attn.q_proj", "attn.qkv")
        for old, new in CLIP_VIT_NAMES.items():
            name = name.replace(old, new)
        converted[name] = tensor.detach()
    converted["cls_token"] = converted["cls_token"].reshape(1, 1, -1)  # (F,) -> (1, 1, F)
    converted["pos_embed"] = converted["pos_embed"].unsqueeze(0)  # (1 + grid^2, F) -> (1, 1 + grid^2, F)
    return converted


def load_text_config(name):
    """The Hugging Face config of a text encoder by name or folder; raises InputError."""
    if name == DISTILBERT:  # the defaults of its class: no download
        return transformers.DistilBertConfig()
    if name == "transformer":  # 12 layers, 512 wide, 8 heads: the defaults too; 76 tokens as in the paper's section 2.4
        return transformers.CLIPTextConfig(max_position_embeddings=76)
    load = partial(transformers.AutoConfig.from_pretrained, name, trust_remote_code=False)
    return load_local_or_hub(load, "text_encoder_model", name, f"pass --text_encoder_model {DISTILBERT}")


def check_text_config(config, name):
    """Raise InputError unless a transformers config is that of a text encoder."""
    if default_text_config(config.model_type) is None:
        kind = f"text_encoder_model is {str(name)!r}, a model of type {config.model_type}"
        raise InputError(f"{kind}, which is not a text encoder: use another one, such as {DISTILBERT}")


def load_text_backbone(name):
    """The pretrained text model of a name or folder, and a CLIP's `PretrainedProjection` or None; raises InputError."""
    model_type = load_text_config(name).model_type
    clip_classes = {"clip": "CLIPModel", "clip_text_model": "CLIPTextModelWithProjection"}
    model_class = getattr(transformers, clip_classes.get(model_type, "AutoModel"))
    model, missing = load_transformers_model(
        model_class, name, "text_encoder_model", "pass --no-pretrained_text_encoder"
    )
    backbone = text_part(model)
    if model_type not in clip_classes:
        prefix = next(path for path, module in model.named_modules() if module is backbone)  # "" or "encoder"
        # The pooler, a layer on the first token, is not used here and lacks in many files.
        check_missing({key for key in missing if key.startswith(prefix) and "pooler" not in key}, name)
        check_text_config(backbone.config, name)
        return backbone, None
    if model_type == "clip_text_model" and missing == {"text_projection.weight"}:
        return backbone, None  # a CLIPTextModel, saved without projection: the head is trained from scratch
    check_missing(missing, name)
    logit_scale = model.logit_scale.item() if model_type == "clip" else None
    return backbone, PretrainedProjection(model.text_projection.weight.detach(), None, logit_scale)


def text_part(model):
    """The text encoder of a transformers model: the encoder of an encoder-decoder, the text model of a dual encoder."""
    default = default_text_config(model.config.model_type)  # the copy of the config in an encoder does not tell
    if default is None or not default.is_encoder_decoder:
        return getattr(model, "text_model", model)
    encoder = model.get_encoder()
    encoder.config = getattr(encoder, "config", model.config)
    return encoder


def load_transformers_model(model_class, name, setting, alternative):
    """A pretrained model by name or folder, and the set of parameter names that its files lack; raises InputError."""
    options = {"use_safetensors": True, "dtype": torch.float32, "trust_remote_code": False}
    transformers_logging.disable_progress_bar()  # of loading weights, which takes a moment
    transformers_logging.set_verbosity_error()  # no table of missing and unused weights: the missing ones are checked
    load = partial(model_class.from_pretrained, name, output_loading_info=True, **options)
    model, info = load_local_or_hub(load, setting, name, alternative, "*.safetensors")
    return model, set(info["missing_keys"])


def load_tokenizer(name, setting="text_tokenizer", alternative="pass --text_tokenizer wordpiece"):
    """The Hugging Face tokenizer of a model by name or folder, padding on the right; raises InputError."""

    def load():
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
            raise ValueError(f"it is a {type(tokenizer).__name__}")
        try:
            tokenizer(PROBES, verbose=False)
        except BaseException as error:  # of the tokenizers library: a regular expression that takes too long
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(one_line(error)) from None
        return tokenizer

    tokenizer = load_local_or_hub(load, setting, name, alternative)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise InputError(f"{setting} is {str(name)!r}, which has no padding token: use another tokenizer")
        tokenizer.pad_token = tokenizer.eos_token  # masked, so any token will do
    tokenizer.padding_side = "right"  # `TextEncoder` relies on it
    return tokenizer


def check_missing(missing, name):
    if missing:
        raise InputError(f"the weights of {name} lack {sorted(missing)[0]} and {len(missing) - 1} more tensors")


def load_local_or_hub(load, setting, name, alternative, weights=None):
    """The result of `load()` from local files if possible, else from the hub; raises InputError.

    Without a network the hub's client retries for up to a minute per file; here a short request comes first. A folder
    must contain files that match `weights`: loading a pickle could run code.
    """
    is_folder, was_offline, failure = Path(name).is_dir(), constants.HF_HUB_OFFLINE, None
    if is_folder and weights and not list(Path(name).glob(weights)):
        raise InputError(f"{setting} is the folder {name}, without {weights} (pickled weights are not read)")
    for offline in (True, False):
        if failure and (is_folder or was_offline or not hub_is_reachable()):
            break
        constants.HF_HUB_OFFLINE = offline
        try:
            return load()
        except Exception as error:
            # The tokenizers library raises a bare Exception for a damaged file. Other errors are bugs.
            if not isinstance(error, LOAD_ERRORS) and type(error) is not Exception:
                raise
            failure = error
        finally:
            constants.HF_HUB_OFFLINE = was_offline
    problem = "could not be loaded from this folder" if is_folder else "was found neither locally nor on the hub"
    advice = f"use a local folder that contains it, or {alternative}"
    raise InputError(f"{setting} is {str(name)!r}, which {problem} ({one_line(failure)}): {advice}") from failure


def hub_is_reachable():
    """Whether the hub answers within five seconds."""
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except LOAD_ERRORS:
        return False
    return True

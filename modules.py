"""The encoders and the projection heads.

Shapes: B images, T captions, L tokens, C/H/W channels, height and width, F width of an encoder's feature,
D width of the shared space, N pictures of a gallery.
"""

import contextlib
import json
from pathlib import Path

import timm
import torch
from torch import nn

from config import InputError

# ImageNet's, for image encoders that do not say what they expect
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DISTILBERT = "distilbert-base-uncased"


class ImageEncoder(nn.Module):
    """A timm image model without its classifier: (B, 3, H, W) float in [0, 1] -> (B, F)."""

    def __init__(self, architecture, size, mean=MEAN, std=STD, model_args=None):
        super().__init__()
        self.backbone = build_timm(architecture, size, **(model_args or {}))
        self.width = getattr(self.backbone, "head_hidden_size", None) or self.backbone.num_features
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images):
        return self.backbone((images - self.mean) / self.std)


class TextEncoder(nn.Module):
    """A Hugging Face text encoder with pooling: (T, L) token ids and mask -> (T, F)."""

    def __init__(self, backbone, pooling):
        super().__init__()
        self.backbone, self.pooling = backbone, pooling
        self.width = backbone.config.hidden_size
        self.max_tokens = getattr(backbone.config, "max_position_embeddings", None) or 512

    def forward(self, input_ids, attention_mask):
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (T, L, F)
        if self.pooling == "cls":
            return hidden[:, 0]
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)  # (T, L, F) -> (T, F)


class ProjectionHead(nn.Module):
    """From an encoder's feature to the shared space: (., F) -> (., D).

    One layer is the linear projection of the paper (no bias); more have GELU between them.
    """

    def __init__(self, width, dim, num_layers=1, dropout=0.0):
        super().__init__()
        layers = []
        for _ in range(num_layers - 1):
            layers += [nn.Dropout(dropout), nn.Linear(width, dim), nn.GELU()]
            width = dim
        self.layers = nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(width, dim, bias=False))

    def forward(self, features):
        return self.layers(features)


# ---- image encoders by name -------------------------------------------------------------------------------------


def build_timm(architecture, size, **model_args):
    """A randomly initialised timm model without classifier, made for `size` pixels; raises InputError."""
    if not timm.is_model(architecture.split(".")[0]):
        near = timm.list_models(f"*{architecture.split('.')[0]}*")[:3] or ["resnet50"]
        raise InputError(f"model_name is {architecture!r}, which timm does not know; try {', '.join(near)} or a folder")
    config = timm.get_pretrained_cfg(architecture.split(".")[0])
    if config is not None and config.fixed_input_size:
        model_args["img_size"] = size
    # A width of the shared space is the projection head's business.
    return timm.create_model(architecture.split(".")[0], pretrained=False, num_classes=0, **model_args)


def load_image_encoder(name, size, pretrained):
    """An `ImageEncoder` and what is needed to build it again without a network; raises InputError."""
    folder = Path(name)
    if folder.is_dir():
        architecture, details = read_timm_folder(folder)
    else:
        architecture = name
        build_timm(name, size) if not timm.is_model(name.split(".")[0]) else None
        found = timm.get_pretrained_cfg(name, allow_unregistered=True)
        details = found.to_dict() if found else {}
    recipe = {
        "architecture": architecture.split(".")[0],
        "mean": list(details.get("mean") or MEAN),
        "std": list(details.get("std") or STD),
    }
    encoder = ImageEncoder(recipe["architecture"], size, recipe["mean"], recipe["std"])
    if pretrained:
        state = pretrained_timm_state(name, size)
        own = encoder.backbone.state_dict()
        missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
        if missing:
            raise InputError(f"the weights of {name} lack {missing[0]} and {len(missing) - 1} more tensors")
        encoder.backbone.load_state_dict(state)
    return encoder, recipe


def read_timm_folder(folder):
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return content["architecture"], content.get("pretrained_cfg", content)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"model_name is the folder {folder}, without a timm config.json ({error!r})") from None


def pretrained_timm_state(name, size):
    """The pretrained weights of a timm model by name or folder, as a state dict."""
    source = f"local-dir:{name}" if Path(name).is_dir() else name
    if Path(name).is_dir() and not (Path(name) / "model.safetensors").is_file():
        raise InputError(f"model_name is the folder {name}, without model.safetensors (pickled weights are not read)")
    config = timm.get_pretrained_cfg(name.split(".")[0]) if not Path(name).is_dir() else None
    extra = {"img_size": size} if config is not None and config.fixed_input_size else {}

    def load():
        return timm.create_model(source, pretrained=True, num_classes=0, **extra).state_dict()

    return from_cache_or_network(load, "model_name", name, "--pretrained_image_encoder false")


# ---- text encoders by name --------------------------------------------------------------------------------------


def load_text_encoder(name, pooling, pretrained, vocab_size, layers=0, width=0):
    """A `TextEncoder` from pretrained weights, or from scratch in the shape of `name`; raises InputError."""
    from transformers import AutoModel

    if pretrained:
        if Path(name).is_dir() and not list(Path(name).glob("*.safetensors")):
            raise InputError(f"text_encoder_model is {name}, a folder without *.safetensors (pickles are not read)")

        def load(**options):
            return AutoModel.from_pretrained(name, use_safetensors=True, dtype=torch.float32, **options)

        backbone = from_cache_or_network(load, "text_encoder_model", name, "--pretrained_text_encoder false")
        if vocab_size > backbone.get_input_embeddings().num_embeddings:
            raise InputError(f"text_tokenizer has {vocab_size} tokens, more than {name} knows: give {name}'s own")
        return TextEncoder(backbone, pooling)
    config = load_text_config(name)
    config.vocab_size = vocab_size
    if layers:
        config.num_hidden_layers = layers
    if width:
        config.hidden_size, config.num_attention_heads = width, width // 64
        setattr(config, "hidden_dim" if config.model_type == "distilbert" else "intermediate_size", 4 * width)
    return TextEncoder(build_text_backbone(config), pooling)


def load_text_config(name):
    """The Hugging Face config of a text encoder by name or folder."""
    from transformers import AutoConfig, DistilBertConfig

    if name == DISTILBERT:  # its config is the class's defaults: nothing to fetch
        return DistilBertConfig()

    def load(**options):
        return AutoConfig.from_pretrained(name, **options)

    return from_cache_or_network(load, "text_encoder_model", name, f"--text_encoder_model {DISTILBERT}")


def build_text_backbone(config):
    """A randomly initialised text model of a Hugging Face config (an object, or the dict a run saved)."""
    from transformers import AutoConfig, AutoModel

    if isinstance(config, dict):
        config = AutoConfig.for_model(**config)
    return AutoModel.from_config(config)


def load_tokenizer(name):
    """The Hugging Face tokenizer of a model by name or folder; raises InputError."""
    from transformers import AutoTokenizer

    def load(**options):
        return AutoTokenizer.from_pretrained(name, **options)

    return from_cache_or_network(load, "text_tokenizer", name, "--text_tokenizer captions")


# ---- local files first, then the network ------------------------------------------------------------------------


def from_cache_or_network(load, setting, name, instead):
    """The result of `load()` from local files if they are there, else over the network; raises InputError.

    The hub's own code retries for a minute without a network; here one short request decides.
    """
    try:
        with hub_offline():
            return load()
    except Exception as error:  # whatever the libraries raise for "not here"
        local_error = error
    if not Path(name).is_dir() and hub_answers():
        try:
            return load()
        except Exception as error:
            local_error = error
    reason = str(local_error).strip().splitlines()[:1]
    where = "could not be loaded from that folder" if Path(name).is_dir() else "is neither here nor to be fetched"
    raise InputError(
        f"{setting} is {name!r}, which {where} ({reason[0][:120] if reason else type(local_error).__name__}): "
        f"give a local folder that holds it, or {instead}"
    ) from None


@contextlib.contextmanager
def hub_offline():
    """Within it, the Hugging Face libraries read local files only."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def hub_answers():
    """True if the model hub can be reached within a few seconds."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
        return True
    except Exception:
        return False

"""Encoders and projection heads.

Shapes: B images, T captions, L tokens, C/H/W channels, height and width, F feature width of an encoder, D width of
the shared space, N images of a gallery.
"""

from types import SimpleNamespace

import timm
import torch
import transformers
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import AttentionPool2d
from timm.models import group_parameters
from torch import nn

from config import InputError
from utils.cli import one_line
from utils.model_checks import size_error
from utils.pretrained import (
    PAPER_ENCODERS,
    check_text_config,
    load_image_weights,
    load_text_backbone,
    load_text_config,
    read_image_config,
    text_part,
)

# Captions encoded at once on a CPU, times the encoder's width. Measured on two cores, forward and backward: for
# DistilBERT (width 768), 16 was faster than 8 and 32; for width 128, 64 and 320 were faster than 16 and 32.
CPU_CAPTIONS_TIMES_WIDTH = 16 * 768
# Models of transformers that take a ready mask. They read a (T, L) mask, because they need none where nothing is
# padded, and the host would wait for the GPU.
READY_MASK = ("albert", "bert", "distilbert", "electra", "roberta", "xlm-roberta")


class ImageEncoder(nn.Module):
    """A timm image model without its classifier: (B, 3, H, W) uint8, or float in [0, 1] -> (B, F)."""

    def __init__(self, architecture, size, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, model_args=None):
        super().__init__()
        self.backbone = build_timm_model(architecture, size, **(model_args or {}))
        self.width = getattr(self.backbone, "head_hidden_size", None) or self.backbone.num_features
        # Attention pooling ends in a linear layer with a bias; without a classifier that layer is the projection.
        self.projection_bias = isinstance(getattr(self.backbone, "head", None), AttentionPool2d)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images):
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        return self.backbone((images - self.mean) / self.std)  # (B, 3, H, W) -> (B, F)


class TextEncoder(nn.Module):
    """A text model with pooling: (T, L) token ids and attention mask, padded on the right -> (T, F).

    `pooling`: the `mean` of the tokens, the first (`cls`) or the last (`end`). CLIP's Transformer always takes the
    last: with its causal mask, only the end-of-text token attends to the whole caption.
    """

    def __init__(self, backbone, pooling):
        super().__init__()
        self.backbone = backbone
        self.pooling = {"clip_text_model": "end", "cbow": "mean"}.get(backbone.config.model_type, pooling)
        self.width = backbone.config.hidden_size
        self.max_tokens = max_positions(backbone)

    @property
    def model_config(self):
        """The dict from which `build_text_backbone` rebuilds the backbone."""
        config = self.backbone.config
        return vars(config) if isinstance(config, SimpleNamespace) else config.to_dict()

    def forward(self, input_ids, attention_mask, parts=None):
        """Captions of similar length are encoded together.

        parts: the sizes of such groups of consecutive captions, (captions, tokens) each. On a CPU they are formed here;
        on a GPU, reading the lengths would stall.
        """
        if parts:
            inputs = zip(
                *(x.split([rows for rows, _ in parts]) for x in (input_ids, attention_mask)), parts, strict=True
            )
            return torch.cat([self.encode(ids[:, :length], mask[:, :length]) for ids, mask, (_, length) in inputs])
        if input_ids.device.type != "cpu":
            return self.encode(input_ids, attention_mask)
        lengths = attention_mask.sum(1)
        order = lengths.argsort(stable=True)
        features = []
        for rows in order.split(max(1, CPU_CAPTIONS_TIMES_WIDTH // self.width)):
            longest = lengths[rows[-1]]
            features.append(self.encode(input_ids[rows, :longest], attention_mask[rows, :longest]))
        return torch.cat(features)[order.argsort()]

    def encode(self, input_ids, attention_mask):
        mask = attention_mask if input_ids.device.type == "cpu" else self.ready_mask(attention_mask)
        hidden = self.backbone(input_ids=input_ids, attention_mask=mask).last_hidden_state  # (T, L, F)
        if self.pooling == "cls":
            return hidden[:, 0]  # (T, L, F) -> (T, F)
        if self.pooling == "end":
            # From the mask and not from the token id: CLIP's tokenizer also pads with the end-of-text token.
            return hidden[torch.arange(len(hidden), device=hidden.device), attention_mask.sum(1) - 1]
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)  # (T, L) -> (T, L, 1)
        return (hidden * weights).sum(1) / weights.sum(1)  # (T, L, F) -> (T, F)

    def ready_mask(self, attention_mask):
        """The mask of the backbone's attention, (T, L) -> (T, 1, 1, L) boolean, or None for a causal one."""
        config = self.backbone.config
        if config.model_type == "clip_text_model":
            return None  # the padding is on the right, where no token but padding sees it
        if config.model_type in READY_MASK and config._attn_implementation == "sdpa":
            return attention_mask[:, None, None, :].bool()
        return attention_mask


def max_positions(backbone):
    """The maximum number of tokens of a text model; 512 if it has no limit."""
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1  # RoBERTa's positions start after the padding id
    limit = getattr(backbone.config, "max_position_embeddings", None) or 0
    return limit if limit > 0 else 512  # XLNet: -1


class CBOW(nn.Module):
    """Continuous bag of words: one embedding per token, (T, L) ids -> (T, L, F); mean pooling ignores order."""

    def __init__(self, vocab_size, hidden_size):
        super().__init__()
        self.config = SimpleNamespace(model_type="cbow", vocab_size=vocab_size, hidden_size=hidden_size)
        self.vectors = nn.Embedding(vocab_size, hidden_size)
        nn.init.normal_(self.vectors.weight, std=0.02)  # as the token embeddings of CLIP's Transformer

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(last_hidden_state=self.vectors(input_ids))  # (T, L) -> (T, L, F)


class ProjectionHead(nn.Module):
    """Maps an encoder's features to the shared space, (., F) -> (., D); one layer is the paper's linear projection."""

    def __init__(self, width, dim, num_layers=1, dropout=0.0, bias=False):
        super().__init__()
        layers = []
        for _ in range(num_layers - 1):
            layers += [nn.Dropout(dropout), nn.Linear(width, dim), nn.GELU()]
            width = dim
        self.layers = nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(width, dim, bias=bias))

    def forward(self, features):
        return self.layers(features)  # (., F) -> (., D)


def build_image_encoder(name, size, pretrained):
    """An `ImageEncoder` by name, its config, and the `PretrainedProjection` of a pretrained CLIP (else None).

    `ImageEncoder(size=size, **image_config)` rebuilds the encoder without a download. Raises InputError.
    """
    image_config = read_image_config(name)
    try:
        encoder = ImageEncoder(size=size, **image_config)
    except InputError:
        raise
    except Exception as error:  # timm has no class of its own for a size that does not fit
        raise size_error(ImageEncoder, name, size, image_config, error) from error
    projection = load_image_weights(encoder.backbone, name, size) if pretrained else None
    return encoder, image_config, projection


def build_timm_model(architecture, size, **model_args):
    """A randomly initialised timm model without a classifier, for images of `size` pixels; raises InputError."""
    if not timm.is_model(architecture):
        names = ", ".join([*timm.list_models(f"*{architecture}*")[:3], *PAPER_ENCODERS])
        raise InputError(f"model_name is {architecture!r}, which is not a timm model: try a folder or {names}")
    config = timm.get_pretrained_cfg(architecture)
    if config is not None and config.fixed_input_size:
        model_args["img_size"] = size
    # num_classes=0 also omits CLIP's projection, which is a `ProjectionHead` here.
    model = timm.create_model(architecture, pretrained=False, num_classes=0, **model_args)
    step = getattr(getattr(model, "patch_embed", None), "patch_size", None) or 1
    if isinstance(getattr(model, "head", None), AttentionPool2d):
        step = 32  # its position embeddings require a resolution divisible by 32
    step = max(step) if isinstance(step, tuple) else step
    if size % step:
        nearest = max(step, round(size / step) * step)
        raise InputError(f"size is {size}, but {architecture} needs a multiple of {step}: pass --size {nearest}")
    return model


def freeze_stages(backbone, count):
    """Freeze the first stages of a timm model; its stem is the first one. Raises InputError if none would be left."""
    stages = group_parameters(backbone, backbone.group_matcher(coarse=True)) if count else {}
    if count and count >= len(stages):
        raise InputError(f"frozen_stages is {count}, but the image encoder has {len(stages)}: use a lower number")
    for stage in sorted(stages)[:count]:
        for name in stages[stage]:
            backbone.get_parameter(name).requires_grad_(False)


def build_text_encoder(name, pooling, pretrained, vocab_size, layers=0, width=0):
    """A `TextEncoder` by name, and the `PretrainedProjection` of a pretrained CLIP (else None).

    `name` is the paper's `transformer` or `cbow`, or a Hugging Face model or its folder. Without pretrained weights
    `vocab_size`, `layers` and `width` replace the sizes in the config of `name` (0: unchanged). Raises InputError.
    """
    if not pretrained:
        try:
            config = scratch_text_config(name, vocab_size, layers, width)
            return TextEncoder(build_text_backbone(config), pooling), None
        except InputError:
            raise
        except Exception as error:  # transformers has no class of its own for sizes that do not go together
            message = f"text_encoder_model is {name}, which cannot be built with these sizes ({one_line(error)})"
            raise InputError(f"{message}: change --text_layers or --text_width, or use another one") from error
    backbone, projection = load_text_backbone(name)
    if vocab_size > backbone.config.vocab_size:
        raise InputError(f"text_tokenizer has {vocab_size} tokens, more than {name} has embeddings: use {name}'s own")
    return TextEncoder(backbone, pooling), projection


def scratch_text_config(name, vocab_size, layers, width):
    """The config of a text encoder trained from scratch: that of `name`, with the given sizes (0: unchanged)."""
    if name == "cbow":
        if layers:
            raise InputError(f"text_layers is {layers}, but text_encoder_model cbow has no layers: omit --text_layers")
        return {"model_type": "cbow", "vocab_size": vocab_size, "hidden_size": width or 512}
    config = load_text_config(name)
    config = getattr(config, "text_config", config)  # of a dual encoder
    check_text_config(config, name)
    config.vocab_size = vocab_size
    if (getattr(config, "pad_token_id", None) or 0) >= vocab_size:
        config.pad_token_id = 0
    config.dtype = None  # that of published weights is often half precision
    if layers:
        config.num_hidden_layers = layers
    if width:
        config.hidden_size, config.num_attention_heads = width, width // 64
        setattr(config, "hidden_dim" if config.model_type == "distilbert" else "intermediate_size", 4 * width)
    return config


def build_text_backbone(config):
    """A randomly initialised text model built from a config, or from the dict `TextEncoder.model_config`."""
    if isinstance(config, dict):
        if config["model_type"] == "cbow":
            return CBOW(config["vocab_size"], config["hidden_size"])
        config = transformers.AutoConfig.for_model(**config)
    if config.model_type == "clip_text_model":
        # The inner model's parameter names are the same in all versions of transformers, the outer one's are not.
        return text_part(transformers.CLIPTextModelWithProjection(config))
    if type(config) in transformers.MODEL_MAPPING:
        return text_part(transformers.AutoModel.from_config(config, trust_remote_code=False))
    # The text models of most dual encoders have no AutoModel.
    return text_part(getattr(transformers, type(config).__name__.replace("Config", "Model"))(config))

"""The encoders and the projection heads.

Shapes: B images, T captions, L tokens, C/H/W channels, height and width, F width of an encoder's feature,
D width of the shared space, N pictures of a gallery.
"""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import timm
import torch
from timm.layers import AttentionPool2d, resample_abs_pos_embed
from torch import nn

from config import InputError, read_json

# ImageNet's, for image encoders that do not say what they expect
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# OpenAI's, for CLIP folders that do not say what they expect
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DISTILBERT = "distilbert-base-uncased"

# The image encoders of Radford et al. 2021 (tables 19 and 20) in timm. The ResNets have the paper's three stem
# convolutions, anti-aliased strides and attention pooling; the released ViTs were trained with QuickGELU.
PAPER_IMAGE_ENCODERS = {
    "RN50": "resnet50_clip",
    "RN101": "resnet101_clip",
    "RN50x4": "resnet50x4_clip",
    "RN50x16": "resnet50x16_clip",
    "RN50x64": "resnet50x64_clip",
    "ViT-B/32": "vit_base_patch32_clip_quickgelu_224",
    "ViT-B/16": "vit_base_patch16_clip_quickgelu_224",
    "ViT-L/14": "vit_large_patch14_clip_quickgelu_224",
}
PRETRAINED = {"model_name": "--pretrained_image_encoder", "text_encoder_model": "--pretrained_text_encoder"}

# Captions encoded at once on a CPU, times the encoder's width. Measured on two cores, forward and backward: of 8, 16
# and 32 captions 16 were the fastest for DistilBERT, 768 wide; of 16, 32, 64 and 320 the last two for 128 wide.
CPU_CAPTIONS_TIMES_WIDTH = 16 * 768


class ImageEncoder(nn.Module):
    """A timm image model without its classifier: (B, 3, H, W) float in [0, 1] -> (B, F)."""

    def __init__(self, architecture, size, mean=MEAN, std=STD, model_args=None):
        super().__init__()
        self.backbone = build_timm(architecture, size, **(model_args or {}))
        self.width = getattr(self.backbone, "head_hidden_size", None) or self.backbone.num_features
        # Attention pooling ends in a linear layer with a bias; without a classifier it is the projection.
        self.projection_bias = isinstance(getattr(self.backbone, "head", None), AttentionPool2d)
        check_size(self.backbone, architecture, size)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images):
        return self.backbone((images - self.mean) / self.std)


class TextEncoder(nn.Module):
    """A text encoder with pooling: (T, L) token ids and mask, padded on the right -> (T, F).

    Pooling is the `mean` of the tokens, the first (`cls`) or the last (`end`). CLIP's Transformer always takes the
    last: with its causal mask only the end-of-text token has seen the whole caption.
    """

    def __init__(self, backbone, pooling):
        super().__init__()
        self.backbone = backbone
        self.pooling = {"clip_text_model": "end", "cbow": "mean"}.get(backbone.config.model_type, pooling)
        self.width = backbone.config.hidden_size
        self.max_tokens = getattr(backbone.config, "max_position_embeddings", None) or 512

    @property
    def recipe(self):
        """What `build_text_backbone` needs to build the backbone again, as a dict."""
        config = self.backbone.config
        return vars(config) if isinstance(config, SimpleNamespace) else config.to_dict()

    def forward(self, input_ids, attention_mask):
        """On a CPU, captions of like length are encoded together; a GPU would lose more by waiting for the lengths."""
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
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (T, L, F)
        if self.pooling == "cls":
            return hidden[:, 0]
        if self.pooling == "end":
            # By the mask and not by the token's id: CLIP's tokenizer pads with the end-of-text token itself.
            return hidden[torch.arange(len(hidden), device=hidden.device), attention_mask.sum(1) - 1]
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)  # (T, L, F) -> (T, F)


class WordVectors(nn.Module):
    """CBOW: a vector for each token, (T, L) ids -> (T, L, F); their mean knows nothing of their order."""

    def __init__(self, vocab_size, hidden_size):
        super().__init__()
        self.config = SimpleNamespace(model_type="cbow", vocab_size=vocab_size, hidden_size=hidden_size)
        self.vectors = nn.Embedding(vocab_size, hidden_size)
        nn.init.normal_(self.vectors.weight, std=0.02)  # as CLIP's Transformer starts its token embeddings

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(last_hidden_state=self.vectors(input_ids))


class ProjectionHead(nn.Module):
    """From an encoder's feature to the shared space: (., F) -> (., D).

    One layer is the linear projection of the paper; more have GELU between them. The last has a bias only where
    the released CLIP has one, after attention pooling.
    """

    def __init__(self, width, dim, num_layers=1, dropout=0.0, bias=False):
        super().__init__()
        layers = []
        for _ in range(num_layers - 1):
            layers += [nn.Dropout(dropout), nn.Linear(width, dim), nn.GELU()]
            width = dim
        self.layers = nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(width, dim, bias=bias))

    def forward(self, features):
        return self.layers(features)


class Released(NamedTuple):
    """What a released CLIP has beside an encoder: its linear projection, and the temperature where it is known."""

    weight: torch.Tensor  # (D, F)
    bias: torch.Tensor | None = None  # (D,)
    logit_scale: float | None = None


# ---- image encoders by name -------------------------------------------------------------------------------------


def build_timm(architecture, size, **model_args):
    """A randomly initialised timm model without classifier, made for `size` pixels; raises InputError."""
    if not timm.is_model(architecture):
        near = timm.list_models(f"*{architecture}*")[:3] or ["resnet50"]
        raise InputError(
            f"model_name is {architecture!r}, which timm does not know; try {', '.join(near)}, a folder, "
            f"or one of {', '.join(PAPER_IMAGE_ENCODERS)}"
        )
    config = timm.get_pretrained_cfg(architecture)
    if config is not None and config.fixed_input_size:
        model_args["img_size"] = size
    # A width of the shared space is the projection head's business.
    return timm.create_model(architecture, pretrained=False, num_classes=0, **model_args)


def check_size(backbone, architecture, size):
    """Raise InputError where timm would fail on pictures of `size` pixels, or leave a margin of them unseen."""
    step = getattr(getattr(backbone, "patch_embed", None), "patch_size", None) or 1
    if isinstance(getattr(backbone, "head", None), AttentionPool2d):
        step = 32  # five halvings, each of an even number
    step = max(step) if isinstance(step, tuple) else step
    if size % step:
        near = max(1, round(size / step)) * step
        raise InputError(f"size is {size}: {architecture} takes multiples of {step}; give --size {near}")


def load_image_encoder(name, size, pretrained):
    """An `ImageEncoder`, what is needed to build it again without a network, and a CLIP's `Released` projection.

    `name` is one of PAPER_IMAGE_ENCODERS, a timm model, a folder in timm's layout or that of a Hugging Face CLIPModel
    whose image encoder is a ViT. The projection is None unless the weights are a CLIP's: OpenAI's, or that folder's.
    Raises InputError.
    """
    if read_folder_config(name).get("model_type") == "clip":
        return load_clip_folder_vit(name, size, pretrained)
    architecture, details = describe_timm(name)
    recipe = {
        "architecture": architecture,
        "mean": list(details.get("mean") or MEAN),
        "std": list(details.get("std") or STD),
    }
    encoder, released = ImageEncoder(size=size, **recipe), None
    if pretrained:
        source = f"{PAPER_IMAGE_ENCODERS[name]}.openai" if name in PAPER_IMAGE_ENCODERS else name
        if details.get("tag") == "openai" and details["num_classes"]:
            state = pretrained_timm_state(source, architecture, size, details["num_classes"])
            head = details["classifier"]
            released = Released(state.pop(f"{head}.weight"), state.pop(f"{head}.bias"))
        else:
            state = pretrained_timm_state(source, architecture, size)
        load_image_weights(encoder, state, name)
    return encoder, recipe, released


def describe_timm(name):
    """The timm architecture of a paper's name, timm's name or folder, and what timm notes about its weights."""
    if name in PAPER_IMAGE_ENCODERS:
        architecture = PAPER_IMAGE_ENCODERS[name]
        return architecture, timm.get_pretrained_cfg(f"{architecture}.openai").to_dict()
    if Path(name).is_dir():
        content = read_folder_config(name)
        if "architecture" not in content:
            raise InputError(f"model_name is the folder {name}, without a config.json of timm or of a CLIPModel")
        architecture = content["architecture"]
        details = {**content, **content.get("pretrained_cfg", {})}
    else:
        architecture = name.split(".")[0]
        try:
            found = timm.get_pretrained_cfg(name, allow_unregistered=True)
        except RuntimeError:  # timm knows the model, but not what stands after its dot
            known = ", ".join(timm.list_pretrained(f"{architecture}.*")) or architecture
            raise InputError(f"model_name is {name!r}, of which timm knows only {known}") from None
        details = found.to_dict() if found else {}
    if details.get("tag") == "openai" and "quickgelu" not in architecture:
        # timm also offers OpenAI's ViT weights in a model with the exact GELU; they were trained with QuickGELU.
        architecture = architecture.replace("_clip_", "_clip_quickgelu_")
    return architecture, details


def read_folder_config(name):
    """The config.json of a model's folder; {} if `name` is no folder; raises InputError."""
    folder = Path(name)
    if not folder.is_dir():
        return {}
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is a folder without a readable config.json ({error})") from None
    return content if isinstance(content, dict) else {}


def pretrained_timm_state(name, architecture, size, num_classes=0):
    """The pretrained weights of a timm model by name or folder, as a state dict."""
    source = f"local-dir:{name}" if Path(name).is_dir() else name
    if Path(name).is_dir() and not (Path(name) / "model.safetensors").is_file():
        raise InputError(f"model_name is the folder {name}, without model.safetensors (pickled weights are not read)")
    config, extra = timm.get_pretrained_cfg(architecture), {}
    if config is not None and config.fixed_input_size and not architecture.startswith("resnet"):
        extra = {"img_size": size}  # timm adapts the positions; not in the ResNets with attention pooling

    def load():
        return timm.create_model(source, pretrained=True, num_classes=num_classes, **extra).state_dict()

    return from_cache_or_network(load, "model_name", name, f"{PRETRAINED['model_name']} false")


def load_image_weights(encoder, state, name):
    """Load a state dict into an `ImageEncoder`, its position embeddings adapted to the image size."""
    own = encoder.backbone.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    if missing:
        raise InputError(f"the weights of {name} lack {missing[0]} and {len(missing) - 1} more tensors")
    for key in ("pos_embed", "head.pos_embed"):  # ([1,] 1 + grid^2, F) of a ViT, of attention pooling
        if key in own and own[key].shape != state[key].shape:
            grid = round((own[key].shape[-2] - 1) ** 0.5)
            old = state[key].reshape(1, *state[key].shape[-2:])
            state[key] = resample_abs_pos_embed(old, [grid, grid]).reshape(own[key].shape)
    encoder.backbone.load_state_dict(state)


# ---- Hugging Face's CLIPModel -----------------------------------------------------------------------------------


def load_clip(name, setting):
    """A Hugging Face CLIPModel with its weights, by name or folder; raises InputError."""
    from transformers import CLIPModel

    check_safetensors(name, setting)

    def load(**options):
        return CLIPModel.from_pretrained(
            name, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
        )

    model, found = from_cache_or_network(load, setting, name, f"{PRETRAINED[setting]} false")
    check_missing(found["missing_keys"], name)
    return model


def check_missing(missing, name):
    if missing:
        raise InputError(f"the weights of {name} lack {sorted(missing)[0]} and {len(missing) - 1} more tensors")


def check_safetensors(name, setting):
    if Path(name).is_dir() and not list(Path(name).glob("*.safetensors")):
        raise InputError(f"{setting} is {name}, a folder without *.safetensors (pickles are not read)")


def load_clip_folder_vit(folder, size, pretrained):
    """As `load_image_encoder`, for the image encoder of a CLIPModel's folder: timm's ViT in its shape."""
    from transformers import CLIPConfig

    config = CLIPConfig.from_pretrained(folder).vision_config
    if config.hidden_act not in ("quick_gelu", "gelu") or config.layer_norm_eps != 1e-5:
        raise InputError(
            f"model_name is {folder}, whose image encoder has {config.hidden_act} and an epsilon of "
            f"{config.layer_norm_eps}: only quick_gelu or gelu with 1e-5 are known here"
        )
    preprocessing = Path(folder) / "preprocessor_config.json"
    details = read_json(preprocessing) if preprocessing.is_file() else {}
    recipe = {
        "architecture": PAPER_IMAGE_ENCODERS["ViT-B/32"],
        "mean": list(details.get("image_mean") or CLIP_MEAN),
        "std": list(details.get("image_std") or CLIP_STD),
        "model_args": {
            "patch_size": config.patch_size,
            "embed_dim": config.hidden_size,
            "depth": config.num_hidden_layers,
            "num_heads": config.num_attention_heads,
            "mlp_ratio": config.intermediate_size / config.hidden_size,
            "act_layer": config.hidden_act,
        },
    }
    encoder, released = ImageEncoder(size=size, **recipe), None
    if pretrained:
        model = load_clip(folder, "model_name")
        load_image_weights(encoder, timm_vit_state(model.vision_model.state_dict()), folder)
        released = Released(model.visual_projection.weight.detach())
    return encoder, recipe, released


def timm_vit_state(state):
    """The weights of a Hugging Face CLIP image encoder under the names of timm's ViT."""
    names = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.patch_embedding": "patch_embed.proj",
        "embeddings.position_embedding.weight": "pos_embed",
        "pre_layrnorm": "norm_pre",  # their spelling
        "post_layernorm": "norm",
        "encoder.layers": "blocks",
        "layer_norm": "norm",
        "self_attn.out_proj": "attn.proj",
    }
    converted = {}
    for name, tensor in state.items():
        if ".self_attn.k_proj." in name or ".self_attn.v_proj." in name:
            continue  # taken with q
        if ".self_attn.q_proj." in name:
            tensor = torch.cat([state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
            name = name.replace("self_attn.q_proj", "attn.qkv")
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        converted[name] = tensor.detach()
    converted["cls_token"] = converted["cls_token"].reshape(1, 1, -1)  # (F,) -> (1, 1, F)
    converted["pos_embed"] = converted["pos_embed"].unsqueeze(0)  # (1 + grid^2, F) -> (1, 1 + grid^2, F)
    return converted


# ---- text encoders by name --------------------------------------------------------------------------------------


def load_text_encoder(name, pooling, pretrained, vocab_size, layers=0, width=0):
    """A `TextEncoder`, from pretrained weights or from scratch in the shape of `name`, and a CLIP's `Released` part.

    `name` is the paper's `transformer` or `cbow`, or a Hugging Face encoder or its folder. Of a CLIPModel the text
    encoder is taken; a CLIPTextModel or CLIPTextModelWithProjection is one. Raises InputError.
    """
    config = load_text_config(name)
    if pretrained:
        backbone, released = pretrained_text_backbone(name, config)
        if vocab_size > backbone.config.vocab_size:
            raise InputError(f"text_tokenizer has {vocab_size} tokens, more than {name} knows: give {name}'s own")
        return TextEncoder(backbone, pooling), released
    config = getattr(config, "text_config", config)  # of a CLIPModel
    config.vocab_size = vocab_size
    if layers and config.model_type == "cbow":
        raise InputError(f"text_layers is {layers}, but text_encoder_model is cbow, which has none: drop it")
    if layers:
        config.num_hidden_layers = layers
    if width:
        config.hidden_size, config.num_attention_heads = width, width // 64
        setattr(config, "hidden_dim" if config.model_type == "distilbert" else "intermediate_size", 4 * width)
    return TextEncoder(build_text_backbone(config), pooling), None


def load_text_config(name):
    """The config of a text encoder by name or folder: Hugging Face's, or for `cbow` its two sizes."""
    from transformers import AutoConfig, CLIPTextConfig, DistilBertConfig

    if name == DISTILBERT:  # its config is the class's defaults: nothing to fetch
        return DistilBertConfig()
    if name == "transformer":  # 12 layers, 512 wide, 8 heads: the defaults too; 76 tokens as in the paper's section 2.4
        return CLIPTextConfig(max_position_embeddings=76)
    if name == "cbow":
        return SimpleNamespace(model_type="cbow", hidden_size=512)

    def load(**options):
        return AutoConfig.from_pretrained(name, trust_remote_code=False, **options)

    return from_cache_or_network(load, "text_encoder_model", name, f"--text_encoder_model {DISTILBERT}")


def pretrained_text_backbone(name, config):
    """The pretrained text model of a Hugging Face name or folder, and the `Released` part if it is a CLIP's."""
    from transformers import AutoModel, CLIPTextModelWithProjection

    setting = "text_encoder_model"
    if config.model_type == "clip":
        model = load_clip(name, setting)
        return model.text_model, Released(model.text_projection.weight.detach(), None, model.logit_scale.item())
    check_safetensors(name, setting)
    is_clip = config.model_type == "clip_text_model"
    kind = CLIPTextModelWithProjection if is_clip else AutoModel

    def load(**options):
        return kind.from_pretrained(
            name, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
        )

    model, found = from_cache_or_network(load, setting, name, f"{PRETRAINED[setting]} false")
    if not is_clip:
        return model, None
    missing = set(found["missing_keys"])
    check_missing(missing - {"text_projection.weight"}, name)
    # A CLIPTextModel was saved without the projection: then the head starts anew.
    return model.text_model, None if missing else Released(model.text_projection.weight.detach())


def build_text_backbone(config):
    """A randomly initialised text model of a config (an object, or the dict a run saved)."""
    from transformers import AutoConfig, AutoModel, CLIPTextModelWithProjection

    if isinstance(config, dict) and config["model_type"] != "cbow":
        config = AutoConfig.for_model(**config)
    config = SimpleNamespace(**config) if isinstance(config, dict) else config
    if config.model_type == "cbow":
        return WordVectors(config.vocab_size, config.hidden_size)
    if config.model_type == "clip_text_model":
        # The inner model's weights have the same names in all versions of transformers, the outer one's have not.
        return CLIPTextModelWithProjection(config).text_model
    return AutoModel.from_config(config)


def load_tokenizer(name):
    """The Hugging Face tokenizer of a model by name or folder; raises InputError."""
    from transformers import AutoTokenizer

    def load(**options):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)

    tokenizer = from_cache_or_network(load, "text_tokenizer", name, "--text_tokenizer captions")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise InputError(f"text_tokenizer is {name!r}, which has no token to pad captions with: give another")
        tokenizer.pad_token = tokenizer.eos_token  # its places are masked
    return tokenizer


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

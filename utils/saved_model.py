"""Checks of a saved model (best/), which may come from a stranger: only known keys with known types are used.

Nothing in it can run code, contact the network, or allocate memory before names and shapes are checked.
"""

import contextlib
import math

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import CONFIG_MAPPING

from config import InputError, rename_settings

MAX_JSON_BYTES, MAX_TOKENIZER_BYTES = 10**7, 10**8  # the largest tokenizers have 35 MB
MAX_INT = 2**24  # of a size or a token id
# Entries of transformers' configs that do not change the features
IGNORED = {"architectures", "id2label", "label2id", "problem_type", "transformers_version", "_name_or_path"}
IGNORED |= {"output_attentions", "output_hidden_states", "return_dict", "model_type"}
# Settings without which a model cannot be rebuilt; others that an earlier version lacked have their defaults.
MODEL_SETTINGS = ("size", "max_length", "text_pooling", "projection_dim", "num_projection_layers")
# Names in safetensors' header; a model has no other ones.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
# Tensors and elements of a model while it is built, relative to its file: an encoder-decoder also builds its decoder.
MAX_RATIO, EXTRA_TENSORS, EXTRA_ELEMENTS = 4, 1000, 2**26


# ---- files --------------------------------------------------------------------------------------------------------


def check_files(folder):
    """Raise InputError unless the folder has the files of a saved model: regular files, of plausible sizes."""
    for name in ("config.json", "model.safetensors", "tokenizer"):
        if not (folder / name).exists():
            raise InputError(f"{folder} is not a trained run: {name} is missing")
    if not (folder / "tokenizer").is_dir():
        raise InputError(f"{folder / 'tokenizer'} is not a folder")
    limits = {folder / "config.json": MAX_JSON_BYTES, folder / "model.safetensors": math.inf}
    folders = [path for path in (folder / "tokenizer").rglob("*") if path.is_dir() and not path.is_symlink()]
    limits |= {path: MAX_TOKENIZER_BYTES for path in (folder / "tokenizer").rglob("*") if path not in folders}
    for path, max_bytes in limits.items():
        if not path.is_file():  # a FIFO would block, a device has no end
            raise InputError(f"{path} is not a regular file")
        if path.stat().st_size > max_bytes:
            raise InputError(f"{path} has {path.stat().st_size:,} bytes, more than {max_bytes:,}")


def read_header(path):
    """{name: tensor without memory} of a safetensors file; raises InputError."""
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            dtypes = {name: DTYPES.get(found.get_dtype(), torch.complex64) for name, found in slices.items()}
            shapes = {name: found.get_shape() for name, found in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a safetensors file ({error})") from None
    return {name: torch.empty(shape, dtype=dtypes[name], device="meta") for name, shape in shapes.items()}


def read_tensors(path):
    """{name: tensor} of a safetensors file, in memory of their own; raises InputError if they are not finite."""
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for name, tensor in state.items():
        if tensor.is_floating_point() and not all(bound.isfinite() for bound in torch.aminmax(tensor)):
            raise InputError(f"{path.name} has values that are not finite in tensor {name}")
    return state


# ---- config -------------------------------------------------------------------------------------------------------


def is_number(value, low=-math.inf, high=math.inf):
    return type(value) in (int, float) and low <= value <= high


def is_size(value):
    return type(value) is int and 0 < value <= MAX_INT


def is_color(value):
    return isinstance(value, list) and len(value) == 3 and all(is_number(x, 0, 1) for x in value)


IMAGE_ENCODER = {
    "architecture": lambda value: isinstance(value, str) and ":" not in value and timm.is_model(value),
    "mean": is_color,
    "std": lambda value: is_color(value) and min(value) > 0,
}
MODEL_ARGS = dict.fromkeys(("patch_size", "embed_dim", "depth", "num_heads"), is_size)  # of a Hugging Face CLIP's ViT
MODEL_ARGS |= {"act_layer": lambda value: value in ("quick_gelu", "gelu"), "mlp_ratio": lambda x: is_number(x, 0, 100)}
CBOW = {"model_type": lambda value: value == "cbow", "vocab_size": is_size, "hidden_size": is_size}


def check_entries(values, schema, part):
    """Raise InputError unless a dict has the keys of the schema, and each value passes its check."""
    if not isinstance(values, dict):
        raise InputError(f"it lacks {part}")
    for name in [*values, *schema]:
        if name not in schema:
            raise InputError(f"it has an unknown entry {part}.{name[:60]}")
        if name not in values:
            raise InputError(f"it lacks {part}.{name}: was it saved by another version?")
        if not schema[name](values[name]):
            raise InputError(f"{part}.{name} is {str(values[name])[:60]!r}, which is not possible")


def checked_content(content):
    """The known parts of a saved model's config.json; raises InputError, with a message to follow the file's name."""
    settings, image, text = (content.get(part) for part in ("settings", "image_encoder", "text_encoder"))
    for part, values in (("settings", settings), ("text_encoder", text)):
        if not isinstance(values, dict):
            raise InputError(f"it lacks {part}")
    settings = rename_settings(settings)
    for name in MODEL_SETTINGS:
        if name not in settings:
            raise InputError(f"it lacks settings.{name}: was it saved by another version?")
    model_args = {"model_args": lambda value: check_entries(value, MODEL_ARGS, "image_encoder.model_args") is None}
    has_args = isinstance(image, dict) and "model_args" in image
    check_entries(image, {**IMAGE_ENCODER, **(model_args if has_args else {})}, "image_encoder")
    return {"settings": settings, "image_encoder": image, "text_encoder": checked_text_config(text)}


def checked_text_config(values):
    """The entries of a dict that describe a text encoder, for `build_text_backbone`; raises InputError.

    A transformers config may have those of its class except other configs, with values of the same type as the
    defaults; all others, such as auto_map, are dropped.
    """
    kind = values.get("model_type")
    if kind == "cbow":
        check_entries(values, CBOW, "text_encoder")
        return values
    default = default_text_config(kind)
    if default is None:
        raise InputError(f"text_encoder.model_type is {str(kind)[:60]!r}, which is not a known text encoder")
    known = {name: value for name, value in default.to_dict().items() if name not in {*IGNORED, *default.sub_configs}}
    checked = {name: value for name, value in values.items() if name in known}
    checks = {name: lambda value, default=known[name]: has_type_of(value, default) for name in checked}
    checks |= {"dtype": lambda value: value in (None, "float32", "float16", "bfloat16")} if "dtype" in checked else {}
    check_entries(checked, checks, "text_encoder")
    return {"model_type": kind, **checked}


def default_text_config(kind):
    """The default transformers config of a type of text encoder; None if there is none."""
    default = None
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        with contextlib.suppress(Exception):  # classes of several models have no defaults
            default = CONFIG_MAPPING[kind]()
    return default if hasattr(default, "vocab_size") and hasattr(default, "hidden_size") else None


def has_type_of(value, default):
    """Whether a JSON value has the type of a default, or is a list of such values; None goes with any type."""
    if isinstance(value, list):
        return all(has_type_of(item, None if isinstance(default, (list, tuple)) else default) for item in value)
    if type(value) is int and not isinstance(default, float):
        return type(default) in (int, type(None)) and abs(value) <= MAX_INT
    if value is None or default is None:
        return True
    return is_number(value) if is_number(default) else isinstance(value, type(default))


# ---- building without memory ------------------------------------------------------------------------------------


@contextlib.contextmanager
def registration_hook(hook):
    """Within the block, `hook(module, name, tensor)` sees each new parameter and buffer, and may replace it."""
    handles = register_module_parameter_registration_hook(hook), register_module_buffer_registration_hook(hook)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def build_empty(build, tensors, file="model.safetensors"):
    """`build()` with parameters on the meta device, for a state dict like `tensors`; raises InputError if it differs.

    Buffers have their values. Before memory is allocated, the model is built on the meta device alone and compared.
    """
    free_tensors = MAX_RATIO * len(tensors) + EXTRA_TENSORS
    free_elements = MAX_RATIO * sum(tensor.numel() for tensor in tensors.values()) + EXTRA_ELEMENTS

    def count(module, name, tensor):
        nonlocal free_tensors, free_elements
        free_tensors, free_elements = free_tensors - 1, free_elements - (0 if tensor is None else tensor.numel())
        if min(free_tensors, free_elements) < 0:
            raise InputError(f"it describes a larger model than that in {file}")

    def to_meta(module, name, tensor):
        return nn.Parameter(tensor.to("meta"), tensor.requires_grad) if isinstance(tensor, nn.Parameter) else None

    with torch.device("meta"), registration_hook(count):
        own = build().state_dict()
    for name in [*own, *tensors]:
        if name not in own or name not in tensors:
            raise InputError(f"{file} {'lacks the' if name in own else 'has an unknown'} tensor {name[:200]}")
        found, expected = tensors[name], own[name]
        if (found.shape, found.dtype) != (expected.shape, expected.dtype) or not found.numel():
            raise InputError(f"{file} has a tensor {name} of another shape or type")
    with registration_hook(to_meta):
        return build()

"""Checks of a CLIP before training and after loading: both encoders run, and the model can be saved and loaded."""

import contextlib
import json

import timm
import torch

from config import InputError
from utils.cli import one_line
from utils.device import check_compiler
from utils.pretrained import PROBES
from utils.saved_model import build_empty, checked_content


@torch.no_grad()
def check_model(model, device="cpu"):
    """Raise InputError unless the model can encode and be saved; to be called before any image is read.

    The model and the random state stay as they are.
    """
    training, config, state = model.training, model.config, model.state_dict()
    with torch.random.fork_rng(devices=[]):
        if config.compile:
            check_compiler(device)
        features = check_encoders(model.eval(), longest=True)
        try:
            if len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) < len(state):
                raise InputError("some of its tensors share memory")
            content = checked_content(json.loads(json.dumps(model.saved_config)))
            copy = build_empty(lambda: type(model)(config, model.tokenizer, saved=content), state)
            copy.load_state_dict(state, assign=True)
            for own, other in zip(features, check_encoders(copy.eval()), strict=True):
                if not torch.allclose(own, other, rtol=1e-4, atol=1e-4 * own.abs().max().item()):
                    raise InputError("its features would not be the same")
        except Exception as error:
            names = f"model_name {config.model_name} and text_encoder_model {config.text_encoder_model}"
            raise InputError(f"a model of {names} could not be loaded after training ({one_line(error)})") from error
    model.train(training)


@torch.no_grad()
def check_encoders(model, longest=False):
    """Encode an example image and two captions; returns their features, (1, F) and (2, F).

    model: a CLIP in evaluation mode; longest: also encode a caption of the maximum length. Raises InputError if an
    encoder fails, or for features that are not usable.
    """
    config, size, features = model.config, model.config.size, []
    image = torch.linspace(0, 1, 3 * size * size).reshape(1, 3, size, size)
    ids = example_token_ids(model)
    captions = [ids[:, :8], ids[:1]] if longest else [ids[:, :8]]
    for setting, encoder, batches in (
        ("model_name", model.image_encoder, [(image,)]),
        ("text_encoder_model", model.text_encoder, [(tokens, torch.ones_like(tokens)) for tokens in captions]),
    ):
        name = getattr(config, setting)
        try:
            found = [encoder(*batch) for batch in batches]
            expected = [(len(batch[0]), encoder.width) for batch in batches]
            if (shapes := [tuple(x.shape) for x in found]) != expected:
                raise ValueError(f"its features have the shape {shapes[0]} instead of {expected[0]}")
        except Exception as error:  # anything, from any library
            if encoder is model.image_encoder:
                raise size_error(type(encoder), name, size, model.image_config, error) from error
            message = f"{setting} is {name}, which does not work here ({one_line(error)}): use another one"
            raise InputError(message) from error
        if not all(x.isfinite().all() for x in found):
            raise InputError(f"{setting} is {name}, whose features are not finite: its weights are damaged")
        features.append(found[0])
    if model.text_encoder.pooling == "cls" and torch.allclose(*features[1], atol=1e-6 * features[1].abs().max().item()):
        raise InputError(
            f"text_pooling is cls, but the first token of {name} does not depend on the others, so that all captions "
            "would be equal: pass --text_pooling mean"
        )
    return features


def example_token_ids(model):
    """Two captions of the maximum length that begin with the same token, (2, L) ids.

    Raises InputError if the tokenizer has an id without an embedding.
    """
    tokenizer, config = model.tokenizer, model.text_encoder.backbone.config
    options = {"truncation": True, "max_length": model.max_length, "padding": True, "return_tensors": "pt"}
    highest = max(*tokenizer.get_vocab().values(), tokenizer(PROBES, **options)["input_ids"].max().item())
    if highest >= config.vocab_size:
        raise InputError(f"text_tokenizer has a token id {highest}, but there are {config.vocab_size} embeddings")
    special = set(tokenizer.all_special_ids)
    ordinary = [token for token in range(len(tokenizer)) if token not in special][-2:]
    ids = torch.tensor(ordinary)[:, None].repeat(1, model.max_length)  # (2,) -> (2, L)
    ids[:, 0] = ids[0, 0]
    return ids


def size_error(encoder_class, name, size, image_config, error):
    """The InputError for images that an encoder cannot take, with the nearest size that it takes."""
    native, nearest = timm.get_pretrained_cfg(image_config["architecture"]).input_size[-1], 32 * round(size / 32)
    candidates = {size, native, *range(max(32, nearest - 96), nearest + 97, 32)}
    for other in sorted(candidates, key=lambda other: abs(other - size)):
        with contextlib.suppress(Exception), torch.device("meta"):
            encoder_class(size=other, **image_config).eval()(torch.zeros(1, 3, other, other))
            if other == size:
                break  # the size is not at fault
            return InputError(f"size is {size}, which {name} cannot take ({one_line(error)}): pass --size {other}")
    return InputError(f"model_name is {name}, which does not work here ({one_line(error)}): use another one")

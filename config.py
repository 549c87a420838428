"""Every setting of the program, once: edit a default here, or give it as a flag (`--batch_size 64`).

A flag beats a preset, a preset beats this file. A run saves its resolved settings, so that a model is
always rebuilt from the run and never from today's defaults. This module imports no torch: `--help` is instant.
"""

import argparse
import dataclasses
import difflib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

INF = math.inf


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line: what, its value, what to do."""


def setting(default, meaning, low=None, high=None, choices=None):
    """A dataclass field that carries its meaning and the values it allows."""
    metadata = {"meaning": meaning, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


# fmt: off
@dataclass(frozen=True)
class Config:
    # ---- where things are -------------------------------------------------------------------------------------
    image_path: str = setting("data/flickr8k/Images", "folder of the photographs")
    captions_path: str = setting("data/flickr8k/captions.txt", "captions file, or the folder that holds it")
    sample_images: int = setting(0, "draw a sample data set of this many training images if none is there", 0, 3200)
    cache_path: str = setting("cache", "folder for decoded images")
    run: str = setting("", "folder of this run; empty: runs/<date and time>")
    resume: bool = setting(False, "continue the run named by --run, or the newest one")

    # ---- data -------------------------------------------------------------------------------------------------
    size: int = setting(224, "side of the square images the model sees, pixels", 16, 1024)
    max_length: int = setting(200, "longest caption, tokens; longer ones are cut", 4, 512)
    captions_per_image: int = setting(1, "captions that come with an image in a batch; all are its positives", 1, 100)
    cache_images: bool = setting(True, "decode each picture once, into a memory-mapped file")
    num_workers: int = setting(4, "processes that load data; 0: the training process itself", 0, 256)
    crop_scale: float = setting(0.5, "smallest share of the picture a training crop keeps; 1: no cropping", 0.05, 1)
    color_jitter: float = setting(0.2, "change of brightness, contrast and saturation in training, +- share", 0, 1)
    seed: int = setting(42, "seed of the split, the weights, the order and the crops", 0, 2**31 - 1)

    # ---- model ------------------------------------------------------------------------------------------------
    model_name: str = setting("resnet50", "image encoder: RN50 ... ViT-L/14 of the paper, a timm model, or a folder")
    text_encoder_model: str = setting("distilbert-base-uncased", "text encoder: transformer, cbow, or Hugging Face's")
    text_tokenizer: str = setting("distilbert-base-uncased", "likewise; `captions` trains a WordPiece on the captions")
    text_layers: int = setting(0, "layers of a text encoder trained from scratch; 0: as its config says", 0, 96)
    text_width: int = setting(0, "width of a text encoder trained from scratch, times 64; 0: likewise", 0, 8192)
    text_pooling: str = setting("mean", "sentence feature: mean of the tokens, or the first", choices=("mean", "cls"))
    pretrained: bool = setting(True, "start both encoders from pretrained weights")
    pretrained_image_encoder: bool | None = setting(None, "the same for one encoder; none: as pretrained")
    pretrained_text_encoder: bool | None = setting(None, "the same for one encoder; none: as pretrained")
    trainable: bool = setting(True, "train both encoders; false: only the heads, on features computed once")
    trainable_image_encoder: bool | None = setting(None, "the same for one encoder; none: as trainable")
    trainable_text_encoder: bool | None = setting(None, "the same for one encoder; none: as trainable")
    num_projection_layers: int = setting(1, "layers of a projection head; 1: linear, as in the paper", 1, 8)
    projection_dim: int = setting(256, "width of the shared space", 2, 8192)
    dropout: float = setting(0.1, "dropout in the projection heads", 0, 0.9)

    # ---- optimisation -----------------------------------------------------------------------------------------
    epochs: int = setting(1, "epochs; each shows every (image, caption) pair once", 1, 100_000)
    batch_size: int = setting(32, "images per step, over all processes", 2, 2**24)
    micro_batch_size: int = setting(0, "images encoded at once (gradient caching); 0: the whole batch", 0, 2**24)
    image_encoder_lr: float = setting(1e-4, "learning rate of the image encoder", 0, 1)
    text_encoder_lr: float = setting(1e-5, "learning rate of the text encoder", 0, 1)
    head_lr: float = setting(1e-3, "learning rate of the projection heads and the temperature", 0, 1)
    weight_decay: float = setting(1e-3, "decoupled weight decay, on matrices only", 0, 10)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm; 0: not", 0, INF)
    scheduler: str = setting("plateau", "learning-rate schedule", choices=("plateau", "cosine"))
    patience: int = setting(1, "plateau: epochs without a better validation loss before a cut", 0, 10_000)
    factor: float = setting(0.8, "plateau: factor of that cut", 0.01, 0.99)
    warmup_steps: int = setting(0, "linear warm-up, steps", 0, 10_000_000)
    ema_decay: float = setting(0.0, "moving average of the weights, evaluated and saved instead; 0: none", 0, 0.99999)
    save_every_minutes: float = setting(10.0, "a resumable checkpoint at least this often, minutes", 0, INF)

    # ---- GAN: generated pictures beside the real ones ----------------------------------------------------------
    gan: str = setting("none", "pairs: a frozen GAN adds captioned pictures; joint: it goes on learning with CLIP",
                       choices=("none", "pairs", "joint"))
    gan_run: str = setting("", "run whose GAN is used (python gan.py --run ...); empty: a CLIP and a GAN are trained")
    gan_generator: str = setting("affine", "like DF-GAN, or like StyleGAN2", choices=("affine", "style"))
    gan_subset: str = setting("", "it learns pictures whose captions name one of these words (dog,ball); empty: all")
    gan_size: int = setting(64, "side of the generated pictures, pixels", choices=(32, 64, 128))
    gan_width: int = setting(64, "channels of its networks at the full size, up to 4 times as many inside", 4, 512)
    gan_epochs: int = setting(300, "epochs of the GAN; each shows every picture once", 1, 100_000)
    gan_batch_size: int = setting(64, "pictures per step of the GAN", 2, 65_536)
    gan_lr: float = setting(2e-4, "learning rate of the generator; the discriminator's is twice as high", 0, 1)
    gan_ratio: float = setting(0.25, "generated pictures per real one in a batch; 0: none", 0, 4)
    gan_weight: float = setting(0.5, "weight of a generated picture in the loss; a real one has 1", 0, 10)
    gan_start: float = setting(0.3, "generated pictures from this share of the training on", 0, 1)
    gan_end: float = setting(0.8, "and up to this one", 0, 1)
    gan_gate: int = setting(10, "drop a picture if a CLIP ranks its caption lower among the 100 most alike; 100: none",
                            1, 100)
    gan_captions: str = setting("", "file of captions to generate pictures of, one a line; empty: the training's")
    gan_match: float = setting(0.25, "CLIP's share of the generator's gradient, relative to the GAN's; 0: none", 0, 10)

    # ---- device and precision ---------------------------------------------------------------------------------
    device: str = setting("auto", "device: auto, cpu, cuda, cuda:1, mps")
    precision: str = setting("auto", "of the encoders; auto: bf16 or fp16 on a GPU, float32 on a CPU",
                             choices=("auto", "float32", "bf16", "fp16"))
    compile: bool = setting(False, "torch.compile both encoders: minutes to start, then faster")

    def __post_init__(self):
        check_config(self)

    def encoder_flag(self, name, encoder):
        """`pretrained` or `trainable` for the "image" or the "text" encoder."""
        own = getattr(self, f"{name}_{encoder}_encoder")
        return getattr(self, name) if own is None else own
# fmt: on


PRESETS = {
    # Small encoders on a drawn data set: a first run on any computer, without a network. test_resnet is the smallest of
    # timm's ResNets (0.4 M parameters).
    "demo": {
        "image_path": "data/shapes/Images",
        "captions_path": "data/shapes/captions.txt",
        "sample_images": 2000,
        "model_name": "test_resnet",
        "text_tokenizer": "captions",
        "text_layers": 2,
        "text_width": 128,
        "pretrained": False,
        "size": 48,
        "max_length": 32,
        "captions_per_image": 5,
        "num_workers": 1,
        "crop_scale": 0.9,
        "color_jitter": 0.05,
        "dropout": 0.0,
        "epochs": 10,
        "batch_size": 64,
        "image_encoder_lr": 2e-3,
        "text_encoder_lr": 2e-3,
        "head_lr": 2e-3,
        "weight_decay": 0.05,
        "scheduler": "cosine",
        "warmup_steps": 50,
        "gan_size": 32,
        "gan_width": 16,
        "gan_epochs": 24,
        "gan_batch_size": 16,
        "gan_lr": 1e-3,
    },
    # What measured best on Flickr8k's validation images, from scratch in ten minutes on two CPU cores (README). The
    # mean of word vectors is as good as a Transformer there and costs nothing, so five captions come for the price
    # of one.
    "best": {
        "model_name": "resnet10t",
        "text_encoder_model": "cbow",
        "text_tokenizer": "captions",
        "text_width": 256,
        "pretrained": False,
        "size": 64,
        "max_length": 40,
        "captions_per_image": 5,
        "num_workers": 1,
        "crop_scale": 0.3,
        "epochs": 24,
        "batch_size": 128,
        "image_encoder_lr": 1e-3,
        "text_encoder_lr": 1e-3,
        "head_lr": 1e-3,
        "weight_decay": 0.3,
        "dropout": 0.2,
        "scheduler": "cosine",
        "warmup_steps": 100,
        "ema_decay": 0.99,
    },
    # Radford et al. 2021 (arXiv:2103.00020), section 2.5 and table 18, ResNet columns.
    "paper": {
        "model_name": "RN50",
        "text_encoder_model": "transformer",
        "pretrained": False,
        "epochs": 32,
        "batch_size": 32_768,
        "micro_batch_size": 256,
        "image_encoder_lr": 5e-4,
        "text_encoder_lr": 5e-4,
        "head_lr": 5e-4,
        "weight_decay": 0.2,
        "scheduler": "cosine",
        "warmup_steps": 2000,
        "max_length": 76,
        "projection_dim": 1024,
        "dropout": 0.0,
        "crop_scale": 0.9,
        "color_jitter": 0.0,
        "max_grad_norm": 0.0,
    },
}


def check_config(config):
    """Raise InputError naming the first setting whose value is of the wrong kind, out of range or impossible."""
    for field in dataclasses.fields(config):
        check_value(field, getattr(config, field.name))
    c = config
    if c.micro_batch_size > c.batch_size:
        raise InputError(
            f"micro_batch_size is {c.micro_batch_size}, more than batch_size ({c.batch_size}): "
            "give at most batch_size, or 0 for the whole batch"
        )
    if c.warmup_steps and c.scheduler == "plateau":
        raise InputError(
            f"warmup_steps is {c.warmup_steps}, but scheduler is plateau, which has no warm-up: give --scheduler cosine"
        )
    if c.text_width % 64:
        raise InputError(f"text_width is {c.text_width}: it must be a multiple of 64")
    for encoder in ("image", "text"):
        if not c.encoder_flag("trainable", encoder) and not c.encoder_flag("pretrained", encoder):
            raise InputError(
                f"the {encoder} encoder is neither pretrained nor trainable, so it would stay random: set one of "
                f"--pretrained_{encoder}_encoder, --trainable_{encoder}_encoder to true"
            )
    if c.encoder_flag("pretrained", "text") and (c.text_layers or c.text_width):
        raise InputError(
            "text_layers and text_width are for a text encoder trained from scratch: "
            "drop them, or give --pretrained_text_encoder false"
        )
    if c.encoder_flag("pretrained", "text") and c.text_encoder_model in ("transformer", "cbow"):
        raise InputError(
            f"text_encoder_model is {c.text_encoder_model!r}, of which there are no pretrained weights: "
            "give --pretrained_text_encoder false, or the folder of a pretrained encoder"
        )
    if c.encoder_flag("pretrained", "text") and c.text_tokenizer == "captions":
        raise InputError(
            "text_tokenizer is 'captions', whose tokens a pretrained text encoder does not know: "
            "give its own tokenizer, or --pretrained_text_encoder false"
        )
    if c.gan != "none" and c.gan_start >= c.gan_end:
        raise InputError(f"gan_start is {c.gan_start}, gan_end {c.gan_end}: the start must come before the end")


def check_value(field, value):
    meta, name = field.metadata, field.name
    kind = kind_of(field)
    if value is None and "None" in str(field.type):
        return
    good = type(value) is kind or (kind is float and type(value) is int)
    if good and meta["choices"]:
        good = value in meta["choices"]
    if good and meta["low"] is not None:
        good = meta["low"] <= value <= meta["high"]
    if not good:
        raise InputError(f"{name} is {value!r}: it must be {describe(field)}")


def kind_of(field):
    """The plain type of a field; optional ones here are all booleans."""
    return field.type if isinstance(field.type, type) else bool


def describe(field):
    if field.metadata["choices"]:
        return "one of " + ", ".join(map(str, field.metadata["choices"]))
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    text = names[kind_of(field)]
    if field.metadata["low"] is not None:
        text += f" from {field.metadata['low']} to {field.metadata['high']}"
    return text


def parse_value(field, text):
    """The value of a setting from the text of its flag; raises InputError by name."""
    kind = kind_of(field)
    if kind is bool:
        values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() == "none" and "None" in str(field.type):
            return None
        if text.lower() in values:
            return values[text.lower()]
    else:
        try:
            return kind(text)
        except ValueError:
            pass
    raise InputError(f"{field.name} is {text!r}: it must be {describe(field)}")


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, raised as InputError."""

    def error(self, message):
        words = message.split() if message.startswith("unrecognized") else []
        for unknown in [word for word in words if word.startswith("--")][:1]:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown.split("=")[0], flags, n=1)
            message += f" (did you mean {near[0]}?)" if near else " (--help lists them all)"
        raise InputError(message)


def parse_config(argv=None):
    """The resolved `Config` of a command line (default: this process's); raises InputError."""
    return build_config(parse_flags(argv))


def parse_flags(argv=None, prog="main.py", description="Train CLIP on captioned photographs.", shown=None):
    """The settings a command line gives, presets first, as a dict; `--help` prints all and exits.

    shown: the settings that a run's command has, which are then the run's where they are not given; no presets.
    """
    fields = dataclasses.fields(Config)
    parser = OneLineParser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    if shown is None:
        parser.add_argument("--preset", choices=sorted(PRESETS), help="several settings at once; flags beat it")
    for field in fields:
        bare = {"nargs": "?", "const": "true"} if kind_of(field) is bool else {}
        default = repr(field.default) if shown is None else "the run's"
        help_text = f"{field.metadata['meaning']} (default: {default})".replace("%", "%%")
        if shown is not None and field.name not in shown:
            help_text = argparse.SUPPRESS
        parser.add_argument(f"--{field.name}", metavar=kind_of(field).__name__, help=help_text, **bare)
    given = vars(parser.parse_args(sys.argv[1:] if argv is None else argv))
    values = dict(PRESETS.get(given.pop("preset", None), {}))
    for field in fields:
        if given[field.name] is not None:
            values[field.name] = parse_value(field, given[field.name])
    return values


def build_config(values):
    """A `Config` from a dict of settings; raises InputError for one that does not exist."""
    names = [field.name for field in dataclasses.fields(Config)]
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise InputError(f"unknown setting {name!r}" + (f": did you mean {near[0]!r}?" if near else ""))
    return Config(**values)


def format_config(config):
    """The settings as a block of text, those changed from the file's defaults marked with a star."""
    lines = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        mark = " " if value == field.default else "*"
        lines.append(f" {mark} {field.name:<26}{value}")
    return "\n".join(lines)


def write_json(path, content):
    """Write JSON so that the file is never seen half-written."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_json(path):
    """The JSON object in a file, a dict; raises InputError if it is missing or damaged."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object: is it from this program?")
    return content


def gan_run_of(run):
    """The folder of the run that has the GAN: for one trained with `--gan pairs` from nothing, that in it."""
    run = Path(run)
    return run / "first" if (run / "first" / "gan").exists() and not (run / "gan").exists() else run


def progress_bar(iterable=None, **options):
    """A tqdm bar; where each state is a line of its own, as in a log file, one every half minute."""
    seconds = 0.5 if sys.stderr.isatty() else 30
    return tqdm(iterable, mininterval=seconds, dynamic_ncols=True, **options)


def exit_on_input_error(main):
    """Run a command's main function; bad input ends it with one line and exit status 2, Ctrl-C with status 130.

    So does what the operating system refuses (a file that cannot be written, a full disk).
    """

    def wrapped(argv=None):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a word that the terminal's encoding lacks is not worth a failure
                stream.reconfigure(errors="backslashreplace")
        try:
            return main(argv)
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
            raise SystemExit(130) from None
        except (InputError, OSError) as error:
            # An error raised in a loader process arrives wrapped in its traceback; its last line is the message.
            line = (str(error).strip().splitlines() or [repr(error)])[-1].removeprefix("config.InputError: ")
            print(f"error: {line}", file=sys.stderr)
            raise SystemExit(2) from None

    wrapped.__doc__ = main.__doc__
    return wrapped

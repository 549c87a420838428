"""All settings. Edit a default here, choose a preset (`--preset demo`), or pass a flag (`--batch_size 64`).

A flag overrides a preset, and a preset overrides this file. A run saves its resolved settings, so a model is always
rebuilt from its run and never from today's defaults. It imports no torch: `--help` is instant.
"""

import dataclasses
import difflib
import math
import os
from dataclasses import dataclass

INF = math.inf


class InputError(ValueError):
    """Invalid user input. The message is one line: the setting, its value, and how to fix it."""


class DivergenceError(ArithmeticError):
    """The training diverged: a loss is no longer finite."""


def setting(default, meaning, low=None, high=None, choices=None):
    """A dataclass field with its meaning and its legal values."""
    metadata = {"meaning": meaning, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def default_workers():
    """One data loading process per CPU core that this process may use, at most 16 per machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # set by torchrun


# fmt: off
@dataclass(frozen=True)
class Config:
    # ---- paths ------------------------------------------------------------------------------------------------
    image_path: str = setting("data/flickr8k/Images", "image folder")
    captions_path: str = setting("data/flickr8k/captions.txt", "captions file, or the folder that contains it")
    sample_images: int = setting(0, "generate a synthetic data set with this many training images if there is none",
                                 0, 3200)
    cache_path: str = setting("cache", "folder for decoded images")
    run: str = setting("", "folder of this run; empty: runs/<date and time>")
    resume: bool = setting(False, "continue the run given by --run, or the newest one")
    check: bool = setting(False, "only check the data, the loading speed and the batch size; writes no run")

    # ---- data -------------------------------------------------------------------------------------------------
    size: int = setting(224, "input resolution of the image encoder, pixels", 16, 1024)
    max_length: int = setting(200, "maximum caption length, tokens; longer captions are truncated", 4, 512)
    captions_per_image: int = setting(1, "captions per image in a batch; all are positives of the image", 1, 100)
    cache_images: bool = setting(True, "decode each image once, into a memory-mapped file")
    num_workers: int = setting(default_workers(), "data loading processes; 0: load in the training process", 0, 256)
    crop_scale: float = setting(0.5, "minimum area fraction of a random training crop; 1: no cropping", 0.05, 1)
    color_jitter: float = setting(0.2, "strength of the brightness, contrast and saturation jitter in training", 0, 1)
    flip: bool = setting(True, "mirror training images at random, except those whose captions name left or right")
    seed: int = setting(42, "random seed of the split, weights, batch order and augmentation", 0, 2**31 - 1)

    # ---- model ------------------------------------------------------------------------------------------------
    model_name: str = setting("resnet50", "image encoder: RN50 ... ViT-L/14 of the paper, a timm model, or a folder")
    text_encoder_model: str = setting("distilbert-base-uncased",
                                      "text encoder: transformer, cbow, a Hugging Face model, or a folder")
    text_tokenizer: str = setting("distilbert-base-uncased",
                                  "tokenizer, by name or folder; wordpiece: build one from the training captions")
    text_layers: int = setting(0, "layers of a text encoder trained from scratch; 0: as in its config", 0, 96)
    text_width: int = setting(0, "width of a text encoder trained from scratch, a multiple of 64; 0: as in its config",
                              0, 8192)
    text_pooling: str = setting("mean", "sentence feature: mean over the tokens, or the first token",
                                choices=("mean", "cls"))
    pretrained: bool = setting(True, "initialise both encoders from pretrained weights")
    pretrained_image_encoder: bool | None = setting(None, "pretrained, for the image encoder only; none: as pretrained")
    pretrained_text_encoder: bool | None = setting(None, "pretrained, for the text encoder only; none: as pretrained")
    trainable: bool = setting(True, "train both encoders; false: train only the heads, on precomputed features")
    trainable_image_encoder: bool | None = setting(None, "trainable, for the image encoder only; none: as trainable")
    trainable_text_encoder: bool | None = setting(None, "trainable, for the text encoder only; none: as trainable")
    frozen_stages: int = setting(0, "first stages of the image encoder that are not trained; the stem is one", 0, 100)
    freeze_batchnorm: bool = setting(False, "keep the BatchNorm statistics of the image encoder while it is trained")
    num_projection_layers: int = setting(1, "layers of each projection head; 1: linear, as in the paper", 1, 8)
    projection_dim: int = setting(256, "width of the shared embedding space", 2, 8192)
    dropout: float = setting(0.1, "dropout in the projection heads", 0, 0.9)

    # ---- optimisation -----------------------------------------------------------------------------------------
    epochs: int = setting(5, "number of epochs; each shows every (image, caption) pair once", 1, 100_000)
    head_epochs: int = setting(0, "train only the projection heads first, for this many epochs, with the settings of "
                               "preset frozen (LP-FT); 0: no", 0, 100_000)
    batch_size: int = setting(64, "images per step, summed over all processes", 2, 2**24)
    micro_batch_size: int = setting(0, "images encoded at once (gradient caching); 0: the whole batch", 0, 2**24)
    image_encoder_lr: float = setting(1e-4, "learning rate of the image encoder", 0, 1)
    text_encoder_lr: float = setting(1e-5, "learning rate of the text encoder", 0, 1)
    head_lr: float = setting(1e-3, "learning rate of the projection heads and the temperature", 0, 1)
    weight_decay: float = setting(1e-3, "decoupled weight decay of weight matrices", 0, 10)
    max_grad_norm: float = setting(1.0, "maximum gradient norm; 0: no clipping", 0, INF)
    scheduler: str = setting("cosine", "learning-rate schedule", choices=("plateau", "cosine"))
    patience: int = setting(1, "plateau: epochs without a lower validation loss before a reduction", 0, 10_000)
    factor: float = setting(0.8, "plateau: factor by which the learning rates are multiplied", 0.01, 0.99)
    warmup_steps: int = setting(0, "cosine: linear warm-up, steps", 0, 10_000_000)
    ema_decay: float = setting(0.0, "decay of the weights' EMA, which is then evaluated and saved; 0: no EMA",
                               0, 0.99999)
    save_every_minutes: float = setting(10.0, "maximum time between checkpoints, minutes", 0, INF)

    # ---- GAN: generated images beside real ones ---------------------------------------------------------------
    gan: str = setting("none", "pairs: add image-caption pairs of a frozen GAN; joint: train the GAN along with CLIP",
                       choices=("none", "pairs", "joint"))
    gan_run: str = setting("", "run with the GAN (python gan.py --run ...); empty: train a CLIP and a GAN first")
    gan_generator: str = setting("affine", "generator architecture: similar to DF-GAN or to StyleGAN2",
                                 choices=("affine", "style"))
    gan_discriminator: str = setting("convolutional", "discriminator; projected: on the features of the run's frozen "
                                     "image encoder (Projected GAN)", choices=("convolutional", "projected"))
    gan_subset: str = setting("", "train the GAN on images whose captions contain one of these comma-separated words; "
                              "empty: all")
    gan_size: int = setting(64, "resolution of generated images, pixels", choices=(32, 64, 128))
    gan_width: int = setting(64, "channels at full resolution; up to 4 times as many at lower resolutions", 4, 512)
    gan_epochs: int = setting(300, "number of epochs of the GAN; each shows every image once", 1, 100_000)
    gan_batch_size: int = setting(64, "images per GAN training step", 2, 65_536)
    gan_lr: float = setting(2e-4, "learning rate of the generator; the discriminator's is twice as high", 0, 1)
    gan_ratio: float = setting(0.25, "generated images per real image in a batch; 0: none", 0, 4)
    gan_weight: float = setting(0.5, "loss weight of a generated image; real images: 1", 0, 10)
    gan_start: float = setting(0.3, "fraction of training after which generated images are added", 0, 1)
    gan_end: float = setting(0.8, "fraction of training after which they are no longer added", 0, 1)
    gan_filter_top_k: int = setting(10, "CLIP filter: drop a generated image if its caption ranks below this "
                                    "among 100 similar captions; 100: no filter", 1, 100)
    gan_captions: str = setting("", "file with captions to generate images for, one per line; empty: training captions")
    gan_clip_weight: float = setting(0.25, "CLIP guidance: gradient norm relative to the discriminator's; 0: none",
                                     0, 10)

    # ---- logging ----------------------------------------------------------------------------------------------
    log: str = setting("none", "where metrics and figures are logged, besides the run folder (optional packages)",
                       choices=("none", "tensorboard", "wandb"))

    # ---- device and precision ---------------------------------------------------------------------------------
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    precision: str = setting("auto", "precision of the encoders; auto: bf16 or fp16 on a CUDA GPU, else float32",
                             choices=("auto", "float32", "bf16", "fp16"))
    compile: bool = setting(False, "torch.compile both encoders: slow start, faster steps")

    def __post_init__(self):
        check_config(self)

    def encoder_flag(self, name, encoder):
        """`pretrained` or `trainable` for the "image" or the "text" encoder."""
        own = getattr(self, f"{name}_{encoder}_encoder")
        return getattr(self, name) if own is None else own


# A GAN on photographs with a pretrained image encoder; 35 epochs on 4,849 images took 53 minutes of one CPU core. The
# captions of photographs are similar: a filter of the top 10 would drop 70% of unseen real images, of the top 50 14%.
PHOTOGRAPH_GAN = {
    "gan_discriminator": "projected", "gan_width": 32, "gan_epochs": 40, "gan_batch_size": 32, "gan_lr": 4e-4,
    "gan_clip_weight": 0.0, "gan_filter_top_k": 50,
}
PRESETS = {
    # A first run on any computer, without a network: small encoders on a synthetic data set. test_resnet is the
    # smallest of timm's ResNets (0.4 M parameters).
    "demo": {
        "image_path": "data/shapes/Images", "captions_path": "data/shapes/captions.txt", "sample_images": 2000,
        "model_name": "test_resnet", "text_tokenizer": "wordpiece", "text_layers": 2, "text_width": 128,
        "pretrained": False, "size": 48, "max_length": 32, "captions_per_image": 5, "num_workers": 1,
        "crop_scale": 0.9, "color_jitter": 0.05, "dropout": 0.0, "epochs": 10, "batch_size": 64,
        "image_encoder_lr": 2e-3, "text_encoder_lr": 2e-3, "head_lr": 2e-3, "weight_decay": 0.05,
        "scheduler": "cosine", "warmup_steps": 50, "gan_size": 32, "gan_width": 16, "gan_epochs": 24,
        "gan_batch_size": 16, "gan_lr": 1e-3,
    },
    # Projection heads on frozen pretrained encoders: minutes on a CPU; tuned on Flickr8k's validation images with
    # EfficientNet-Lite0 and all-MiniLM-L6-v2.
    "frozen": {
        "trainable": False, "captions_per_image": 5, "epochs": 40, "batch_size": 256, "head_lr": 2e-3, "dropout": 0.5,
        "scheduler": "cosine", "warmup_steps": 50, **PHOTOGRAPH_GAN,
    },
    # LP-FT: heads on frozen encoders first, then the image encoder without its first stages; tuned as preset frozen.
    "finetune": {
        "head_epochs": 40, "trainable_text_encoder": False, "frozen_stages": 3, "freeze_batchnorm": True,
        "captions_per_image": 5, "epochs": 6, "batch_size": 64, "image_encoder_lr": 2e-4, "head_lr": 1e-4,
        "dropout": 0.5, "scheduler": "cosine", "warmup_steps": 50, "ema_decay": 0.98, **PHOTOGRAPH_GAN,
    },
    # Flickr8k from scratch in ten minutes on two CPU cores; tuned on the validation images. CBOW is as good as a
    # Transformer there and costs almost nothing, so five captions per image cost little more than one.
    "scratch": {
        "model_name": "resnet10t", "text_encoder_model": "cbow", "text_tokenizer": "wordpiece", "text_width": 256,
        "pretrained": False, "size": 64, "max_length": 40, "captions_per_image": 5, "num_workers": 1,
        "crop_scale": 0.3, "epochs": 24, "batch_size": 128, "image_encoder_lr": 1e-3, "text_encoder_lr": 1e-3,
        "head_lr": 1e-3, "weight_decay": 0.3, "dropout": 0.2, "scheduler": "cosine", "warmup_steps": 100,
        "ema_decay": 0.99, "gan_filter_top_k": 50,
    },
    # Radford et al. 2021 (arXiv:2103.00020), section 2.5 and table 18, ResNet columns.
    "paper": {
        "model_name": "RN50", "text_encoder_model": "transformer", "pretrained": False, "epochs": 32,
        "batch_size": 32_768, "micro_batch_size": 256, "image_encoder_lr": 5e-4, "text_encoder_lr": 5e-4,
        "head_lr": 5e-4, "weight_decay": 0.2, "scheduler": "cosine", "warmup_steps": 2000, "max_length": 76,
        "projection_dim": 1024, "dropout": 0.0, "crop_scale": 0.9, "color_jitter": 0.0, "max_grad_norm": 0.0,
    },
}
# fmt: on

# Names and values from earlier versions that may still occur in saved runs.
RENAMED = {"gan_gate": "gan_filter_top_k", "gan_match": "gan_clip_weight"}
RENAMED_VALUES = {("text_tokenizer", "captions"): "wordpiece"}


# ---- checks -----------------------------------------------------------------------------------------------------


def check_config(config):
    """Raise InputError for the first setting that has the wrong type, is out of range, or conflicts with another."""
    for field in dataclasses.fields(config):
        check_value(field, getattr(config, field.name))
    c = config
    if c.micro_batch_size > c.batch_size:
        raise InputError(
            f"micro_batch_size is {c.micro_batch_size}, more than batch_size ({c.batch_size}): "
            "use at most batch_size, or 0 for the whole batch"
        )
    if c.warmup_steps and c.scheduler == "plateau":
        raise InputError(
            f"warmup_steps is {c.warmup_steps}, but the plateau scheduler has no warm-up: pass --scheduler cosine"
        )
    if c.text_width % 64:
        raise InputError(f"text_width is {c.text_width}: it must be a multiple of 64")
    for encoder in ("image", "text"):
        if not c.encoder_flag("trainable", encoder) and not c.encoder_flag("pretrained", encoder):
            raise InputError(
                f"the {encoder} encoder is neither pretrained nor trainable, so it would stay random: "
                f"pass --pretrained_{encoder}_encoder or --trainable_{encoder}_encoder"
            )
    if c.encoder_flag("pretrained", "text"):
        for name, conflict in (
            ("text_layers", c.text_layers > 0),
            ("text_width", c.text_width > 0),
            ("text_encoder_model", c.text_encoder_model in ("transformer", "cbow")),
            ("text_tokenizer", c.text_tokenizer == "wordpiece"),
        ):
            if conflict:
                raise InputError(
                    f"{name} is {getattr(c, name)!r}, which needs a text encoder trained from scratch: "
                    "pass --no-pretrained_text_encoder, or use another value"
                )
    if c.gan != "none" and c.gan_start >= c.gan_end:
        raise InputError(f"gan_start is {c.gan_start}, gan_end {c.gan_end}: the start must come before the end")


def check_value(field, value):
    meta, kind = field.metadata, kind_of(field)
    if value is None and "None" in str(field.type):
        return
    good = type(value) is kind or (kind is float and type(value) is int)
    if good and meta["choices"]:
        good = value in meta["choices"]
    if good and meta["low"] is not None:
        good = meta["low"] <= value <= meta["high"]
    if not good:
        raise InputError(f"{field.name} is {value!r}: it must be {legal_values(field)}")


def kind_of(field):
    """The plain type of a field; all optional ones are booleans."""
    return field.type if isinstance(field.type, type) else bool


def legal_values(field):
    if field.metadata["choices"]:
        return "one of " + ", ".join(map(str, field.metadata["choices"]))
    text = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}[kind_of(field)]
    if field.metadata["low"] is not None:
        text += f" from {field.metadata['low']} to {field.metadata['high']}"
    return text


# ---- building a config -------------------------------------------------------------------------------------------


def parse_config(argv=None):
    """The resolved `Config` of a command line (default: sys.argv); raises InputError."""
    from utils.flags import parse_flags

    return build_config(parse_flags(argv)[0])


def rename_settings(values):
    """Saved settings with the names and values of this version."""
    values = {RENAMED.get(name, name): value for name, value in values.items()}
    return {name: RENAMED_VALUES.get((name, value), value) for name, value in values.items()}


def build_config(values):
    """A `Config` from a dict of settings; raises InputError for an unknown one. Old names are translated."""
    values = rename_settings(values)
    names = [field.name for field in dataclasses.fields(Config)]
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise InputError(f"unknown setting {name!r}" + (f": did you mean {near[0]!r}?" if near else ""))
    return Config(**values)

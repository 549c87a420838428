"""Metrics and figures for TensorBoard or Weights & Biases (`--log`), whose packages are imported when used."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from config import InputError
from utils.distributed import is_first_process


class Tracker:
    """Logs numbers and figures of a run; does nothing for the log "none", and in all processes but the first.

    Raises InputError if the package is missing.
    """

    def __init__(self, config):
        self.config, self.folder = config, Path(config.run)
        self.kind = config.log if is_first_process() else "none"
        self.writer = None  # opened at first use, when the run folder exists
        try:
            if self.kind == "tensorboard":
                import torch.utils.tensorboard  # noqa: F401
            elif self.kind == "wandb":
                import wandb  # noqa: F401
        except ImportError:
            message = f"log is {self.kind}, a package that is not installed: pip install {self.kind}"
            raise InputError(message) from None

    def open(self):
        """The writer of TensorBoard, in tensorboard/ of the run, or the run of Weights & Biases, which is resumed."""
        if self.writer is None and self.kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(self.folder / "tensorboard")
        elif self.writer is None:
            import wandb

            number = hashlib.sha256(str(self.folder.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:16]
            options = {"project": "clip", "name": self.folder.name, "id": number, "resume": "allow"}
            self.writer = wandb.init(**options, dir=self.folder, config=vars(self.config))
        return self.writer

    def numbers(self, values, step):
        """Log the numbers in a dict of numbers or dicts; step: completed steps."""
        if self.kind == "none":
            return
        flat = flatten(values)
        if self.kind == "wandb":
            self.open().log(flat, step=step)
            return
        for name, value in flat.items():
            self.open().add_scalar(name, value, step)
        self.writer.flush()

    def figure(self, name, file, step):
        """Log an image file."""
        if self.kind == "none" or not Path(file).exists():
            return
        pixels = np.asarray(Image.open(file).convert("RGB"))
        if self.kind == "wandb":
            import wandb

            self.open().log({name: wandb.Image(pixels)}, step=step)
        else:
            self.open().add_image(name, pixels, step, dataformats="HWC")
            self.writer.flush()


def flatten(values, prefix=""):
    """{"a/b": number} of nested dicts; other values are left out."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            flat[prefix + name] = value
    return flat

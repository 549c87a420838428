"""Files of a GAN in <run>/gan.

last.pt and metrics.jsonl are for resuming the training, generator.safetensors and config.json for using the generator.
"""

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from config import InputError
from utils.checkpoint import read_checkpoint, write_history
from utils.files import atomic_write, read_json, write_json


def save_checkpoint(gan, folder, history):
    """Write last.pt and metrics.jsonl; history: the metrics of the finished epochs, a list of dicts."""
    with atomic_write(folder / "last.pt") as path:
        torch.save({"gan": gan.state_dict(), "history": history}, path)
    write_history(history, folder)


def load_checkpoint(gan, folder):
    """Restore `gan` from last.pt if it exists; returns the metrics of the finished epochs, a list of dicts."""
    path = folder / "last.pt"
    if not path.exists():
        if (folder / "metrics.jsonl").exists():
            raise InputError(f"{folder} lacks last.pt, so its GAN cannot be resumed: remove that folder")
        return []
    checkpoint = read_checkpoint(path, "a checkpoint of this GAN")
    try:
        gan.load_state_dict(checkpoint["gan"])
        return checkpoint["history"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is not a checkpoint of this GAN ({first_line(error)})") from None


def save_generator(generator, folder, **content):
    """Write generator.safetensors and config.json, which holds its architecture and `content`."""
    write_json(folder / "config.json", {"architecture": generator.architecture, **content})
    with atomic_write(folder / "generator.safetensors") as path:
        save_file({name: tensor.cpu().contiguous() for name, tensor in generator.state_dict().items()}, path)


def read_generator(folder, build_generator):
    """The generator that `save_generator` wrote, built by `build_generator(**architecture)`; raises InputError."""
    if not (folder / "generator.safetensors").exists():
        command = f"python gan.py --run {folder.parent.as_posix()}"
        raise InputError(f"{folder} contains no generator: train one with {command} (--resume if one was started)")
    content = read_json(folder / "config.json")
    try:
        generator = build_generator(**content["architecture"])
        generator.load_state_dict(load_file(folder / "generator.safetensors"))
    except (KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder} does not contain a generator of this version ({first_line(error)})") from None
    return generator


def first_line(error):
    return (str(error).splitlines() or [repr(error)])[0][:100]

"""The settings of `python gan.py` and those recorded in <run>/gan. Imports no torch, so that `--help` is instant."""

import os
from pathlib import Path

from config import InputError, build_config, rename_settings
from utils.files import read_json
from utils.flags import parse_flags

SETTINGS = (  # they define a GAN and are saved with it
    *("gan_generator", "gan_subset", "gan_size", "gan_width", "gan_epochs"),
    *("gan_batch_size", "gan_lr", "gan_clip_weight", "seed"),
)
RUN_SETTINGS = (  # further flags of gan.py; where they are not given, those of the run hold
    *("run", "resume", "image_path", "captions_path", "cache_path", "cache_images", "num_workers"),
    *("device", "precision"),
)


def parse_gan_config(argv=None):
    """The `Config` of gan.py: the settings of the run, overridden by the flags; raises InputError.

    With --resume, the settings the GAN was started with; only `gan_epochs` and the flags in `RUN_SETTINGS` may differ.
    """
    allowed = {*SETTINGS, *RUN_SETTINGS}
    given, _ = parse_flags(argv, "gan.py", "Train a text-conditional GAN for a trained CLIP (--run).", allowed)
    if not given.get("run"):
        raise InputError("give the trained run: python gan.py --run runs/x")
    unknown = sorted(given.keys() - allowed)
    if unknown:
        raise InputError(f"{unknown[0]} is not a setting of the GAN, which has {', '.join(SETTINGS)}")
    run = Path(given["run"])
    if not (run / "config.json").exists():
        raise InputError(f"run is {run}, which contains no run: train one with python main.py")
    saved, folder = read_json(run / "config.json"), run / "gan"
    started = any((folder / name).exists() for name in ("metrics.jsonl", "generator.safetensors"))
    # A GAN stopped before the end of its first epoch may be started again with other settings.
    if (folder / "config.json").exists() and (started or given.get("resume")):
        if not given.get("resume"):
            raise InputError(f"{folder} already contains a GAN: give --resume to continue it, or remove that folder")
        saved |= resumed_settings(folder, given)
    return build_config({**saved, **given, "run": run.as_posix()})


def resumed_settings(folder, given):
    """The settings of the GAN in `folder`; raises InputError if one of the `given` flags differs from them."""
    settings = gan_settings(folder)
    if settings is None:
        raise InputError(f"{folder} contains a GAN trained jointly with CLIP, which cannot be continued alone")
    for name in set(SETTINGS) - {"gan_epochs"}:
        if given.get(name, settings.get(name)) != settings.get(name):
            raise InputError(
                f"{name} is {given[name]}, but the GAN was started with {settings.get(name)}: drop the flag"
            )
    return settings


def gan_settings(folder):
    """The settings of the GAN in `folder` (<run>/gan), a dict; None for a GAN trained jointly with CLIP."""
    settings = read_json(Path(folder) / "config.json").get("settings")
    if settings is not None and not isinstance(settings, dict):
        raise InputError(f"{Path(folder) / 'config.json'} is damaged: its settings are {settings!r}")
    return None if settings is None else rename_settings(settings)


def conditioning_run(run):
    """The run whose CLIP embeds the captions for the generator of `run`: `run` itself, unless trained jointly.

    Raises InputError if that run is missing.
    """
    path = Path(run) / "gan" / "config.json"
    content = read_json(path) if path.exists() else {}
    relative = content.get("conditioning_run", content.get("told_by"))  # told_by: the key before it was renamed
    if relative is None:
        return Path(run)
    found = Path(os.path.normpath(Path(run) / relative))
    if not found.exists():
        raise InputError(f"the GAN of {run} is conditioned on the CLIP of the run {found}, which is missing")
    return found


def check_split(gan_config, images, load_splits):
    """Raise InputError unless the training images of the GAN are among `images`, the training images of this run.

    Without official split files another seed gives another split: the GAN would have seen test images of this run.
    """
    try:
        gan_images = load_splits(gan_config)["train"].names
    except InputError:
        return  # its data set no longer exists
    others = sorted(set(gan_images) - set(images))
    if others:
        raise InputError(
            f"the GAN of gan_run was trained on {len(others)} images that are not training images here (such as "
            f"{others[0]}): give the same data set and --seed {gan_config.seed}"
        )

"""The settings of `python gan.py` and those recorded in <run>/gan. No torch import: `--help` is instant."""

import os
from pathlib import Path

from config import InputError, build_config, rename_settings
from utils.files import read_json
from utils.flags import parse_flags
from utils.runs import GAN_ARCHITECTURE, check_links, check_saved_paths

SETTINGS = (*GAN_ARCHITECTURE, "gan_batch_size", "gan_lr", "gan_clip_weight", "seed")  # saved with a GAN
RUN_SETTINGS = ("run", "resume", "image_path", "captions_path", "cache_path", "cache_images", "num_workers")
RUN_SETTINGS += ("device", "precision", "log")  # further flags of gan.py; default: the run's values


def parse_gan_config(argv=None):
    """The `Config` of gan.py: the settings of the run, overridden by the flags; raises InputError.

    With --resume, the settings the GAN was started with; only `gan_epochs` and the flags in `RUN_SETTINGS` may differ.
    """
    allowed = {*SETTINGS, *RUN_SETTINGS}
    given, _ = parse_flags(argv, "gan.py", "Train a text-conditional GAN for a trained CLIP (--run).", allowed)
    for name in sorted(given.keys() - allowed):
        raise InputError(f"{name} is not a GAN setting; the GAN settings are {', '.join(SETTINGS)}")
    if not given.get("run"):
        raise InputError("pass the trained run: python gan.py --run runs/x")
    run = Path(given["run"])
    folder, given["run"] = run / "gan", run.as_posix()
    if not (run / "config.json").exists():
        raise InputError(f"run is {run}, which is not a run folder: train one with python main.py")
    check_links(run)
    saved = read_json(run / "config.json")
    check_saved_paths(saved, given, run)
    started = any((folder / name).exists() for name in ("metrics.jsonl", "generator.safetensors"))
    # A GAN stopped before the end of its first epoch may be started again with other settings.
    if not (folder / "config.json").exists() or not (started or given.get("resume")):
        return build_config({**saved, **given})
    if not given.get("resume"):
        raise InputError(f"{folder} already contains a GAN: pass --resume to continue it, or remove that folder")
    settings = gan_settings(folder)
    if settings is None:
        raise InputError(f"{folder} contains a GAN trained jointly with CLIP, which cannot be continued alone")
    for name in given.keys() & {*SETTINGS} - {"gan_epochs"}:
        if given[name] != (value := settings.get(name)):
            raise InputError(f"{name} is {given[name]}, but the GAN was started with {value}: drop the flag")
    return build_config({**saved, **settings, **given})


def gan_settings(folder):
    """The settings of the GAN in `folder` (<run>/gan), a dict; None for a GAN trained jointly with CLIP."""
    path = Path(folder) / "config.json"
    settings = read_json(path).get("settings")
    if settings is None:
        return None
    try:
        settings = {"gan_discriminator": "convolutional", **rename_settings(settings)}  # missing in earlier versions
        build_config(settings)
    except (AttributeError, InputError) as error:
        raise InputError(f"{path} is damaged ({error!s:.200}): retrain the GAN") from None
    return settings


def conditioning_run(run):
    """The run whose CLIP embeds the captions for the GAN of `run`: `run`, unless trained jointly; raises InputError."""
    path = Path(run) / "gan" / "config.json"
    content = read_json(path) if path.exists() else {}
    relative = content.get("conditioning_run", content.get("told_by"))  # told_by: its name in earlier versions
    if not isinstance(relative, str | None) or "\0" in (relative or ""):
        raise InputError(f"{path} is damaged (conditioning_run: {relative!r:.200}): retrain the GAN")
    found = Path(os.path.normpath(Path(run) / relative)) if relative else Path(run)
    if relative and not found.exists():
        raise InputError(f"the GAN of {run} is conditioned on the CLIP of the run {found}, which is missing")
    return found


def check_split(gan_config, images, load_splits):
    """Raise InputError unless the training images of the GAN are among `images`, the training images of this run.

    Without official split files another seed means another split: the GAN would have seen test images of this run.
    """
    try:
        others = sorted({*load_splits(gan_config)["train"].names} - {*images})
    except InputError:
        return  # its data set no longer exists
    if others:
        raise InputError(
            f"the GAN of gan_run was trained on {len(others)} images that are not training images here (such as "
            f"{others[0]}): use the same data set and pass --seed {gan_config.seed}"
        )

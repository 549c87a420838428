"""Run folders, and the settings of a run; does not import torch."""

import dataclasses
import datetime
import os
from pathlib import Path

from config import InputError, build_config, rename_settings
from utils.files import read_json
from utils.flags import parse_flags

# Settings that may differ when a run is resumed: they do not change what has been learned. (With the cosine
# schedule a different number of epochs changes the learning rates of the remaining ones.)
MAY_CHANGE = {"run", "resume", "gan_run", "gan_captions", "image_path", "captions_path", "cache_path", "cache_images"}
MAY_CHANGE |= {"num_workers", "epochs", "save_every_minutes"}
# Settings fixed by a trained GAN (`--gan_run`).
GAN_ARCHITECTURE = ("gan_generator", "gan_subset", "gan_size", "gan_width", "gan_epochs")


def newest_run(folder="runs", trained=False):
    """The newest run in `folder`; with `trained`, the one whose best model was saved last; raises InputError."""
    marker = "best/model.safetensors" if trained else "config.json"
    found = sorted(Path(folder).glob(f"*/{marker}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError(
            f"no {'trained run' if trained else 'run'} in {folder}/: pass --run FOLDER, or train one: "
            "python main.py --preset demo"
        )
    return Path(folder) / found[-1].relative_to(folder).parts[0]


def model_folder(run):
    """The folder with the saved model of a run: its best/, or the folder itself."""
    run = Path(run)
    return run / "best" if (run / "best").is_dir() else run


def stage_1_folder(run):
    """The folder of stage 1 in a run with all three stages of `--gan pairs`; earlier versions called it first/."""
    run = Path(run)
    return run / "first" if (run / "first").is_dir() else run / "stage1"


def gan_run_folder(run):
    """The run that contains the GAN (a folder gan/): `run` itself, or its stage 1."""
    run = Path(run)
    return run if (run / "gan").exists() or not (stage_1_folder(run) / "gan").exists() else stage_1_folder(run)


def relative_path(path, folder):
    """`path` relative to `folder`, which stays valid when both are moved together."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # on another drive (Windows)
        return Path(path).absolute().as_posix()


def resolve_run(argv=None):
    """The `Config` of a training command, its run folder included, and the source of each setting.

    With --resume the settings are those of the run. Raises InputError.
    """
    values, sources = parse_flags(argv)
    if values.get("resume"):
        return resume_run(values), sources
    config = build_config(values)
    if config.gan != "none" and config.gan_run:
        config, adopted = adopt_gan_settings(config, {name for name, source in sources.items() if source == "flag"})
        sources |= dict.fromkeys(adopted, "GAN run")
    folder = Path(config.run or f"runs/{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"run is {folder}, which is not a folder: pass another --run")
    if (folder / "config.json").exists():
        raise InputError(f"{folder} already contains a run: pass --resume to continue it, or another --run")
    return dataclasses.replace(config, run=folder.as_posix()), sources


def resume_run(values):
    folder = Path(values["run"]) if values.get("run") else newest_run()
    if not (folder / "config.json").exists():
        raise InputError(f"run is {folder}, which contains no run to resume (no config.json)")
    saved = rename_settings(read_json(folder / "config.json"))
    for name, value in values.items():
        if name not in MAY_CHANGE and saved.get(name, value) != value:
            raise InputError(f"{name} is {value}, but {folder} was started with {saved[name]}: drop the flag")
    return build_config({**saved, **values, "run": folder.as_posix()})


def adopt_gan_settings(config, flags):
    """The config with the settings of the GAN in `config.gan_run`, and those settings; InputError if flags conflict."""
    path = gan_run_folder(config.gan_run) / "gan" / "config.json"
    if not path.exists():
        hint = f"train one with python gan.py --run {config.gan_run}"
        raise InputError(f"gan_run is {config.gan_run}, which contains no GAN: {hint}")
    settings = read_json(path).get("settings") or {}
    settings = {name: settings[name] for name in GAN_ARCHITECTURE if name in settings}
    for name, value in settings.items():
        if name in flags and getattr(config, name) != value:
            raise InputError(
                f"{name} is {getattr(config, name)}, but the GAN of {config.gan_run} was trained with {value}: "
                "drop the flag, or --gan_run"
            )
    return dataclasses.replace(config, **settings), settings

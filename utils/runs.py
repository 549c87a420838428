"""Run folders, and the settings of a run; does not import torch."""

import contextlib
import dataclasses
import datetime
import errno
import itertools
import os
from pathlib import Path

from config import InputError, build_config, rename_settings
from utils.files import read_json
from utils.flags import parse_flags

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Settings that may differ when a run is resumed: they do not change what has been learned. (With the cosine
# schedule a different number of epochs changes the learning rates of the remaining ones.)
MAY_CHANGE = {"run", "resume", "gan_run", "gan_captions", "image_path", "captions_path", "cache_path", "cache_images"}
MAY_CHANGE |= {"num_workers", "epochs", "save_every_minutes", "log"}
# Settings fixed by a trained GAN (`--gan_run`).
GAN_ARCHITECTURE = ("gan_generator", "gan_discriminator", "gan_subset", "gan_size", "gan_width", "gan_epochs")
SUBFOLDERS = ("best", "first", "gan", "heads", "index", "stage1", "tensorboard", "tokenizer", "wandb")  # of a run
CACHE_FILES = ("images-*", "features-*", ".images-*", ".features-*")


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
    if config.run:
        check_new(folder)
    return dataclasses.replace(config, run=folder.as_posix()), sources


def check_new(folder):
    """Raise InputError if a run cannot be started in this folder."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"run is {folder}, which is not a folder: pass another --run")
    if (folder / "config.json").exists():
        raise InputError(f"{folder} already contains a run: pass --resume to continue it, or another --run")
    check_links(folder)


def check_links(folder):
    """Raise InputError if a subfolder of a run is a symbolic link: a command would write outside the run."""
    for path in [folder / name for name in SUBFOLDERS]:
        if path.is_symlink():
            raise InputError(f"{path} is a symbolic link: replace it by a folder, since commands write there")
        if path.is_dir():
            check_links(path)


def check_saved_paths(saved, given, folder):
    """Raise InputError if a command would write where only the config of a run says, which may be somebody else's.

    Without flags, data sets are generated and images cached only in the working directory or in an existing cache.
    """
    config = build_config({**saved, **given})

    def unknown(name):
        return name not in given and not Path(getattr(config, name)).resolve().is_relative_to(Path.cwd())

    generates = config.sample_images and not os.path.exists(config.captions_path)
    if generates and (unknown("image_path") or unknown("captions_path")):
        paths = f"--image_path {config.image_path} --captions_path {config.captions_path}"
        raise InputError(f"the data set of {folder} is missing: pass {paths} to generate it there")
    if unknown("cache_path") and not any(any(Path(config.cache_path).glob(name)) for name in CACHE_FILES):
        raise InputError(f"the cache of {folder} is missing: pass --cache_path {config.cache_path} to write it there")


@contextlib.contextmanager
def claim_run(config, sources):
    """Within the block no other process trains in the run folder, which is created; yields the config.

    A folder named after the time gets a number if it is taken. Raises InputError.
    """
    for number in itertools.count(1):
        folder = Path(config.run if number == 1 else f"{config.run}-{number}")
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(lock_run(folder))
                if not config.resume:
                    check_new(folder)
            except InputError:
                if config.resume or "run" in sources:
                    raise
                continue
            yield dataclasses.replace(config, run=folder.as_posix())
            return


@contextlib.contextmanager
def lock_run(folder):
    """Within the block no other process locks the run; new folders that stay empty are removed. Raises InputError."""
    folder = Path(folder)
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = None
    try:
        lock = lock_folder(folder)
        yield
    finally:
        if lock is not None:
            with contextlib.suppress(OSError):
                (folder / ".lock").unlink()
            os.close(lock)
        with contextlib.suppress(OSError):
            for path in created:
                path.rmdir()


def lock_folder(folder):
    """A descriptor that locks a run until it is closed or this process ends; InputError if it is locked already."""
    path, flags = folder / ".lock", os.O_CREAT | os.O_RDWR
    busy = InputError(f"{folder} is in use by another process: wait until it has ended, or pass another --run")
    if fcntl is None:  # Windows removes the file when the process ends
        try:
            return os.open(path, flags | os.O_EXCL | os.O_TEMPORARY)
        except FileExistsError:
            raise busy from None
    while True:
        lock = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by loader processes
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                os.close(lock)
                raise busy from None
            return lock  # a file system without locks
        if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
            return lock
        os.close(lock)  # removed meanwhile by the process that held it


def resume_run(values):
    folder = Path(values["run"]) if values.get("run") else newest_run()
    if not (folder / "config.json").exists():
        raise InputError(f"run is {folder}, which contains no run to resume (no config.json)")
    check_links(folder)
    saved = rename_settings(read_json(folder / "config.json"))
    for name, value in values.items():
        if name not in MAY_CHANGE and saved.get(name, value) != value:
            raise InputError(f"{name} is {value}, but {folder} was started with {saved[name]}: drop the flag")
    check_saved_paths(saved, values, folder)
    return build_config({**saved, **values, "run": folder.as_posix()})


def adopt_gan_settings(config, flags):
    """The config with the settings of the GAN in `config.gan_run`, and those settings; InputError if flags conflict."""
    path = gan_run_folder(config.gan_run) / "gan" / "config.json"
    if not path.exists():
        hint = f"train one with python gan.py --run {config.gan_run}"
        raise InputError(f"gan_run is {config.gan_run}, which contains no GAN: {hint}")
    settings = read_json(path).get("settings") or {}
    if not isinstance(settings, dict):
        raise InputError(f"{path} is damaged (settings: {settings!r:.60}): retrain the GAN")
    if settings:  # earlier versions had no other discriminator
        settings = {"gan_discriminator": "convolutional", **settings}
    settings = {name: settings[name] for name in GAN_ARCHITECTURE if name in settings}
    for name, value in settings.items():
        if name in flags and getattr(config, name) != value:
            raise InputError(
                f"{name} is {getattr(config, name)}, but the GAN of {config.gan_run} was trained with {value}: "
                "drop the flag, or --gan_run"
            )
    return dataclasses.replace(config, **settings), settings

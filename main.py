"""Train CLIP: `python main.py` (Flickr8k), `python main.py --preset demo` (no data needed), `python main.py --help`.

The heavy imports wait until the settings are known to be good; loader processes that are spawned (Windows, macOS)
import this file again and stay light.
"""

import dataclasses
import datetime
import os
import signal
import sys
from pathlib import Path

from config import (
    InputError,
    build_config,
    exit_on_input_error,
    format_config,
    gan_run_of,
    parse_flags,
    read_json,
    write_json,
)

# What may differ when a run is resumed: none of it changes what was learned (under the cosine schedule, another
# number of epochs changes the learning rates of those to come).
MAY_CHANGE = {
    "run",
    "resume",
    "gan_run",
    "gan_captions",
    "image_path",
    "captions_path",
    "cache_path",
    "cache_images",
    "num_workers",
    "epochs",
    "save_every_minutes",
}
# What cannot be changed any more when a finished GAN is used (`--gan_run`).
MADE_WITH = ("gan_generator", "gan_subset", "gan_size", "gan_width", "gan_epochs")


def resolve_config(argv=None):
    """The settings of this run, its folder included; with --resume, those the run was started with."""
    given = parse_flags(argv)
    if given.get("resume"):
        return resumed_config(given)
    config = build_config(given)
    if config.gan != "none" and config.gan_run:
        config = with_settings_of_gan(config, sys.argv[1:] if argv is None else argv)
    folder = Path(config.run or f"runs/{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"run is {folder}, which is not a folder: give another --run")
    if (folder / "config.json").exists():
        raise InputError(f"{folder} already holds a run: give --resume to continue it, or another --run")
    return dataclasses.replace(config, run=folder.as_posix())


def with_settings_of_gan(config, words):
    """The settings with those of the GAN that is there already; raises InputError if a flag asks for another."""
    path = gan_run_of(config.gan_run) / "gan" / "config.json"
    settings = (read_json(path).get("settings") or {}) if path.exists() else {}
    settings = {name: settings[name] for name in MADE_WITH if name in settings}
    flags = {word.split("=")[0].removeprefix("--") for word in words}
    for name, value in settings.items():
        if name in flags and getattr(config, name) != value:
            raise InputError(
                f"{name} is {getattr(config, name)}, but the GAN of {config.gan_run} was made with {value}: "
                "drop the flag, or --gan_run"
            )
    return dataclasses.replace(config, **settings)


def resumed_config(given):
    folder = Path(given["run"]) if given.get("run") else newest_run()
    if not (folder / "config.json").exists():
        raise InputError(f"run is {folder}, which holds no run to resume (no config.json)")
    saved = read_json(folder / "config.json")
    for name, value in given.items():
        if name not in MAY_CHANGE and saved.get(name, value) != value:
            raise InputError(f"{name} is {value}, but {folder} was started with {saved[name]}: drop the flag")
    return build_config({**saved, **given, "run": folder.as_posix()})


def newest_run(folder="runs"):
    runs = sorted(Path(folder).glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise InputError(f"no run in {folder}/ to resume: train one with python main.py")
    return runs[-1].parent


@exit_on_input_error
def main(argv=None):
    """Train, evaluate on the test split, and leave pictures and numbers in the run's folder."""
    config = resolve_config(argv)
    import training

    if training.is_first_process():
        print(format_config(config), flush=True)
    if config.gan != "none":
        check_processes(config)
    chain = config.gan != "none" and not config.gan_run
    before = signal.getsignal(signal.SIGTERM)
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        if chain:
            train_first(config)
        results = training.train(config)
    except KeyboardInterrupt:  # before a first step or after the last: in between a training ends with a checkpoint
        begun = any((Path(config.run) / name).exists() for name in ("last.pt", "first"))
        line = f"to go on: python main.py --resume --run {config.run}" if begun else "before the first step"
        print(f"\nstopped; {line}", flush=True)
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    first = Path(config.run) / "first"
    if chain and read_json(first / "config.json")["epochs"] == config.epochs:
        print(compare(read_json(first / "results.json"), results), flush=True)


def compare(first, second):
    """The results without and with generated pictures side by side, as text."""
    names = ("text_to_image_R@1", "text_to_image_R@5", "image_to_text_R@1", "rsum")
    rows = [("", "real pictures only", "and generated ones")]
    rows += [(name.replace("_", " "), *(f"{results[name]:.1f}" for results in (first, second))) for name in names]
    lines = [f"{name:<20}{a:>20}{b:>20}" for name, a, b in rows]
    note = "(one run each: whether they help is asked by benchmarks/gan_ablation.py, over several seeds)"
    return "\n" + "\n".join([*lines, note])


def check_processes(config):
    """Raise InputError where several processes would have to train one GAN."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and (config.gan == "joint" or not config.gan_run):
        raise InputError(
            f"gan is {config.gan} in several processes, but a GAN learns in one: train it with "
            "python gan.py --run ..., then give --gan pairs --gan_run ..."
        )


def train_first(config):
    """Train the CLIP and the GAN that a run with generated pictures needs, in first/ of its folder.

    What a stopped run has already done is not done again.
    """
    import gan
    import generated
    import shapes
    import training

    # What is wrong with the later stages is said now, before anything is written.
    generated.check_settings(config)
    if config.sample_images:
        shapes.draw_sample(config.image_path, config.captions_path, config.sample_images)
    gan.learned_splits(config, config.seed)
    first = dataclasses.replace(config, run=f"{config.run}/first", gan="none")
    Path(first.run).mkdir(parents=True, exist_ok=True)
    write_json(Path(config.run) / "config.json", {**vars(config), "resume": False})  # so that it can be resumed
    print("\n==== 1 of 3: CLIP on the real pictures ====", flush=True)
    if not (Path(first.run) / "results.json").exists():
        try:
            training.train(first)
        except SystemExit:
            print(f"to go on with all three stages: python main.py --resume --run {config.run}", flush=True)
            raise
    print("\n==== 2 of 3: the GAN, told the captions by that CLIP ====", flush=True)
    gan.train_gan(first)
    print("\n==== 3 of 3: CLIP on real and generated pictures ====", flush=True)


if __name__ == "__main__":
    main()

"""Builds the command line from the settings in `config.py`; does not import torch."""

import argparse
import dataclasses
import difflib
import functools
import sys
import textwrap

from config import PRESETS, RENAMED, Config, InputError, kind_of, legal_values

BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "none": None}
# The first setting of each group in --help.
HELP_GROUPS = {"image_path": "paths", "size": "data", "model_name": "model", "epochs": "optimisation"}
HELP_GROUPS |= {"gan": "GAN stage", "device": "device and precision"}
# Meanings that differ in the --help of gan.py, a command for a trained run.
MEANINGS_FOR_A_RUN = {
    "run": "trained run whose CLIP conditions the GAN; the GAN is saved in its gan/",
    "resume": "continue training the GAN of the run",
    "seed": "random seed of the GAN's training",
}


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, raised as InputError."""

    def error(self, message):
        words = message.split() if message.startswith("unrecognized") else []
        for unknown in [word.split("=")[0] for word in words if word.startswith("--")][:1]:
            flags = [flag for action in self._actions for flag in action.option_strings]
            flags = [flag for flag in flags if flag.startswith("--no-") == unknown.startswith("--no-")]
            near = difflib.get_close_matches(unknown, flags, n=1)
            renamed = RENAMED.get(unknown.removeprefix("--"))
            if renamed:
                message += f" (renamed to --{renamed})"
            else:
                message += f" (did you mean {near[0]}?)" if near else " (see --help)"
        if "invalid choice: 'best'" in message:
            message += " (best was renamed to scratch)"
        raise InputError(message)


def flag_type(field):
    """The `type` function of a flag; its range is checked by `check_config`."""
    kind = kind_of(field)

    def convert(text):
        try:
            return BOOLEANS[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            raise argparse.ArgumentTypeError(f"{text!r} is not {legal_values(field)}") from None

    return convert


def add_flags(parser, shown=None):
    """One flag per setting, in groups, and `--no-<name>`; `shown`: the settings that appear in --help, default all."""
    group = None
    for field in dataclasses.fields(Config):
        if field.name in HELP_GROUPS:
            group = parser.add_argument_group(HELP_GROUPS[field.name])
        meta, kind = field.metadata, kind_of(field)
        legal = f"{meta['low']} to {meta['high']}, " if meta["low"] is not None else ""
        meaning = meta["meaning"] if shown is None else MEANINGS_FOR_A_RUN.get(field.name, meta["meaning"])
        default = f"default: {field.default!r}" if shown is None else "default: that of the run"
        default = "required" if shown is not None and field.name == "run" else default
        text = f"{meaning} ({legal}{default})".replace("%", "%%")
        options = {"type": flag_type(field), "default": argparse.SUPPRESS}
        options["help"] = text if shown is None or field.name in shown else argparse.SUPPRESS
        options |= {"choices": meta["choices"]} if meta["choices"] else {"metavar": kind.__name__}
        if kind is bool:
            values = "true|false|none" if "None" in str(field.type) else "true|false"
            options |= {"nargs": "?", "const": True, "metavar": values}
            hidden = {"action": "store_false", "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            group.add_argument(f"--no-{field.name}", dest=field.name, **hidden)
        group.add_argument(f"--{field.name}", **options)


def parse_flags(argv=None, prog="main.py", description="Train CLIP on captioned images.", shown=None):
    """The settings of a command line, {name: value}, and their sources, {name: "preset <name>" or "flag"}.

    shown: the settings of a command for an existing run, which has no presets.
    """
    parser = OneLineParser(
        prog=prog,
        usage=f"{prog} [--setting value ...]",
        description=f"{description} Boolean settings: --name or --no-name.",
        allow_abbrev=False,
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=34),
    )
    if shown is None:
        parser.add_argument("--preset", choices=sorted(PRESETS), help="several settings at once; flags override it")
    add_flags(parser, shown)
    flags = vars(parser.parse_args(sys.argv[1:] if argv is None else argv))
    preset = flags.pop("preset", None)
    values = {**PRESETS.get(preset, {}), **flags}
    return values, {name: "flag" if name in flags else f"preset {preset}" for name in values}


def format_config(config, sources):
    """The settings that differ from the defaults, a paragraph for each source (preset, flag, saved run)."""
    paragraphs = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        source = sources.get(field.name, "saved run")
        if field.name not in ("run", "resume") and (value != field.default or source == "flag"):
            paragraphs.setdefault(source, []).append(f"{field.name}={value}")
    lines = [f"run: {config.run}"]
    for source, settings in paragraphs.items():
        lines += textwrap.wrap(f"{source}: " + "  ".join(settings), 110, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines)

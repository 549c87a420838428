"""The command line made from the settings in `config.py`; no torch."""

import argparse
import dataclasses
import difflib
import functools
import sys
import textwrap

from config import PRESETS, RENAMED, Config, InputError, kind_of, legal_values

# The first setting of each group in --help.
HELP_GROUPS = {
    "image_path": "paths",
    "size": "data",
    "model_name": "model",
    "epochs": "optimisation",
    "gan": "GAN stage",
    "device": "device and precision",
}


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, raised as InputError."""

    def error(self, message):
        words = message.split() if message.startswith("unrecognized") else []
        for unknown in [word.split("=")[0] for word in words if word.startswith("--")][:1]:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown, flags, n=1)
            renamed = RENAMED.get(unknown.removeprefix("--"))
            if renamed:
                message += f" (renamed to --{renamed})"
            else:
                message += f" (did you mean {near[0]}?)" if near else " (see --help)"
        raise InputError(message)


class BooleanFlag(argparse.BooleanOptionalAction):
    """`--name`, `--no-name`, or with a value: `--name true`, `--name false`; `none` where a setting may be None."""

    VALUES = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "none": None}

    def __init__(self, option_strings, dest, **options):
        super().__init__(option_strings, dest, **options)
        self.nargs, self.metavar = "?", "true|false"

    def __call__(self, parser, namespace, values, option_string=None):
        text = "true" if values is None else values.lower()
        if text not in self.VALUES:
            parser.error(f"{self.dest} is {values!r}: it must be true or false")
        value = self.VALUES[text]
        setattr(namespace, self.dest, (not value) if option_string.startswith("--no-") else value)


class HelpFormatter(argparse.HelpFormatter):
    def _format_action_invocation(self, action):
        if isinstance(action, BooleanFlag):  # without the optional value
            return ", ".join(action.option_strings)
        return super()._format_action_invocation(action)


def flag_type(field):
    """The conversion of a flag's text; its range is checked by `check_config`."""
    kind = kind_of(field)

    def convert(text):
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {legal_values(field)}") from None

    return convert


def add_flags(parser, shown=None):
    """One flag per setting, in groups; `shown`: the settings that appear in --help, by default all."""
    group = None
    for field in dataclasses.fields(Config):
        if field.name in HELP_GROUPS:
            group = parser.add_argument_group(HELP_GROUPS[field.name])
        meta, options = field.metadata, {"default": argparse.SUPPRESS}
        if kind_of(field) is bool:
            options["action"] = BooleanFlag
        else:
            options["type"] = flag_type(field)
            options |= {"choices": meta["choices"]} if meta["choices"] else {"metavar": kind_of(field).__name__}
        legal = f"{meta['low']} to {meta['high']}, " if meta["low"] is not None else ""
        default = repr(field.default) if shown is None else "that of the run"
        options["help"] = f"{meta['meaning']} ({legal}default: {default})".replace("%", "%%")
        if shown is not None and field.name not in shown:
            options["help"] = argparse.SUPPRESS
        group.add_argument(f"--{field.name}", **options)


def parse_flags(argv=None, prog="main.py", description="Train CLIP on captioned images.", shown=None):
    """The settings given on a command line, and where each comes from; `--help` prints them all and exits.

    Args:
        shown: the settings that a command for an existing run has; such a command has no presets.

    Returns:
        ({name: value}, {name: "preset <name>" or "flag"}).
    """
    parser = OneLineParser(
        prog=prog,
        usage=f"{prog} [--setting value ...]",
        description=description,
        allow_abbrev=False,
        formatter_class=functools.partial(HelpFormatter, max_help_position=34),
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
        if value != field.default and field.name != "run":
            paragraphs.setdefault(sources.get(field.name, "saved run"), []).append(f"{field.name}={value}")
    lines = [f"run: {config.run}"]
    for source, settings in paragraphs.items():
        lines += textwrap.wrap(f"{source}: " + "  ".join(settings), 110, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines)

"""The command line: flags, where their values come from, --help, and the first output."""

import dataclasses

import pytest

from config import PRESETS, RENAMED, Config, InputError, build_config, parse_config
from utils.flags import format_config, parse_flags


def one_line(text):
    """Text with its whitespace normalised: argparse wraps lines."""
    return " ".join(text.split())


def test_flag_overrides_preset_and_preset_overrides_file():
    assert PRESETS["demo"]["batch_size"] != 48
    assert parse_config(["--preset", "demo"]).batch_size == PRESETS["demo"]["batch_size"]
    assert parse_config(["--preset", "demo", "--batch_size", "48"]).batch_size == 48
    assert parse_config(["--batch_size", "48", "--preset", "demo"]).batch_size == 48
    assert parse_config(["--preset", "demo"]).factor == Config().factor
    # A flag with the default value overrides the preset too.
    assert PRESETS["demo"]["epochs"] != Config().epochs
    assert parse_config(["--preset", "demo", "--epochs", str(Config().epochs)]).epochs == Config().epochs


def test_parse_flags_names_the_source_of_each_setting():
    values, sources = parse_flags(["--preset", "demo", "--batch_size", "48", "--seed", "3"])
    assert values == {**PRESETS["demo"], "batch_size": 48, "seed": 3}
    assert sources.keys() == values.keys()
    assert {name for name, source in sources.items() if source == "flag"} == {"batch_size", "seed"}
    assert set(sources.values()) == {"flag", "preset demo"}
    assert parse_flags([]) == ({}, {})


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--cache_images"], True),
        (["--no-cache_images"], False),
        (["--cache_images", "true"], True),
        (["--cache_images", "false"], False),
        (["--cache_images=False"], False),
        (["--cache_images", "0"], False),
        (["--cache_images", "1"], True),
        (["--cache_images", "TRUE"], True),
        (["--cache_images", "--seed", "3"], True),
        (["--no-cache_images", "--seed", "3"], False),
        (["--no-cache_images", "--cache_images"], True),
    ],
)
def test_boolean_flag_bare_negated_or_with_a_value(words, value):
    assert parse_config(words).cache_images is value


def test_boolean_flag_of_an_encoder_may_be_none():
    config = parse_config(["--no-pretrained", "--pretrained_text_encoder"])
    assert (config.encoder_flag("pretrained", "text"), config.encoder_flag("pretrained", "image")) == (True, False)
    assert parse_config(["--pretrained_text_encoder", "none"]).pretrained_text_encoder is None
    assert parse_config(["--pretrained_image_encoder", "false"]).pretrained_image_encoder is False


def test_values_have_the_type_of_their_setting():
    config = parse_config(["--batch_size", "64", "--dropout", "0", "--run", "7", "--device", "cuda:1"])
    assert (config.batch_size, config.dropout, config.run, config.device) == (64, 0.0, "7", "cuda:1")
    assert type(config.dropout) is float
    assert parse_config(["--gan_size", "128"]).gan_size == 128


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--batchsize", "64"], ["--batchsize", "did you mean --batch_size"]),
        (["--batch_siz=64"], ["--batch_siz", "did you mean --batch_size"]),
        (["--no-cache_image"], ["--no-cache_image", "did you mean --no-cache_images"]),
        (["--zzz", "1"], ["--zzz", "--help"]),
        (["--batch", "64"], ["--batch"]),  # no abbreviations
        (["--preset", "huge"], ["huge", "demo"]),
        (["--preset", "best"], ["best", "scratch"]),
        (["64"], ["64"]),
        (["--batch_size"], ["--batch_size: expected one argument"]),
        (["--batch_size", "many"], ["batch_size", "'many'", "from 2 to 16777216"]),
        (["--batch_size", "1"], ["batch_size is 1", "from 2 to 16777216"]),
        (["--batch_size", "3.5"], ["batch_size", "'3.5'", "an integer"]),
        (["--dropout", "0.95"], ["dropout is 0.95", "from 0 to 0.9"]),
        (["--head_lr", "nan"], ["head_lr is nan", "from 0 to 1"]),
        (["--head_lr", "-1"], ["head_lr is -1.0", "from 0 to 1"]),
        (["--epochs", "0"], ["epochs is 0", "from 1 to"]),
        (["--scheduler", "linear"], ["--scheduler", "'linear'", "plateau", "cosine"]),
        (["--precision", "fp8"], ["--precision", "'fp8'", "auto", "float32", "bf16", "fp16"]),
        (["--gan_size", "33"], ["--gan_size", "33", "32", "64", "128"]),
        (["--cache_images", "maybe"], ["cache_images", "'maybe'", "true or false"]),
        (["--cache_images", "none"], ["cache_images is", "true or false"]),
        (["--no-cache_images", "false"], ["unrecognized arguments: false"]),
        (["--text_width", "128"], ["text_width", "--no-pretrained_text_encoder"]),
    ],
)
def test_parse_config_names_the_bad_value_and_the_legal_ones(argv, parts):
    with pytest.raises(InputError) as error:
        parse_config(argv)
    assert "\n" not in str(error.value)
    assert [part for part in parts if part not in str(error.value)] == [], str(error.value)


def test_parse_config_does_not_suggest_a_known_flag():
    for argv in (["--batch_size"], ["--preset", "huge"]):
        with pytest.raises(InputError) as error:
            parse_config(argv)
        assert "did you mean" not in str(error.value)


@pytest.mark.parametrize("old", sorted(RENAMED))
def test_renamed_flag_is_refused_with_its_new_name(old):
    for argv in ([f"--{old}", "3"], [f"--{old}=3"]):
        with pytest.raises(InputError, match=rf"unrecognized arguments: --{old}.*renamed to --{RENAMED[old]}\)"):
            parse_config(argv)


def test_every_setting_has_a_meaning_and_a_flag():
    examples = {int: "{low}", float: "{low}", str: "x", bool: "true"}
    for field in dataclasses.fields(Config):
        assert field.metadata["meaning"]
        kind = field.type if isinstance(field.type, type) else bool
        text = str(field.metadata["choices"][-1] if field.metadata["choices"] else examples[kind])
        text = text.format(**field.metadata)
        given = ["--pretrained", "false", f"--{field.name}", text]
        assert getattr(parse_config(given), field.name) == kind(text if kind is not bool else True)


def test_help_shows_every_setting_with_its_legal_values(capsys):
    with pytest.raises(SystemExit) as exit:
        parse_config(["--help"])
    printed = one_line(capsys.readouterr().out)
    assert exit.value.code == 0
    for preset in PRESETS:
        assert preset in printed
    for field in dataclasses.fields(Config):
        assert f"--{field.name}" in printed
        assert one_line(field.metadata["meaning"]) in printed
        if field.metadata["choices"]:
            assert "{" + ",".join(map(str, field.metadata["choices"])) + "}" in printed
        elif field.metadata["low"] is not None:
            assert f"({field.metadata['low']} to {field.metadata['high']}, default: {field.default!r})" in printed
        if field.type is bool:
            assert f"--{field.name} [true|false]" in printed
    assert "Boolean settings: --name or --no-name." in printed


def test_help_of_a_command_for_a_run_shows_its_own_settings_only(capsys):
    with pytest.raises(SystemExit):
        parse_flags(["--help"], "gan.py", "Train a GAN.", {"run", "gan_size"})
    printed = one_line(capsys.readouterr().out)
    assert "gan.py" in printed and "Train a GAN." in printed
    assert "--run" in printed and "--gan_size" in printed
    assert "--batch_size" not in printed and "--preset" not in printed


# ---- the first output -------------------------------------------------------------------------------------------


def test_format_config_groups_changed_settings_by_source():
    values, sources = parse_flags(["--preset", "demo", "--batch_size", "48", "--epochs", "10", "--size", "48"])
    lines = format_config(build_config({**values, "run": "runs/x"}), sources).splitlines()
    assert lines[0] == "run: runs/x"
    assert max(map(len, lines)) <= 110
    text = one_line("\n".join(lines[1:]))
    preset, flag = text.split("flag: ")
    assert preset.startswith("preset demo: ")
    assert set(flag.split()) == {"batch_size=48", "epochs=10", "size=48"}
    preset_values = {name: value for name, value in PRESETS["demo"].items() if value != getattr(Config(), name)}
    expected = {f"{n}={v}" for n, v in preset_values.items() if n not in ("batch_size", "epochs", "size")}
    assert set(preset.removeprefix("preset demo: ").split()) == expected


def test_format_config_marks_the_settings_of_a_saved_run():
    lines = format_config(Config(run="runs/x", epochs=7, seed=3), {"epochs": "flag"}).splitlines()
    assert lines == ["run: runs/x", "saved run: seed=3", "flag: epochs=7"]


def test_format_config_of_the_defaults_is_one_line():
    assert format_config(Config(run="x"), {}) == "run: x"


def test_format_config_shows_a_flag_that_restores_a_default():
    values, sources = parse_flags(["--preset", "demo", "--batch_size", "32"])
    assert "flag: batch_size=32" in format_config(build_config({**values, "run": "x"}), sources).splitlines()


def test_renamed_preset_and_hidden_flags_in_errors():
    with pytest.raises(InputError, match="best was renamed to scratch"):
        parse_flags(["--preset", "best"])
    with pytest.raises(InputError) as error:
        parse_flags(["--nosuch", "1"])
    assert "--no-" not in str(error.value)

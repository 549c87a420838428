"""Settings: where their values come from, and what is refused."""

import dataclasses
import json

import pytest
from conftest import run_python

from config import (
    PRESETS,
    Config,
    InputError,
    build_config,
    exit_on_input_error,
    format_config,
    parse_config,
    read_json,
    write_json,
)


def test_defaults_are_the_published_ones():
    expected = {
        "model_name": "resnet50",
        "text_encoder_model": "distilbert-base-uncased",
        "text_tokenizer": "distilbert-base-uncased",
        "max_length": 200,
        "num_projection_layers": 1,
        "projection_dim": 256,
        "dropout": 0.1,
        "batch_size": 32,
        "num_workers": 4,
        "head_lr": 1e-3,
        "image_encoder_lr": 1e-4,
        "text_encoder_lr": 1e-5,
        "weight_decay": 1e-3,
        "patience": 1,
        "factor": 0.8,
        "epochs": 1,
        "size": 224,
        "pretrained": True,
        "trainable": True,
    }
    config = parse_config([])
    assert {name: getattr(config, name) for name in expected} == expected


def test_flag_beats_preset_beats_file():
    assert PRESETS["demo"]["batch_size"] not in (Config().batch_size, 48)
    assert parse_config(["--preset", "demo"]).batch_size == PRESETS["demo"]["batch_size"]
    assert parse_config(["--preset", "demo", "--batch_size", "48"]).batch_size == 48
    assert parse_config(["--batch_size", "48", "--preset", "demo"]).batch_size == 48
    assert parse_config(["--preset", "demo"]).factor == Config().factor
    # A flag with the file's own value still beats the preset.
    assert parse_config(["--preset", "demo", "--batch_size", "32"]).batch_size == 32


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_is_a_possible_config(preset):
    config = parse_config(["--preset", preset])
    assert {name: getattr(config, name) for name in PRESETS[preset]} == PRESETS[preset]


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--cache_images"], True),
        (["--cache_images", "true"], True),
        (["--cache_images", "false"], False),
        (["--cache_images=False"], False),
        (["--cache_images", "0"], False),
        (["--cache_images", "--seed", "3"], True),
    ],
)
def test_booleans_bare_or_spelt_out(words, value):
    assert parse_config(words).cache_images is value


def test_values_have_the_kind_of_their_setting():
    config = parse_config(["--batch_size", "64", "--dropout", "0", "--run", "7", "--device", "cuda:1"])
    assert (config.batch_size, config.dropout, config.run, config.device) == (64, 0.0, "7", "cuda:1")
    assert type(config.dropout) is float


def test_encoder_flag_falls_back_to_the_common_one():
    config = parse_config(["--pretrained", "false", "--pretrained_text_encoder", "true"])
    assert config.encoder_flag("pretrained", "text") is True
    assert config.encoder_flag("pretrained", "image") is False
    assert parse_config(["--pretrained_text_encoder", "none"]).pretrained_text_encoder is None


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().epochs = 3


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--batchsize", "64"], ["--batchsize", "did you mean --batch_size"]),
        (["--batch_siz=64"], ["--batch_siz", "did you mean --batch_size"]),
        (["--zzz", "1"], ["--zzz", "--help"]),
        (["--preset", "huge"], ["huge", "demo"]),
        (["64"], ["64"]),
        (["--batch_size"], ["--batch_size: expected one argument"]),
        (["--batch_size", "many"], ["batch_size", "'many'", "from 2 to 16777216"]),
        (["--batch_size", "1"], ["batch_size is 1", "from 2 to 16777216"]),
        (["--batch_size", "3.5"], ["batch_size", "'3.5'", "a whole number"]),
        (["--dropout", "0.95"], ["dropout is 0.95", "from 0 to 0.9"]),
        (["--head_lr", "nan"], ["head_lr is nan", "from 0 to 1"]),
        (["--head_lr", "-1"], ["head_lr is -1.0", "from 0 to 1"]),
        (["--epochs", "0"], ["epochs is 0", "from 1 to"]),
        (["--scheduler", "linear"], ["scheduler is 'linear'", "plateau, cosine"]),
        (["--precision", "fp8"], ["precision is 'fp8'", "auto, float32, bf16, fp16"]),
        (["--cache_images", "maybe"], ["cache_images is 'maybe'", "true or false"]),
        (["--cache_images", "none"], ["cache_images is 'none'", "true or false"]),
        (["--micro_batch_size", "64"], ["micro_batch_size is 64", "batch_size (32)"]),
        (["--pretrained", "false", "--text_width", "100"], ["text_width is 100", "multiple of 64"]),
        (["--text_width", "128"], ["text_width", "--pretrained_text_encoder false"]),
        (["--text_tokenizer", "captions"], ["text_tokenizer is 'captions'", "--pretrained_text_encoder false"]),
        (["--pretrained", "false", "--trainable_image_encoder", "false"], ["the image encoder", "neither"]),
    ],
)
def test_impossible_settings_are_named_with_what_is_allowed(argv, parts):
    with pytest.raises(InputError) as error:
        parse_config(argv)
    assert "\n" not in str(error.value)
    assert [part for part in parts if part not in str(error.value)] == [], str(error.value)


def test_a_known_flag_is_not_suggested_for_itself():
    for argv in (["--batch_size"], ["--preset", "huge"]):
        with pytest.raises(InputError) as error:
            parse_config(argv)
        assert "did you mean" not in str(error.value)


def test_every_number_is_refused_outside_its_range():
    for field in dataclasses.fields(Config):
        low, high = field.metadata["low"], field.metadata["high"]
        if low is None:
            continue
        outside = [low - 1, high + 1] if high < float("inf") else [low - 1]
        for value in outside:
            with pytest.raises(InputError, match=f"^{field.name} is {value}: .* from {low} to {high}"):
                Config(**{field.name: value})


@pytest.mark.parametrize("value", [True, "32", None, 32.0])
def test_a_value_of_another_kind_is_refused(value):
    with pytest.raises(InputError, match="^batch_size is .*a whole number"):
        Config(batch_size=value)


def test_build_config_refuses_an_unknown_name():
    with pytest.raises(InputError, match="unknown setting 'batchsize': did you mean 'batch_size'"):
        build_config({"batchsize": 3})


def test_every_setting_has_a_meaning_and_a_flag():
    # What --help prints is generated from the fields; one of each kind is set through its flag.
    examples = {int: "{low}", float: "{low}", str: "x", bool: "true"}
    for field in dataclasses.fields(Config):
        assert field.metadata["meaning"]
        kind = field.type if isinstance(field.type, type) else bool
        text = str(field.metadata["choices"][-1] if field.metadata["choices"] else examples[kind])
        text = text.format(**field.metadata)
        given = ["--pretrained", "false", f"--{field.name}", text]
        assert getattr(parse_config(given), field.name) == kind(text if kind is not bool else True)


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as exit:
        parse_config(["--help"])
    printed = capsys.readouterr().out
    assert exit.value.code == 0
    for field in dataclasses.fields(Config):
        assert f"--{field.name} " in printed
        assert field.metadata["meaning"] in printed


def test_importing_config_imports_no_torch():
    finished = run_python("-c", "import sys, config; config.parse_config([]); print('torch' in sys.modules)")
    assert finished.stdout.strip() == "False", finished.stderr


def test_format_config_marks_what_was_changed():
    lines = {line[3:].split()[0]: line for line in format_config(Config(epochs=3, run="x")).splitlines()}
    assert lines["epochs"].startswith(" * ")
    assert lines["epochs"].endswith(" 3")
    assert lines["batch_size"].startswith("   ")
    assert len(lines) == len(dataclasses.fields(Config))


def test_json_is_written_whole_and_read_back(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}


def test_read_json_says_what_is_wrong(tmp_path):
    with pytest.raises(InputError, match=r"no\.json does not exist"):
        read_json(tmp_path / "no.json")
    (tmp_path / "bad.json").write_text('{"a": ', encoding="utf-8")
    with pytest.raises(InputError, match=r"bad\.json cannot be read as JSON"):
        read_json(tmp_path / "bad.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"bytes\.json cannot be read as JSON"):
        read_json(tmp_path / "bytes.json")


def test_input_errors_end_a_command_with_one_line(refused):
    @exit_on_input_error
    def command(argv):
        raise InputError(f"{argv[0]} is wrong")

    assert refused(command, ["this"]) == "this is wrong"


def test_an_input_error_from_a_loader_process_is_one_line(refused):
    # PyTorch hands on an exception of a worker with its traceback as the message.
    @exit_on_input_error
    def command(argv):
        raise InputError('Caught InputError in DataLoader worker process 0.\n  File "x"\nconfig.InputError: bad x\n')

    assert refused(command, []) == "bad x"


def test_other_errors_are_not_hidden():
    @exit_on_input_error
    def command(argv):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        command([])

"""Settings: defaults, presets, legal values, names of earlier versions."""

import dataclasses

import pytest
from conftest import run_python

from config import PRESETS, RENAMED, Config, DivergenceError, InputError, build_config, parse_config, rename_settings


def test_defaults_are_the_published_ones():
    expected = {
        "model_name": "resnet50",
        "text_encoder_model": "distilbert-base-uncased",
        "text_tokenizer": "distilbert-base-uncased",
        "max_length": 200,
        "num_projection_layers": 1,
        "projection_dim": 256,
        "dropout": 0.1,
        "batch_size": 64,
        "head_lr": 1e-3,
        "image_encoder_lr": 1e-4,
        "text_encoder_lr": 1e-5,
        "weight_decay": 1e-3,
        "patience": 1,
        "factor": 0.8,
        "epochs": 5,
        "size": 224,
        "pretrained": True,
        "trainable": True,
    }
    config = parse_config([])
    assert {name: getattr(config, name) for name in expected} == expected
    assert config == Config()


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_preset_gives_a_legal_config(preset):
    config = parse_config(["--preset", preset])
    assert {name: getattr(config, name) for name in PRESETS[preset]} == PRESETS[preset]


def test_presets_are_the_documented_ones():
    assert set(PRESETS) == {"demo", "frozen", "finetune", "scratch", "paper"}


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().epochs = 3


def test_encoder_flag_falls_back_to_the_common_setting():
    config = Config(pretrained=False, pretrained_text_encoder=True)
    assert config.encoder_flag("pretrained", "text") is True
    assert config.encoder_flag("pretrained", "image") is False
    assert config.encoder_flag("trainable", "image") is True


# ---- legal values -----------------------------------------------------------------------------------------------


def test_every_number_is_refused_outside_its_range():
    for field in dataclasses.fields(Config):
        low, high = field.metadata["low"], field.metadata["high"]
        if low is None:
            continue
        outside = [low - 1, high + 1] if high < float("inf") else [low - 1]
        for value in outside:
            with pytest.raises(InputError, match=f"^{field.name} is {value}: .* from {low} to {high}"):
                Config(**{field.name: value})


def test_every_choice_is_refused_outside_its_choices():
    found = [field for field in dataclasses.fields(Config) if field.metadata["choices"]]
    assert len(found) >= 6
    for field in found:
        value = 33 if field.type is int else "other"
        with pytest.raises(InputError) as error:
            Config(**{field.name: value})
        choices = ", ".join(map(str, field.metadata["choices"]))
        assert str(error.value) == f"{field.name} is {value!r}: it must be one of {choices}"


@pytest.mark.parametrize("value", [True, "32", None, 32.0])
def test_value_of_another_type_is_refused(value):
    with pytest.raises(InputError, match="^batch_size is .*: it must be an integer"):
        Config(batch_size=value)


@pytest.mark.parametrize("value", [1, "true", None])
def test_boolean_of_another_type_is_refused(value):
    with pytest.raises(InputError, match="^cache_images is .*: it must be true or false"):
        Config(cache_images=value)
    assert Config(pretrained_text_encoder=None).pretrained_text_encoder is None


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"head_lr": float("nan")}, ["head_lr is nan", "from 0 to 1"]),
        ({"micro_batch_size": 128}, ["micro_batch_size is 128", "batch_size (64)"]),
        ({"warmup_steps": 5, "scheduler": "plateau"}, ["warmup_steps is 5", "--scheduler cosine"]),
        ({"pretrained": False, "text_width": 100}, ["text_width is 100", "multiple of 64"]),
        ({"text_width": 128}, ["text_width is 128", "--no-pretrained_text_encoder"]),
        ({"text_layers": 2}, ["text_layers is 2", "--no-pretrained_text_encoder"]),
        ({"text_encoder_model": "cbow"}, ["text_encoder_model is 'cbow'", "--no-pretrained_text_encoder"]),
        ({"text_tokenizer": "wordpiece"}, ["text_tokenizer is 'wordpiece'", "--no-pretrained_text_encoder"]),
        ({"pretrained": False, "trainable_image_encoder": False}, ["the image encoder is neither"]),
        ({"pretrained_text_encoder": False, "trainable": False}, ["the text encoder is neither"]),
        ({"gan": "pairs", "gan_start": 0.5, "gan_end": 0.5}, ["gan_start is 0.5", "gan_end 0.5", "before the end"]),
    ],
)
def test_conflicting_settings_are_refused(settings, parts):
    with pytest.raises(InputError) as error:
        Config(**settings)
    assert "\n" not in str(error.value)
    assert [part for part in parts if part not in str(error.value)] == [], str(error.value)


def test_errors_have_their_own_types():
    assert issubclass(InputError, ValueError)
    assert issubclass(DivergenceError, ArithmeticError) and not issubclass(DivergenceError, InputError)


# ---- from a dict ------------------------------------------------------------------------------------------------


def test_build_config_refuses_an_unknown_name():
    with pytest.raises(InputError, match="unknown setting 'batchsize': did you mean 'batch_size'"):
        build_config({"batchsize": 3})
    with pytest.raises(InputError, match="unknown setting 'zzzzz'$"):
        build_config({"zzzzz": 3})


def test_build_config_reads_the_names_of_earlier_versions():
    old = {"gan_gate": 7, "gan_match": 0.5, "text_tokenizer": "captions", "pretrained": False}
    new = {"gan_filter_top_k": 7, "gan_clip_weight": 0.5, "text_tokenizer": "wordpiece", "pretrained": False}
    assert build_config(old) == build_config(new) == Config(**new)
    assert rename_settings(old) == new
    assert rename_settings(new) == new


def test_renamed_settings_exist_under_their_new_names_only():
    names = {field.name for field in dataclasses.fields(Config)}
    assert set(RENAMED.values()) <= names
    assert not set(RENAMED) & names


# ---- imports ----------------------------------------------------------------------------------------------------


def test_config_imports_no_torch():
    finished = run_python("-c", "import sys, config; config.parse_config([]); print('torch' in sys.modules)")
    assert finished.stdout.strip() == "False", finished.stderr


def test_light_modules_import_no_torch():
    code = "import sys, utils.cli, utils.files, utils.flags, utils.gan_settings, utils.hashing, utils.runs\n"
    finished = run_python("-c", code + "print({'torch', 'numpy', 'pandas', 'timm', 'transformers'} & {*sys.modules})")
    assert finished.stdout.strip() == "set()", finished.stderr

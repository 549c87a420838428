"""All commands answer --help, bad flags and bad input at once, with a one-line error, and leave no files."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, flags, run_python
from PIL import Image
from safetensors.torch import load_file, save_file

import inference
import main
from utils.files import read_json, write_json

COMMANDS = {
    "main": [ROOT / "main.py"],
    "gan": [ROOT / "gan.py"],
    "inference": [ROOT / "inference.py"],
    "app": ["-m", "extras.app"],
    "augment_captions": ["-m", "extras.augment_captions"],
}
HEAVY = {"torch", "pandas", "timm", "transformers", "albumentations", "cv2", "matplotlib", "PIL"}


def imported(finished):
    """The modules that a process with `-X importtime` has imported."""
    lines = [line for line in finished.stderr.splitlines() if line.startswith("import time:")]
    assert lines
    return {line.split("|")[-1].strip() for line in lines}


# ---- --help and bad flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_imports_nothing_heavy(command):
    finished = run_python("-X", "importtime", *COMMANDS[command], "--help")
    assert finished.returncode == 0
    assert "--run" in finished.stdout
    assert imported(finished) & HEAVY == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_flag_of_a_command_imports_nothing_heavy(command):
    finished = run_python("-X", "importtime", *COMMANDS[command], "--run", "x", "--sead", "3")
    assert finished.returncode == 2
    errors = [line for line in finished.stderr.splitlines() if not line.startswith("import time:")]
    assert len(errors) == 1
    assert errors[0].startswith("error: unrecognized arguments: --sead")
    assert imported(finished) & HEAVY == set()
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("argv", [["--batch_size", "1"], ["--warmup_steps", "-9"], ["--resume"], ["--gan_gate", "3"]])
def test_bad_settings_of_main_import_nothing_heavy(argv):
    finished = run_python("-X", "importtime", ROOT / "main.py", *argv)
    assert finished.returncode == 2
    assert imported(finished) & HEAVY == set()


def test_command_ends_with_status_2_and_one_line():
    finished = run_python(ROOT / "main.py", "--batchsize", "3")
    assert finished.returncode == 2
    assert finished.stderr.splitlines() == ["error: unrecognized arguments: --batchsize 3 (did you mean --batch_size?)"]
    assert list(Path().iterdir()) == []


# ---- bad input: training ----------------------------------------------------------------------------------------

TWENTY = {f"{i:02d}.jpg": [f"A dog number {i} .", "A dog ."] for i in range(20)}


def test_training_without_a_data_set_says_how_to_get_one(refused):
    line = refused(main.main, ["--device", "cpu"])
    for part in ("image_path is", "Images", "Kaggle", "--image_path", "--preset demo"):
        assert part in line
    assert list(Path().iterdir()) == []


def break_data(kind, data):
    """Damage the data set as described by `kind`; returns changed settings."""
    images, captions = Path(data["image_path"]), Path(data["captions_path"])
    if kind == "no image folder":
        shutil.rmtree(images)
    elif kind == "no captions file":
        captions.unlink()
    elif kind == "missing images":
        for name in ("03.jpg", "04.jpg", "05.jpg"):
            (images / name).unlink()
    elif kind == "unreadable image":
        (images / "03.jpg").write_bytes(b"not an image")
    elif kind == "truncated jpeg":
        rng = np.random.default_rng(0)
        Image.fromarray(rng.integers(0, 256, (80, 80, 3), dtype=np.uint8)).save(images / "03.jpg")
        (images / "03.jpg").write_bytes((images / "03.jpg").read_bytes()[:2000])
    elif kind == "empty captions":
        captions.write_text("", encoding="utf-8")
    elif kind == "header only":
        captions.write_text("image,caption\n", encoding="utf-8")
    elif kind == "wrong columns":
        captions.write_text("photo,words\n03.jpg,A dog\n", encoding="utf-8")
    elif kind == "overlong caption":
        append(captions, "03.jpg," + "word " * 10_000)
    elif kind == "no caption":
        append(captions, "20.jpg,")
    elif kind == "one image":
        captions.write_text("image,caption\n03.jpg,A dog\n", encoding="utf-8")
    elif kind == "outside":
        append(captions, "../../secret.jpg,A dog")
    elif kind == "run is a file":
        Path("run").write_text("", encoding="utf-8")
    elif kind == "cache is a file":
        Path("cache").write_text("", encoding="utf-8")
    elif kind == "unknown model":
        return {"model_name": "resnet9000"}
    return {}


def append(path, line):
    path.write_text(path.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("no image folder", ["image_path is", "Images", "--preset demo"]),
        ("no captions file", ["captions_path is", "captions.txt", "--preset demo"]),
        ("missing images", ["missing", "(and 2 more)"]),
        ("unreadable image", ["03.jpg cannot be read"]),
        ("truncated jpeg", ["03.jpg cannot be read", "truncated"]),
        ("empty captions", ["captions.txt is empty"]),
        ("header only", ["captions.txt contains no captions"]),
        ("wrong columns", ["photo,words", "`image,caption`"]),
        ("overlong caption", ["line 42", "10,000 words"]),
        ("no caption", ["line 42", "'20.jpg' has no caption"]),
        ("one image", ["1 training", "at least 2"]),
        ("outside", ["'../../secret.jpg'", "inside the image folder"]),
        ("run is a file", ["run is", "not a folder"]),
        ("cache is a file", ["cache"]),
        ("unknown model", ["resnet9000"]),
    ],
)
def test_bad_data_gives_a_one_line_error_and_leaves_no_files(kind, parts, data_set, tiny_config, refused):
    data = data_set(TWENTY)
    changes = break_data(kind, data)
    line = refused(main.main, flags(tiny_config(**data, **changes)))
    assert [part for part in parts if part not in line] == [], line
    assert not list(Path().rglob("*.tmp")) + list(Path().rglob(".*.tmp"))
    assert not Path("run").is_dir()  # the run folder is created after all checks


@pytest.mark.usefixtures("no_plots")
def test_fewer_images_than_a_batch_train_with_a_warning(data_set, tiny_config, capsys):
    main.main(flags(tiny_config(**data_set(TWENTY), batch_size=17)))
    assert "warning: batch_size is 17, more than the training images" in capsys.readouterr().out


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_image_found_during_training_gives_a_one_line_error(num_workers, data_set, tiny_config, refused):
    data = data_set(TWENTY)
    for file in Path(data["image_path"]).iterdir():
        file.write_bytes(file.read_bytes()[:-300])
    line = refused(main.main, flags(tiny_config(**data, cache_images=False, num_workers=num_workers)))
    assert line.startswith("image ")
    assert "cannot be read" in line


# ---- bad input: search ------------------------------------------------------------------------------------------


@pytest.fixture
def search(trained_run, refused):
    """`search(*argv)`: the one-line error of a search on the trained run that is refused."""

    def call(*argv, run=trained_run):
        output = [] if "--evaluate" in argv else ["--output", "out.png"]
        line = refused(inference.main, [*argv, "--run", run, "--device", "cpu", *output])
        assert not Path("out.png").exists()
        return line

    return call


def test_search_refuses_impossible_queries(search):
    for query in ("", "  "):
        assert "the query is empty" in search(query)
    assert "n is 11, with 10 images" in search("a red circle", "--n", "11")
    assert "n is 0" in search("a red circle", "--n", "0")
    assert "--n" in search("a red circle", "--n", "many")


def test_search_refuses_a_folder_without_images(search):
    assert "images is nowhere, which is not a folder" in search("a dog", "--images", "nowhere")
    Path("empty").mkdir()
    assert "empty" in search("a dog", "--images", "empty")
    Path("gallery").mkdir()
    Path("gallery/b.jpg").write_bytes(b"not an image")
    assert "b.jpg cannot be read" in search("a dog", "--images", "gallery", "--n", "1")


def test_search_refuses_a_folder_without_a_model(search, refused, tmp_path):
    assert "no trained run" in refused(inference.main, ["a dog"])
    assert "is not a trained run" in search("a dog", run=tmp_path)
    assert "is not a trained run" in search("a dog", run=tmp_path / "nowhere")


def test_search_refuses_a_damaged_model(search, trained_run, tmp_path):
    run = Path(shutil.copytree(trained_run, tmp_path / "copy"))
    weights, description = run / "best" / "model.safetensors", run / "best" / "config.json"
    state = load_file(weights)

    save_file({name: tensor for name, tensor in state.items() if name != "logit_scale"}, weights)
    assert "lacks the tensor logit_scale" in search("a dog", run=run)
    weights.write_bytes(pickle.dumps({"logit_scale": 1}))
    assert "is not a safetensors file" in search("a dog", run=run)
    weights.unlink()
    assert "model.safetensors is missing" in search("a dog", run=run)
    save_file(state, weights)

    content = read_json(description)
    del content["settings"]["projection_dim"]
    write_json(description, content)
    assert "lacks settings.projection_dim" in search("a dog", run=run)
    description.write_text("[", encoding="utf-8")
    assert "cannot be read as JSON" in search("a dog", run=run)


def test_evaluate_refuses_unreadable_data(search, sample):
    assert "pass both --images and --captions_path" in search("--evaluate", "--images", sample["image_path"])
    images = ["--evaluate", "--image_path", sample["image_path"], "--captions_path"]
    assert "which does not exist" in search(*images, "nowhere.txt")
    Path("c.txt").write_text("image,caption\nnowhere.jpg,A dog\n", encoding="utf-8")
    assert "nowhere.jpg is missing" in search(*images, "c.txt")

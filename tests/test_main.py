"""The training command from its flags to its folder, and what both commands say to bad input."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, flags, run_python
from PIL import Image
from safetensors.torch import load_file, save_file

import config as settings
import inference
import main
from config import InputError, read_json

METRICS = {f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
METRICS |= {"image_to_text_median_rank", "text_to_image_median_rank", "rsum"}


def copy_run(run, folder):
    shutil.copytree(run, folder)
    return folder


# ---- a run ------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_files(trained_run):
    left = {file.relative_to(trained_run).as_posix() for file in trained_run.rglob("*") if file.is_file()}
    expected = {"config.json", "metrics.jsonl", "last.pt", "results.json", "curves.png", "matches.png"}
    expected |= {"best/model.safetensors", "best/config.json", "best/tokenizer/tokenizer.json"}
    expected |= {"best/tokenizer/tokenizer_config.json"}
    assert expected <= left
    assert not [name for name in left if name.endswith(".tmp")]
    for name in ("curves.png", "matches.png"):
        with Image.open(trained_run / name) as picture:
            assert min(picture.size) > 200
            assert np.asarray(picture.convert("L")).std() > 10


def test_a_run_names_its_metrics(trained_run):
    results = read_json(trained_run / "results.json")
    assert set(results) == METRICS | {"split", "images"}
    assert (results["split"], results["images"]) == ("test", 10)
    for metrics in (results, *read_lines(trained_run / "metrics.jsonl")):
        recalls = [value for name, value in metrics.items() if "_R@" in name]
        assert len(recalls) == 6
        assert all(0 <= value <= 100 for value in recalls)
        assert metrics["rsum"] == pytest.approx(sum(recalls))
    epochs = read_lines(trained_run / "metrics.jsonl")
    assert [line["epoch"] for line in epochs] == [1, 2]
    assert [line["steps"] for line in epochs] == [15, 30]  # 24 images, 5 captions each, 8 a step
    assert epochs[1]["train_loss"] < epochs[0]["train_loss"]
    assert set(epochs[0]) >= METRICS


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_run_saves_its_resolved_settings(trained_run):
    saved = read_json(trained_run / "config.json")
    assert settings.build_config(saved).epochs == 2
    assert Path(saved["run"]) == trained_run
    assert read_json(trained_run / "best" / "config.json")["settings"]["epochs"] == 2


def test_a_saved_run_is_rebuilt_from_its_own_settings(trained_run, sample, capsys):
    # Not from flags, not from today's defaults: the command gets nothing but the folder.
    arguments = ["--evaluate", "--run", str(trained_run), "--json", "--device", "cpu"]
    inference.main([*arguments, "--image_path", sample["image_path"], "--captions_path", sample["captions_path"]])
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == METRICS | {"images", "captions"}
    assert (printed["images"], printed["captions"]) == (42, 210)


def test_help_and_refusals_import_no_torch():
    code = "import sys, main\ntry: main.main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    for argv, status in ((["--help"], 0), (["--batch_size", "1"], 2)):
        finished = run_python("-c", code, *argv)
        assert finished.returncode == status
        assert finished.stdout.splitlines()[-1] == "False"


def test_the_command_itself_ends_with_status_2_and_one_line():
    finished = run_python(ROOT / "main.py", "--batchsize", "3")
    assert finished.returncode == 2
    assert finished.stderr.splitlines() == ["error: unrecognized arguments: --batchsize 3 (did you mean --batch_size?)"]
    assert list(Path().iterdir()) == []


# ---- which folder, which settings -------------------------------------------------------------------------------


def test_a_run_gets_a_folder_of_its_own():
    assert main.resolve_config(["--run", "a/b"]).run == "a/b"
    assert Path(main.resolve_config([]).run).parent == Path("runs")


def test_a_run_is_not_overwritten(tiny_config, trained_run, refused):
    before = (trained_run / "config.json").read_bytes()
    line = refused(main.main, flags(tiny_config(run=str(trained_run))))
    assert "already holds a run" in line
    assert "--resume" in line
    assert (trained_run / "config.json").read_bytes() == before


def save_run(name, age, **changes):
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    settings.write_json(folder / "config.json", {**vars(settings.Config(**changes)), "run": folder.as_posix()})
    os.utime(folder / "config.json", (1e9 - age, 1e9 - age))
    return folder


def test_resume_continues_the_newest_run():
    save_run("b", 0, epochs=3)
    save_run("c", 100)
    assert main.newest_run() == Path("runs/b")
    resumed = main.resolve_config(["--resume"])
    assert (resumed.run, resumed.epochs, resumed.resume) == ("runs/b", 3, True)
    assert main.resolve_config(["--resume", "--run", "runs/c"]).epochs == 1


def test_resume_takes_only_what_does_not_change_the_past():
    folder = save_run("a", 0, batch_size=64)
    assert main.resolve_config(["--resume", "--epochs", "9", "--num_workers", "0"]).epochs == 9
    assert main.resolve_config(["--resume", "--batch_size", "64"]).batch_size == 64
    for name in main.MAY_CHANGE:
        assert name in settings.Config.__dataclass_fields__
    with pytest.raises(InputError, match="batch_size is 32, but .*a was started with 64"):
        main.resolve_config(["--resume", "--batch_size", "32"])
    with pytest.raises(InputError, match="sample_images is 2000, but .*a was started with 0"):
        main.resolve_config(["--resume", "--preset", "demo"])
    saved = read_json(folder / "config.json")
    del saved["seed"]  # from a version that had no such setting
    settings.write_json(folder / "config.json", saved)
    assert main.resolve_config(["--resume", "--seed", "7"]).seed == 7


def test_resume_trains_the_epochs_that_are_left(trained_run, tmp_path, capsys):
    run = copy_run(trained_run, tmp_path / "copy")
    main.main(["--resume", "--run", str(run), "--epochs", "3", "--cache_path", str(tmp_path / "cache")])
    old, new = read_lines(trained_run / "metrics.jsonl"), read_lines(run / "metrics.jsonl")
    assert new[:2] == old
    assert [line["steps"] for line in new] == [15, 30, 45]
    assert "at epoch 3, batch 0" in capsys.readouterr().out


# ---- bad input: training ----------------------------------------------------------------------------------------

TWENTY = {f"{i:02d}.jpg": [f"A dog number {i} .", "A dog ."] for i in range(20)}


def test_without_a_data_set_the_command_says_how_to_get_one(refused):
    line = refused(main.main, ["--device", "cpu"])
    assert "data" in line
    for part in ("Images", "Kaggle", "--image_path", "--preset demo"):
        assert part in line
    assert list(Path().iterdir()) == []


def break_data(kind, data):
    """Damage the data set in the way of `kind`; extra settings."""
    images, captions = Path(data["image_path"]), Path(data["captions_path"])
    if kind == "no image folder":
        shutil.rmtree(images)
    elif kind == "no captions file":
        captions.unlink()
    elif kind == "missing pictures":
        for name in ("03.jpg", "04.jpg", "05.jpg"):
            (images / name).unlink()
    elif kind == "unreadable picture":
        (images / "03.jpg").write_bytes(b"no picture")
    elif kind == "truncated jpeg":
        rng = np.random.default_rng(0)
        Image.fromarray(rng.integers(0, 256, (80, 80, 3), dtype=np.uint8)).save(images / "03.jpg")
        (images / "03.jpg").write_bytes((images / "03.jpg").read_bytes()[:2000])
    elif kind == "empty captions":
        captions.write_text("", encoding="utf-8")
    elif kind == "header only":
        captions.write_text("image,caption\n", encoding="utf-8")
    elif kind == "wrong columns":
        captions.write_text("picture,text\n03.jpg,A dog\n", encoding="utf-8")
    elif kind == "endless caption":
        append(captions, "03.jpg," + "word " * 10_000)
    elif kind == "no caption":
        append(captions, "20.jpg,")
    elif kind == "one image":
        captions.write_text("image,caption\n03.jpg,A dog\n", encoding="utf-8")
    elif kind == "outside":
        append(captions, "../../secret.jpg,A dog")
    elif kind == "large batch":
        return {"batch_size": 17}
    elif kind == "run is a file":
        Path("run").write_text("", encoding="utf-8")
    elif kind == "cache is a file":
        Path("cache").write_text("", encoding="utf-8")
    elif kind == "no such model":
        return {"model_name": "resnet9000"}
    return {}


def append(path, line):
    path.write_text(path.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("no image folder", ["image_path is", "Images", "--preset demo"]),
        ("no captions file", ["captions_path is", "captions.txt", "--preset demo"]),
        ("missing pictures", ["missing", "(and 2 more)"]),
        ("unreadable picture", ["03.jpg cannot be read"]),
        ("truncated jpeg", ["03.jpg cannot be read", "truncated"]),
        ("empty captions", ["captions.txt is empty"]),
        ("header only", ["captions.txt holds no captions"]),
        ("wrong columns", ["picture", "`image` and `caption`"]),
        ("endless caption", ["line 42", "10,000 words"]),
        ("no caption", ["line 42", "'20.jpg' has no caption"]),
        ("one image", ["1 training", "at least 2"]),
        ("outside", ["'../../secret.jpg'", "inside the image folder"]),
        ("large batch", ["batch_size is 17", "16 training images", "--batch_size 16"]),
        ("run is a file", ["run is", "not a folder"]),
        ("cache is a file", ["cache"]),
        ("no such model", ["resnet9000"]),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(kind, parts, data_set, tiny_config, refused):
    data = data_set(TWENTY)
    changes = break_data(kind, data)
    line = refused(main.main, flags(tiny_config(**data, **changes)))
    assert [part for part in parts if part not in line] == [], line
    assert not list(Path().rglob("*.tmp"))
    assert not Path("run").is_dir()  # the run's folder comes when everything is known to be good


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_picture_found_late_gets_one_line_too(num_workers, data_set, tiny_config, refused):
    data = data_set(TWENTY)
    for file in Path(data["image_path"]).iterdir():
        file.write_bytes(file.read_bytes()[:-300])
    line = refused(main.main, flags(tiny_config(**data, cache_images=False, num_workers=num_workers)))
    assert line.startswith("picture ")
    assert "cannot be read" in line


def test_resume_without_a_run_is_refused(refused):
    assert "no run in runs/" in refused(main.main, ["--resume"])
    Path("runs/x").mkdir(parents=True)
    assert "holds no run to resume" in refused(main.main, ["--resume", "--run", "runs/x"])
    assert [path.as_posix() for path in Path().rglob("*")] == ["runs", "runs/x"]


def test_resume_of_a_damaged_run_is_refused(trained_run, tmp_path, refused):
    run = copy_run(trained_run, tmp_path / "copy")
    argv = ["--resume", "--run", run, "--epochs", "3", "--cache_path", tmp_path / "cache"]
    (run / "last.pt").write_bytes(b"no checkpoint")
    assert "last.pt cannot be read as a checkpoint" in refused(main.main, argv)
    (run / "config.json").write_text("{", encoding="utf-8")
    assert "config.json cannot be read as JSON" in refused(main.main, argv)


# ---- bad input: inference ---------------------------------------------------------------------------------------


@pytest.fixture
def search(trained_run, refused):
    """The line with which a search on the trained run is refused."""

    def call(*argv, run=trained_run):
        line = refused(inference.main, [*argv, "--run", run, "--device", "cpu", "--output", "out.png"])
        assert not Path("out.png").exists()
        return line

    return call


def test_search_refuses_impossible_questions(search):
    for query in ("", "  "):
        assert "the query is empty" in search(query)
    assert "n is 11, with 10 pictures" in search("a red circle", "--n", "11")
    assert "n is 0" in search("a red circle", "--n", "0")
    assert "--n" in search("a red circle", "--n", "many")


def test_search_refuses_an_impossible_gallery(search, tmp_path):
    assert "images is nowhere, which is not a folder" in search("a dog", "--images", "nowhere")
    Path("empty").mkdir()
    assert "empty holds no pictures" in search("a dog", "--images", "empty")
    Path("gallery").mkdir()
    (tmp_path / "gallery" / "b.jpg").write_bytes(b"no picture")
    assert "b.jpg cannot be read" in search("a dog", "--images", "gallery", "--n", "1")


def test_search_refuses_a_folder_that_is_no_run(search, refused, tmp_path):
    assert "no trained run" in refused(inference.main, ["a dog"])
    assert "is not a trained run" in search("a dog", run=tmp_path)
    assert "is not a trained run" in search("a dog", run=tmp_path / "nowhere")


def test_search_refuses_a_damaged_model(search, trained_run, tmp_path):
    run = copy_run(trained_run, tmp_path / "copy")
    weights, description = run / "best" / "model.safetensors", run / "best" / "config.json"
    state = load_file(weights)

    save_file({name: tensor for name, tensor in state.items() if name != "logit_scale"}, weights)
    assert "lacks tensor logit_scale" in search("a dog", run=run)
    weights.write_bytes(pickle.dumps({"logit_scale": 1}))
    assert "is not a safetensors file" in search("a dog", run=run)
    weights.unlink()
    assert "holds no model.safetensors" in search("a dog", run=run)
    save_file(state, weights)

    content = read_json(description)
    del content["settings"]["projection_dim"]
    settings.write_json(description, content)
    assert "lacks settings.projection_dim" in search("a dog", run=run)
    description.write_text("[", encoding="utf-8")
    assert "cannot be read as JSON" in search("a dog", run=run)


def test_evaluate_refuses_what_it_cannot_read(search, sample):
    assert "--image_path and --captions_path" in search("--evaluate")
    images = ["--evaluate", "--image_path", sample["image_path"], "--captions_path"]
    assert "which does not exist" in search(*images, "nowhere.txt")
    Path("c.txt").write_text("image,caption\nnowhere.jpg,A dog\n", encoding="utf-8")
    assert "nowhere.jpg is missing" in search(*images, "c.txt")

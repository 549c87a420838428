"""Run folders, and the settings of new and resumed runs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, flags

import gan
import inference
import main
from config import Config, InputError
from utils.files import read_json, write_json
from utils.runs import (
    GAN_ARCHITECTURE,
    MAY_CHANGE,
    check_saved_paths,
    claim_run,
    gan_run_folder,
    model_folder,
    newest_run,
    relative_path,
    resolve_run,
    stage_1_folder,
)


def save_run(name, age, **changes):
    """A run folder with settings only, last modified `age` seconds before a fixed time."""
    folder = Path("runs") / name
    write_json(folder / "config.json", {**vars(Config(**changes)), "run": folder.as_posix()})
    os.utime(folder / "config.json", (1e9 - age, 1e9 - age))
    return folder


def resolve(*words):
    return resolve_run([str(word) for word in words])[0]


# ---- a new run --------------------------------------------------------------------------------------------------


def test_resolve_run_chooses_a_folder():
    assert resolve("--run", "a/b").run == "a/b"
    folder = Path(resolve().run)
    assert folder.parent == Path("runs")
    assert folder.name[:2] == "20" and not folder.exists()


def test_resolve_run_returns_the_sources():
    config, sources = resolve_run(["--preset", "demo", "--seed", "3"])
    assert (config.seed, config.model_name) == (3, "test_resnet")
    assert (sources["seed"], sources["model_name"]) == ("flag", "preset demo")


def test_existing_run_is_not_overwritten(tiny_config, trained_run, refused):
    before = (trained_run / "config.json").read_bytes()
    line = refused(main.main, flags(tiny_config(run=str(trained_run))))
    assert "already contains a run" in line
    assert "--resume" in line
    assert (trained_run / "config.json").read_bytes() == before


def test_run_that_is_a_file_is_refused():
    Path("x").write_text("")
    with pytest.raises(InputError, match="run is x, which is not a folder"):
        resolve("--run", "x")


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights")
def test_linked_subfolders_of_a_run_are_refused(trained_run, tmp_path, refused):
    for name in ("best", "index", "best/tokenizer", "tensorboard"):
        run = Path(shutil.copytree(trained_run, tmp_path / name.replace("/", "-")))
        if not (run / name).exists():
            (run / name).mkdir()
        (run / name).rename(tmp_path / "elsewhere")
        (run / name).symlink_to(tmp_path / "elsewhere")
        before = sorted((tmp_path / "elsewhere").rglob("*"))
        for command, argv in ((main.main, ["--resume"]), (gan.main, []), (inference.main, ["a dog"])):
            assert f"{name} is a symbolic link" in refused(command, [*argv, "--run", run])
        assert sorted((tmp_path / "elsewhere").rglob("*")) == before
        shutil.rmtree(tmp_path / "elsewhere")


# ---- one process per run ----------------------------------------------------------------------------------------


CLAIM = """
import sys
from utils.runs import claim_run, resolve_run
config, sources = resolve_run(sys.argv[1:])
with claim_run(config, sources) as config:
    print(config.run, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def claim():
    """`claim(*argv)`: a process that claims the run of a command line until its input is closed; the first line."""
    processes = []

    def start(*argv):
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = {**os.environ, **ENVIRONMENT}
        processes.append(subprocess.Popen([sys.executable, "-c", CLAIM, *argv], env=environment, **options))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_run_is_used_by_one_process_at_a_time(claim):
    first = claim("--run", "x")
    assert first.stdout.readline() == "x\n"
    second = claim("--run", "x")
    assert "x is in use by another process" in second.communicate()[1].splitlines()[-1]
    assert second.returncode == 1
    first.kill()  # the lock ends with its process
    first.wait()
    third = claim("--run", "x")
    assert third.stdout.readline() == "x\n"
    fourth = claim("--run", "a/b")
    assert fourth.stdout.readline() == "a/b\n"
    for process in (third, fourth):
        process.communicate("")
        assert process.returncode == 0
    assert list(Path().rglob("*")) == [Path("x")]  # new folders in which nothing was written are removed


def test_runs_started_in_the_same_second_have_folders_of_their_own():
    config, sources = resolve_run([])
    with claim_run(config, sources) as first:
        assert first.run == config.run
        write_json(f"{first.run}/config.json", {})
    with claim_run(config, sources) as second, claim_run(config, sources) as third:
        assert (second.run, third.run) == (f"{config.run}-2", f"{config.run}-2")  # a process may lock a run twice
    assert sorted(path.name for path in Path("runs").rglob("*")) == [Path(config.run).name, "config.json"]
    with pytest.raises(InputError, match="already contains a run"), claim_run(first, {"run": "flag"}):
        pass


# ---- resuming ---------------------------------------------------------------------------------------------------


def test_resume_continues_the_newest_run():
    save_run("b", 0, epochs=3)
    save_run("c", 100)
    assert newest_run() == Path("runs/b")
    resumed = resolve("--resume")
    assert (resumed.run, resumed.epochs, resumed.resume) == ("runs/b", 3, True)
    assert resolve("--resume", "--run", "runs/c").epochs == Config().epochs


def test_resume_accepts_only_settings_that_do_not_change_what_was_learned():
    folder = save_run("a", 0, batch_size=64)
    assert resolve("--resume", "--epochs", 9, "--num_workers", 0).epochs == 9
    assert resolve("--resume", "--batch_size", 64).batch_size == 64
    assert set(Config.__dataclass_fields__) >= MAY_CHANGE
    with pytest.raises(InputError, match="batch_size is 32, but .*a was started with 64"):
        resolve("--resume", "--batch_size", 32)
    with pytest.raises(InputError, match="sample_images is 2000, but .*a was started with 0"):
        resolve("--resume", "--preset", "demo")
    saved = read_json(folder / "config.json")
    del saved["seed"]  # from a version without this setting
    write_json(folder / "config.json", saved)
    assert resolve("--resume", "--seed", 7).seed == 7


def test_resume_reads_the_settings_of_earlier_versions():
    folder = save_run("a", 0, pretrained=False)
    saved = read_json(folder / "config.json")
    saved["gan_gate"], saved["gan_match"] = 7, 0.5
    saved["text_tokenizer"] = "captions"
    del saved["gan_filter_top_k"], saved["gan_clip_weight"]
    write_json(folder / "config.json", saved)
    config = resolve("--resume")
    assert (config.gan_filter_top_k, config.gan_clip_weight, config.text_tokenizer) == (7, 0.5, "wordpiece")
    assert resolve("--resume", "--gan_filter_top_k", 7, "--text_tokenizer", "wordpiece") == config
    with pytest.raises(InputError, match="gan_filter_top_k is 8, but .*a was started with 7"):
        resolve("--resume", "--gan_filter_top_k", 8)


def test_resume_writes_elsewhere_only_where_flags_say(tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    folder = save_run("a", 0, cache_path=str(elsewhere / "cache"))
    with pytest.raises(InputError, match="the cache of runs/a is missing: pass --cache_path .*cache to write it there"):
        resolve("--resume")
    assert resolve("--resume", "--cache_path", elsewhere / "cache").cache_path == str(elsewhere / "cache")
    (elsewhere / "cache").mkdir()
    with pytest.raises(InputError, match="the cache of runs/a is missing"):
        resolve("--resume")
    (elsewhere / "cache" / "images-256-x.npy").write_bytes(b"")
    assert resolve("--resume").cache_path == str(elsewhere / "cache")

    paths = {"image_path": str(elsewhere / "Images"), "captions_path": str(elsewhere / "captions.txt")}
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **paths, "sample_images": 9})
    with pytest.raises(InputError, match="the data set of runs/a is missing: pass --image_path .*--captions_path"):
        resolve("--resume")
    assert resolve("--resume", *flags(Config(**paths))).sample_images == 9
    (elsewhere / "captions.txt").write_text("")
    assert resolve("--resume").sample_images == 9
    with pytest.raises(InputError, match="the cache of .* is missing"):
        check_saved_paths({"cache_path": str(elsewhere)}, {}, folder)


def test_resume_without_a_run_is_refused(refused):
    assert "no run in runs/" in refused(main.main, ["--resume"])
    Path("runs/x").mkdir(parents=True)
    assert "contains no run to resume" in refused(main.main, ["--resume", "--run", "runs/x"])
    assert [path.as_posix() for path in Path().rglob("*")] == ["runs", "runs/x"]


def test_resume_of_a_damaged_config_is_refused(refused):
    folder = save_run("a", 0)
    (folder / "config.json").write_text("{", encoding="utf-8")
    assert "config.json cannot be read as JSON" in refused(main.main, ["--resume"])


# ---- the settings of a GAN --------------------------------------------------------------------------------------


def test_run_with_a_trained_gan_adopts_its_architecture():
    settings = {"gan_generator": "style", "gan_subset": "dog", "gan_size": 32, "gan_width": 8, "gan_epochs": 7}
    settings["gan_discriminator"] = "projected"
    assert set(settings) == set(GAN_ARCHITECTURE)
    write_json("x/gan/config.json", {"settings": {**settings, "gan_lr": 0.5}})
    config = resolve("--gan", "pairs", "--gan_run", "x")
    assert {name: getattr(config, name) for name in settings} == settings
    assert config.gan_lr == Config().gan_lr  # only the architecture
    assert resolve("--gan", "pairs", "--gan_run", "x", "--gan_size", 32).gan_size == 32
    with pytest.raises(InputError, match="gan_size is 64, but the GAN of x was trained with 32: drop the flag"):
        resolve("--gan", "pairs", "--gan_run", "x", "--gan_size", 64)
    assert resolve("--gan_run", "x").gan_size == 64  # no GAN is used


def test_gan_settings_override_a_preset_and_are_not_attributed_to_it():
    write_json("x/gan/config.json", {"settings": {"gan_width": 8}})
    config, sources = resolve_run(["--preset", "demo", "--gan", "pairs", "--gan_run", "x"])
    assert config.gan_width == 8
    assert sources.get("gan_width") != "preset demo"
    assert sources["gan_epochs"] == "preset demo"
    config, _ = resolve_run(["--preset", "frozen", "--gan", "pairs", "--gan_run", "x"])
    assert config.gan_discriminator == "convolutional"  # of a GAN from before there was another


# ---- folders ----------------------------------------------------------------------------------------------------


def test_newest_run_with_trained_ignores_untrained_runs():
    for number, name in enumerate(("a", "b", "c")):
        save_run(name, 0)
        if name != "c":
            Path(f"runs/{name}/best").mkdir()
            Path(f"runs/{name}/best/model.safetensors").write_bytes(b"")
            os.utime(f"runs/{name}/best/model.safetensors", (1e9 - number, 1e9 - number))
    assert newest_run(trained=True) == Path("runs/a")
    with pytest.raises(InputError, match="no trained run in elsewhere/: pass --run FOLDER, or train one"):
        newest_run("elsewhere", trained=True)


def test_model_folder_is_best_or_the_folder_itself():
    Path("a/best").mkdir(parents=True)
    assert model_folder("a") == Path("a/best")
    assert model_folder("a/best") == Path("a/best")


def test_gan_run_folder_is_the_run_or_its_stage_1():
    Path("a").mkdir()
    assert (stage_1_folder("a"), gan_run_folder("a")) == (Path("a/stage1"), Path("a"))
    Path("a/stage1/gan").mkdir(parents=True)
    assert gan_run_folder("a") == Path("a/stage1")
    Path("a/gan").mkdir()
    assert gan_run_folder("a") == Path("a")
    Path("b/first/gan").mkdir(parents=True)  # the name in earlier versions
    assert (stage_1_folder("b"), gan_run_folder("b")) == (Path("b/first"), Path("b/first"))


def test_relative_path_survives_a_move():
    assert relative_path("runs/a", "runs/b/gan") == "../../a"
    assert relative_path(Path("runs/a").absolute(), "runs") == "a"


@pytest.mark.skipif(sys.platform != "win32", reason="other systems have no drives")
def test_relative_path_to_another_drive_is_absolute():
    assert relative_path("C:/a", "D:/b") == "C:/a"

"""Export to ONNX: the same embeddings as PyTorch, and a search that needs none of the program."""

import json
import subprocess
import sys

import pytest

import inference
from config import InputError
from extras import export
from utils.files import read_json


@pytest.fixture(scope="module")
def exported(trained_run, tmp_path_factory):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("export") / "model"
    export.main(["--run", str(trained_run), "--to", str(folder), "--license", "mit"])
    return folder


def test_example_finds_the_same_images_without_the_program(exported, trained_run, sample, tmp_path):
    images = sample["image_path"]
    code = "import sys, runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
    code += "assert not {'torch', 'clip', 'transformers'} & set(sys.modules)"
    command = [sys.executable, "-c", code, exported / "example.py", "a red circle", images]
    printed = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    found = [line.split("\t") for line in printed.splitlines()]
    results = inference.Searcher(trained_run, images=images, device="cpu").search("a red circle")
    assert len(found) == len(results) == 9
    for (score, _), result in zip(found, results, strict=True):
        assert float(score) == pytest.approx(result["score"], abs=0.01)  # images are resized by another library


def test_difference_of_the_encoders_is_measured(exported, trained_run):
    model = export.load(trained_run)
    assert export.check_encoders(model, exported) < 1e-5
    model.text_projection.layers[-1].weight.data *= -1
    assert export.check_encoders(model, exported) > 0.01


def test_model_card_has_the_results_and_no_paths(exported, trained_run, sample):
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n")
    assert "@" not in card.replace("R@", "")
    assert f"rsum {read_json(trained_run / 'results.json')['rsum']:.1f}" in card
    assert str(trained_run.parent) not in card and str(sample["image_path"]) not in card
    assert json.loads((exported / "preprocessor_config.json").read_text())["size"] == {"height": 32, "width": 32}


def test_existing_folder_is_refused(exported, trained_run):
    before = sorted(exported.iterdir())
    with pytest.raises(InputError, match="exists: pass a new folder"):
        export.export(trained_run, exported)
    assert sorted(exported.iterdir()) == before


def test_failed_export_leaves_nothing(exported, trained_run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "check_encoders", lambda *_: float("nan"))
    with pytest.raises(InputError, match="cosines of the exported model differ by nan"):
        export.export(trained_run, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_missing_package_is_named(trained_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match="export needs the package onnx: pip install onnx onnxscript onnxruntime"):
        export.export(trained_run, tmp_path / "new")

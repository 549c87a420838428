"""The table of results of several runs."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import compare_runs

from config import Config
from utils.files import write_json


def save_run(name, value, **changes):
    results = {"split": "test", "images": 10, **dict.fromkeys(compare_runs.METRICS, value)}
    write_json(f"runs/{name}/results.json", {**results, "ci95": dict.fromkeys(compare_runs.METRICS, 1.25)})
    write_json(f"runs/{name}/config.json", {**vars(Config(**changes)), "run": name})
    return f"runs/{name}"


def test_runs_that_differ_in_the_seed_share_a_row(capsys):
    folders = [save_run("a", 10.0, seed=1), save_run("b", 12.0, seed=2), save_run("c", 20.0, seed=1, dropout=0.3)]
    compare_runs.main([*folders, "runs/none"])
    printed = capsys.readouterr()
    rows = [line.split(" | ") for line in printed.out.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["| a, b; dropout 0.1", "| c; dropout 0.3"]
    assert [row[2] for row in rows] == ["2", "1"]
    assert rows[0][3] == "11.0 ± 1.4"
    assert rows[1][3] == "20.0 ± 1.2"
    assert "runs/none has no results.json" in printed.err


@pytest.mark.usefixtures("own_folder")
def test_no_file_is_written(tmp_path):
    folder = save_run("a", 10.0)
    before = sorted(tmp_path.rglob("*"))
    compare_runs.main([folder])
    assert sorted(tmp_path.rglob("*")) == before

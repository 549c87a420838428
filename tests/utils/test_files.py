"""Reading and writing of small files."""

import json
import os
import stat
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from clip import save_model
from config import InputError
from utils.files import (
    MAX_JSON_BYTES,
    TEMPORARY,
    atomic_write,
    check_regular,
    read_json,
    write_json,
)

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions, links and limits")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_atomic_write_replaces_the_file_after_success(tmp_path):
    path = tmp_path / "new" / "folder" / "x.txt"
    for content in ("first", "second"):
        with atomic_write(path) as temporary:
            assert temporary.parent.parent == path.parent and temporary.name == path.name
            temporary.write_text(content)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == content
        assert names(path.parent) == ["x.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_write_leaves_the_file_alone_after_an_error(tmp_path, error):
    path = tmp_path / "x.txt"
    path.write_text("before")
    with pytest.raises(error), atomic_write(path) as temporary:
        temporary.write_text("half of th")
        raise error
    assert path.read_text() == "before"
    assert names(tmp_path) == ["x.txt"]


@posix
def test_atomic_write_gives_the_usual_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "x.json", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) == 0o640


@posix
def test_atomic_write_follows_no_link(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "x.json").symlink_to(tmp_path / "victim")
    write_json(tmp_path / "x.json", {"a": 1})
    assert (tmp_path / "victim").read_text() == "precious"
    assert read_json(tmp_path / "x.json") == {"a": 1} and not (tmp_path / "x.json").is_symlink()


@posix
def test_atomic_write_removes_what_killed_processes_left(tmp_path):
    stale = tmp_path / f".x.json.abc{TEMPORARY}"
    stale.mkdir()
    (stale / "x.json").write_bytes(b"half")
    with atomic_write(tmp_path / "y.json") as temporary:
        temporary.write_text("{}")
        write_json(tmp_path / "x.json", {})  # leaves the folder of a process that is alive
        assert temporary.exists()
    assert names(tmp_path) == ["x.json", "y.json"]


@posix
@pytest.mark.parametrize(
    "save",
    [
        lambda file: file.write_bytes(bytes(10**6)),
        lambda file: torch.save({"x": torch.zeros(10**6)}, file),
        lambda file: save_file({"x": torch.zeros(10**6)}, file),
        lambda file: np.lib.format.open_memmap(file, mode="w+", shape=(1000, 1000)),
    ],
    ids=["bytes", "torch", "safetensors", "numpy"],
)
def test_full_disk_is_an_os_error_that_names_the_file(tmp_path, save):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with (
            pytest.raises(OSError, match=r"File too large: .*x\.bin") as error,
            atomic_write(tmp_path / "x.bin") as file,
        ):
            save(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.filename == str(tmp_path / "x.bin")
    assert names(tmp_path) == []


def test_atomic_write_of_a_folder(tmp_path):
    with pytest.raises(ValueError), atomic_write(tmp_path / "new" / "x", is_folder=True) as folder:
        (folder / "a").write_text("half")
        raise ValueError
    assert names(tmp_path / "new") == []
    with atomic_write(tmp_path / "new" / "x", is_folder=True) as folder:
        (folder / "a").write_text("whole")
        (folder / "b").mkdir()
        assert not (tmp_path / "new" / "x").exists()
    assert names(tmp_path / "new" / "x") == ["a", "b"]


@posix
def test_full_disk_while_a_tokenizer_is_written(tmp_path, tiny_model):
    import resource

    model, limits = tiny_model(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # tokenizer_config.json fits, tokenizer.json does not
    try:
        with pytest.raises(OSError, match=r"File too large: .*tokenizer"):
            save_model(model, tmp_path / "best")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path / "best") == []


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), RuntimeError("a bug"), FileNotFoundError(2, "missing", "other")]
)
def test_other_errors_of_a_block_are_passed_on(tmp_path, error):
    with pytest.raises(type(error)) as found, atomic_write(tmp_path / "x.bin"):
        raise error
    assert found.value is error


def test_atomic_write_of_a_long_name(tmp_path):
    write_json(tmp_path / ("x" * 240), {"a": 1})
    assert read_json(tmp_path / ("x" * 240)) == {"a": 1}


def test_write_json_writes_all_or_nothing(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert names(tmp_path) == ["x.json"]
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"x\.json does not exist"),
        (b'{"a": ', r"x\.json cannot be read as JSON"),
        (b"\xff\xfe\x00", r"x\.json cannot be read as JSON"),
        (b"[" * 100_000, r"x\.json cannot be read as JSON"),
        (b"[1]", r"x\.json does not contain a JSON object"),
    ],
)
def test_read_json_names_what_is_wrong(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(error.value)


@posix
def test_fifos_folders_and_huge_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        with pytest.raises(InputError, match="is not a regular file"):
            read_json(path)
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(40 * 10**9)
    with pytest.raises(InputError, match=f"40,000,000,000 bytes, more than {MAX_JSON_BYTES:,}"):
        read_json(tmp_path / "sparse")
    check_regular(tmp_path / "sparse")
    check_regular(tmp_path / "missing")

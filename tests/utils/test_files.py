"""Reading and writing of small files."""

import json
import os
import stat
import sys

import pytest

from config import InputError
from utils.files import atomic_write, read_json, read_lines, read_text, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_atomic_write_replaces_the_file_after_success(tmp_path):
    path = tmp_path / "new" / "folder" / "x.txt"
    for content in ("first", "second"):
        with atomic_write(path) as temporary:
            assert temporary.parent == path.parent and temporary != path
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


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions")
def test_atomic_write_gives_the_usual_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "x.json", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) == 0o640


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
        (b"[1]", r"x\.json does not contain a JSON object"),
    ],
)
def test_read_json_names_what_is_wrong(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(error.value)


def test_read_lines_strips_and_skips_blank_lines(tmp_path):
    (tmp_path / "x.txt").write_bytes("\ufeff one \r\n\r\n \ntwö\n\nthree".encode())
    assert read_lines(tmp_path / "x.txt") == ["one", "twö", "three"]


def test_read_text_refuses_other_encodings(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    for function in (read_text, read_lines):
        with pytest.raises(InputError, match=r"x\.txt cannot be read as UTF-8 text"):
            function(tmp_path / "x.txt")
        with pytest.raises(InputError, match=r"gone\.txt cannot be read"):
            function(tmp_path / "gone.txt")

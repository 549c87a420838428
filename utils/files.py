"""Reading and writing small files; does not import torch."""

import contextlib
import json
import os
import tempfile
from pathlib import Path

from config import InputError


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path that replaces `path` once the block has succeeded; on an error `path` stays as it was.

    The temporary file is created next to `path` under an unpredictable name, and it is flushed to disk before
    the rename. Missing parent folders are created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".tmp")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~current_umask())  # mkstemp restricts the file to its owner
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path, content):
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_json(path):
    """The JSON object in a file, a dict; raises InputError if the file is missing or damaged."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} does not contain a JSON object; was it written by this program?")
    return content


def read_text(path):
    """The content of a UTF-8 file, with or without a byte-order mark; raises InputError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text ({error})") from None


def read_lines(path):
    """The stripped, non-empty lines of a text file; raises InputError."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]

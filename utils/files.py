"""Reading and writing small files; does not import torch."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from config import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TEMPORARY = ".clip.tmp"  # suffix of temporary folders
MAX_JSON_BYTES = 10**8


# ---- writing ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def temporary_folder(path):
    """Yield a new folder beside `path`, which is removed in the end, or by the next process if this one is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path.parent)
    folder, lock = create_temporary_folder(path)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def atomic_write(path, is_folder=False):
    """Yield a temporary path that replaces `path` once the block has succeeded; on an error `path` stays as it was.

    The file, or the folder if `is_folder`, which replaces nothing, lies in a new folder with an unpredictable name,
    because libraries write temporary files of their own, and is flushed to disk before the rename, which replaces a
    symbolic link instead of following it. Raises OSError for a full disk, whatever the library in the block raises.
    """
    path = Path(path)
    with temporary_folder(path) as folder:
        temporary = folder / path.name
        try:
            temporary.mkdir() if is_folder else temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            for written in filter(Path.is_file, temporary.rglob("*") if is_folder else [temporary]):
                with open(written, "rb+") as file:
                    os.fsync(file.fileno())
        except Exception as error:
            cause = os_error(error, temporary)
            if cause is None:
                raise
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        temporary.chmod(mode)  # safetensors restricts the file to its owner
        temporary.replace(path)


def create_temporary_folder(path):
    """A new folder beside `path`, and a descriptor that locks it as long as this process lives (None on Windows)."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=TEMPORARY))
        if fcntl is None:
            return folder, None
        lock = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():  # else another process took it for a stale one
            return folder, lock
        os.close(lock)


def remove_stale(parent):
    """Remove the temporary folders in `parent` whose process was killed."""
    for folder in Path(parent).glob(f".*{TEMPORARY}") if fcntl else []:
        with contextlib.suppress(OSError):  # locked: its process is alive
            lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)


def os_error(error, temporary):
    """The OSError that made writing a temporary file or folder fail; None if there is none."""
    if isinstance(error, OSError):
        own = error.filename is None or Path(error.filename).is_relative_to(temporary.parent)
        return error if error.errno and own else None
    if found := re.search(r"os error (\d+)", str(error)):  # of safetensors and tokenizers
        return OSError(int(found[1]), os.strerror(int(found[1])))
    try:  # torch.save hides it
        with open(temporary / "probe" if temporary.is_dir() else temporary, "ab") as file:
            file.write(bytes(2**16))
    except OSError as cause:
        return cause
    return None


def write_json(path, content):
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


# ---- reading ----------------------------------------------------------------------------------------------------


def check_regular(path, max_bytes=None):
    """Raise InputError if a path exists and is not a regular file (a FIFO would block), or is too large."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path} is not a regular file")
    if max_bytes is not None and os.path.exists(path) and (size := os.path.getsize(path)) > max_bytes:
        raise InputError(f"{path} has {size:,} bytes, more than {max_bytes:,}")


def read_json(path):
    """The JSON object in a file, a dict; raises InputError if the file is missing or damaged."""
    check_regular(path, MAX_JSON_BYTES)
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} does not contain a JSON object; was it written by this program?")
    return content

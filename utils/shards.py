"""Images and captions in WebDataset tar shards, as open_clip and img2dataset write them.

A sample is an image (`key.jpg`, ...) and its caption with the same key (`key.txt`, or "caption" or "captions" in
`key.json`). An image in a shard has the path `folder/00000.tar/key.jpg` and is read from within the shard, at any
position: shuffling, resuming, validation and search work as with files.
"""

import contextlib
import functools
import io
import json
import os
import re
import tarfile
from pathlib import Path

from config import InputError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "heic")
MAX_CAPTION_BYTES = 10**6
SPLIT_PREFIX = re.compile(r"(train|val|validation|dev|test)(?![a-z])")  # of a shard's name


def find_shards(folder):
    """The .tar files of a folder of shards, sorted; hidden ones (macOS writes `._name` beside `name`) are none.

    None if the folder has images or folders, too: there a .tar is the archive that they came from.
    """
    found = []
    with os.scandir(folder) if os.path.isdir(folder) else contextlib.nullcontext([]) as entries:
        for entry in entries:
            suffix = entry.name.rpartition(".")[2].lower()
            if entry.name.startswith("."):
                continue
            if suffix in IMAGE_SUFFIXES or entry.is_dir():
                return []
            if suffix == "tar":
                found.append(Path(entry.path))
    return sorted(found)


def read_shards(folder):
    """[(name, captions, split or None)] of the images in the shards, and the number of incomplete samples.

    Images are named `shard/member`; a shard whose name begins with that of a split belongs to it. Raises InputError for
    a damaged shard.
    """
    found, incomplete = [], 0
    for shard in find_shards(folder):
        images, captions, _ = index_shard(str(shard), os.stat(shard).st_mtime_ns)
        split = SPLIT_PREFIX.match(shard.name.lower())
        complete = [key for key in images if any(caption.strip() for caption in captions.get(key, []))]
        found += [(f"{shard.name}/{images[key]}", captions[key], split and split[1]) for key in complete]
        incomplete += len(images.keys() | captions.keys()) - len(complete)
    if not found:
        raise InputError(f"the shards in {folder} contain no image with a caption")
    return found, incomplete


def locate(file):
    """The shard, offset and size in bytes of an image with a path within a shard; None for any other path."""
    shard, suffix, member = os.fspath(file).replace(os.sep, "/").rpartition(".tar/")
    shard += suffix.rstrip("/")
    if not suffix or not os.path.isfile(shard):
        return None
    return (shard, *found) if (found := index_shard(shard, os.stat(shard).st_mtime_ns)[2].get(member)) else None


def image_exists(file):
    """True for an image file, and for an image in a shard; False, not an error, for an invalid name."""
    return os.path.isfile(file) or locate(file) is not None


def image_stat(file):
    """The size in bytes of an image, and the modification time in nanoseconds of its file or shard."""
    if located := locate(file):
        return located[2], os.stat(located[0]).st_mtime_ns
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def open_image(file):
    """An image as a file that is open for reading bytes."""
    if located := locate(file):
        shard, offset, size = located
        with open(shard, "rb") as opened:
            opened.seek(offset)
            return io.BytesIO(opened.read(size))
    return open(file, "rb")


@functools.lru_cache(maxsize=100_000)
def index_shard(shard, changed):
    """{key: image name}, {key: [caption, ...]}, {image name: (offset, size)}; `changed`: the modification time.

    The key of `000/12.seg.jpg` is `000/12`, as in WebDataset. Raises InputError if the shard is damaged.
    """
    images, captions, places = {}, {}, {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key, suffix = f"{folder}{slash}{stem}", suffix.lower()
                if not member.isreg() or not stem:
                    continue
                if suffix in IMAGE_SUFFIXES:
                    images[key], places[member.name] = member.name, (member.offset_data, member.size)
                elif suffix in ("txt", "json") and member.size <= MAX_CAPTION_BYTES:
                    found = read_captions_of(tar.extractfile(member).read(), suffix)
                    if suffix == "json" or key not in captions:
                        captions[key] = found or captions.get(key, [])
            tar.fileobj.seek(tar.offset)
            if not tar.fileobj.read(512):
                raise EOFError("it ends early")  # tarfile takes the end of the file for that of the archive
    except (tarfile.TarError, EOFError, ValueError, OSError) as error:
        raise InputError(f"shard {shard} is damaged ({error}): write or download it again") from None
    return images, captions, places


def read_captions_of(content, suffix):
    """The captions in the bytes of a .txt or .json member, a list; none if there are none in the JSON."""
    text = content.decode("utf-8", "replace")
    if suffix == "txt":
        return [text]
    found = json.loads(text)
    found = found.get("captions") or found.get("caption") if isinstance(found, dict) else None
    found = [found] if isinstance(found, str) else found
    return [caption for caption in found if isinstance(caption, str)] if isinstance(found, list) else []

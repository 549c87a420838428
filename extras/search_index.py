"""Search index: embeddings of images and captions, computed once and saved beside a run.

An index is a safetensors file (no pickle) with the names, the file stats (size, modification time), the content hashes
and the embeddings. Its header holds the hash of the model that it belongs to. A file is recognised by its name and file
stat, else by its content, so that renamed, copied or touched files are not embedded again.
"""

import contextlib
import hashlib
import os
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from clip import load_model, read_saved_model
from config import InputError, build_config
from dataset import load_splits
from inference import IMAGE_SUFFIXES, embed_images
from utils.captions import read_captions
from utils.embed import embed_captions
from utils.files import atomic_write
from utils.hashing import file_hash, file_stat, model_hash

VERSION = "3"  # of the file format
TENSORS = ("names", "file_stats", "content_hashes", "vectors")
BLOCK = 20_000  # images after which a partial index is saved


# ---- what is indexed --------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A trained model, the folder of its search files, and the hash that ties the files to the model."""

    model: torch.nn.Module
    folder: Path
    hash: str


def open_run(folder, device="cpu"):
    """The `Run` saved in a folder; raises InputError."""
    return Run(load_model(folder, device), Path(folder) / "index", model_hash(folder))


@dataclass
class Gallery:
    """N images below the folder `root`, with their file stats (N, 2); `label` begins the name of the index file."""

    root: Path
    names: list[str]
    file_stats: np.ndarray
    label: str

    @cached_property
    def resolved(self):
        return {(self.root / name).resolve(): row for row, name in enumerate(self.names)}

    def rows_of(self, file):
        """The row of an image file in a list, empty if the file is not in the gallery."""
        row = self.resolved.get(Path(file).resolve())
        return [] if row is None else [row]


def list_gallery(images, run):
    """The `Gallery` of the folder `images`, or else of a run's own images; raises InputError."""
    if images:
        return Gallery(Path(images), *scan_images(images), "images")
    config = build_config(read_saved_model(run)[1]["settings"])
    split, pairs = default_split(config)
    root = Path(config.image_path)
    names = [file.relative_to(root).as_posix() for file in pairs.files]
    return Gallery(root, names, stack_stats([file_stat(file) for file in pairs.files]), split)


def list_captions(config, path=None):
    """The distinct captions of a file (default: the run's), that file, and the label of their index."""
    if path:
        return list(dict.fromkeys(read_captions(path)["caption"])), path, "captions"
    try:
        split, pairs = default_split(config)
    except InputError as error:
        raise InputError(f"the run's own captions are not available ({error}): give --captions_path") from None
    return list(dict.fromkeys(pairs.captions)), config.captions_path, f"captions-{split}"


def default_split(config):
    """The name and the `Pairs` of the split that is searched by default: test, or validation without a test split."""
    splits = load_splits(config)
    split = "test" if splits["test"].files else "validation"
    return split, splits[split]


def scan_images(folder):
    """The names of all images below a folder, sorted, and their file stats (N, 2); raises InputError.

    Hidden files and folders are skipped (macOS creates a `._photo.jpg` beside a photo.jpg). `os.scandir` and plain
    strings, because `Path.rglob` would dominate the time of a search.
    """
    found, waiting, suffixes = [], [(str(folder), "")], tuple(IMAGE_SUFFIXES)
    if not Path(folder).is_dir():
        raise InputError(f"images is {folder}, which is not a folder")
    while waiting:
        path, prefix = waiting.pop()
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    name = entry.name
                    if name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append((entry.path, f"{prefix}{name}/"))
                    elif name.lower().endswith(suffixes):
                        with contextlib.suppress(OSError):  # a link to itself
                            if entry.is_file():
                                status = entry.stat()
                                found.append((prefix + name, status.st_size, status.st_mtime_ns))
        except OSError as error:
            print(f"folder {path} is skipped ({error.strerror})", file=sys.stderr)
    if not found:
        raise InputError(f"{folder} contains no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    found.sort()
    return [name for name, _, _ in found], stack_stats([stat for _, *stat in found])


def stack_stats(stats):
    """A list of N file stats as an array (N, 2)."""
    return np.array(stats, dtype=np.int64).reshape(-1, 2)


def embed_readable(model, image_files, total=None):
    """As `embed_images`, but unreadable images are reported on stderr and get a vector of NaN.

    Raises InputError if as many as `total` (default: all) are unreadable.
    """
    failed = {}
    vectors = embed_images(model, image_files, failed=failed)
    if len(failed) == (len(image_files) if total is None else total):
        raise InputError(f"none of the images can be read: {failed[0]}")
    for position, reason in failed.items():
        print(f"{reason}: skipped", file=sys.stderr)
        vectors[position] = torch.nan
    return vectors


# ---- the index --------------------------------------------------------------------------------------------------


@dataclass
class Index:
    """N names with file stats (N, 2), content hashes (N, 16) and embeddings (N, D)."""

    names: list[str]
    file_stats: np.ndarray
    content_hashes: np.ndarray
    vectors: torch.Tensor


def index_images(run, gallery):
    """The up-to-date `Index` of a gallery, saved beside the run; the vector of an unreadable image is NaN."""

    def embed(names):
        return embed_readable(run.model, [gallery.root / name for name in names], total=len(gallery.names))

    def content_hash(name):
        try:
            return file_hash(gallery.root / name)
        except OSError:  # no permission: reported by `embed`
            return hashlib.blake2b(os.fsencode(name), digest_size=16).digest()

    path = index_path(run, gallery.root, gallery.label)
    return update_index(path, run.hash, gallery.names, gallery.file_stats, embed, content_hash)


def index_captions(run, captions, source, label):
    """The up-to-date `Index` of distinct captions; `source` is the file they come from."""

    def embed(names):
        return embed_captions(run.model, names, desc="embedding captions")

    def content_hash(caption):
        return hashlib.blake2b(caption.encode(), digest_size=16).digest()

    stats = stack_stats([(len(caption), 0) for caption in captions])
    return update_index(index_path(run, Path(source), label), run.hash, captions, stats, embed, content_hash)


def index_path(run, source, label):
    """The index file of a folder or captions file: one for each full path."""
    path_hash = hashlib.sha256(str(source.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return run.folder / f"{label}-{path_hash}.safetensors"


def update_index(path, model, names, file_stats, embed, content_hash):
    """The index at `path`, updated to contain exactly these names; only new and changed ones are embedded.

    Args:
        model: hash of the model that computes the embeddings.
        names, file_stats: N distinct names and their file stats (N, 2).
        embed: names -> (N, D) vectors. content_hash: name -> 16 bytes.
    """
    try:
        old = read_index(path, model)
    except InputError as error:
        print(f"{error}: it is rebuilt", file=sys.stderr)
        old = None
    failed = old.vectors[:, 0].isnan().numpy() if old else None  # were unreadable: they may be readable by now
    if old and old.names == names and np.array_equal(old.file_stats, file_stats) and not failed.any():
        return old
    rows, hashes = find_known(old, names, file_stats, content_hash)
    if old:
        rows[(rows >= 0) & failed[rows]] = -1
    new = np.flatnonzero(rows < 0)
    done, vectors = rows >= 0, None
    for start in range(0, max(1, len(new)), BLOCK):
        part = new[start : start + BLOCK]
        embedded = embed([names[i] for i in part]).cpu() if len(part) else old.vectors[:0].clone()
        if vectors is None:
            vectors = torch.empty(len(names), embedded.shape[1])
            if old:
                vectors[torch.from_numpy(done)] = old.vectors[torch.from_numpy(rows[done])]
            del old  # memory-mapped from the file that is now replaced
        vectors[torch.from_numpy(part)] = embedded
        done[part] = True
        if not done.all():  # an interrupted search loses at most one block
            kept = [name for name, known in zip(names, done.tolist(), strict=True) if known]
            write_index(path, model, Index(kept, file_stats[done], hashes[done], vectors[torch.from_numpy(done)]))
    if len(new) < len(names):
        print(f"index: {len(new)} of {len(names)} embedded, {len(names) - len(new)} reused", file=sys.stderr)
    index = Index(names, file_stats, hashes, vectors)
    write_index(path, model, index)
    return index


def find_known(old, names, file_stats, content_hash):
    """For each name its row in the old index or -1 (N,), and its content hash (N, 16).

    A name with an unchanged file stat is known without reading the file; otherwise its content decides.
    """
    rows, hashes = np.full(len(names), -1), np.zeros((len(names), 16), dtype=np.uint8)
    by_name = dict(zip(old.names, enumerate(old.file_stats.tolist()), strict=True)) if old else {}
    by_content = {content.tobytes(): row for row, content in enumerate(old.content_hashes)} if old else {}
    for i, (name, stat) in enumerate(zip(names, file_stats.tolist(), strict=True)):
        row, old_stat = by_name.get(name, (-1, None))
        if stat == old_stat:
            rows[i], hashes[i] = row, old.content_hashes[row]
        else:
            content = content_hash(name)
            rows[i], hashes[i] = by_content.get(content, -1), np.frombuffer(content, dtype=np.uint8)
    return rows, hashes


def read_index(path, model):
    """The `Index` in a file, its vectors memory-mapped, or None if there is no file.

    Raises InputError if it is damaged, has an older format, or belongs to another model.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = [file.get_tensor(name) for name in TENSORS] if header.get("version") == VERSION else []
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"index {path} is damaged ({str(error).splitlines()[0][:100]})") from None
    if not tensors:
        raise InputError(f"index {path} has the format of another version")
    if header.get("model") != model:
        raise InputError(f"index {path} belongs to another model")
    names, stats, hashes, vectors = tensors
    names = names.numpy().tobytes().decode("utf-8", "surrogateescape").split("\0")
    if not (len(names) == len(stats) == len(hashes) == len(vectors) and vectors.ndim == 2):
        raise InputError(f"index {path} is damaged ({len(names)} names, {len(vectors)} vectors)")
    return Index(names, stats.numpy(), hashes.numpy(), vectors)


def write_index(path, model, index):
    """Save an index atomically; if that fails, a warning is printed and the search continues."""
    names = torch.frombuffer(bytearray("\0".join(index.names), "utf-8", "surrogateescape"), dtype=torch.uint8)
    stats, hashes = torch.from_numpy(index.file_stats), torch.from_numpy(index.content_hashes)
    tensors = dict(zip(TENSORS, (names, stats, hashes, index.vectors.contiguous()), strict=True))
    try:
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata={"model": model, "version": VERSION})
    except (OSError, SafetensorError) as error:
        print(f"index {path} could not be saved ({error}): the next search embeds again", file=sys.stderr)

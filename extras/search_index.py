"""Search index: embeddings of images and captions, computed once and saved in the run folder.

An index is a safetensors file (no pickle) with names, file stats (size, modification time), content hashes, embeddings,
and the hash of its model in the header. A file is recognised by its name and file stat, else by its content, so that
renamed, copied or touched files are not embedded again.
"""

import hashlib
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import compress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from clip import load_model, read_saved_model
from config import InputError, build_config
from dataset import load_splits
from inference import embed_images
from utils.captions import read_captions
from utils.cli import one_line
from utils.device import search_dtype
from utils.embed import embed_captions
from utils.files import atomic_write, check_regular
from utils.hashing import content_hash, file_stat, model_hash
from utils.image_files import image_suffixes
from utils.runs import check_links
from utils.shards import open_image

VERSION = "3"  # of the file format
TENSORS = ("names", "file_stats", "content_hashes", "vectors")
BLOCK = 2000  # images after which a partial index is saved
MAX_SAVE_SHARE = 0.05  # of the time; a large index is saved less often
MAX_NAME_BYTES = 4096  # on average
MAX_STALE = 10_000  # rows of an index that are no longer in its gallery, besides ten times the present ones


@dataclass
class Run:
    """A trained model, the folder of its search files, and the hash that ties the files to the model."""

    model: torch.nn.Module
    folder: Path
    hash: str


def open_run(folder, device="cpu"):
    """The `Run` saved in a folder; raises InputError."""
    check_links(Path(folder))
    return Run(load_model(folder, device), Path(folder) / "index", model_hash(folder))


@dataclass
class Gallery:
    """N images under the folder `root`, with their file stats (N, 2); `label` begins the name of the index file."""

    root: Path
    names: list[str]
    file_stats: np.ndarray
    label: str

    def rows_of(self, file):
        """The rows of an image file, also under other names (links); empty if the file is not in the gallery."""
        path = Path(file).resolve()
        rows = np.flatnonzero((self.file_stats == file_stat(path)).all(1)).tolist() if path.exists() else []
        return [row for row in rows if (self.root / self.names[row]).resolve() == path]


def list_gallery(images, run):
    """The `Gallery` of the folder `images`, or else of a run's own images; raises InputError."""
    if images:
        return Gallery(Path(images), *scan_images(images), "images")
    config = build_config({**read_saved_model(run)[1]["settings"], "run": str(run)})  # it may have been moved
    split, pairs = default_split(config)
    names = [file.relative_to(config.image_path).as_posix() for file in pairs.files]
    return Gallery(Path(config.image_path), names, np.array([*map(file_stat, pairs.files)], np.int64), split)


def list_captions(config, path=None):
    """The distinct captions of a file (default: the run's), that file, and the label of their index."""
    if path:
        return list(dict.fromkeys(read_captions(path)["caption"])), path, "captions"
    try:
        split, pairs = default_split(config)
    except InputError as error:
        raise InputError(f"the run's own captions are not available ({error}): pass --captions_path") from None
    return list(dict.fromkeys(pairs.captions)), config.captions_path, f"captions-{split}"


def default_split(config):
    """The name and the `Pairs` of the split that is searched by default: test, or validation without a test split."""
    splits = load_splits(config)
    split = "test" if splits["test"].files else "validation"
    return split, splits[split]


def scan_images(folder):
    """The names of all images under a folder, sorted, and their file stats (N, 2); raises InputError.

    Hidden files are skipped (macOS creates ._photo.jpg beside photo.jpg), and what is no image; a line says how many.
    Linked folders are followed, each folder once. `Path.rglob` would dominate a search's time.
    """
    if not Path(folder).is_dir():
        raise InputError(f"images is {folder}, which is not a folder")
    found, skipped, visited, suffixes = [], Counter(), set(), image_suffixes()

    def report(error):
        print(f"folder {error.filename} is skipped ({error.strerror})", file=sys.stderr)

    for path, folders, files in os.walk(folder, onerror=report, followlinks=True):
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        prefix = f"{Path(path).relative_to(folder).as_posix()}/".removeprefix("./")
        for name in files:
            file, suffix = os.path.join(path, name), os.path.splitext(name)[1].lower()
            if name.startswith("."):
                skipped["hidden"] += 1
            elif suffix in suffixes and os.path.isfile(file):
                found.append((prefix + name, *file_stat(file)))
            else:
                skipped[suffix[:10] or "without suffix"] += 1
    if not found:
        raise InputError(f"{folder} contains no images (.jpg, .png, .webp, ...)")
    if skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in skipped.most_common(5))
        print(f"files of {folder} that are no images are not used: {kinds}", file=sys.stderr)
    found.sort()
    return [name for name, *_ in found], np.array([stat for _, *stat in found], np.int64)


def embed_readable(model, image_files, total=None):
    """Like `embed_images`, but unreadable images get NaN and a warning; InputError if `total` (default: all) fail."""
    failed = {}
    vectors = embed_images(model, image_files, amp_dtype=search_dtype(model), failed=failed)
    if len(failed) == (total or len(image_files)):
        raise InputError(f"none of the images can be read: {failed[0]}")
    for position, reason in failed.items():
        print(f"{reason}: skipped", file=sys.stderr)
        vectors[position] = torch.nan
    return vectors


@dataclass
class Index:
    """N names with file stats (N, 2), content hashes (N, 16) and embeddings (N, D)."""

    names: list[str]
    file_stats: np.ndarray
    content_hashes: np.ndarray
    vectors: torch.Tensor


EMPTY = Index([], np.zeros((0, 2), np.int64), np.zeros((0, 16), np.uint8), torch.zeros(0, 1))


def index_images(run, gallery):
    """The up-to-date `Index` of a gallery, saved in the run folder; the vector of an unreadable image is NaN."""

    def embed(names):
        return embed_readable(run.model, [gallery.root / name for name in names], total=len(gallery.names))

    def read(name):
        try:
            with open_image(gallery.root / name) as file:
                return file.read()
        except OSError:  # no permission: reported by `embed`
            return os.fsencode(name)

    return update_index(run, gallery.root, gallery.label, gallery.names, gallery.file_stats, embed, read)


def index_captions(run, captions, source, label):
    """The up-to-date `Index` of distinct captions; `source` is the file they come from."""
    file_stats = np.array([(len(caption), 0) for caption in captions], np.int64)
    embed = partial(embed_captions, run.model, amp_dtype=search_dtype(run.model), desc="embedding captions")
    return update_index(run, source, label, captions, file_stats, embed, str.encode)


def update_index(run, source, label, names, file_stats, embed, read):
    """The index of `source`, updated to contain exactly these names; only new and changed ones are embedded.

    `label` begins the name of the index file. `embed`: names -> (N, D) vectors; `read`: a name -> its content, bytes.
    """
    source_hash = hashlib.sha256(str(Path(source).resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    path = run.folder / f"{label}-{source_hash}.safetensors"
    try:
        old = read_index(path, run, len(names)) if path.exists() else EMPTY
    except InputError as error:
        print(f"{error}: it is rebuilt", file=sys.stderr)
        old = EMPTY
    unchanged = old.names == names and np.array_equal(old.file_stats, file_stats)
    if unchanged and not old.vectors[:, 0].isnan().any():  # unreadable images may be readable by now
        return old
    rows, hashes = find_known(old, names, file_stats, read)
    known, new, vectors = rows >= 0, np.flatnonzero(rows < 0), None
    next_save = 0.0
    for start in range(0, max(1, len(new)), BLOCK):  # an interrupted search loses little
        part = new[start : start + BLOCK]
        embedded = embed([names[i] for i in part]).cpu() if len(part) else old.vectors[:0].clone()
        if vectors is None:
            vectors = torch.empty(len(names), embedded.shape[1])
            vectors[known] = old.vectors[rows[known]]
            del old  # memory-mapped from the file that is now replaced
        vectors[part] = embedded
        known[part] = True
        if time.monotonic() < next_save and start + BLOCK < len(new):
            continue
        started = time.monotonic()
        index = Index(list(compress(names, known)), file_stats[known], hashes[known], vectors[known])
        write_index(path, run.hash, index)
        next_save = time.monotonic() + (time.monotonic() - started) / MAX_SAVE_SHARE
    if len(new) < len(names):
        print(f"index: {len(new)} of {len(names)} embedded, {len(names) - len(new)} reused", file=sys.stderr)
    return index


def find_known(old, names, file_stats, read):
    """For each name its row in the old index, -1 if new or unreadable so far (N,), and its content hash (N, 16)."""
    rows, hashes = np.full(len(names), -1), np.zeros((len(names), 16), dtype=np.uint8)
    readable = np.flatnonzero(~old.vectors[:, 0].isnan().numpy()).tolist()
    by_stat = {(old.names[row], *old.file_stats[row].tolist()): row for row in readable}
    by_content = {old.content_hashes[row].tobytes(): row for row in readable}
    for i, (name, stat) in enumerate(zip(names, file_stats.tolist(), strict=True)):
        row = by_stat.get((name, *stat))
        content = content_hash(read(name)) if row is None else old.content_hashes[row].tobytes()
        rows[i] = by_content.get(content, -1) if row is None else row
        hashes[i] = np.frombuffer(content, dtype=np.uint8)
    return rows, hashes


def read_index(path, run, num_names):
    """The memory-mapped `Index` in a file, for a source that now has `num_names` images or captions.

    Raises InputError if it is damaged, in another format, of another model, or mostly outdated.
    """
    damaged = f"index {path} is damaged"
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            shapes = [file.get_slice(name).get_shape() for name in TENSORS] if header.get("version") == VERSION else []
            max_rows = 10 * num_names + MAX_STALE
            small = not shapes or max(shapes[-1][0], shapes[0][0] // MAX_NAME_BYTES) <= max_rows
            tensors = [file.get_tensor(name) for name in TENSORS] if shapes and small else []
    except (SafetensorError, OSError, ValueError, RuntimeError, IndexError) as error:
        raise InputError(f"{damaged} ({one_line(error)})") from None
    if not shapes:
        raise InputError(f"index {path} has the format of another version")
    if header.get("model") != run.hash:
        raise InputError(f"index {path} belongs to another model")
    if not small:
        raise InputError(f"index {path} is larger than ten times the {num_names} entries now")
    rows, num_bytes = shapes[-1][0], shapes[0][0]
    expected = [(torch.uint8, (num_bytes,)), (torch.int64, (rows, 2)), (torch.uint8, (rows, 16))]
    expected.append((torch.float32, (rows, run.model.config.projection_dim)))
    if [(tensor.dtype, tuple(tensor.shape)) for tensor in tensors] != expected:
        raise InputError(f"{damaged} (tensors of other types or shapes)")
    names, stats, hashes, vectors = tensors
    names = bytes(names.numpy()).decode("utf-8", "surrogateescape").split("\0")
    if len(names) != rows or not (vectors[:, 0].isnan() | (vectors.norm(dim=1) < 1.01)).all():
        raise InputError(f"{damaged} ({len(names)} names, {rows} vectors, or not unit vectors)")
    return Index(names, stats.numpy(), hashes.numpy(), vectors)


def write_index(path, model, index):
    """Save an index atomically; if that fails, a warning is printed and the search continues."""
    names = torch.frombuffer(bytearray("\0".join(index.names), "utf-8", "surrogateescape"), dtype=torch.uint8)
    stats, hashes = torch.from_numpy(index.file_stats), torch.from_numpy(index.content_hashes)
    tensors = dict(zip(TENSORS, (names, stats, hashes, index.vectors), strict=True))
    try:
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata={"model": model, "version": VERSION})
    except OSError as error:
        print(f"index {path} could not be saved ({error}): the next search recomputes embeddings", file=sys.stderr)

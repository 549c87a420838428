"""Embedding pictures and captions, each only once: the search index that is saved beside a run.

An index is one safetensors file (never a pickle): the names, each file's size and time and a digest of its content,
and the vectors. It belongs to one model: the digest of the weights, the settings and the tokenizer is in its header.
A file is known again by name, size and time; failing that, by its content, so that a renamed, copied or touched file
is not embedded again.
"""

import contextlib
import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset
from tqdm import tqdm

from clip import autocast, load_model
from config import InputError, read_json, write_json
from dataset import EvaluationImages, TokenStore, make_loader, pad_tokens
from images import ImageStore, stored_side

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
VERSION = "2"  # of the file's layout and of how a picture is prepared for the model
BLOCK = 20_000  # pictures after which a long work is saved


# ---- embedding --------------------------------------------------------------------------------------------------


@torch.no_grad()
def run_encoder(function, dataset, device, dtype=None, batch_size=64, num_workers=0, description=None, collate=None):
    """`function` of every batch of a dataset, concatenated, on the device; a progress bar if described."""
    loader = make_loader(dataset, num_workers, batch_size=batch_size, collate_fn=collate)
    results = []
    hidden = description is None or not sys.stderr.isatty()  # short work: in a log file its bar is only noise
    with tqdm(total=len(dataset), desc=description, disable=hidden, leave=False) as bar:
        for batch in loader:
            parts = batch if isinstance(batch, tuple) else (batch,)
            with autocast(device, dtype):
                results.append(function(*[part.to(device, non_blocking=True) for part in parts]).float())
            bar.update(len(parts[0]))
    return torch.cat(results)


class Captions(Dataset):
    """Tokenised captions for an encoder, in batches padded to their longest."""

    def __init__(self, tokenizer, captions, max_length):
        self.tokens, self.pad_id = TokenStore(tokenizer, captions, max_length), tokenizer.pad_token_id

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, caption):
        return self.tokens[caption]

    def collate(self, token_lists):
        return pad_tokens(token_lists, self.pad_id)


def embed_images(
    model, image_files, batch_size=64, num_workers=0, dtype=None, description="embedding images", failed=None
):
    """(N, D) unit vectors of N picture files, float32, on the model's device; raises InputError.

    With a dict `failed` (and no workers) unreadable pictures are noted there instead, {position: why}.
    """
    store = ImageStore([Path(file) for file in image_files], stored_side(model.config.size))
    images = EvaluationImages(store, range(len(store)), model.config.size, failed)
    return run_encoder(model.encode_image, images, model.device, dtype, batch_size, num_workers, description)


def embed_readable(model, image_files, total=None):
    """As `embed_images`, but a picture that cannot be read is named and gets a vector of NaN: one of many should not
    stop the rest. Raises InputError if as many as `total` (default: all) cannot be read."""
    failed = {}
    vectors = embed_images(model, image_files, failed=failed)
    if len(failed) == (len(image_files) if total is None else total):
        raise InputError(f"none of the pictures can be read: {failed[0]}")
    for position, why in failed.items():
        print(f"{why}: left out", file=sys.stderr)
        vectors[position] = torch.nan
    return vectors


def embed_captions(model, captions, batch_size=256, dtype=None, description=None):
    """(T, D) unit vectors of T captions, float32, on the model's device."""
    dataset = Captions(model.tokenizer, list(captions), model.max_length)
    return run_encoder(
        model.encode_text, dataset, model.device, dtype, batch_size, description=description, collate=dataset.collate
    )


# ---- a run ------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A trained model, the folder for what is kept beside it, and the digest that ties the two together."""

    model: torch.nn.Module
    folder: Path
    digest: str


def open_run(folder, device="cpu"):
    """The `Run` saved in a folder; raises InputError."""
    model = load_model(folder, device)
    return Run(model, Path(folder) / "index", model_digest(folder))


def model_digest(folder):
    """A digest of all that decides a saved model's vectors: weights, settings, tokenizer; 32 hexadecimal digits.

    Reading large weights takes longer than a search, so their digest is noted beside them with their size and time.
    """
    folder = Path(folder)
    folder = folder / "best" if (folder / "best").is_dir() else folder
    weights, note = folder / "model.safetensors", folder / "digest.json"
    stamp = list(stamp_of(weights))
    noted = {}
    with contextlib.suppress(InputError):
        noted = read_json(note)
    if not isinstance(noted, dict) or noted.get("stamp") != stamp or not isinstance(noted.get("weights"), str):
        noted = {"stamp": stamp, "weights": file_digest(weights).hex()}
        with contextlib.suppress(OSError):  # a folder that cannot be written to: read them again next time
            write_json(note, noted)
    whole = hashlib.blake2b(f"{VERSION} {noted['weights']}".encode(), digest_size=16)
    for file in [folder / "config.json", *sorted((folder / "tokenizer").glob("*"))]:
        whole.update(file.read_bytes())
    return whole.hexdigest()


# ---- files ------------------------------------------------------------------------------------------------------


def stamp_of(file):
    """A file's (size in bytes, time of last change in nanoseconds)."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def file_digest(file):
    """16 bytes that tell a file's content."""
    digest = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as content:
        while part := content.read(1 << 20):
            digest.update(part)
    return digest.digest()


def scan_pictures(folder):
    """The names of all pictures below a folder, sorted, and their sizes and times (N, 2); raises InputError.

    Hidden files and folders are left out (macOS keeps a `._photo.jpg` beside a photo.jpg, which is none).
    `os.scandir` and plain strings: with `Path.rglob` this would be most of a search's time.
    """
    found, waiting, endings = [], [(str(folder), "")], tuple(PICTURES)
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
                    elif name.lower().endswith(endings):
                        with contextlib.suppress(OSError):  # a link to itself
                            if entry.is_file():
                                status = entry.stat()
                                found.append((prefix + name, status.st_size, status.st_mtime_ns))
        except OSError as error:
            print(f"folder {path} is left out ({error.strerror})", file=sys.stderr)
    if not found:
        raise InputError(f"{folder} holds no pictures ({', '.join(sorted(PICTURES))})")
    found.sort()
    return [name for name, _, _ in found], stamp_array([stamp for _, *stamp in found])


def stamp_array(stamps):
    """A list of N (size, time) as an array (N, 2)."""
    return np.array(stamps, dtype=np.int64).reshape(-1, 2)


# ---- the index --------------------------------------------------------------------------------------------------


@dataclass
class Index:
    """N names, each with its file's size and time (N, 2), the digest of its content (N, 16) and its vector (N, D)."""

    names: list[str]
    stamps: np.ndarray
    digests: np.ndarray
    vectors: torch.Tensor


def index_pictures(run, root, names, stamps, label):
    """The up-to-date `Index` of the pictures `names` below `root`, of sizes and times `stamps` (N, 2); saved beside
    the run. The vector of a picture that cannot be read is NaN."""
    root = Path(root)

    def embed(names):
        return embed_readable(run.model, [root / name for name in names], total=len(stamps))

    def digest(name):
        try:
            return file_digest(root / name)
        except OSError:  # no permission: `embed` will say so
            return hashlib.blake2b(os.fsencode(name), digest_size=16).digest()

    path = index_path(run, root, label)
    return update_index(path, run.digest, names, stamps, embed, digest)


def index_captions(run, captions, source, label):
    """The up-to-date `Index` of captions, each different one once; `source` is the file they come from."""

    def embed(names):
        return embed_captions(run.model, names, description="embedding captions")

    def digest(caption):
        return hashlib.blake2b(caption.encode(), digest_size=16).digest()

    stamps = stamp_array([(len(caption), 0) for caption in captions])
    return update_index(index_path(run, Path(source), label), run.digest, captions, stamps, embed, digest)


def index_path(run, source, label):
    """Where the index of a folder (or a captions file) lies: one for each, by its full path."""
    place = hashlib.sha256(str(source.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return run.folder / f"{label}-{place}.safetensors"


def update_index(path, owner, names, stamps, embed, digest):
    """The index at `path`, made to hold exactly these names; only what is new or changed is embedded.

    Args:
        owner: the digest of the model that the vectors belong to.
        names, stamps: N different names, and their sizes and times (N, 2).
        embed: names -> (N, D) vectors. digest: name -> 16 bytes.
    """
    try:
        old = read_index(path, owner)
    except InputError as error:
        print(f"{error}: everything is embedded anew", file=sys.stderr)
        old = None
    unknown = old.vectors[:, 0].isnan().numpy() if old else None  # could not be read: perhaps they can now
    if old and old.names == names and np.array_equal(old.stamps, stamps) and not unknown.any():
        return old
    rows, digests = find_known(old, names, stamps, digest)
    if old:
        rows[(rows >= 0) & unknown[rows]] = -1
    new = np.flatnonzero(rows < 0)
    done, vectors = rows >= 0, None
    for start in range(0, max(1, len(new)), BLOCK):
        part = new[start : start + BLOCK]
        embedded = embed([names[i] for i in part]).cpu() if len(part) else old.vectors[:0].clone()
        if vectors is None:
            vectors = torch.empty(len(names), embedded.shape[1])
            if old:
                vectors[torch.from_numpy(done)] = old.vectors[torch.from_numpy(rows[done])]
            del old  # it is mapped into memory from the file that is now replaced
        vectors[torch.from_numpy(part)] = embedded
        done[part] = True
        if not done.all():  # a long work that is stopped is not lost
            kept = [name for name, known in zip(names, done.tolist(), strict=True) if known]
            write_index(path, owner, Index(kept, stamps[done], digests[done], vectors[torch.from_numpy(done)]))
    if len(new) < len(names):
        print(f"index: {len(new)} of {len(names)} embedded, the others are known", file=sys.stderr)
    index = Index(names, stamps, digests, vectors)
    write_index(path, owner, index)
    return index


def find_known(old, names, stamps, digest):
    """For each name its row in the old index or -1, (N,), and the digest of its content, (N, 16).

    A name with an unchanged size and time is known without reading it; otherwise its content decides.
    """
    rows, digests = np.full(len(names), -1), np.zeros((len(names), 16), dtype=np.uint8)
    by_name = dict(zip(old.names, enumerate(old.stamps.tolist()), strict=True)) if old else {}
    by_content = {content.tobytes(): row for row, content in enumerate(old.digests)} if old else {}
    for i, (name, stamp) in enumerate(zip(names, stamps.tolist(), strict=True)):
        row, old_stamp = by_name.get(name, (-1, None))
        if stamp == old_stamp:
            rows[i], digests[i] = row, old.digests[row]
        else:
            content = digest(name)
            rows[i], digests[i] = by_content.get(content, -1), np.frombuffer(content, dtype=np.uint8)
    return rows, digests


def read_index(path, owner):
    """The `Index` in a file, its vectors mapped into memory, or None without a file.

    Raises InputError if it is damaged or belongs to another model.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            names, stamps, digests, vectors = (file.get_tensor(n) for n in ("names", "stamps", "digests", "vectors"))
        names = names.numpy().tobytes().decode("utf-8", "surrogateescape").split("\0")
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"index {path} is damaged ({str(error).splitlines()[0][:100]})") from None
    if header.get("model") != owner:
        raise InputError(f"index {path} belongs to another model")
    if not (len(names) == len(stamps) == len(digests) == len(vectors) and vectors.ndim == 2):
        raise InputError(f"index {path} is damaged ({len(names)} names, {len(vectors)} vectors)")
    return Index(names, stamps.numpy(), digests.numpy(), vectors)


def write_index(path, owner, index):
    """Save an index so that the file is never seen half-written; where that is impossible, say so and go on."""
    tensors = {
        "names": torch.frombuffer(bytearray("\0".join(index.names), "utf-8", "surrogateescape"), dtype=torch.uint8),
        "stamps": torch.from_numpy(index.stamps),
        "digests": torch.from_numpy(index.digests),
        "vectors": index.vectors.contiguous(),
    }
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata={"model": owner})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        print(f"index {path} could not be saved ({error}): the next search embeds again", file=sys.stderr)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)

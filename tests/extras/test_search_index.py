"""Search index: only new and changed files are embedded; a damaged index, or one of another model, is rebuilt."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import draw_image
from safetensors import safe_open
from safetensors.torch import save_file

from clip import save_model
from config import InputError
from dataset import EvaluationImages, ImageStore
from extras import search_index
from extras.search_index import (
    Gallery,
    Run,
    index_captions,
    index_images,
    list_gallery,
    open_run,
    read_index,
    scan_images,
)
from utils.embed import encode_dataset
from utils.hashing import model_hash
from utils.image_cache import storage_resolution


@pytest.fixture
def run(tmp_path, tiny_model):
    return Run(tiny_model(), tmp_path / "index", "model a")


@pytest.fixture
def gallery(tmp_path):
    folder = tmp_path / "gallery"
    for seed, name in enumerate(("a.jpg", "b.PNG", "sub/c.webp", "sub/deep/d.jpg")):
        draw_image(folder / name, seed=seed)
    (folder / "notes.txt").write_text("not an image")
    (folder / "sub/._c.jpg").write_text("not an image either")
    return folder


@pytest.fixture
def embedded(monkeypatch):
    """The names of the files embedded since the list was last cleared."""
    names, embed_images = [], search_index.embed_images

    def counting(model, files, *more, **options):
        names.extend(file.name for file in files)
        return embed_images(model, files, *more, **options)

    monkeypatch.setattr(search_index, "embed_images", counting)
    return names


def refresh(run, folder):
    return index_images(run, Gallery(folder, *scan_images(folder), "images"))


def check_vectors(run, gallery, found):
    """Each vector is that of its file, embedded alone."""
    assert found.names == sorted(p.relative_to(gallery).as_posix() for p in gallery.rglob("[!.]*.[jJwpP][peEnN]*"))
    for name, vector in zip(found.names, found.vectors, strict=True):
        images = EvaluationImages(ImageStore([gallery / name], storage_resolution(32)), [0], 32)
        expected = encode_dataset(run.model.encode_image, images, torch.device("cpu"))[0]
        torch.testing.assert_close(vector, expected, atol=1e-5, rtol=0)


def test_scan_images_finds_images_in_all_folders_and_nothing_else(gallery):
    (gallery / ".trash").mkdir()
    (gallery / ".trash/e.jpg").write_bytes(b"hidden")
    names, file_stats = scan_images(gallery)
    assert names == ["a.jpg", "b.PNG", "sub/c.webp", "sub/deep/d.jpg"]
    status = (gallery / "sub/c.webp").stat()
    assert file_stats[2].tolist() == [status.st_size, status.st_mtime_ns]


def test_scan_images_follows_linked_folders_once_and_counts_other_files(gallery, tmp_path, capsys):
    draw_image(tmp_path / "real" / "e.jfif")
    (gallery / "linked").symlink_to(tmp_path / "real")
    (gallery / "sub" / "again").symlink_to(tmp_path / "real")
    (gallery / "sub" / "loop").symlink_to(gallery)
    (gallery / "README").write_text("no suffix")
    names, stats = scan_images(gallery)
    assert names == ["a.jpg", "b.PNG", "linked/e.jfif", "sub/c.webp", "sub/deep/d.jpg"] and len(stats) == 5
    line = capsys.readouterr().err
    assert line.startswith(f"files of {gallery} that are no images are not used: ")
    assert {"1 .txt", "1 hidden", "1 without suffix"} == {*line.split(": ")[1].strip().split(", ")}


def test_times_after_2262_fit_into_the_index(gallery):
    try:
        os.utime(gallery / "a.jpg", ns=(0, 2**63 + 10**9))
    except (OSError, OverflowError):
        pytest.skip("the file system has no such times")
    assert scan_images(gallery)[0][0] == "a.jpg"


def test_scan_images_refuses_folders_without_images(tmp_path, gallery):
    with pytest.raises(InputError, match="is not a folder"):
        scan_images(gallery / "a.jpg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="contains no images"):
        scan_images(tmp_path / "empty")


def test_index_images_embeds_nothing_the_second_time(run, gallery, embedded):
    first = refresh(run, gallery)
    assert embedded == ["a.jpg", "b.PNG", "c.webp", "d.jpg"]
    check_vectors(run, gallery, first)
    embedded.clear()
    second = refresh(run, gallery)
    assert embedded == []
    assert second.names == first.names and torch.equal(second.vectors, first.vectors)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda g: draw_image(g / "b.PNG", seed=9), ["b.PNG"]),
        (lambda g: (g / "a.jpg").unlink(), []),
        (lambda g: (g / "a.jpg").rename(g / "sub/zebra.jpg"), []),
        (lambda g: (g / "sub").rename(g / "moved"), []),
        (lambda g: os.utime(g / "a.jpg", ns=(1, 1)), []),
        (lambda g: shutil.copy(g / "a.jpg", g / "copy.jpg"), []),
        (lambda g: draw_image(g / "new.jpg", seed=8), ["new.jpg"]),
        (lambda g: [(g / "a.jpg").rename(g / "x.jpg"), draw_image(g / "a.jpg", seed=7)], ["a.jpg"]),
    ],
    ids=["changed", "deleted", "renamed", "folder renamed", "touched", "copied", "added", "name reused"],
)
def test_index_images_embeds_only_changed_files(run, gallery, embedded, change, expected):
    refresh(run, gallery)
    embedded.clear()
    change(gallery)
    found = refresh(run, gallery)
    assert embedded == expected
    check_vectors(run, gallery, found)
    embedded.clear()
    check_vectors(run, gallery, refresh(run, gallery))
    assert embedded == []


def test_index_images_of_swapped_files(run, gallery, embedded):
    refresh(run, gallery)
    embedded.clear()
    (gallery / "a.jpg").rename(gallery / "t.jpg")
    (gallery / "sub/deep/d.jpg").rename(gallery / "a.jpg")
    (gallery / "t.jpg").rename(gallery / "sub/deep/d.jpg")
    check_vectors(run, gallery, refresh(run, gallery))
    assert embedded == []


def test_index_of_another_model_is_rebuilt(run, gallery, embedded, capsys, tiny_model):
    refresh(run, gallery)
    (path,) = run.folder.glob("*.safetensors")
    with pytest.raises(InputError, match="belongs to another model"):
        read_index(path, Run(run.model, run.folder, "model b"), 4)
    torch.manual_seed(1)
    other = Run(tiny_model(projection_dim=16), run.folder, "model b")
    embedded.clear()
    found = refresh(other, gallery)
    assert len(embedded) == 4 and found.vectors.shape == (4, 16)
    assert "belongs to another model: it is rebuilt" in capsys.readouterr().err
    check_vectors(other, gallery, found)


def test_index_of_another_format_is_rebuilt(run, gallery, embedded, capsys, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(search_index, "VERSION", "2")
        refresh(run, gallery)
    embedded.clear()
    check_vectors(run, gallery, refresh(run, gallery))
    assert len(embedded) == 4
    assert "has the format of another version: it is rebuilt" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [b"", b"not an index", None], ids=["empty", "nonsense", "cut off"])
def test_damaged_index_is_rebuilt(run, gallery, embedded, capsys, damage):
    refresh(run, gallery)
    (path,) = run.folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-40] if damage is None else damage)
    with pytest.raises(InputError, match="is damaged"):
        read_index(path, run, 4)
    embedded.clear()
    check_vectors(run, gallery, refresh(run, gallery))
    assert len(embedded) == 4
    assert "is damaged" in capsys.readouterr().err
    read_index(path, run, 4)


def change_tensors(**changes):
    def damage(path):
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name, change in changes.items():
            tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, path, metadata)

    return damage


def make_sparse(path):
    """An index of 40 GB of zeros, without blocks on the disk."""
    rows = 240_000_000
    shapes = {"names": ("U8", [rows]), "file_stats": ("I64", [rows, 2]), "content_hashes": ("U8", [rows, 16])}
    header, offset = {}, 0
    with safe_open(path, "pt") as file:
        header["__metadata__"], width = file.metadata(), file.get_slice("vectors").get_shape()[1]
    for name, (dtype, shape) in {**shapes, "vectors": ("F32", [rows, width])}.items():
        size = int(np.prod(shape)) * {"U8": 1, "I64": 8, "F32": 4}[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    content = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + offset)


@pytest.mark.parametrize(
    "damage",
    [
        change_tensors(vectors=lambda x: x[:, :5]),
        change_tensors(vectors=lambda x: x * 3),
        change_tensors(vectors=lambda x: torch.cat([x[:, :1], x[:, 1:] * torch.nan], 1)),
        change_tensors(vectors=lambda x: x.half()),
        change_tensors(vectors=lambda x: x[0]),
        change_tensors(file_stats=lambda x: x.float()),
        change_tensors(file_stats=lambda x: x[:, :1]),
        change_tensors(content_hashes=lambda x: x[:, :8]),
        change_tensors(names=lambda x: x[x != 0]),
        change_tensors(names=lambda x: x.reshape(1, -1)),
        lambda path: path.unlink() or os.mkfifo(path),
        make_sparse,
    ],
    ids=[
        "width",
        "length",
        "NaN",
        "half",
        "1-D",
        "stats type",
        "stats",
        "hashes",
        "names",
        "2-D names",
        "FIFO",
        "large",
    ],
)
def test_mistyped_index_is_rebuilt(run, gallery, embedded, capsys, damage):
    refresh(run, gallery)
    (path,) = run.folder.glob("*.safetensors")
    damage(path)
    embedded.clear()
    check_vectors(run, gallery, refresh(run, gallery))
    assert len(embedded) == 4
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("index /")]
    assert line.endswith(": it is rebuilt")
    read_index(path, run, 4)


def test_large_index_is_saved_less_often(run, gallery, monkeypatch):
    saved, write = [], search_index.write_index
    monkeypatch.setattr(search_index, "BLOCK", 1)
    monkeypatch.setattr(search_index, "write_index", lambda *all: saved.append(len(all[2].names)) or write(*all))
    monkeypatch.setattr(search_index, "MAX_SAVE_SHARE", 1e-9)
    refresh(run, gallery)
    assert saved == [1, 4]  # saving took longer than its share of the time


def test_write_index_failure_leaves_the_old_index_and_no_temporary_file(run, gallery, monkeypatch, capsys):
    refresh(run, gallery)
    (path,) = run.folder.glob("*.safetensors")
    before = path.read_bytes()

    def full(tensors, file, **more):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(search_index, "save_file", full)
    draw_image(gallery / "new.jpg", seed=8)
    check_vectors(run, gallery, refresh(run, gallery))  # the search continues
    assert "No space left on device" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert list(run.folder.iterdir()) == [path]


def test_index_images_continues_after_an_interruption(run, gallery, embedded, monkeypatch):
    monkeypatch.setattr(search_index, "BLOCK", 2)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(search_index, "write_index", interrupted(search_index.write_index))
        refresh(run, gallery)
    assert embedded == ["a.jpg", "b.PNG"]
    embedded.clear()
    found = refresh(run, gallery)
    assert embedded == ["c.webp", "d.jpg"]
    check_vectors(run, gallery, found)


def interrupted(function):
    def call(*arguments):
        function(*arguments)
        raise KeyboardInterrupt

    return call


def test_list_gallery_of_a_folder_and_of_a_run(trained_run, gallery, sample):
    found = list_gallery(gallery, trained_run)
    assert found.names == scan_images(gallery)[0] and found.label == "images"
    assert found.rows_of(gallery / "sub" / ".." / "b.PNG") == [1] and found.rows_of("a.jpg") == []
    found = list_gallery(None, trained_run)
    assert len(found.names) == 10 and found.label == "test" and found.root.as_posix() == sample["image_path"]


def test_index_captions_embeds_each_caption_once(run, tmp_path, monkeypatch):
    captions, calls, embed = ["a dog", "two cats"], [], search_index.embed_captions
    monkeypatch.setattr(
        search_index, "embed_captions", lambda m, c, **more: calls.append(list(c)) or embed(m, c, **more)
    )
    index_captions(run, captions, tmp_path / "captions.txt", "captions")
    found = index_captions(run, ["two cats", "a house"], tmp_path / "captions.txt", "captions")
    assert calls == [["a dog", "two cats"], ["a house"]]
    torch.testing.assert_close(found.vectors, embed(run.model, ["two cats", "a house"]), atol=1e-5, rtol=0)


def test_model_hash_depends_on_weights_and_settings(tmp_path, tiny_model):
    model = tiny_model()
    save_model(model, tmp_path / "run/best")
    first = open_run(tmp_path / "run")
    assert first.folder == tmp_path / "run/index"
    assert model_hash(tmp_path / "run") == model_hash(tmp_path / "run/best") == first.hash
    with torch.no_grad():
        model.image_projection.layers[-1].weight[0, 0] += 1
    save_model(model, tmp_path / "run/best")
    second = model_hash(tmp_path / "run")
    assert second != first.hash
    config = tmp_path / "run/best/config.json"
    config.write_text(config.read_text().replace('"size": 32', '"size": 64'))
    assert model_hash(tmp_path / "run") not in (first.hash, second)


def test_model_hash_with_a_damaged_cache(tmp_path, tiny_model):
    save_model(tiny_model(), tmp_path / "run/best")
    expected = model_hash(tmp_path / "run")
    (tmp_path / "run/best/weights_hash.json").write_text("[")
    assert model_hash(tmp_path / "run") == expected

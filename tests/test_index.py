"""The saved index: only what is new or changed is embedded; one that is damaged or another model's is not used."""

import os
import shutil

import pytest
import torch
from conftest import draw_picture

import index
from clip import save_model
from config import InputError
from index import Run, index_captions, index_pictures, model_digest, open_run, read_index, scan_pictures


@pytest.fixture
def run(tmp_path, tiny_model):
    return Run(tiny_model(), tmp_path / "index", "model a")


@pytest.fixture
def gallery(tmp_path):
    folder = tmp_path / "gallery"
    for seed, name in enumerate(("a.jpg", "b.PNG", "sub/c.webp", "sub/deep/d.jpg")):
        draw_picture(folder / name, seed=seed)
    (folder / "notes.txt").write_text("no picture")
    (folder / "sub/._c.jpg").write_text("no picture either")
    return folder


@pytest.fixture
def embedded(monkeypatch):
    """The names of the files embedded since it was last cleared."""
    names, embed_images = [], index.embed_images

    def counting(model, files, *more, **options):
        names.extend(file.name for file in files)
        return embed_images(model, files, *more, **options)

    monkeypatch.setattr(index, "embed_images", counting)
    return names


def refresh(run, gallery):
    return index_pictures(run, gallery, *scan_pictures(gallery), "pictures")


def check_vectors(run, gallery, found):
    """Each name's vector is its file's, embedded by itself."""
    assert found.names == sorted(p.relative_to(gallery).as_posix() for p in gallery.rglob("[!.]*.[jJwpP][peEnN]*"))
    for name, vector in zip(found.names, found.vectors, strict=True):
        expected = index.run_encoder(
            run.model.encode_image,
            index.EvaluationImages(index.ImageStore([gallery / name], index.stored_side(32)), [0], 32),
            torch.device("cpu"),
        )[0]
        torch.testing.assert_close(vector, expected, atol=1e-5, rtol=0)


def test_scan_finds_pictures_in_all_folders_and_nothing_else(gallery):
    (gallery / ".trash").mkdir()
    (gallery / ".trash/e.jpg").write_bytes(b"hidden")
    names, stamps = scan_pictures(gallery)
    assert names == ["a.jpg", "b.PNG", "sub/c.webp", "sub/deep/d.jpg"]
    status = (gallery / "sub/c.webp").stat()
    assert stamps[2].tolist() == [status.st_size, status.st_mtime_ns]


def test_scan_refuses_what_is_no_folder_of_pictures(tmp_path, gallery):
    with pytest.raises(InputError, match="is not a folder"):
        scan_pictures(gallery / "a.jpg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no pictures"):
        scan_pictures(tmp_path / "empty")


def test_second_search_embeds_nothing(run, gallery, embedded):
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
        (lambda g: draw_picture(g / "b.PNG", seed=9), ["b.PNG"]),
        (lambda g: (g / "a.jpg").unlink(), []),
        (lambda g: (g / "a.jpg").rename(g / "sub/zebra.jpg"), []),
        (lambda g: (g / "sub").rename(g / "moved"), []),
        (lambda g: os.utime(g / "a.jpg", ns=(1, 1)), []),
        (lambda g: shutil.copy(g / "a.jpg", g / "copy.jpg"), []),
        (lambda g: draw_picture(g / "new.jpg", seed=8), ["new.jpg"]),
        (lambda g: [(g / "a.jpg").rename(g / "x.jpg"), draw_picture(g / "a.jpg", seed=7)], ["a.jpg"]),
    ],
    ids=["changed", "deleted", "renamed", "folder renamed", "touched", "copied", "added", "name taken over"],
)
def test_only_what_changed_is_embedded(run, gallery, embedded, change, expected):
    refresh(run, gallery)
    embedded.clear()
    change(gallery)
    found = refresh(run, gallery)
    assert embedded == expected
    check_vectors(run, gallery, found)
    embedded.clear()
    check_vectors(run, gallery, refresh(run, gallery))
    assert embedded == []


def test_swapped_files_keep_their_own_vectors(run, gallery, embedded):
    refresh(run, gallery)
    embedded.clear()
    (gallery / "a.jpg").rename(gallery / "t.jpg")
    (gallery / "sub/deep/d.jpg").rename(gallery / "a.jpg")
    (gallery / "t.jpg").rename(gallery / "sub/deep/d.jpg")
    check_vectors(run, gallery, refresh(run, gallery))
    assert embedded == []


def test_index_of_another_model_is_refused_and_made_anew(run, gallery, embedded, capsys, tiny_model):
    refresh(run, gallery)
    (path,) = run.folder.glob("*.safetensors")
    with pytest.raises(InputError, match="belongs to another model"):
        read_index(path, "model b")
    torch.manual_seed(1)
    other = Run(tiny_model(projection_dim=16), run.folder, "model b")
    embedded.clear()
    found = refresh(other, gallery)
    assert len(embedded) == 4 and found.vectors.shape == (4, 16)
    assert "belongs to another model: everything is embedded anew" in capsys.readouterr().err
    check_vectors(other, gallery, found)


@pytest.mark.parametrize("damage", [b"", b"no index", None], ids=["empty", "nonsense", "cut off"])
def test_damaged_index_is_made_anew(run, gallery, embedded, capsys, damage):
    refresh(run, gallery)
    (path,) = run.folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-40] if damage is None else damage)
    with pytest.raises(InputError, match="is damaged"):
        read_index(path, run.digest)
    embedded.clear()
    check_vectors(run, gallery, refresh(run, gallery))
    assert len(embedded) == 4
    assert "is damaged" in capsys.readouterr().err
    read_index(path, run.digest)


def test_failed_write_leaves_the_old_index_and_no_remains(run, gallery, monkeypatch, capsys):
    refresh(run, gallery)
    (path,) = run.folder.glob("*.safetensors")
    before = path.read_bytes()

    def full(tensors, file, **more):
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(index, "save_file", full)
    draw_picture(gallery / "new.jpg", seed=8)
    check_vectors(run, gallery, refresh(run, gallery))  # the search itself goes on
    assert "could not be saved (no space left)" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert list(run.folder.iterdir()) == [path]


def test_a_long_work_that_is_stopped_is_not_lost(run, gallery, embedded, monkeypatch):
    monkeypatch.setattr(index, "BLOCK", 2)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(index, "write_index", stopping(index.write_index))
        refresh(run, gallery)
    assert embedded == ["a.jpg", "b.PNG"]
    embedded.clear()
    found = refresh(run, gallery)
    assert embedded == ["c.webp", "d.jpg"]
    check_vectors(run, gallery, found)


def stopping(function):
    def stop(*arguments):
        function(*arguments)
        raise KeyboardInterrupt

    return stop


def test_captions_are_embedded_once(run, tmp_path, monkeypatch):
    captions, calls, embed = ["a dog", "two cats"], [], index.embed_captions
    monkeypatch.setattr(index, "embed_captions", lambda m, c, **more: calls.append(list(c)) or embed(m, c, **more))
    index_captions(run, captions, tmp_path / "captions.txt", "captions")
    found = index_captions(run, ["two cats", "a house"], tmp_path / "captions.txt", "captions")
    assert calls == [["a dog", "two cats"], ["a house"]]
    torch.testing.assert_close(found.vectors, embed(run.model, ["two cats", "a house"]), atol=1e-5, rtol=0)


def test_model_digest_depends_on_weights_and_settings(tmp_path, tiny_model):
    model = tiny_model()
    save_model(model, tmp_path / "run/best")
    first = open_run(tmp_path / "run")
    assert first.folder == tmp_path / "run/index"
    assert model_digest(tmp_path / "run") == model_digest(tmp_path / "run/best") == first.digest
    with torch.no_grad():
        model.image_projection.layers[-1].weight[0, 0] += 1
    save_model(model, tmp_path / "run/best")
    second = model_digest(tmp_path / "run")
    assert second != first.digest
    config = tmp_path / "run/best/config.json"
    config.write_text(config.read_text().replace('"size": 32', '"size": 64'))
    assert model_digest(tmp_path / "run") not in (first.digest, second)


def test_model_digest_survives_a_damaged_note(tmp_path, tiny_model):
    save_model(tiny_model(), tmp_path / "run/best")
    digest = model_digest(tmp_path / "run")
    (tmp_path / "run/best/digest.json").write_text("[")
    assert model_digest(tmp_path / "run") == digest

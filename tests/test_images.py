"""Pictures: decoding, and the cache."""

import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import draw_picture, quarters
from PIL import Image

import images
from config import InputError
from images import ImageStore, build_image_cache, decode_image

# ---- pictures ---------------------------------------------------------------------------------------------------


def test_sixteen_bits_are_brought_to_eight(tmp_path):
    ramp = np.linspace(0, 65535, 20 * 20).reshape(20, 20).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    decoded = decode_image(tmp_path / "a.png", 20)
    assert np.abs(decoded[..., 0].astype(int) - (ramp >> 8)).max() <= 1


def test_decode_image_shows_the_whole_picture(tmp_path):
    Image.fromarray(quarters(40)).resize((90, 40), Image.Resampling.NEAREST).save(tmp_path / "a.png")
    decoded = decode_image(tmp_path / "a.png", 20)
    assert decoded.shape == (20, 20, 3)
    assert decoded.dtype == np.uint8
    for row, column in ((2, 2), (2, 17), (17, 2), (17, 17)):
        assert np.abs(decoded[row, column].astype(int) - quarters(20)[row, column]).max() < 12


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_decode_image_gives_rgb_of_any_kind_of_picture(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new("RGB", (30, 20), (255, 255, 255)).convert(mode).save(path)
    assert decode_image(path, 16).shape == (16, 16, 3)
    assert decode_image(path, 16).min() >= 254


def test_decode_image_turns_a_photograph_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    Image.fromarray(quarters(40)).save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert np.abs(decode_image(tmp_path / "a.jpg", 20)[3, 3].astype(int) - [0, 0, 250]).max() < 40


def test_decode_image_names_a_truncated_or_foreign_file(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (80, 80, 3), dtype=np.uint8)).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    for content in (whole[: len(whole) // 2], whole[:50], b"not a picture", b""):
        path = tmp_path / "b.jpg"
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"b\.jpg cannot be read"):
            decode_image(path, 80)


def test_what_is_transparent_is_white_and_floats_keep_their_greys(tmp_path):
    clear = np.zeros((20, 20, 4), dtype=np.uint8)
    clear[5:15, 5:15, 3] = 255  # a black square on nothing
    Image.fromarray(clear).save(tmp_path / "a.png")
    decoded = decode_image(tmp_path / "a.png", 20)
    assert decoded[1, 1].tolist() == [255, 255, 255] and decoded[10, 10].tolist() == [0, 0, 0]
    ramp = np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20)
    for values, dtype in ((ramp, np.float32), (ramp * 252, np.float32), (ramp * 252, np.int32)):
        Image.fromarray(values.astype(dtype)).save(tmp_path / "b.tif")
        decoded = decode_image(tmp_path / "b.tif", 20)
        assert np.abs(decoded[..., 0].astype(int) - ramp * 252).max() <= 4


# ---- the cache --------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    files = [tmp_path / "pictures" / f"{i}.png" for i in range(5)]
    for seed, file in enumerate(files):
        draw_picture(file, seed=seed)
    return files


def test_the_cache_holds_what_decoding_gives(pictures, tmp_path):
    path = build_image_cache(pictures, 20, tmp_path / "cache", 2, False)
    store = ImageStore(pictures, 20, path)
    assert all(np.array_equal(store[i], decode_image(file, 20)) for i, file in enumerate(pictures))


def test_the_cache_is_built_once_and_again_when_a_picture_changes(pictures, tmp_path, monkeypatch):
    decoded, folder = [], tmp_path / "cache"
    monkeypatch.setattr(images, "decode_image", lambda file, side: decoded.append(file) or decode_image(file, side))
    path = build_image_cache(pictures, 20, folder, 0, False).path
    assert build_image_cache(pictures, 20, folder, 0, False).path == path
    assert sorted(decoded) == pictures
    draw_picture(pictures[2], seed=99)
    os.utime(pictures[2], ns=(1, 1))
    changed = build_image_cache(pictures, 20, folder, 0, False).path
    assert changed != path
    assert np.array_equal(np.load(changed)[2], decode_image(pictures[2], 20))
    assert set(folder.iterdir()) == {changed, changed.with_suffix(".digests")}  # the old one is gone
    other = build_image_cache(pictures, 24, folder, 0, False).path
    assert changed.exists()
    assert np.load(other).shape == (5, 24, 24, 3)
    changed.with_suffix(".digests").write_bytes(b"damaged")
    assert np.array_equal(np.load(build_image_cache(pictures, 20, folder, 0, False).path), np.load(changed))


def test_every_split_of_the_same_pictures_finds_the_one_cache(pictures, tmp_path):
    folder = tmp_path / "cache"
    whole = build_image_cache(pictures, 20, folder, 0, False)
    for chosen in ([3, 0], [4], [2, 1, 0, 4, 3], []):
        files = [pictures[i] for i in chosen]
        cache = build_image_cache(files, 20, folder, 0, False)
        assert cache.path == whole.path and cache.rows.tolist() == chosen
        store = pickle.loads(pickle.dumps(ImageStore(files, 20, cache)))  # as a loader process gets it
        assert len(store) == len(files)
        assert all(np.array_equal(store[i], decode_image(file, 20)) for i, file in enumerate(files))
    more = tmp_path / "pictures" / "more.png"
    draw_picture(more, seed=50)
    assert build_image_cache([pictures[1], more], 20, folder, 0, False).path != whole.path


def test_unreadable_pictures_leave_no_cache(pictures, tmp_path):
    for file in pictures[1:4]:
        file.write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"1\.png cannot be read .* \(and 2 more pictures: see .*unreadable\.txt"):
        build_image_cache(pictures, 20, tmp_path / "cache", 2, False)
    (left,) = (tmp_path / "cache").iterdir()
    lines = left.read_text(encoding="utf-8").splitlines()
    assert [str(file) in line for file, line in zip(pictures[1:4], lines, strict=True)] == [True] * 3


def test_an_interrupted_build_leaves_no_cache(pictures, tmp_path, monkeypatch):
    def interrupted(file, side):
        raise KeyboardInterrupt

    monkeypatch.setattr(images, "decode_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_image_cache(pictures, 20, tmp_path / "cache", 1, False)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_full_disk_is_refused_before_anything_is_written(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(images.shutil, "disk_usage", lambda folder: SimpleNamespace(free=5 * 20 * 20 * 3 - 1))
    with pytest.raises(InputError, match="--cache_path, or --cache_images false"):
        build_image_cache(pictures, 20, tmp_path / "cache", 0, False)
    assert list((tmp_path / "cache").iterdir()) == []

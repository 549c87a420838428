"""Image decoding, the image cache, decoded images by index, and the evaluation transform."""

import errno
import os
import pickle
import struct
import tracemalloc
import zlib
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import draw_image, quarters
from PIL import Image, features

from config import InputError
from utils import image_cache
from utils.image_cache import EvaluationImages, ImageStore, build_image_cache, decode_image, resize_image

# ---- decoding ------------------------------------------------------------------------------------------------------


def test_decode_image_scales_16_bits_to_8(tmp_path):
    ramp = np.linspace(0, 65535, 20 * 20).reshape(20, 20).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    decoded = decode_image(tmp_path / "a.png", 20)
    assert np.abs(decoded[..., 0].astype(int) - (ramp >> 8)).max() <= 1


def test_decode_image_does_not_crop(tmp_path):
    Image.fromarray(quarters(40)).resize((90, 40), Image.Resampling.NEAREST).save(tmp_path / "a.png")
    decoded = decode_image(tmp_path / "a.png", 20)
    assert decoded.shape == (20, 20, 3)
    assert decoded.dtype == np.uint8
    for row, column in ((2, 2), (2, 17), (17, 2), (17, 17)):
        assert np.abs(decoded[row, column].astype(int) - quarters(20)[row, column]).max() < 12


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_decode_image_converts_every_mode_to_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new("RGB", (30, 20), (255, 255, 255)).convert(mode).save(path)
    assert decode_image(path, 16).shape == (16, 16, 3)
    assert decode_image(path, 16).min() >= 254


def test_decode_image_applies_the_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees clockwise
    Image.fromarray(quarters(40)).save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert np.abs(decode_image(tmp_path / "a.jpg", 20)[3, 3].astype(int) - [0, 0, 250]).max() < 40


def test_decode_image_applies_the_exif_orientation_to_16_bits(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = np.zeros((20, 20), dtype=np.uint8)
    grey[:10] = 200
    grey[:, :10] += 50
    Image.fromarray(grey).save(tmp_path / "8.png", exif=exif)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png", exif=exif)
    decoded = decode_image(tmp_path / "16.png", 20).astype(int)
    assert np.abs(decoded - decode_image(tmp_path / "8.png", 20)).max() <= 1
    assert decoded[2, 2, 0] == 50 and decoded[2, 17, 0] == 250  # the left column is on top, the top row on the right


def test_decode_image_reports_damaged_exif_data(tmp_path):
    # Two tags: orientation 6, and SubIFDs (0x014A), an offset that holds text here. Pillow raises struct.error.
    tags = b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00" + b"\x01\x4a\x00\x02\x00\x00\x00\x04abc\x00"
    exif = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x02" + tags + bytes(4)
    Image.fromarray(quarters(40)).save(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(InputError, match=r"image .*a\.jpg cannot be read"):
        decode_image(tmp_path / "a.jpg", 20)


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
def test_decode_image_reports_a_damaged_avif_file(tmp_path):
    Image.fromarray(quarters(40)).save(tmp_path / "a.avif")
    content = bytearray((tmp_path / "a.avif").read_bytes())
    start = content.index(b"mdat") + 12
    content[start : start + 40] = bytes(40)
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(InputError, match=r"image .*a\.jpg cannot be read"):
        decode_image(tmp_path / "a.jpg", 20)


def test_decode_image_reports_truncated_and_non_image_files(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (80, 80, 3), dtype=np.uint8)).save(tmp_path / "a.jpg")
    complete = (tmp_path / "a.jpg").read_bytes()
    for content in (complete[: len(complete) // 2], complete[:50], b"not an image", b""):
        path = tmp_path / "b.jpg"
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"b\.jpg cannot be read"):
            decode_image(path, 80)


def test_decode_image_makes_transparency_white_and_scales_floats(tmp_path):
    clear = np.zeros((20, 20, 4), dtype=np.uint8)
    clear[5:15, 5:15, 3] = 255  # a black square on a transparent background
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
def image_files(tmp_path):
    files = [tmp_path / "images" / f"{i}.png" for i in range(5)]
    for seed, file in enumerate(files):
        draw_image(file, seed=seed)
    return files


def test_cache_contains_the_decoded_images(image_files, tmp_path):
    cache = build_image_cache(image_files, 20, tmp_path / "cache", 2, False)
    store = ImageStore(image_files, 20, cache)
    assert all(np.array_equal(store[i], decode_image(file, 20)) for i, file in enumerate(image_files))


def test_cache_is_rebuilt_only_when_an_image_changes(image_files, tmp_path, monkeypatch):
    decoded, folder = [], tmp_path / "cache"
    monkeypatch.setattr(
        image_cache, "decode_image", lambda file, size: decoded.append(file) or decode_image(file, size)
    )
    path = build_image_cache(image_files, 20, folder, 0, False).path
    assert build_image_cache(image_files, 20, folder, 0, False).path == path
    assert sorted(decoded) == image_files
    draw_image(image_files[2], seed=99)
    os.utime(image_files[2], ns=(1, 1))
    changed = build_image_cache(image_files, 20, folder, 0, False).path
    assert changed != path
    assert np.array_equal(np.load(changed)[2], decode_image(image_files[2], 20))
    assert set(folder.iterdir()) == {changed, changed.with_suffix(".digests")}  # the outdated one was deleted
    other = build_image_cache(image_files, 24, folder, 0, False).path
    assert changed.exists()
    assert np.load(other).shape == (5, 24, 24, 3)
    changed.with_suffix(".digests").write_bytes(b"damaged")
    assert np.array_equal(np.load(build_image_cache(image_files, 20, folder, 0, False).path), np.load(changed))


def overwrite(path, array, save=np.save):
    with open(path, "wb") as file:
        save(file, array)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b""),
        lambda path: overwrite(path, np.zeros((5, 20, 20, 4), np.uint8)),
        lambda path: path.unlink() or os.mkfifo(path),
        lambda path: overwrite(path.with_suffix(".digests"), np.zeros(5)),
        lambda path: overwrite(path.with_suffix(".digests"), np.zeros((), "S16")),
        lambda path: overwrite(path.with_suffix(".digests"), np.zeros(0, "S16")),
        lambda path: overwrite(path.with_suffix(".digests"), np.zeros(5), np.savez),
        lambda path: path.with_suffix(".digests").unlink() or os.mkfifo(path.with_suffix(".digests")),
    ],
    ids=["cut", "empty", "shape", "FIFO", "type", "scalar", "no digests", "archive", "digests FIFO"],
)
def test_damaged_cache_is_rebuilt(image_files, tmp_path, capsys, damage):
    path = build_image_cache(image_files, 20, tmp_path / "cache", 0, False).path
    expected = np.array(np.load(path))
    damage(path)
    assert build_image_cache(image_files, 20, tmp_path / "cache", 0, False).path == path
    assert np.array_equal(np.load(path), expected)
    assert f"{path} is damaged" in capsys.readouterr().err


def test_every_split_of_the_same_images_uses_one_cache(image_files, tmp_path):
    folder = tmp_path / "cache"
    complete = build_image_cache(image_files, 20, folder, 0, False)
    for chosen in ([3, 0], [4], [2, 1, 0, 4, 3], []):
        files = [image_files[i] for i in chosen]
        cache = build_image_cache(files, 20, folder, 0, False)
        assert cache.path == complete.path and cache.rows.tolist() == chosen
        store = pickle.loads(pickle.dumps(ImageStore(files, 20, cache)))  # as in a loader process
        assert len(store) == len(files)
        assert all(np.array_equal(store[i], decode_image(file, 20)) for i, file in enumerate(files))
    more = tmp_path / "images" / "more.png"
    draw_image(more, seed=50)
    assert build_image_cache([image_files[1], more], 20, folder, 0, False).path != complete.path


def test_a_cache_that_another_process_has_just_written_stays(image_files, tmp_path, monkeypatch):
    """Both processes found none and decode the same images; the first to finish opens its cache at once."""
    write, paths = image_cache.write_pixels, []

    def other_process_first(*args):
        monkeypatch.setattr(image_cache, "write_pixels", write)
        paths.append(build_image_cache(image_files, 16, tmp_path / "cache", 0, False).path)
        monkeypatch.setattr(np, "save", lambda *args: paths.append(paths[0].exists()))  # the digests, after the pixels
        return write(*args)

    monkeypatch.setattr(image_cache, "write_pixels", other_process_first)
    build_image_cache(image_files, 16, tmp_path / "cache", 0, False)
    assert paths[1:] == [True]


def test_unreadable_images_leave_no_cache(image_files, tmp_path):
    for file in image_files[1:4]:
        file.write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"1\.png cannot be read .* \(and 2 more images: see .*unreadable\.txt"):
        build_image_cache(image_files, 20, tmp_path / "cache", 2, False)
    (left,) = (tmp_path / "cache").iterdir()
    lines = left.read_text(encoding="utf-8").splitlines()
    assert [str(file) in line for file, line in zip(image_files[1:4], lines, strict=True)] == [True] * 3


def test_interrupted_build_leaves_no_cache(image_files, tmp_path, monkeypatch):
    def interrupted(file, resolution):
        raise KeyboardInterrupt

    monkeypatch.setattr(image_cache, "decode_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_image_cache(image_files, 20, tmp_path / "cache", 1, False)
    assert list((tmp_path / "cache").iterdir()) == []


def test_full_disk_is_reported_before_anything_is_written(image_files, tmp_path, monkeypatch):
    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=5 * 20 * 20 * 3 - 1))
    with pytest.raises(InputError, match="--cache_path, or --no-cache_images"):
        build_image_cache(image_files, 20, tmp_path / "cache", 0, False)
    assert list((tmp_path / "cache").iterdir()) == []


# ---- images by index ---------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{seed}.png" for seed in range(4)]
    for seed, path in enumerate(paths):
        draw_image(path, (64, 64), seed)
    return paths


def test_resize_image_keeps_the_whole_image():
    assert np.array_equal(resize_image(quarters(32), 16), quarters(16))


def test_evaluation_images_show_the_whole_image(files):
    store = ImageStore(files, 36)
    item = EvaluationImages(store, [0], 32)[0]
    assert (item.shape, item.dtype) == ((3, 32, 32), torch.uint8)
    corners = store[0][[2, 2, -3, -3], [2, -3, 2, -3]].astype(int)
    assert np.abs(item.permute(1, 2, 0).numpy()[[2, 2, -3, -3], [2, -3, 2, -3]] - corners).max() < 12


def test_image_store_reads_the_same_from_files_and_from_the_cache(files, tmp_path):
    direct = ImageStore(files, 36)
    cached = ImageStore(files, 36, build_image_cache(files, 36, tmp_path / "cache", 0, False))
    assert len(direct) == len(cached) == 4
    for index in range(4):
        assert np.array_equal(direct[index], decode_image(files[index], 36))
        assert np.array_equal(direct[index], cached[index])
    copy = pickle.loads(pickle.dumps(cached))  # as for a loader process
    assert copy.files is None and np.array_equal(copy[3], direct[3])
    assert np.array_equal(pickle.loads(pickle.dumps(direct))[3], direct[3])


def test_evaluation_images_record_failures_or_raise(files):
    files[2].write_bytes(b"not an image")
    failed = {}
    images = EvaluationImages(ImageStore(files, 36), [3, 2, 1], 32, failed)
    batch = images.__getitems__([0, 1, 2])
    assert len(images) == 3
    assert list(failed) == [1] and "2.png cannot be read" in failed[1]
    assert [bool((image == 0).all()) for image in batch] == [False, True, False]
    with pytest.raises(InputError, match=r"2\.png cannot be read"):
        EvaluationImages(ImageStore(files, 36), [3, 2, 1], 32).__getitems__([0, 1, 2])


# ---- damaged and huge files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [MemoryError(), KeyError("x y"), AttributeError(), OverflowError("far\ntoo large")])
def test_any_exception_of_a_decoder_names_the_image(tmp_path, monkeypatch, error):
    Image.fromarray(quarters(40)).save(tmp_path / "a.png")
    monkeypatch.setattr(image_cache, "to_upright_rgb", lambda image: (_ for _ in ()).throw(error))
    with pytest.raises(InputError, match=r"image .*a\.png cannot be read \(.+\)") as found:
        decode_image(tmp_path / "a.png", 20)
    assert "\n" not in str(found.value)


def test_too_many_open_files_are_no_fault_of_the_image(tmp_path, monkeypatch):
    error = OSError(errno.EMFILE, "Too many open files")
    monkeypatch.setattr(Image, "open", lambda path: (_ for _ in ()).throw(error))
    (tmp_path / "a.png").touch()
    with pytest.raises(OSError, match="Too many open files"):
        decode_image(tmp_path / "a.png", 20)


def test_too_many_open_files_are_no_fault_of_the_cache(image_files, tmp_path, monkeypatch):
    path = build_image_cache(image_files, 20, tmp_path / "cache", 0, False).path
    error = OSError(errno.EMFILE, "Too many open files")
    monkeypatch.setattr(np.lib.format, "open_memmap", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(OSError, match="Too many open files"):
        build_image_cache(image_files, 20, tmp_path / "cache", 0, False)
    assert path.exists()


def png_header(width, height):
    """A PNG file without pixels, of 119 bytes or so."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("size", "message"),
    [((13_000, 13_000), "13000 x 13000 pixels in .* bytes"), ((60_000, 60_000), "more than 180 megap")],
)
def test_a_small_file_of_many_pixels_is_refused_without_memory(tmp_path, size, message):
    (tmp_path / "a.png").write_bytes(png_header(*size))
    tracemalloc.start()
    with pytest.raises(InputError, match=message):
        decode_image(tmp_path / "a.png", 20)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_photograph_of_200_megapixels_is_decoded_at_a_reduced_scale(tmp_path):
    image = Image.new("L", (16_320, 12_240), 100)
    image.save(tmp_path / "a.jpg", quality=50)
    decoded = decode_image(tmp_path / "a.jpg", 32)
    assert np.abs(decoded.astype(int) - 100).max() <= 2


SUFFIXES = ["png", "jpg", "gif", "webp", "tif", "bmp", "jp2", "avif", "ppm", "tga", "ico", "dds", "pcx", "sgi"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_images_of_all_formats_are_decoded_or_refused(tmp_path, suffix):
    path, rng = tmp_path / f"a.{suffix}", np.random.default_rng(0)
    try:
        Image.fromarray(quarters(48)).save(path)
    except (OSError, KeyError):
        pytest.skip(f"Pillow does not write {suffix}")
    complete = path.read_bytes()
    assert np.abs(decode_image(path, 16)[2, 2].astype(int) - [250, 0, 0]).max() < 60
    for _ in range(12):
        content = bytearray(complete[: rng.integers(1, len(complete) + 1)])
        for position in rng.integers(0, len(content), rng.choice((0, 1, 20))):
            content[position] = rng.integers(256)
        path.write_bytes(content)
        try:
            assert decode_image(path, 16).shape == (16, 16, 3)
        except InputError as error:
            assert "a." in str(error) and "\n" not in str(error)


def test_opencv_has_no_threads_that_a_forked_loader_process_would_wait_for():
    assert cv2.getNumThreads() == 1

"""Names of image files: suffixes, Unicode forms, printing."""

import sys
import types

from conftest import draw_image

from utils import image_files
from utils.image_files import find_images, image_suffixes, is_image_name, printable_name


def test_image_suffixes_are_those_of_pillow_that_can_be_decoded():
    assert {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".tif", ".bmp", ".jp2", ".ico"} <= image_suffixes()
    assert image_suffixes().isdisjoint({".pdf", ".eps", ".mpg", ".h5", ".wmf"})
    assert is_image_name("a/B.JPEG") and not is_image_name("a dog. Two cats") and not is_image_name("jpg")


def test_heic_is_registered_if_the_package_is_installed(monkeypatch):
    calls = []
    package = types.SimpleNamespace(register_heif_opener=lambda: calls.append(1))
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    assert image_files.register_decoders.__wrapped__() and calls == [1]
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert not image_files.register_decoders.__wrapped__()


def test_find_images_in_other_unicode_forms_and_without_suffix(tmp_path):
    for name in ("cafe\u0301.png", "\u00fcber.png", "sub/a.jpg", "b.png"):
        draw_image(tmp_path / name)
    assert find_images(tmp_path, ["Images/b.png", "x/none.png", "y/none.png"])[0] == tmp_path / "b.png"
    assert find_images(tmp_path, ["x/b.png", "y/b.png"]) == [tmp_path / "x/b.png", tmp_path / "y/b.png"]  # ambiguous
    names = ["caf\u00e9.png", "u\u0308ber.png", "sub\\a.jpg", "b", "b.png", "missing.png"]
    found = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path, names)]
    assert found == ["cafe\u0301.png", "\u00fcber.png", "sub/a.jpg", "b.png", "b.png", "missing.png"]


def test_printable_name_is_one_line():
    assert printable_name("a\n\u2028\x85\tb\u00e9.jpg") == "a\\n\\u2028\\x85\\tb\u00e9.jpg"

"""`python main.py --check`."""

from pathlib import Path

import pytest
from conftest import flags

import main
from extras import check_data


def test_check_reports_the_data_and_writes_no_run(tiny_config, capsys, monkeypatch):
    monkeypatch.setattr(check_data, "LOADING_SECONDS", 0.1)
    config = tiny_config(check=True)
    found = main.main(flags(config))
    printed = capsys.readouterr().out
    assert (found["images"], found["broken"], found["captions"], found["largest_batch"]) == (42, 0, 210, None)
    assert found["images_per_second"] > 0
    assert "data: train 24 / validation 8 / test 10 images" in printed
    assert "captions: 5 to 5 per image" in printed and "0 are truncated" in printed
    assert not Path(config.run).exists() and not Path(config.cache_path).exists()


def test_check_names_broken_images(data_set, tiny_config, refused, capsys):
    data = data_set({f"{i:02d}.jpg": [f"A dog {i} ."] for i in range(20)})
    for name in ("03.jpg", "07.jpg"):
        (Path(data["image_path"]) / name).write_bytes(b"no image")
    line = refused(main.main, flags(tiny_config(**data, check=True)))
    assert line == "2 images cannot be read: replace them, or remove them from the captions file"


@pytest.mark.parametrize(
    ("largest", "text"),
    [(None, "pass --micro_batch_size 16"), (8, "8 images per step fit"), (4, "pass --micro_batch_size 4")],
)
def test_batch_advice(tiny_config, largest, text):
    assert text in check_data.describe_batch(largest, tiny_config())

"""Pictures of results: proportions are kept, all that was asked for is drawn, odd sizes and texts break nothing."""

import numpy as np
import pytest
from conftest import draw_picture
from PIL import Image

from pictures import MATCH, WEAK, draw_bars, draw_confusion, draw_grid, open_picture, wrap

LONG = "a small brown dog with a red collar runs through the high grass " * 12


def coloured(path, colour):
    """How many pixels of a saved picture have exactly this colour."""
    return int((np.asarray(Image.open(path).convert("RGB")) == colour).all(-1).sum())


def test_open_picture_is_upright_and_keeps_its_proportions(tmp_path):
    image = Image.new("RGB", (1200, 300), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture(tmp_path / "turned.jpg").size == (80, 320)


@pytest.mark.parametrize("size", [(3000, 30), (30, 3000)])
def test_strips_get_borders_that_their_frame_does_not_cover(tmp_path, size):
    Image.new("RGB", size, "red").save(tmp_path / "strip.png")
    shown = np.asarray(open_picture(tmp_path / "strip.png"))
    assert sorted(shown.shape) == [3, 64, 320]
    assert (shown == (255, 0, 0)).all(-1).sum() == 3 * 320 and (shown[0, 0] == 255).all()


@pytest.mark.parametrize("size", [(900, 100), (100, 900), (300, 300)], ids=["wide", "tall", "square"])
@pytest.mark.parametrize("number", [1, 4, 9])
def test_grid_draws_every_picture_and_frames_the_matches(tmp_path, size, number):
    files = [tmp_path / f"{i}.png" for i in range(number)]
    for file in files:
        Image.new("RGB", size, (10, 20, 230)).save(file)
    colours = [MATCH] + [WEAK] * (number - 1)
    for heading in ("dog", LONG):
        draw_grid([(heading, files, ["title"] * number, colours)], tmp_path / "grid.png")
        inside = coloured(tmp_path / "grid.png", (10, 20, 230))
        row = min(3, number)  # the size of a picture depends on how many stand beside it
        draw_grid([(heading, files[:row], ["title"] * row, colours[:row])], tmp_path / "row.png")
        one = coloured(tmp_path / "row.png", (10, 20, 230)) / row
        assert one > 1000 and 0.8 * number < inside / one < 1.2 * number
        assert coloured(tmp_path / "grid.png", (50, 205, 50)) > 100  # limegreen
    width, height = Image.open(tmp_path / "grid.png").size
    assert width < 900 and height < 330 * -(-number // 3) + 200


def test_several_grids_stand_under_one_another(tmp_path):
    draw_picture(tmp_path / "a.jpg")
    panel = ("dog", [tmp_path / "a.jpg"] * 3, ["x"] * 3, [None] * 3)
    heights = []
    for count in (1, 2, 4):
        draw_grid([panel] * count, tmp_path / "grid.png")
        heights.append(Image.open(tmp_path / "grid.png").size[1])
    assert heights[1] > 1.5 * heights[0] and heights[2] > 1.5 * heights[1]


def test_wrap_keeps_lines_apart_and_cuts_long_texts():
    assert wrap("a\nb", 9, 14) == ["a", "b"]
    lines = wrap(LONG, 9.6, 14)
    assert len(lines) == 4 and lines[-1].endswith("...") and max(map(len, lines)) <= 90


def test_bars_with_negative_and_long_entries(tmp_path):
    draw_picture(tmp_path / "a.jpg")
    # The lengths are the values, or what they are above a tenth of the range below the least.
    for values, ratio in (([0.4, 0.2], 2), ([0.4, -0.2], 11), ([-0.2, -0.6], 11)):
        draw_bars(tmp_path / "a.jpg", LONG, [LONG, "dog"], values, [MATCH, WEAK], tmp_path / "bars.png")
        green, grey = (coloured(tmp_path / "bars.png", c) for c in ((50, 205, 50), (211, 211, 211)))
        assert 0.85 * ratio < green / grey < 1.15 * ratio


@pytest.mark.parametrize("number", [2, 8, 40])
def test_confusion_matrix_of_few_and_many_labels(tmp_path, number):
    counts = np.eye(number, dtype=int) * 3
    counts[0] = 0  # a label without pictures
    labels = ["x" * (3 * i % 40 + 1) for i in range(number)]
    draw_confusion(counts, labels, tmp_path / "c.png", LONG)
    full = coloured(tmp_path / "c.png", (8, 48, 107))  # the darkest blue: 100 per cent
    assert full > 500 * (number - 1)


def test_dollars_are_only_dollars(tmp_path):
    file = tmp_path / "a$b__c$d.jpg"
    draw_picture(file)
    draw_grid([("$100% off$ and $x__y$", [file], [file.name], [None])], tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size[0] > 100

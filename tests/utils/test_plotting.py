"""Figures: aspect ratios are kept, everything requested is plotted, unusual sizes and texts are handled."""

import numpy as np
import pytest
import torch
from conftest import draw_image
from PIL import Image

from config import InputError
from dataset import make_pairs
from utils.plotting import (
    MATCH,
    MAX_ROWS,
    WEAK,
    open_image,
    plot_bars,
    plot_confusion,
    plot_curves,
    plot_gan_samples,
    plot_grid,
    plot_matches,
    wrap_text,
)

LONG = "a small brown dog with a red collar runs through the high grass " * 12
GREEN, GREY = (50, 205, 50), (211, 211, 211)  # limegreen, lightgrey


def count_pixels(path, color):
    """How many pixels of a saved figure have exactly this colour."""
    return int((np.asarray(Image.open(path).convert("RGB")) == color).all(-1).sum())


def test_open_image_is_upright_and_keeps_its_aspect_ratio(tmp_path):
    image = Image.new("RGB", (1200, 300), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # rotated by 90 degrees
    image.save(tmp_path / "rotated.jpg", exif=exif)
    assert open_image(tmp_path / "rotated.jpg").size == (80, 320)


def test_open_image_refuses_damaged_files(tmp_path):
    (tmp_path / "damaged.jpg").write_bytes(b"not an image")
    with pytest.raises(InputError, match="damaged.jpg cannot be read"):
        open_image(tmp_path / "damaged.jpg")


@pytest.mark.parametrize("size", [(3000, 30), (30, 3000)])
def test_open_image_pads_narrow_images(tmp_path, size):
    Image.new("RGB", size, "red").save(tmp_path / "strip.png")
    shown = np.asarray(open_image(tmp_path / "strip.png"))
    assert sorted(shown.shape) == [3, 64, 320]
    assert (shown == (255, 0, 0)).all(-1).sum() == 3 * 320 and (shown[0, 0] == 255).all()


@pytest.mark.parametrize("size", [(900, 100), (100, 900), (300, 300)], ids=["wide", "tall", "square"])
@pytest.mark.parametrize("number", [1, 4, 9])
def test_plot_grid_draws_every_image_and_frames_the_matches(tmp_path, size, number):
    files = [tmp_path / f"{i}.png" for i in range(number)]
    for file in files:
        Image.new("RGB", size, (10, 20, 230)).save(file)
    colors = [MATCH] + [WEAK] * (number - 1)
    for heading in ("dog", LONG):
        assert plot_grid([(heading, files, ["title"] * number, colors)], tmp_path / "grid.png") == 0
        inside = count_pixels(tmp_path / "grid.png", (10, 20, 230))
        row = min(3, number)  # the size of an image depends on the number of columns
        plot_grid([(heading, files[:row], ["title"] * row, colors[:row])], tmp_path / "row.png")
        one = count_pixels(tmp_path / "row.png", (10, 20, 230)) / row
        assert one > 1000 and 0.8 * number < inside / one < 1.2 * number
        assert count_pixels(tmp_path / "grid.png", GREEN) > 100
    width, height = Image.open(tmp_path / "grid.png").size
    assert width < 900 and height < 330 * -(-number // 3) + 200


def test_plot_grid_stacks_panels(tmp_path):
    draw_image(tmp_path / "a.jpg")
    panel = ("dog", [tmp_path / "a.jpg"] * 3, ["x"] * 3, [None] * 3)
    heights = []
    for count in (1, 2, 4):
        plot_grid([panel] * count, tmp_path / "grid.png")
        heights.append(Image.open(tmp_path / "grid.png").size[1])
    assert heights[1] > 1.5 * heights[0] and heights[2] > 1.5 * heights[1]


def test_plot_grid_counts_images_beyond_the_last_row(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.plotting.MAX_ROWS", 3)
    assert MAX_ROWS == 60
    draw_image(tmp_path / "a.jpg")
    panels = [("dog", [tmp_path / "a.jpg"] * n, ["x"] * n, [None] * n) for n in (4, 5, 2)]
    assert plot_grid(panels, tmp_path / "grid.png") == 2 + 2  # rows of 3 and 1, then of 3
    assert Image.open(tmp_path / "grid.png").size[1] < 3 * 330 + 200


def test_wrap_text_keeps_line_breaks_and_truncates_long_texts():
    assert wrap_text("a\nb", 9, 14) == ["a", "b"]
    lines = wrap_text(LONG, 9.6, 14)
    assert len(lines) == 4 and lines[-1].endswith("...") and max(map(len, lines)) <= 90


def test_plot_bars_with_negative_values_and_long_names(tmp_path):
    draw_image(tmp_path / "a.jpg")
    # Lengths are the values, or their distances from a point a tenth of the range below the smallest.
    for values, ratio in (([0.4, 0.2], 2), ([0.4, -0.2], 11), ([-0.2, -0.6], 11)):
        assert plot_bars(tmp_path / "a.jpg", LONG, [LONG, "dog"], values, [MATCH, None], tmp_path / "bars.png") == 0
        green, grey = (count_pixels(tmp_path / "bars.png", color) for color in (GREEN, GREY))
        assert 0.85 * ratio < green / grey < 1.15 * ratio


def test_plot_bars_counts_names_beyond_the_last_bar(tmp_path):
    draw_image(tmp_path / "a.jpg")
    names, values = [f"label {i}" for i in range(26)], [1.0] * 26
    assert plot_bars(tmp_path / "a.jpg", "dog", names, values, [WEAK] * 26, tmp_path / "bars.png") == 6


@pytest.mark.parametrize("number", [2, 8, 40])
def test_plot_confusion_with_few_and_many_labels(tmp_path, number):
    counts = np.eye(number, dtype=int) * 3
    counts[0] = 0  # a label without images
    labels = ["x" * (3 * i % 40 + 1) for i in range(number)]
    plot_confusion(counts, labels, tmp_path / "c.png", LONG)
    full = count_pixels(tmp_path / "c.png", (8, 48, 107))  # the darkest blue: 100%
    assert full > 500 * (number - 1)


def test_dollar_signs_are_not_parsed_as_formulas(tmp_path):
    file = tmp_path / "a$b__c$d.jpg"
    draw_image(file)
    plot_grid([("$100% off$ and $x__y$", [file], [file.name], [None])], tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size[0] > 100


def test_plot_matches_frames_each_captions_own_image(tmp_path):
    names = [f"{i}.png" for i in range(6)]
    for name in names:
        Image.new("RGB", (60, 60), (10, 20, 230)).save(tmp_path / name)
    pairs = make_pairs({name: [f"a $dog {name}", LONG] for name in names}, tmp_path)
    images, own_first = torch.eye(6), torch.eye(6).repeat_interleave(2, 0)  # each caption's own image ranks first
    framed = []
    for texts in (own_first, -own_first, own_first + own_first.roll(1, 1) * 2):  # own images rank first, last, second
        plot_matches(pairs, images, texts, tmp_path / "matches.png")
        framed.append(count_pixels(tmp_path / "matches.png", GREEN))
    assert framed[0] > 400 and framed[1] == 0 and 0.9 < framed[2] / framed[0] < 1.1
    few = make_pairs({name: [f"a dog {name}"] for name in names[:2]}, tmp_path)  # fewer images than columns
    plot_matches(few, torch.eye(2), torch.eye(2), tmp_path / "few.png")
    assert count_pixels(tmp_path / "few.png", GREEN) > 200


def test_plot_curves_of_one_and_of_several_epochs(tmp_path):
    names = ["train_loss", "validation_loss", "temperature", *(f"text_to_image_R@{k}" for k in (1, 5, 10))]
    history = [{"epoch": epoch, **dict.fromkeys(names, 1.0 / epoch)} for epoch in (1, 2, 3)]
    for lines in (history[:1], history):
        plot_curves(lines, tmp_path / "curves.png")
        assert Image.open(tmp_path / "curves.png").size == (1300, 400)


@pytest.mark.parametrize("number", [1, 5, 8])
def test_plot_gan_samples_draws_all_images_of_a_caption(tmp_path, number):
    real, generated = np.zeros((32, 32, 3)), np.zeros((32, 32, 3))
    real[..., 0], generated[..., 2] = 1, 1
    plot_gan_samples(tmp_path / "samples.png", [LONG] * number, [(real, [generated] * 3)] * number)
    red, blue = (count_pixels(tmp_path / "samples.png", color) for color in ((255, 0, 0), (0, 0, 255)))
    assert red > 1000 * number and 2.8 < blue / red < 3.2
    assert Image.open(tmp_path / "samples.png").size[1] == 180 * -(-number // 2)

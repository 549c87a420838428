"""The synthetic data set: captions, splits, and agreement of images and captions."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_image, flags, tiny_settings
from PIL import Image

import main
from config import Config, InputError
from dataset import load_splits
from utils.captions import read_captions
from utils.splits import SPLITS
from utils.synthetic import (
    BACKGROUNDS,
    COLORS,
    RESOLUTION,
    all_scenes,
    generate_dataset,
    render_scene,
    scene_captions,
)


def captions_by_image(path):
    return {image: frozenset(rows["caption"]) for image, rows in read_captions(path).groupby("image")}


def folder_bytes(folder):
    return {file.relative_to(folder): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


def test_generate_dataset_is_deterministic_for_a_seed(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        generate_dataset(tmp_path / name / "Images", tmp_path / name / "captions.txt", 5, 2, 3, seed)
    a, b, c = (folder_bytes(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert a[Path("captions.txt")] != c[Path("captions.txt")]


def test_generate_dataset_has_the_layout_of_flickr8k(sample, tmp_path):
    splits = load_splits(Config(**tiny_settings(tmp_path, **sample)))
    assert {split: len(pairs.files) for split, pairs in splits.items()} == {"train": 24, "validation": 8, "test": 10}
    assert [np.diff(pairs.caption_offsets).tolist() for pairs in splits.values()] == [[5] * 24, [5] * 8, [5] * 10]
    listed = sorted(file.name for file in Path(sample["captions_path"]).parent.glob("*Images.txt"))
    assert len(listed) == len(SPLITS)


def test_no_two_images_share_their_captions(sample):
    sets = list(captions_by_image(sample["captions_path"]).values())
    assert all(len(captions) == 5 for captions in sets)
    assert len(set(sets)) == len(sets) == 42


def test_no_two_scenes_share_their_captions():
    sets = [frozenset(scene_captions(scene)) for scene in all_scenes()]
    assert all(len(captions) == 5 for captions in sets)
    assert len(set(sets)) == len(sets)


def test_captions_name_the_objects_and_the_background():
    for scene in all_scenes()[::97]:
        background, (color_a, _), _, (color_b, _) = scene
        for caption in scene_captions(scene):
            assert {background, color_a, color_b} <= set(caption.lower().split())


@pytest.mark.parametrize("relation", ["left of", "above"])
def test_images_show_the_colors_and_the_relation(relation):
    # The mean position of the pixels near a colour is the position of its object.
    for number, (first, second) in enumerate(combinations(COLORS, 2)):
        scene = ("asphalt", (first, "triangle"), relation, (second, "square"))
        pixels = np.asarray(render_scene(scene, np.random.default_rng(number)), dtype=float)
        assert pixels.shape == (RESOLUTION, RESOLUTION, 3)
        centers = {}
        for color in (first, second):
            near = np.linalg.norm(pixels - COLORS[color], axis=2) < 40
            assert 150 < near.sum() < RESOLUTION * RESOLUTION / 4
            centers[color] = np.argwhere(near).mean(0)  # row, column
            row, column = centers[color].round().astype(int)
            assert np.linalg.norm(pixels[row, column] - COLORS[color]) < 40
        axis = 1 if relation == "left of" else 0
        assert centers[first][axis] + 10 < centers[second][axis]


@pytest.mark.parametrize("background", sorted(BACKGROUNDS))
def test_images_show_the_background(background):
    pixels = np.asarray(
        render_scene((background, ("red", "ring"), "above", ("blue", "cross")), np.random.default_rng(0))
    )
    corners = np.concatenate([pixels[:8, :8].reshape(-1, 3), pixels[-8:, -8:].reshape(-1, 3)])
    nearest = min(BACKGROUNDS, key=lambda name: np.linalg.norm(corners.mean(0) - BACKGROUNDS[name]))
    assert nearest == background


def test_existing_data_set_is_left_unchanged(tmp_path):
    (tmp_path / "captions.txt").write_text("mine", encoding="utf-8")
    generate_dataset(tmp_path / "Images", tmp_path / "captions.txt", 5)
    assert (tmp_path / "captions.txt").read_text(encoding="utf-8") == "mine"
    assert not (tmp_path / "Images").exists()


def test_images_are_replaced_as_a_whole_while_another_process_reads_them(tmp_path, monkeypatch):
    paths, seen = (tmp_path / "Images", tmp_path / "captions.txt"), []
    generate_dataset(*paths, 3, 1, 1)
    before = folder_bytes(tmp_path)
    images = {file: content for file, content in before.items() if file.suffix == ".jpg"}
    paths[1].unlink()  # as if the other process were about to write it
    save = Image.Image.save

    def save_and_look(image, file, **options):
        Path(file).write_bytes(b"half")
        seen.append(folder_bytes(tmp_path).items() >= images.items())
        save(image, file, **options)

    monkeypatch.setattr(Image.Image, "save", save_and_look)
    generate_dataset(*paths, 3, 1, 1)
    assert seen == [True] * 5
    assert folder_bytes(tmp_path) == before


def test_more_images_than_scenes_are_refused_before_writing(tmp_path):
    max_images = len(all_scenes()) - 600
    with pytest.raises(InputError, match=f"sample_images is {max_images + 1}: at most {max_images} are possible"):
        generate_dataset(tmp_path / "Images", tmp_path / "captions.txt", max_images + 1)
    assert list(tmp_path.iterdir()) == []


def test_data_set_is_not_written_among_other_images(tmp_path, tiny_config, refused):
    draw_image(tmp_path / "own/Images/dog.jpg")
    config = tiny_config(image_path="own/Images", captions_path="own/caption.csv", sample_images=12)
    line = refused(main.main, flags(config))
    assert "captions_path is own" in line and "which contains dog.jpg" in line
    assert [file.name for file in (tmp_path / "own").rglob("*")] == ["Images", "dog.jpg"]

"""The drawn data set: its captions, its splits, and whether the pictures show what the captions say."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_picture, flags, tiny_settings

import main
from config import Config, InputError
from dataset import SPLIT_FILES, load_splits, read_captions
from shapes import COLOURS, GROUNDS, SIDE, all_scenes, captions_of, draw_sample, draw_scene, read_caption


def captions_by_image(path):
    return {image: frozenset(rows["caption"]) for image, rows in read_captions(path).groupby("image")}


def folder_bytes(folder):
    return {file.relative_to(folder): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


def test_draw_sample_is_the_same_for_a_seed(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        draw_sample(tmp_path / name / "Images", tmp_path / name / "captions.txt", 5, 2, 3, seed)
    a, b, c = (folder_bytes(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert a[Path("captions.txt")] != c[Path("captions.txt")]


def test_draw_sample_has_the_layout_of_flickr8k(sample, tmp_path):
    splits = load_splits(Config(**tiny_settings(tmp_path, **sample)))
    assert {split: len(pairs.files) for split, pairs in splits.items()} == {"train": 24, "validation": 8, "test": 10}
    assert [np.diff(pairs.first).tolist() for pairs in splits.values()] == [[5] * 24, [5] * 8, [5] * 10]
    listed = sorted(file.name for file in Path(sample["captions_path"]).parent.glob("*Images.txt"))
    assert len(listed) == len(SPLIT_FILES)


def test_captions_are_read_as_what_was_drawn():
    for scene in all_scenes():
        for caption in captions_of(scene):
            ground, objects = read_caption(caption)
            assert ground == scene[0] and sorted(objects) == sorted([scene[1], scene[3]])
    for other in ("Two dogs on a red square .", "A red ring and a blue box .", "A dog on grass ."):
        assert read_caption(other) is None


def test_no_two_pictures_share_their_captions(sample):
    sets = list(captions_by_image(sample["captions_path"]).values())
    assert all(len(captions) == 5 for captions in sets)
    assert len(set(sets)) == len(sets) == 42


def test_no_two_scenes_share_their_captions():
    sets = [frozenset(captions_of(scene)) for scene in all_scenes()]
    assert all(len(captions) == 5 for captions in sets)
    assert len(set(sets)) == len(sets)


def test_captions_name_the_objects_and_the_ground():
    for scene in all_scenes()[::97]:
        ground, (colour_a, _), _, (colour_b, _) = scene
        for caption in captions_of(scene):
            assert {ground, colour_a, colour_b} <= set(caption.lower().split())


@pytest.mark.parametrize("relation", ["left of", "above"])
def test_pictures_show_colours_and_relation(relation):
    # The mean place of the pixels near a colour is where its object stands.
    for number, (first, second) in enumerate(combinations(COLOURS, 2)):
        scene = ("asphalt", (first, "triangle"), relation, (second, "square"))
        pixels = np.asarray(draw_scene(scene, np.random.default_rng(number)), dtype=float)
        assert pixels.shape == (SIDE, SIDE, 3)
        places = {}
        for colour in (first, second):
            near = np.linalg.norm(pixels - COLOURS[colour], axis=2) < 40
            assert 150 < near.sum() < SIDE * SIDE / 4
            places[colour] = np.argwhere(near).mean(0)  # row, column
            row, column = places[colour].round().astype(int)
            assert np.linalg.norm(pixels[row, column] - COLOURS[colour]) < 40
        axis = 1 if relation == "left of" else 0
        assert places[first][axis] + 10 < places[second][axis]


@pytest.mark.parametrize("ground", sorted(GROUNDS))
def test_pictures_show_the_ground(ground):
    pixels = np.asarray(draw_scene((ground, ("red", "ring"), "above", ("blue", "cross")), np.random.default_rng(0)))
    corners = np.concatenate([pixels[:8, :8].reshape(-1, 3), pixels[-8:, -8:].reshape(-1, 3)])
    nearest = min(GROUNDS, key=lambda name: np.linalg.norm(corners.mean(0) - GROUNDS[name]))
    assert nearest == ground


def test_an_existing_data_set_is_left_alone(tmp_path):
    (tmp_path / "captions.txt").write_text("mine", encoding="utf-8")
    draw_sample(tmp_path / "Images", tmp_path / "captions.txt", 5)
    assert (tmp_path / "captions.txt").read_text(encoding="utf-8") == "mine"
    assert not (tmp_path / "Images").exists()


def test_more_pictures_than_scenes_are_refused_before_any_is_drawn(tmp_path):
    most = len(all_scenes()) - 600
    with pytest.raises(InputError, match=f"sample_images is {most + 1}: at most {most} can be drawn"):
        draw_sample(tmp_path / "Images", tmp_path / "captions.txt", most + 1)
    assert list(tmp_path.iterdir()) == []


def test_the_sample_is_not_drawn_among_other_pictures(tmp_path, tiny_config, refused):
    draw_picture(tmp_path / "own/Images/dog.jpg")
    config = tiny_config(image_path="own/Images", captions_path="own/caption.csv", sample_images=12)
    line = refused(main.main, flags(config))
    assert "captions_path is own" in line and "where dog.jpg lies" in line
    assert [file.name for file in (tmp_path / "own").rglob("*")] == ["Images", "dog.jpg"]

"""Splits by files, by a column, and of a run whose data has changed; equal captions in the notes."""

import csv
import json

import pytest
from caption_formats import write_images
from conftest import flags

from config import InputError
from dataset import describe_splits, load_splits, split_images
from utils.splits import find_split_files, read_split

NAMES = [f"{number}.jpg" for number in range(10)]


def touch(folder, names, content="0.jpg\n"):
    for name in names:
        (folder / name).write_text(content, encoding="utf-8")


@pytest.mark.parametrize(
    "names",
    [
        ["train.txt", "val.txt", "test.txt"],
        ["TRAIN.TXT", "Dev.txt", "Test.txt"],
        ["training.txt", "validation.txt", "testing.txt"],
        ["flickr30k_train.txt", "flickr30k_val.txt", "flickr30k_test.txt"],
        ["my_trainImages.txt", "my_devImages.txt", "my_testImages.txt"],
        ["Flickr_8k.trainImages.txt", "Flickr_8k.devImages.txt", "Flickr_8k.testImages.txt"],
        ["shapestrainimages.txt", "shapesvalimages.txt", "shapestestimages.txt"],
        ["train_images.lst", "valid-list.txt", "test split.txt"],
    ],
)
def test_find_split_files_with_usual_names(tmp_path, names):
    touch(tmp_path, [*names, "latest.txt", "._train.txt", "restrain.txt", "train.csv", "captions.txt", "constest.txt"])
    files = find_split_files(tmp_path, tmp_path / "captions.txt")
    assert [path.name for path in files.values()] == names
    assert list(files) == ["train", "validation", "test"]


def test_two_lists_of_one_split_are_refused_and_the_captions_file_is_none(tmp_path):
    touch(tmp_path, ["val.txt", "dev.txt"])
    with pytest.raises(InputError, match=r"dev.txt and val.txt both list validation images"):
        find_split_files(tmp_path)
    assert [*find_split_files(tmp_path, tmp_path / "dev.txt")] == ["validation"]
    touch(tmp_path, ["Flickr_8k.devImages.txt"])  # the official one
    assert find_split_files(tmp_path)["validation"].name == "Flickr_8k.devImages.txt"


def test_split_files_may_name_images_in_other_forms(tmp_path):
    (tmp_path / "val.txt").write_bytes("Images/a\u2028b.jpg\n1\ncafe\u0301.jpg\nc\\d.jpg\n".encode())
    names = ["a\u2028b.jpg", "1.jpg", "caf\u00e9.jpg", "c/d.jpg", "x/y.png", "z/y.png"]
    assert split_images(names, tmp_path, 1)["validation"] == names[:4]
    (tmp_path / "val.txt").write_text("y\n")  # of two images
    with pytest.raises(InputError, match=r"val.txt lists y, not found.*\(not a list of images\? rename it\)"):
        split_images(names, tmp_path, 1)


def test_few_images_have_a_validation_split(tmp_path):
    assert [len(names) for names in split_images(NAMES[:5], tmp_path, 1).values()] == [3, 1, 1]
    assert [len(names) for names in split_images(NAMES, tmp_path, 1).values()] == [8, 1, 1]
    touch(tmp_path, ["test.txt"])
    assert [len(names) for names in split_images(NAMES, tmp_path, 1).values()] == [8, 1, 1]


def write_captions(path, rows, header=("image", "caption", "split")):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    write_images(path.parent / "Images")
    return {"image_path": str(path.parent / "Images"), "captions_path": str(path)}


def test_split_column(tmp_path, tiny_config):
    values = ["train"] * 5 + ["restval", "VAL", "dev", "test", ""]
    rows = [(name, f"A dog {name}", value) for name, value in zip(NAMES, values, strict=True)]
    config = tiny_config(**write_captions(tmp_path / "c.csv", rows))
    splits = load_splits(config)
    assert [pairs.names for pairs in splits.values()] == [NAMES[:6], NAMES[6:8], NAMES[8:9]]
    assert "column `split` of c.csv; images in no split, which are not used: 1" in describe_splits(config, splits)
    for change, message in (
        (("0.jpg", "A cat", "test"), r"image '0.jpg' is in the splits 'train' and 'test'"),
        (
            ("9.jpg", "A cat", "extra"),
            r"image '9.jpg' is in the splits '' and 'extra'",
        ),
    ):
        write_captions(tmp_path / "c.csv", [*rows, change])
        with pytest.raises(InputError, match=message):
            load_splits(config)
    write_captions(tmp_path / "c.csv", [row if row[2] else ("9.jpg", "A", "x") for row in rows])
    with pytest.raises(InputError, match="the split 'x' of '9.jpg' should be train, validation or test"):
        load_splits(config)


@pytest.mark.usefixtures("no_plots")
def test_a_run_keeps_its_split_when_the_data_has_grown(tmp_path, tiny_config, refused, capsys):
    import main
    from clip import load_model
    from extras.search_index import list_captions, list_gallery

    rows = [(name, f"A dog {name}") for name in NAMES[2:]]
    paths = write_captions(tmp_path / "c.csv", rows, ("image", "caption"))
    config = tiny_config(**paths)
    main.main(flags(config))
    expected = load_splits(config)
    assert read_split(tmp_path / "run") == {split: pairs.names for split, pairs in expected.items()}
    # Two more images: a new run has another split, this one does not.
    write_captions(tmp_path / "c.csv", [*rows, ("0.jpg", "A"), ("1.jpg", "B")], ("image", "caption"))
    assert load_splits(tiny_config(**paths, run="other"))["train"].names != expected["train"].names
    capsys.readouterr()
    results = main.main(["--resume", "--run", str(tmp_path / "run"), "--epochs", "2", "--cache_path", "cache"])
    assert results["images"] == len(expected["test"].files)
    assert "the run's split; images not in it, which are not used: 2" in capsys.readouterr().out
    (tmp_path / "run").rename(tmp_path / "moved")
    gallery = list_gallery(None, tmp_path / "moved")
    assert (gallery.names, gallery.label) == (expected["test"].names, "test")
    for folder in ("moved", "moved/best"):
        assert load_splits(load_model(tmp_path / folder).config)["train"].names == expected["train"].names
        assert list_captions(load_model(tmp_path / folder).config)[0] == expected["test"].captions
    # An image of the run is gone.
    write_captions(
        tmp_path / "c.csv", [row for row in rows if row[0] != expected["train"].names[1]], ("image", "caption")
    )
    line = refused(main.main, ["--resume", "--run", "moved", "--cache_path", "cache"])
    assert f"lacks '{expected['train'].names[1]}' and 0 more of the 6 train images of moved" in line
    (tmp_path / "moved" / "split.json").write_text(json.dumps({"train": ["a", "a"], "validation": [], "test": []}))
    assert "split.json is damaged" in refused(main.main, ["--resume", "--run", "moved", "--cache_path", "cache"])


def test_notes_about_equal_captions_and_small_splits(data_set, tiny_config):
    captions = {name: [f"A dog {name} .", "Two Dogs !" if name < "3" else f"two  dogs {name}"] for name in NAMES}
    captions["9.jpg"] = ["two dogs."]
    config = tiny_config(**data_set(captions, dev=["3.jpg"], test=["4.jpg", "5.jpg"]))
    splits = load_splits(config)
    lines = describe_splits(config, splits)
    assert "note: 4 captions occur at several images of a split" in lines
    assert "note: the test split has 2 images: each changes its recalls by up to 50 points" in lines
    assert splits["validation"].text_ids is None and splits["test"].text_ids is None
    train = splits["train"]
    equal = {train.text_ids[j].item() for j, caption in enumerate(train.captions) if "two" in caption.lower()}
    assert len(equal) == 1 + sum("two  dogs" in c or "two dogs " in c for c in train.captions)

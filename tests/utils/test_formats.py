"""Captions files of common data sets: layouts, encodings, lists in cells, mutated files."""

import csv
import io
import json
import random
import time

import pytest
from caption_formats import FORMATS, IMAGES, pairs_of, write_images

from config import Config, InputError
from dataset import describe_splits, load_splits
from utils.captions import read_captions, read_pairs
from utils.formats import clean_text, decode_text, read_columns, read_lines


def rows(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_captions(path).itertuples(index=False, name=None))


# ---- layouts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_pairs(tmp_path, name):
    file, content = FORMATS[name]
    (tmp_path / file).write_bytes(content)
    frame = read_pairs(tmp_path)  # found in its folder
    assert sorted(zip(frame["image"], frame["caption"], strict=True)) == sorted(pairs_of(name))
    assert ("split" in frame) == (name in ("Karpathy", "split column", "Hugging Face, split"))
    assert frame.attrs["format"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_can_be_trained_on(tmp_path, name, refused, no_plots):
    import main

    file, content = FORMATS[name]
    write_images(tmp_path / "Images")
    (tmp_path / file).write_bytes(content)
    words = ["--preset", "demo", "--sample_images", "0", "--size", "16", "--batch_size", "4", "--epochs", "1"]
    words += ["--num_workers", "0", "--warmup_steps", "0", "--text_layers", "1", "--text_width", "64", "--run", "run"]
    results = main.main([*words, "--image_path", "Images", "--captions_path", str(tmp_path), "--device", "cpu"])
    assert results["split"] == "test" and results["images"] >= 1
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert sorted(name for names in split.values() for name in names) == sorted(IMAGES)


def test_what_was_recognised_is_said(tmp_path):
    write_images(tmp_path / "Images")
    file, content = FORMATS["split column"]
    (tmp_path / file).write_bytes(content)
    (tmp_path / "train.txt").write_text("".join(f"{name}\n" for name in IMAGES[:8]))
    (tmp_path / "._train.txt").write_bytes(b"\xff\xfe")
    config = Config(image_path=str(tmp_path / "Images"), captions_path=str(tmp_path))
    lines = describe_splits(config, load_splits(config))
    assert "column `split` of captions.csv (train.txt not used); hidden files ._* ignored: 1" in lines
    assert "captions: captions.csv, table with commas (image, caption, split, columns not used: source), UTF-8" in lines
    assert "test split has 1 image: each changes its recalls by up to 100 points" in lines


def test_excel_and_other_tables(tmp_path):
    german = 'sep=;\r\nBild;Beschriftung\r\nä.jpg;"Ein Hund; müde"\r\n'
    expected = [("ä.jpg", "Ein Hund; müde")]
    for content in (german.encode("cp1252"), german.encode("utf-8-sig"), german.encode("utf-16")):
        assert rows(tmp_path / "c.csv", content) == expected
    assert rows(tmp_path / "c.csv", german.encode("utf-16-le")) == expected  # without a byte-order mark
    index = ",file_name,caption\n0,a.jpg,A dog\n1,b.jpg,A cat\n"  # as pandas writes it
    assert rows(tmp_path / "c.csv", index) == [("a.jpg", "A dog"), ("b.jpg", "A cat")]
    numbered = "image,caption_0,caption_1\na.jpg,A dog,It runs\nb.jpg,A cat,\n"
    assert rows(tmp_path / "c.csv", numbered) == [("a.jpg", "A dog"), ("a.jpg", "It runs"), ("b.jpg", "A cat")]
    unusual = "image\u2028s,x\n"
    with pytest.raises(InputError, match=r"it should start with a header such as `image,caption`"):
        rows(tmp_path / "c.csv", unusual)
    with pytest.raises(InputError, match=r"'a\.jpg,A dog': it should start with a header such as `image,caption`"):
        rows(tmp_path / "c.csv", "a.jpg,A dog\n")


def test_results_csv_of_flickr30k_keeps_quotes_and_its_broken_row(tmp_path):
    text = (
        'image_name| comment_number| comment\na.jpg| 0| " Stop " signs | \na.jpg| 4   A dog runs across the grass .\n'
    )
    text = text.replace(" | \n", "\n")
    assert rows(tmp_path / "results.csv", text) == [
        ("a.jpg", '" Stop " signs'),
        ("a.jpg", "A dog runs across the grass ."),
    ]


def test_lists_of_captions_in_a_cell(tmp_path):
    cells = [
        "['A dog', \"It's a cat\"]",
        '["A dog", "It\'s a cat"]',
        "['A dog'\n \"It's a cat\"]",
        "('A dog', \"It's a cat\")",
    ]
    for cell in cells:
        text = io.StringIO()
        csv.writer(text).writerows([("image", "caption"), ("a.jpg", cell), ("b.jpg", "[unclear] (two")])
        expected = [("a.jpg", "A dog"), ("a.jpg", "It's a cat"), ("b.jpg", "[unclear] (two")]
        assert rows(tmp_path / "c.csv", text.getvalue()) == expected
    for cell in ("[{'raw': 'A dog', 'tokens': ['A']}, {'raw': 'It runs'}]", "{'A dog', 'It runs'}"):
        expected = [("a.jpg", "A dog"), ("a.jpg", "It runs")]
        assert rows(tmp_path / "c.csv", f'image,caption\na.jpg,"{cell}"\n') == expected
    with pytest.raises(InputError, match="a list of captions contains 1"):
        rows(tmp_path / "c.csv", "image,caption\na.jpg,\"['A dog', 1]\"\n")
    assert rows(tmp_path / "c.json", '{"a.jpg": ["A dog", "It runs"], "b.jpg": "A cat"}')[1:] == [
        ("a.jpg", "It runs"),
        ("b.jpg", "A cat"),
    ]


def test_json_with_the_pairs_in_a_list_of_another_name(tmp_path):
    text = '{"info": [1], "data": [{"Image": "a.jpg", "caption": "A dog"}]}'
    assert rows(tmp_path / "c.json", text) == [("a.jpg", "A dog")]


def test_image_names_from_json_and_absolute_ones(tmp_path):
    folder = tmp_path / "Images"
    path = tmp_path / "c.csv"
    path.write_text(f"image,caption\n{folder / 'sub' / 'a.jpg'},A dog\n", encoding="utf-8")
    assert read_pairs(path, folder)["image"].tolist() == ["sub/a.jpg"]
    with pytest.raises(InputError, match="is not inside the image folder"):
        read_pairs(path, tmp_path / "other")
    with pytest.raises(InputError, match="130,000 characters"):
        rows(path, "image,caption\n" + "a" * 130_000 + ",A dog\n")
    with pytest.raises(InputError, match="or a NUL"):
        rows(path, '[{"image": "a\\u0000", "caption": "A dog"}]')
    with pytest.raises(InputError, match="line 2 has a NUL character"):
        rows(path, "image,caption\na\0,A dog\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [{"id": 1}], "annotations": []}', "without the captions of .*KeyError: 'file_name'"),
        ('{"images": [1]}', "without the captions"),
        ("[1, 2]", "without the captions"),
        ("[" * 100_000, "without the captions .*RecursionError"),
        ('{"image": "a.jpg"', "line 1 cannot be read as JSON"),
        ('{"file_name": "a.jpg", "text": "A dog"}\n{"file_name": \n', "line 2 cannot be read as JSON"),
        ('{"images": [{"filename": "a.jpg", "sentences": [{"raw": 3}]}]}', "caption is 3"),
        ("[]", "without the captions"),
    ],
)
def test_json_of_another_layout_is_refused(tmp_path, content, message):
    with pytest.raises(InputError, match=message) as error:
        rows(tmp_path / "c.json", content)
    assert "\n" not in str(error.value)


def test_lines_are_counted_with_line_ends_in_quotes(tmp_path):
    with pytest.raises(InputError, match="line 7: image 'c.jpg' has no caption"):
        rows(tmp_path / "c.csv", '\nimage,caption\na.jpg,"A\ndog"\n\nb.jpg,A cat\nc.jpg,\n')


def test_read_columns(tmp_path):
    (tmp_path / "c.csv").write_text("Label;x;file name\nA cat;1;a.jpg\n")
    frame = read_columns(tmp_path / "c.csv", image=("image", "file_name"), label=("label",))
    assert frame.to_dict("list") == {"image": ["a.jpg"], "label": ["A cat"]} and frame.index.tolist() == [2]
    assert read_columns(tmp_path / "c.csv", image=("image",)) is None


def test_decode_text_and_clean_text():
    assert decode_text("é".encode("cp1252"), "x") == ("é", "cp1252")
    assert decode_text(b"a\r\nb\rc", "x") == ("a\nb\nc", "UTF-8")
    assert clean_text("un caf\udce9") == "un café"
    assert clean_text("日本\udcff") == "日本\ufffd" and clean_text("a \ud800") == "a \ufffd"


def test_read_lines_strips_and_skips_blank_lines(tmp_path):
    path = tmp_path / "x.txt"
    for encoding in ("utf-8", "utf-16"):
        path.write_bytes("\ufeff one \r\n\r\n \ntwö\u2028a\x85b\n\nthree".encode(encoding))
        assert read_lines(path) == ["one", "twö\u2028a\x85b", "three"]
    with pytest.raises(InputError, match=r"gone\.txt cannot be read"):
        read_lines(tmp_path / "gone.txt")
    with open(path, "wb") as file:
        file.truncate(40 * 10**9)
    with pytest.raises(InputError, match=r"x\.txt has 40,000,000,000 bytes"):
        read_lines(path)


# ---- random files -----------------------------------------------------------------------------------------------


def read_in_time(path, content):
    """The pairs of a file, or the InputError; anything else, and more than 5 s per MB, fails."""
    path.write_bytes(content)
    start = time.process_time()
    try:
        found = list(read_captions(path).itertuples(index=False, name=None))
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000 + len(str(path))
        found = None
    assert time.process_time() - start < 5 * max(1, len(content) / 1e6)
    return found


def test_valid_tables_are_read_as_by_an_independent_reader(tmp_path):
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    letters = st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="[(\ufeff")
    names = st.text(letters, min_size=1, max_size=8).map(lambda name: f"{name.strip()}.jpg")
    names = names.filter(lambda name: not set(name) & set('/\\:"') and ".." not in name)
    captions = st.text(letters, max_size=30).filter(lambda text: text.strip())
    pairs = st.lists(st.tuples(names, captions), min_size=1, max_size=20)

    @hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @hypothesis.given(pairs, st.sampled_from(",;\t|"), st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]), st.booleans())
    def check(pairs, delimiter, encoding, windows):
        text = io.StringIO()
        writer = csv.writer(
            text, delimiter=delimiter, quoting=csv.QUOTE_ALL, lineterminator="\r\n" if windows else "\n"
        )
        writer.writerows([("image", "caption"), *pairs])
        expected = [(name.strip(), " ".join(caption.split())) for name, caption in pairs]
        assert read_in_time(tmp_path / "c.csv", text.getvalue().encode(encoding)) == expected

    check()


def test_mutated_captions_files_raise_nothing_but_input_errors(tmp_path):
    rng = random.Random(0)
    contents = [content for _, content in FORMATS.values()]
    for _ in range(200):
        content = bytearray(rng.choice(contents))
        for _ in range(rng.choice((1, 3, 30))):
            start = rng.randrange(len(content) + 1)
            end = start + rng.choice((0, 1, 1, 5, 200))
            content[start:end] = rng.choice((b"", b'"', b"\n", b"\0", b"[", b"'", bytes([rng.randrange(256)]) * 3))
        read_in_time(tmp_path / "c.dat", bytes(content))

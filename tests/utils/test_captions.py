"""Captions files of both formats, lists of captions, and the WordPiece tokenizer built from captions."""

import re

import numpy as np
import pytest

from config import InputError
from dataset import make_pairs
from utils.captions import (
    find_captions_file,
    group_captions,
    read_caption_list,
    read_captions,
    text_ids,
    train_tokenizer,
)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def rows(path):
    return list(read_captions(path).itertuples(index=False, name=None))


# ---- captions files ---------------------------------------------------------------------------------------------

DOGS = [("a.jpg", "A dog , running ."), ("a.jpg", 'The "dog" runs'), ("b.jpg", "NA")]
CSV = 'image,caption\na.jpg,"A dog , running ."\na.jpg,"The ""dog"" runs"\nb.jpg,NA\n'
TOKEN = 'a.jpg#0\tA dog , running .\na.jpg#1\tThe "dog" runs\nb.jpg#0\tNA\n'


@pytest.mark.parametrize("text", [CSV, TOKEN], ids=["csv", "token"])
@pytest.mark.parametrize(
    "change",
    [
        lambda text: text,
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\ufeff" + text.replace("\n", "\r\n") + "\r\n \r\n",
        lambda text: re.sub(r"(?<!\")\n", "  \n", text).replace(' ."', ' .  "'),
        lambda text: "\n" + text.replace("b.jpg", "\nb.jpg"),
        lambda text: text.rstrip("\n"),
    ],
    ids=["plain", "byte-order mark", "Windows", "both", "trailing blanks", "empty lines", "no final newline"],
)
def test_read_captions_of_files_from_any_system(tmp_path, text, change):
    assert rows(write(tmp_path / "x.dat", change(text))) == DOGS


def test_read_captions_returns_columns_image_and_caption(tmp_path):
    frame = read_captions(write(tmp_path / "c.csv", CSV))
    assert list(frame.columns) == ["image", "caption"]
    assert len(frame) == 3


def test_read_captions_of_a_csv_with_more_columns_in_another_order(tmp_path):
    text = 'number,Caption,Image\n0,"A dog , running .",a.jpg\n1,The ""dog"" runs,a.jpg\n'
    assert rows(write(tmp_path / "c.csv", text)) == [DOGS[0], ("a.jpg", 'The ""dog"" runs')]


def test_read_captions_of_a_caption_with_a_newline_in_quotes(tmp_path):
    assert rows(write(tmp_path / "c.csv", 'image,caption\na.jpg,"A dog\nruns"\n')) == [("a.jpg", "A dog runs")]


@pytest.mark.parametrize("name", ["captions.txt", "captions.csv", "Flickr8k.token.txt"])
def test_read_captions_finds_the_file_in_a_folder(tmp_path, name):
    write(tmp_path / name, TOKEN)
    assert rows(tmp_path) == rows(tmp_path / name) == DOGS
    assert find_captions_file(tmp_path) == tmp_path / name


def test_find_captions_file_explains_where_to_get_one(tmp_path):
    for path, message in ((tmp_path, "a folder without captions.txt"), (tmp_path / "x.txt", "which does not exist")):
        with pytest.raises(InputError, match=f"captions_path is .*{message}.*Kaggle.*--preset demo"):
            find_captions_file(path)


def test_read_captions_skips_the_missing_image_of_flickr8k(tmp_path):
    missing = "".join(f"2258277193_586949ec62.jpg.1#{i}\tTwo people .\n" for i in range(5))
    assert rows(write(tmp_path / "Flickr8k.token.txt", missing + TOKEN)) == DOGS


def test_read_captions_skips_a_blank_caption_beside_others(tmp_path):
    assert rows(write(tmp_path / "c.csv", CSV + 'a.jpg,\nb.jpg," "\n')) == DOGS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (" \n\n", "is empty"),
        ("image,caption\n", "contains no captions"),
        ("image,caption\na.jpg,éàü\n".encode() + b"b.jpg,\xff\n", "line 3 cannot be read as UTF-8"),
        ("photo;words\na.jpg;dog\n", "starts with 'photo;words': it should start with a header.*`image,caption`"),
        ("x" * 200_000, "starts with"),
        ("image,caption\na.jpg,A dog, running\n", "line 2: 3 columns instead of 2.*quotes"),
        ("image,caption\na.jpg\n", "line 2: image 'a.jpg' has no caption"),
        ('image,caption\na.jpg,"A dog\nb.jpg,A cat\n', "line 2: a quote is opened and never closed"),
        ("a.jpg#0\tA dog\nb.jpg#0 A cat\n", "line 2: no tab"),
        ("image,caption\na.jpg,A dog\nb.jpg,\nc.jpg,\n", r"line 3: image 'b.jpg' has no caption \(1 more"),
        ("image,caption\na.jpg," + "word " * 10_000, "line 2: caption has 10,000 words .at most 1,000"),
        ("image,caption\n,A dog\n", "line 2: the image name ''"),
    ],
)
def test_read_captions_names_what_is_wrong(tmp_path, content, message):
    path = write(tmp_path / "captions.txt", content)
    with pytest.raises(InputError, match=message) as error:
        read_captions(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["../x.jpg", "/x.jpg", "a/../../x.jpg", r"..\x.jpg", r"C:\x.jpg", "C:x.jpg", r"\\s\x.jpg"]
)
def test_read_captions_refuses_an_image_name_outside_the_folder(tmp_path, name):
    with pytest.raises(InputError, match="is not inside the image folder"):
        read_captions(write(tmp_path / "captions.txt", f"image,caption\n{name},A dog\n"))


def test_image_names_may_contain_folders_dots_and_spaces(tmp_path):
    text = "image,caption\nsub/my dog..jpg,A dog\n"
    assert rows(write(tmp_path / "captions.txt", text)) == [("sub/my dog..jpg", "A dog")]
    assert rows(write(tmp_path / "c.txt", "my photo.jpg#0\ta dog\n")) == [("my photo.jpg", "a dog")]


# ---- lists of captions ------------------------------------------------------------------------------------------


def test_read_caption_list_with_and_without_groups(tmp_path):
    path = write(tmp_path / "c.txt", "A dog .\n\ng1\tA cat .\ng1\t A cat sits .\nA dog .\ng2\tA cat .\n")
    captions, groups = read_caption_list(path)
    assert captions == ["A dog .", "A cat .", "A cat sits ."]
    assert groups == ["A dog .", "g1", "g1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "gan_captions is .*, which is not a file"),
        ("", "contains 0 captions: at least 2 are needed"),
        ("A dog .\nA dog .\n", "contains 1 captions"),
        (CSV, "a captions file with images"),
        (TOKEN, "a captions file with images"),
        (b"\xff\xfe\x00", "line 1 cannot be read as UTF-16"),
    ],
)
def test_read_caption_list_refuses(tmp_path, content, message):
    if content is not None:
        write(tmp_path / "c.txt", content)
    with pytest.raises(InputError, match=message):
        read_caption_list(tmp_path / "c.txt")


def test_group_captions_gives_groups_of_training_captions_their_image():
    pairs = make_pairs({"a.jpg": ["A dog .", "The dog runs ."], "b.jpg": ["A cat ."]}, "images")
    captions = ["A cat .", "A cat sits .", "A bird .", "A bird flies .", "The dog runs .", "A fish ."]
    groups = ["g1", "g1", "g2", "g2", "g3", "g4"]
    found = group_captions(captions, groups, pairs)
    assert found[:2] == [1, 1]  # image b
    assert found[4] == 0  # image a
    assert found[2] == found[3] < 0 and found[5] < 0 and found[5] != found[2]
    assert np.unique(found).size == 4


def test_text_ids_of_equal_captions_are_equal():
    texts = ["A dog .", "a  DOG", " a dog!", "A dog's", "caf\u00e9", "CAFE\u0301.", "", ".", "STRASSE", "stra\u00dfe"]
    ids = text_ids(texts).tolist()
    groups = [0, 0, 0, 1, 2, 2, 3, 3, 4, 4]
    assert len({*ids}) == 5 and all(
        (ids[i] == ids[j]) == (groups[i] == groups[j]) for i in range(10) for j in range(10)
    )
    assert text_ids(["a dog"]).tolist() == [ids[0]] and text_ids(["a dog"]).dtype == np.int64
    assert text_ids([]).shape == (0,)


# ---- the tokenizer ----------------------------------------------------------------------------------------------

TEXTS = ["A dog runs .", "the Dog , and the cat !", "zebras", "a  dog"]


def test_train_tokenizer_is_deterministic():
    first, second = train_tokenizer(TEXTS), train_tokenizer(TEXTS)
    assert first.get_vocab() == second.get_vocab()
    assert first(TEXTS)["input_ids"] == second(TEXTS)["input_ids"]
    assert first.convert_ids_to_tokens(first("The DOG")["input_ids"]) == ["[CLS]", "the", "dog", "[SEP]"]


def test_tokenizer_spells_rare_words_and_marks_unknown_characters():
    tokenizer = train_tokenizer(TEXTS)
    spelled = ["[CLS]", "z", "##e", "##b", "##r", "##a", "##s", "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("zebras")["input_ids"]) == spelled
    assert tokenizer.convert_ids_to_tokens(tokenizer("ж dog")["input_ids"]) == ["[CLS]", "[UNK]", "dog", "[SEP]"]
    assert tokenizer.pad_token_id == 0


def test_train_tokenizer_keeps_the_most_frequent_words():
    texts = ["dog dog dog cat cat bird bird"]
    characters = len(set("dogcatbir"))
    tokenizer = train_tokenizer(texts, vocab_size=5 + 2 * characters + 2)
    words = [piece for piece in tokenizer.get_vocab() if len(piece) == 3 and piece.isalpha()]
    assert set(words) <= {"dog", "cat", "bird"} and "dog" in words
    assert len(tokenizer) == 5 + 2 * characters + 2

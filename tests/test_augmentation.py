"""Captions out of captions: what is proposed, what is filtered, what is refused."""

import numpy as np
import pytest
import torch

from augmentation import (
    GRAMMAR,
    MEANING,
    MaskedModel,
    Neighbours,
    augment_captions,
    main,
    restore_case,
    variant_of,
    words_of,
)
from dataset import Pairs, load_splits, read_captions, train_tokenizer
from shapes import SHAPES, all_scenes, captions_of


@pytest.fixture
def pairs(tiny_config):
    return load_splits(tiny_config())["train"]


@pytest.fixture
def many_pairs():
    """The captions of 300 drawn pictures, without the pictures."""
    scenes = [all_scenes()[i] for i in np.random.default_rng(0).permutation(len(all_scenes()))[:300]]
    captions = [caption for scene in scenes for caption in captions_of(scene)]
    return Pairs([], [], captions, np.repeat(np.arange(300), 5), np.arange(0, 1501, 5))


def plain(caption):
    """A drawn picture's caption with the second words for the shapes replaced by the first."""
    first = {second: name for name, second in SHAPES.items()}
    return [first.get(word, word) for word in words_of(caption)]


def test_neighbours_propose_what_the_captions_have_there_more_than_once():
    captions = ["A red dog runs .", "A red cat runs .", "the red cat runs .", "a red CAT runs .", "A red dog runs ."]
    neighbours = Neighbours(captions)
    assert neighbours(words_of("A red mouse runs ."), 2) == {"dog": 2, "cat": 3}
    assert neighbours(words_of("the red cat runs ."), 0) == {"a": 4}  # "the" stands there only once
    assert Neighbours([*captions, "the red dog sits ."]).knows("The red dog runs .")  # each triple, from somewhere
    assert not neighbours.knows("The dog runs .")


def test_a_kept_meaning_is_kept(many_pairs):
    pairs = many_pairs
    rows = augment_captions(pairs, Neighbours(pairs.captions), "kept", changes=2)
    assert len(rows) > 20
    for image, original, variant in rows:
        assert original in [pairs.captions[j] for j in range(*pairs.first[image : image + 2])]
        assert variant != original
        assert plain(variant) == plain(original)  # the same colours, shapes, places and ground


def test_a_new_meaning_changes_one_word_and_is_no_training_caption(pairs):
    rows = augment_captions(pairs, Neighbours(pairs.captions), "new")
    assert len(rows) > 20
    changed = set()
    for _, original, variant in rows:
        assert variant not in pairs.captions
        differing = [(a, b) for a, b in zip(words_of(original), words_of(variant), strict=True) if a != b]
        assert len(differing) == 1
        changed |= set(differing[0])
    assert not changed & GRAMMAR
    assert changed & MEANING  # colours may change: the picture is yet to be made
    assert len({variant for _, _, variant in rows}) == len(rows)


def test_variants_depend_on_the_seed_alone(pairs):
    propose = Neighbours(pairs.captions)
    first = augment_captions(pairs, propose, "new", seed=1, number=10)
    assert first == augment_captions(pairs, propose, "new", seed=1, number=10)
    assert first != augment_captions(pairs, propose, "new", seed=2, number=10)
    assert len(first) == 10


def test_captions_of_test_pictures_are_no_variants(pairs):
    propose = Neighbours(pairs.captions)
    unseen = {variant for _, _, variant in augment_captions(pairs, propose, "new")}
    again = {variant for _, _, variant in augment_captions(pairs, propose, "new", known=list(unseen)[:10])}
    assert again and not again & set(list(unseen)[:10])


@pytest.mark.parametrize("word", ["the", "red", "left", "two", "no", "x9", ".", "##ing", "man"])
def test_filters_hold_whatever_is_proposed(word):
    rng, siblings = np.random.default_rng(0), [f"a big {word} is there ."]
    caption = "A man throws a big ball ."
    assert variant_of(caption, siblings, lambda *_: {word: 1.0}, "kept", rng) is None
    assert variant_of(caption, ["a big disc ."], lambda *_: {"disc": 1.0}, "kept", rng) == "A man throws a big disc ."
    assert variant_of(caption, ["the disc ."], lambda *_: {"disc": 1.0}, "kept", rng) is None  # "the" tells nothing


def test_capitals_stay_where_they_were():
    assert restore_case(["on", "snow", ",", "a", "disc"], "On sand , a Disc") == "On snow , a Disc"


# ---- the masked language model ----------------------------------------------------------------------------------


@pytest.fixture
def masked_folder(tmp_path, pairs):
    """`masked_folder(head=True)`: a tiny DistilBERT that always answers "box", then "hoop"; or one without its head."""
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    def make(head):
        tokenizer = train_tokenizer(pairs.captions)
        config = DistilBertConfig(vocab_size=len(tokenizer), dim=32, n_layers=1, n_heads=2, hidden_dim=32)
        torch.manual_seed(0)
        model = DistilBertForMaskedLM(config)
        model.vocab_projector.weight.data.zero_()  # the biases alone decide
        for word, bias in (("box", 20.0), ("hoop", 19.0), ("ring", 10.0)):
            model.vocab_projector.bias.data[tokenizer.convert_tokens_to_ids(word)] = bias
        (model if head else model.distilbert).save_pretrained(tmp_path / "masked")
        tokenizer.save_pretrained(tmp_path / "masked")
        return str(tmp_path / "masked")

    return make


def test_masked_model_proposes_its_likeliest_words(masked_folder):
    proposals = MaskedModel(masked_folder(head=True))(words_of("A red square is left of a blue ring on grass ."), 2)
    assert set(proposals) == {"box", "hoop"}  # a ring, 10,000 times less likely, is not
    assert proposals["box"] / proposals["hoop"] == pytest.approx(np.e, rel=1e-3)


def test_masked_model_leaves_words_in_pieces_alone(masked_folder):
    assert MaskedModel(masked_folder(head=True))(["a", "rred", "ring"], 1) == {}


def test_a_model_without_its_head_is_refused(masked_folder, trained_run, refused):
    folder = masked_folder(head=False)
    line = refused(main, ["--run", trained_run, "--model", folder])
    assert "without its masked-language head it would propose random words" in line


# ---- the command ------------------------------------------------------------------------------------------------


def test_command_writes_variants_and_shows_them(trained_run, pairs, capsys):
    main(["--run", str(trained_run), "--number", "30"])
    printed = capsys.readouterr().out
    frame = read_captions("captions_kept.csv")
    assert set(frame["image"]) <= set(pairs.names)
    assert "the second reader accepts" in printed
    assert all(caption in printed for caption in frame["caption"])
    main(["--run", str(trained_run), "--number", "30", "--meaning", "new", "--output", "list.txt"])
    with open("list.txt", encoding="utf-8") as file:
        listed = file.read().splitlines()
    neighbours = Neighbours(pairs.captions)
    assert listed
    assert all(neighbours.knows(caption) for caption in listed)


def test_command_refuses_counts_below_one(trained_run, refused):
    assert "at least 1" in refused(main, ["--run", trained_run, "--number", 0])

"""Caption augmentation: proposals, filters and the command."""

import numpy as np
import pytest
import torch
from conftest import run_python

from clip import load_model
from dataset import Pairs, load_splits, train_tokenizer
from extras.augment_captions import (
    PROTECTED,
    MaskedModelProposals,
    TrigramProposals,
    augment_captions,
    filter_variants,
    main,
    make_variant,
    restore_case,
    split_words,
)
from inference import embed_images
from utils.captions import read_captions
from utils.embed import embed_captions
from utils.synthetic import SHAPES, all_scenes, scene_captions


@pytest.fixture
def pairs(tiny_config):
    return load_splits(tiny_config())["train"]


@pytest.fixture
def many_pairs():
    """The captions of 300 synthetic images, without the images."""
    scenes = [all_scenes()[i] for i in np.random.default_rng(0).permutation(len(all_scenes()))[:300]]
    captions = [caption for scene in scenes for caption in scene_captions(scene)]
    return Pairs([], [], captions, np.repeat(np.arange(300), 5), np.arange(0, 1501, 5))


def without_synonyms(caption):
    """The words of a caption, with synonyms of shapes replaced."""
    shapes = {synonym: shape for shape, synonym in SHAPES.items()}
    return [shapes.get(word, word) for word in split_words(caption)]


def test_trigrams_propose_the_words_seen_at_least_twice_between_the_neighbours():
    captions = ["A red dog runs .", "A red cat runs .", "the red cat runs .", "a red CAT runs .", "A red dog runs ."]
    proposals = TrigramProposals(captions)
    assert proposals(split_words("A red mouse runs ."), 2) == {"dog": 2, "cat": 3}
    assert proposals(split_words("the red cat runs ."), 0) == {"a": 4}  # "the" occurs there only once
    assert not proposals.contains("The dog runs .")
    more = TrigramProposals([*captions, "the red dog sits ."])
    assert more.contains("The red dog runs .")  # each trigram occurs in some caption


def test_same_meaning_is_preserved(many_pairs):
    pairs = many_pairs
    rows = augment_captions(pairs, TrigramProposals(pairs.captions), "same", changes=2)
    assert len(rows) > 20
    for image, original, variant in rows:
        assert original in [pairs.captions[j] for j in pairs.captions_of(image)]
        assert variant != original
        assert without_synonyms(variant) == without_synonyms(original)  # colours, shapes, relation, background


def test_new_meaning_changes_one_word_and_is_not_a_training_caption(pairs):
    rows = augment_captions(pairs, TrigramProposals(pairs.captions), "new")
    assert len(rows) > 20
    changed = set()
    for _, original, variant in rows:
        assert variant not in pairs.captions
        differing = [(a, b) for a, b in zip(split_words(original), split_words(variant), strict=True) if a != b]
        assert len(differing) == 1
        changed |= set(differing[0])
    assert not changed & PROTECTED["new"]
    assert changed & PROTECTED["same"]  # colours may change, because the image is generated for the variant
    assert len({variant for _, _, variant in rows}) == len(rows)


def test_variants_are_deterministic_for_a_seed(pairs):
    propose = TrigramProposals(pairs.captions)
    first = augment_captions(pairs, propose, "new", seed=1, number=10)
    assert first == augment_captions(pairs, propose, "new", seed=1, number=10)
    assert first != augment_captions(pairs, propose, "new", seed=2, number=10)
    assert len(first) == 10


def test_known_captions_are_not_proposed_as_variants(pairs):
    propose = TrigramProposals(pairs.captions)
    unseen = {variant for _, _, variant in augment_captions(pairs, propose, "new")}
    again = {variant for _, _, variant in augment_captions(pairs, propose, "new", known=list(unseen)[:10])}
    assert again and not again & set(list(unseen)[:10])


@pytest.mark.parametrize("word", ["the", "red", "left", "two", "no", "x9", ".", "##ing", "man"])
def test_filters_reject_protected_and_unconfirmed_words(word):
    rng, others = np.random.default_rng(0), [f"a big {word} is there ."]
    caption = "A man throws a big ball ."
    assert make_variant(caption, others, lambda *_: {word: 1.0}, "same", rng) is None
    assert make_variant(caption, ["a big disc ."], lambda *_: {"disc": 1.0}, "same", rng) == "A man throws a big disc ."
    assert make_variant(caption, ["the disc ."], lambda *_: {"disc": 1.0}, "same", rng) is None  # "the" is no evidence


def test_restore_case_capitalises_the_same_positions():
    assert restore_case(["on", "snow", ",", "a", "disc"], "On sand , a Disc") == "On snow , a Disc"


def test_filter_keeps_variants_that_clip_ranks_among_the_first_ten(trained_run, pairs):
    """Independent of the implementation: rank the image of each variant among the images of all variants."""
    rows = augment_captions(pairs, TrigramProposals(pairs.captions), "new")
    kept = filter_variants(rows, "same", None, pairs, trained_run)
    model, expected = load_model(trained_run), []
    image_embeddings = embed_images(model, pairs.files)
    for image, original, variant in rows:
        scores = image_embeddings @ embed_captions(model, [variant])[0]
        better = {other for other, _, _ in rows if other != image and scores[other] >= scores[image]}
        others = [other for other, _, _ in rows if other in better]  # an image counts once for each of its variants
        expected += [(image, original, variant)] if len(others) < 10 else []
    assert len(rows) < 200  # one batch
    assert 0 < len(kept) < len(rows)
    assert kept == expected


def test_filter_for_a_new_meaning_requires_known_trigrams():
    proposals = TrigramProposals(["A dog runs .", "A cat sits ."])
    rows = [(0, "A dog runs .", "A dog runs ."), (1, "A cat sits .", "A cat runs .")]
    assert filter_variants(rows, "new", proposals, None, None) == rows[:1]


# ---- the masked language model ----------------------------------------------------------------------------------


@pytest.fixture
def masked_folder(tmp_path, pairs):
    """`masked_folder(head=True)`: a tiny DistilBERT that always predicts "box", then "hoop"; or its backbone."""
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    def make(head):
        tokenizer = train_tokenizer(pairs.captions)
        config = DistilBertConfig(vocab_size=len(tokenizer), dim=32, n_layers=1, n_heads=2, hidden_dim=32)
        torch.manual_seed(0)
        model = DistilBertForMaskedLM(config)
        model.vocab_projector.weight.data.zero_()  # the prediction depends on the biases alone
        for word, bias in (("box", 20.0), ("hoop", 19.0), ("ring", 10.0)):
            model.vocab_projector.bias.data[tokenizer.convert_tokens_to_ids(word)] = bias
        (model if head else model.distilbert).save_pretrained(tmp_path / "masked")
        tokenizer.save_pretrained(tmp_path / "masked")
        return str(tmp_path / "masked")

    return make


def test_masked_model_proposes_its_most_probable_words(masked_folder):
    words = split_words("A red square is left of a blue ring on grass .")
    proposals = MaskedModelProposals(masked_folder(head=True))(words, 2)
    assert set(proposals) == {"box", "hoop"}  # not "ring", 10,000 times less probable
    assert proposals["box"] / proposals["hoop"] == pytest.approx(np.e, rel=1e-3)


def test_masked_model_skips_words_of_several_tokens(masked_folder):
    assert MaskedModelProposals(masked_folder(head=True))(["a", "rred", "ring"], 1) == {}


def test_masked_model_without_its_head_is_refused(masked_folder, trained_run, refused):
    folder = masked_folder(head=False)
    line = refused(main, ["--run", trained_run, "--model", folder])
    assert "without its language-modelling head it would propose random words" in line


# ---- the command ------------------------------------------------------------------------------------------------


def test_command_writes_and_prints_variants(trained_run, pairs, capsys):
    main(["--run", str(trained_run), "--number", "30"])
    printed = capsys.readouterr().out
    frame = read_captions("captions_same.csv")
    assert set(frame["image"]) <= set(pairs.names)
    assert "variants pass the filter" in printed
    assert all(caption in printed for caption in frame["caption"])
    main(["--run", str(trained_run), "--number", "30", "--meaning", "new", "--output", "list.txt"])
    with open("list.txt", encoding="utf-8") as file:
        listed = file.read().splitlines()
    proposals = TrigramProposals(pairs.captions)
    assert listed
    assert all(proposals.contains(caption) for caption in listed)


def test_command_prints_help_and_refuses_flags_without_importing_torch():
    done = run_python("-X", "importtime", "-m", "extras.augment_captions", "--help")
    assert done.returncode == 0 and "{same,new}" in done.stdout
    assert "argparse" in done.stderr and "torch" not in done.stderr
    done = run_python("-m", "extras.augment_captions", "--run", "x", "--meaning", "kept")
    assert done.returncode == 2
    assert done.stderr.startswith("error: argument --meaning: invalid choice: 'kept'")


def test_command_refuses_numbers_below_one(trained_run, refused):
    assert "at least 1" in refused(main, ["--run", trained_run, "--number", 0])

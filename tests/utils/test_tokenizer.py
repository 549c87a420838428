"""The WordPiece tokenizer built from captions."""

from utils.tokenizer import train_tokenizer

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

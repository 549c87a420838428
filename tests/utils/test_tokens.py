"""Token ids are those of the tokenizer, whatever way they are computed."""

import random

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from utils import tokens
from utils.captions import train_tokenizer
from utils.tokens import TokenStore, encode_captions, encodes_words

# Fragments whose joints matter: blanks of all kinds, controls, combining marks, special tokens, characters of one word.
FRAGMENTS = ["a", "dog", "ing", "##ing", "[SEP]", "[MASK]", "!", "'", "-", " ", " ", "  ", "\t", "\n", "\x1c", "\u0301"]
FRAGMENTS += [
    "\u00e9",
    "e\u0301",
    "\u4e2d",
    "\u6587",
    "\u200d",
    "\u00a0",
    "\u2028",
    "\u03a3",
    "\u0130",
    "\ud55c",
    "x" * 120,
]


def random_captions(count, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choices(FRAGMENTS, k=rng.randint(0, 25))) for _ in range(count)]


def bert_tokenizer(pre_tokenizer=None, normalizer=None, **special):
    """A tokenizer with the parts of BERT's, or others."""
    tokenizer = train_tokenizer(random_captions(300, seed=1))
    tokenizer.backend_tokenizer.normalizer = normalizer or normalizers.BertNormalizer()
    if pre_tokenizer:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.add_special_tokens(special)
    return tokenizer


def byte_level_tokenizer():
    """BPE whose tokens contain the blank before a word, as in GPT-2 and CLIP."""
    vocabulary = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE({**vocabulary, "\u0120a": len(vocabulary)}, [("\u0120", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {
    "wordpiece": (lambda: train_tokenizer(random_captions(300, seed=1)), True),
    "bert": (bert_tokenizer, True),
    "byte level": (byte_level_tokenizer, False),
    "other words": (lambda: bert_tokenizer(pre_tokenizers.WhitespaceSplit()), False),
    "blanks replaced": (lambda: bert_tokenizer(normalizer=normalizers.Replace(" ", "x")), False),
    "token with a blank": (lambda: bert_tokenizer(additional_special_tokens=["a dog"]), False),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_equal_those_of_the_tokenizer(name):
    make, by_words = TOKENIZERS[name]
    tokenizer, captions = make(), random_captions(2000)
    assert encodes_words(tokenizer) == by_words
    for max_length in (4, 7, 200):
        expected = tokenizer(captions, truncation=True, max_length=max_length)["input_ids"]
        assert encode_captions(tokenizer, captions, max_length) == expected


def test_words_are_not_encoded_alone_without_tokens_at_both_ends():
    tokenizer = train_tokenizer(["a dog"])
    for template in ("[CLS] $A", "[CLS] [SEP] $A"):
        special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=special)
        assert not encodes_words(tokenizer)
        assert encode_captions(tokenizer, ["a dog"], 20) == tokenizer(["a dog"])["input_ids"]


def test_store_is_the_same_in_chunks_of_any_size(monkeypatch):
    tokenizer, captions = train_tokenizer(random_captions(300, seed=1)), random_captions(50)
    whole = TokenStore(tokenizer, captions, 9)
    monkeypatch.setattr(tokens, "CHUNK_SIZE", 7)
    parts = TokenStore(tokenizer, captions, 9)
    assert np.array_equal(whole.ids, parts.ids) and np.array_equal(whole.offsets, parts.offsets)
    assert whole.ids.dtype == np.int32
    assert len(TokenStore(tokenizer, [], 9)) == 0

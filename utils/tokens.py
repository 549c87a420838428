"""Tokenised captions."""

import re
from itertools import chain

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

CHUNK_SIZE = 50_000  # captions encoded at once
# Parts of a tokenizer for which a blank separates words.
INDEPENDENT = {"BertPreTokenizer", "WordPiece", "Sequence", "BertNormalizer", "Lowercase", "NFC", "NFD", "StripAccents"}


class TokenStore:
    """Tokenised captions: all ids in one int32 array, caption j at offsets[j] .. offsets[j + 1] - 1."""

    def __init__(self, tokenizer, captions, max_length):
        lengths, parts = [[0]], [np.zeros(0, dtype=np.int32)]
        for start in range(0, len(captions), CHUNK_SIZE):
            lists = encode_captions(tokenizer, captions[start : start + CHUNK_SIZE], max_length)
            lengths.append([*map(len, lists)])
            parts.append(np.fromiter(chain.from_iterable(lists), np.int32, sum(lengths[-1])))
        self.offsets, self.ids = np.cumsum(np.concatenate(lengths), dtype=np.int64), np.concatenate(parts)

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, caption):
        return self.ids[self.offsets[caption] : self.offsets[caption + 1]]


def encode_captions(tokenizer, captions, max_length):
    """The token ids of each caption, as `tokenizer(...)` gives them; many times faster where it allows."""
    if not getattr(tokenizer, "is_fast", False) or tokenizer.truncation_side != "right":
        return tokenizer(captions, truncation=True, max_length=max_length)["input_ids"]
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    if not encodes_words(tokenizer):
        backend.enable_truncation(max_length)
        return [encoding.ids for encoding in backend.encode_batch_fast(captions)]
    words = list({word for caption in captions for word in caption.split(" ")})
    encodings = backend.encode_batch_fast(words, add_special_tokens=False)
    ids = {word: encoding.ids for word, encoding in zip(words, encodings, strict=True)}
    (first, last), found = backend.encode("").ids, (map(ids.get, caption.split(" ")) for caption in captions)
    return [[first, *[*chain.from_iterable(parts)][: max_length - 2], last] for parts in found]


def encodes_words(tokenizer):
    """Whether words between blanks are encoded independently, as in BERT: then each distinct one is encoded once."""
    backend = tokenizer.backend_tokenizer
    kinds = {type(part).__name__ for part in (backend.pre_tokenizer, backend.model)}
    kinds |= {*re.findall(r"(\w+)\(", repr(backend.normalizer))}
    word, caption = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    return (
        {"BertPreTokenizer", "WordPiece"} <= kinds <= INDEPENDENT
        and (len(caption) == len(word) + 2 and caption[1:-1] == word)  # between [CLS] and [SEP]
        and not any(" " in str(token) for token in tokenizer.added_tokens_decoder.values())
    )


def pad_tokens(token_arrays, pad_id):
    """input_ids and attention_mask, (T, L) int64, padded on the right to the longest of the T captions.

    Same result as the tokenizer's own `pad`, but five times as fast.
    """
    arrays = [torch.from_numpy(ids) for ids in token_arrays]
    input_ids = pad_sequence(arrays, batch_first=True, padding_value=pad_id).long()
    lengths = torch.tensor([len(ids) for ids in arrays])
    return input_ids, (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()

"""Combinations of a subject and a context, such as a dog and snow, that can be left out of a set of photographs."""

import re
from collections import Counter

import numpy as np

# The combinations left out are pairs of these words that are named together by captions of this many training images,
# the most frequent first, no word in more than two pairs.
MIN_IMAGES, MAX_IMAGES = 50, 200
NUM_QUERIES = 2  # the last captions of each image left out are queries only; images are generated for the others
SUBJECTS = ("dog", "man", "woman", "boy", "girl", "child", "people")
# fmt: off
CONTEXTS = (
    "snow", "water", "beach", "grass", "street", "bike", "ball", "mountain", "pool", "car", "field", "rock", "park",
    "sand", "bench", "swing", "skateboard", "ramp", "hill", "wall", "fence", "building", "stick", "frisbee", "tree",
)
# fmt: on
PLURALS = {"man": "men", "woman": "women", "child": "children"}


def naming(pairs, word):
    """(T,) booleans: the captions that name a word, in the singular or plural."""
    forms = re.compile(rf"\b({word}|{word}e?s|{PLURALS.get(word, word)})\b", re.IGNORECASE)
    return np.array([bool(forms.search(caption)) for caption in pairs.captions])


def images_naming(pairs, captions):
    """(N,) booleans: the images with one of these captions (T,)."""
    return np.bincount(pairs.image_index[captions], minlength=len(pairs.files)) > 0


def choose_combinations(pairs, number=8):
    """The combinations to leave out, chosen from the training captions alone: a list of (subject, context)."""
    named = {word: naming(pairs, word) for word in (*SUBJECTS, *CONTEXTS)}
    counts = {(a, b): images_naming(pairs, named[a] & named[b]).sum() for a in SUBJECTS for b in CONTEXTS}
    uses, chosen = Counter(), []
    possible = [pair for pair in counts if MIN_IMAGES <= counts[pair] <= MAX_IMAGES]
    for a, b in sorted(possible, key=lambda pair: -counts[pair]):
        if uses[a] < 2 and uses[b] < 2 and len(chosen) < number:
            chosen.append((a, b))
            uses.update((a, b))
    return chosen


def leave_out_combinations(pairs, combinations):
    """(N,) images that show a combination, by their captions taken together; (T,) captions that name one themselves."""
    images, captions = np.zeros(len(pairs.files), bool), np.zeros(len(pairs.captions), bool)
    for a, b in combinations:
        first, second = naming(pairs, a), naming(pairs, b)
        images |= images_naming(pairs, first) & images_naming(pairs, second)
        captions |= first & second
    return images, captions

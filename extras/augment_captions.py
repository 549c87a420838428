"""Variants of a run's training captions with one word replaced: `python -m extras.augment_captions --run runs/x`.

With `--meaning same` a variant still describes its image: the output is a CSV that can be appended to a captions file.
With `--meaning new` it describes another plausible image: the output is a list for `--gan_captions`.

Words come from the training captions (seen between the same two neighbours) or, with `--model`, from a masked
language model; protected words are neither replaced nor inserted. `--meaning same` also protects colours, numbers,
directions and negations, and requires that another caption of the image has the word beside the same neighbour.
Variants are then filtered: the run's CLIP has to retrieve the image, or the captions have to contain all trigrams.
"""

import csv
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

from config import InputError, build_config
from utils.cli import exit_on_input_error
from utils.files import atomic_write, read_json
from utils.flags import OneLineParser

WORD = re.compile(r"[^\W\d_]{2,}")  # letters only
FUNCTION_WORDS = "an the is are was were be been of and or to in on at by with from as for there it its this"
MEANING_WORDS = (
    "red orange yellow green cyan blue purple pink black white brown gray grey tan gold silver blond blonde "
    "one two three four five six seven eight nine ten no not without nobody none nothing "
    "left right above below over under top bottom up down behind front between inside outside"
)
PROTECTED = {"same": {*WORD.findall(f"{FUNCTION_WORDS} {MEANING_WORDS}")}, "new": {*WORD.findall(FUNCTION_WORDS)}}
MIN_COUNT = 2  # times that a word must occur between the same neighbours
# Limits on a masked language model's proposals; relative: divided by the original word's probability.
MAX_PROPOSALS, MIN_PROBABILITY, MIN_RELATIVE_PROBABILITY = 10, 0.03, 0.1
FILTER_TOP_K, FILTER_BATCH = 10, 100  # CLIP has to rank the image among the first 10 of at least 100


def parse_arguments(argv=None):
    parser = OneLineParser(prog="python -m extras.augment_captions", description="Write variants of training captions.")
    parser.add_argument("--run", required=True, help="run folder; its training captions are augmented")
    parser.add_argument(
        "--meaning", choices=("same", "new"), default="same", help="meaning of the variants (default: same)"
    )
    parser.add_argument("--model", help="masked LM that proposes words (default: words from the training captions)")
    parser.add_argument("--number", type=int, default=1000, help="maximum number of variants (>= 1, default: 1000)")
    parser.add_argument("--changes", type=int, default=1, help="words replaced per caption (>= 1, default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (>= 0, default: 0)")
    parser.add_argument("--image_path", help="image folder, if it was moved since training")
    parser.add_argument("--captions_path", help="captions file, if it was moved since training")
    parser.add_argument("--output", help="output file (default: captions_same.csv or captions_new.txt)")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if arguments.number < 1 or arguments.changes < 1 or arguments.seed < 0:
        parser.error("--number and --changes must be at least 1, --seed at least 0")
    return arguments


if __name__ == "__main__":
    exit_on_input_error(parse_arguments)()  # before the heavy imports, so that --help and flag errors return at once

import numpy as np
import torch
from transformers import AutoModelForMaskedLM

from clip import load_model
from dataset import load_splits
from inference import embed_images
from utils.embed import embed_captions
from utils.pretrained import load_tokenizer, load_transformers_model


class TrigramProposals:
    """Proposes {word: count}: the words that occur in the captions between the same two neighbours."""

    def __init__(self, captions):
        self.between = defaultdict(Counter)
        for caption in captions:
            for before, word, after in trigrams(split_words(caption)):
                self.between[before, after][word] += 1

    def __call__(self, words, position):
        before, _, after = trigrams(words)[position]
        return {word: count for word, count in self.between[before, after].items() if count >= MIN_COUNT}

    def contains(self, caption):
        """Whether every trigram of a caption occurs in the captions."""
        return all(self.between[before, after][word] for before, word, after in trigrams(split_words(caption)))


class MaskedModelProposals:
    """Proposes {word: probability}: what a masked language model predicts in place of a word; raises InputError."""

    def __init__(self, name, device="cpu"):
        model, missing = load_transformers_model(AutoModelForMaskedLM, name, "model", "omit --model")
        self.tokenizer = load_tokenizer(name, "model", "omit --model")
        if missing - set(getattr(model, "_tied_weights_keys", None) or ()):
            problem = "without its language-modelling head it would propose random words"
            raise InputError(f"model is {name}: {problem}; use a masked language model, or omit --model")
        self.model = model.to(device).eval()

    @torch.no_grad()
    def __call__(self, words, position):
        tokenizer = self.tokenizer
        own = tokenizer(words[position], add_special_tokens=False)["input_ids"]
        if len(own) != 1:
            return {}  # several tokens: a rare word, such as a name
        masked = [*words[:position], tokenizer.mask_token, *words[position + 1 :]]
        batch = tokenizer(" ".join(masked), return_tensors="pt").to(self.model.device)
        mask_position = (batch["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0, 0]
        probabilities = self.model(**batch).logits[0, mask_position].float().softmax(-1)
        best = probabilities.topk(MAX_PROPOSALS)
        threshold = max(MIN_PROBABILITY, MIN_RELATIVE_PROBABILITY * float(probabilities[own[0]]))
        pairs = zip(tokenizer.convert_ids_to_tokens(best.indices.tolist()), best.values.tolist(), strict=True)
        return {word.lower(): probability for word, probability in pairs if probability >= threshold}


def split_words(caption):
    return caption.lower().split()


def trigrams(words):
    """(before, word, after) of each word; "" beyond the ends."""
    return list(zip(["", *words], words, [*words[1:], ""], strict=False))


def make_variant(caption, other_captions, propose, meaning, rng, changes=1):
    """The caption with up to `changes` words replaced, or None; `other_captions` are those of the same image."""
    words, changed = split_words(caption), set()
    for _ in range(changes):
        for position in rng.permutation(len(words)).tolist():
            if position in changed or words[position] in PROTECTED[meaning] or not WORD.fullmatch(words[position]):
                continue
            weights = filter_proposals(words, position, propose(words, position), other_captions, meaning)
            if weights:
                probabilities = np.array(list(weights.values()), dtype=float)
                words[position] = str(rng.choice(list(weights), p=probabilities / probabilities.sum()))
                changed.add(position)
                break
    return restore_case(words, caption) if changed else None


def filter_proposals(words, position, proposals, other_captions, meaning):
    """The proposals {word: weight} that are allowed."""
    allowed = {w for w in proposals if WORD.fullmatch(w) and w not in words and w not in PROTECTED[meaning]}
    if meaning == "same":
        before, _, after = trigrams(words)[position]
        bigrams = {trigram[:2] for caption in other_captions for trigram in trigrams(split_words(caption))}
        # A neighbour counts if it is unique ("red" of which object?) and says what the word is about ("the" does not).
        unique = {word for word in (before, after) if words.count(word) == 1}
        anchors = {word for word in unique - PROTECTED["new"] if WORD.fullmatch(word)}
        confirmed = {word for first, word in bigrams if first == before and first in anchors}
        allowed &= confirmed | {word for word, second in bigrams if second == after and second in anchors}
    return {word: weight for word, weight in proposals.items() if word in allowed}


def restore_case(words, caption):
    """The words as a caption, capitalised where the original is."""
    pairs = zip(words, caption.split(), strict=True)
    return " ".join(word.capitalize() if original[:1].isupper() else word for word, original in pairs)


def augment_captions(pairs, propose, meaning, seed=0, number=None, changes=1, known=()):
    """(image number, caption, variant) rows: at most one variant of each caption of the `dataset.Pairs`, in random
    order, at most `number` of them (None: no limit), none of them a caption of `pairs` or `known`."""
    rng, rows, known = np.random.default_rng(seed), [], {caption.lower() for caption in [*pairs.captions, *known]}
    for index in rng.permutation(len(pairs.captions)).tolist():
        if len(rows) == number:
            break
        image, caption = int(pairs.image_index[index]), pairs.captions[index]
        other_captions = [pairs.captions[j] for j in pairs.captions_of(image) if j != index]
        variant = make_variant(caption, other_captions, propose, meaning, rng, changes)
        if variant is not None and variant.lower() not in known:
            known.add(variant.lower())
            rows.append((image, caption, variant))
    return rows


def filter_variants(rows, meaning, trigram_proposals, pairs, run):
    """The rows of `augment_captions` whose variants pass the filter: CLIP's ranking, or known trigrams only."""
    if meaning == "new" or not rows:
        return [row for row in rows if trigram_proposals.contains(row[2])]
    model, images = load_model(run), [image for image, _, _ in rows]
    text_embeddings = embed_captions(model, [variant for _, _, variant in rows])
    image_embeddings = embed_images(model, [pairs.files[image] for image in images])
    kept, num_batches = [], max(1, len(rows) // FILTER_BATCH)
    for number in range(num_batches):
        batch = slice(number * len(rows) // num_batches, (number + 1) * len(rows) // num_batches)
        own = (text_embeddings[batch] * image_embeddings[batch]).sum(1, keepdim=True)
        other_image = np.not_equal.outer(images[batch], images[batch])
        above = (text_embeddings[batch] @ image_embeddings[batch].T >= own).cpu().numpy() & other_image
        kept += [row for row, rank in zip(rows[batch], above.sum(1), strict=True) if rank < FILTER_TOP_K]
    return kept


def write_variants(path, rows, pairs, meaning):
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        if meaning == "same":
            csv.writer(file).writerows([("image", "caption"), *((pairs.names[image], v) for image, _, v in rows)])
        else:
            file.writelines(f"{variant}\n" for _, _, variant in rows)


@exit_on_input_error
def main(argv=None):
    """Write the variants and print up to 100 of them for inspection."""
    arguments = parse_arguments(argv)
    meaning, settings = arguments.meaning, read_json(Path(arguments.run) / "config.json")
    settings |= {name: getattr(arguments, name) for name in ("image_path", "captions_path") if getattr(arguments, name)}
    splits = load_splits(build_config({**settings, "run": arguments.run}))
    pairs, held_out = splits["train"], [*splits["validation"].captions, *splits["test"].captions]
    trigram_proposals = TrigramProposals(pairs.captions)
    propose = MaskedModelProposals(arguments.model) if arguments.model else trigram_proposals
    rows = augment_captions(pairs, propose, meaning, arguments.seed, arguments.number, arguments.changes, held_out)
    kept = filter_variants(rows, meaning, trigram_proposals, pairs, arguments.run)
    if not kept:
        raise InputError("no caption has a variant that passes the filters: try --meaning new, or --model")
    path = arguments.output or {"same": "captions_same.csv", "new": "captions_new.txt"}[meaning]
    write_variants(path, kept, pairs, meaning)
    print(f"{len(kept)} of {len(rows)} variants pass the filter and are in {path}; up to 100 of them at random:\n")
    for row in np.random.default_rng(arguments.seed).permutation(len(kept))[:100].tolist():
        print(f"{kept[row][1]}\n  -> {kept[row][2]}")


if __name__ == "__main__":
    main()

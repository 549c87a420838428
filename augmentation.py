"""New captions out of the training captions, one word changed at a time: `python augmentation.py --run runs/x`.

With `--meaning kept` (the default) a variant says the same of its photograph; the CSV of images and variants can be
added to a captions file. With `--meaning new` it says something else that a photograph could show; the list is for
`--gan_captions`, which makes pictures for it.

What may take a word's place is proposed by the training captions (words seen between the same two neighbours) or, with
`--model`, by a masked language model that sees the whole caption with one word hidden. Filters follow: nothing but
words of letters, no word already in the caption, no protected word in or out. A kept meaning protects colours, numbers,
sides and negations, too, and takes only a word that stands beside the same word in another caption of the photograph:
"blue box" for "blue square" if another caption calls it so. At last a second reader looks at the whole sentence, and
what it does not accept is left out: the run's CLIP, which has to find the photograph by the variant, or for a new
meaning the training captions, which have to hold every three words in a row.
"""

import csv
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch

from clip import load_model
from config import InputError, OneLineParser, build_config, exit_on_input_error, read_json
from dataset import load_splits
from index import embed_captions, embed_images
from modules import check_safetensors, from_cache_or_network

WORD = re.compile(r"[^\W\d_]{2,}")  # letters only
GRAMMAR = set(
    WORD.findall("an the is are was were be been of and or to in on at by with from as for there it its this")
)
MEANING = set(
    WORD.findall(
        "red orange yellow green cyan blue purple pink black white brown gray grey tan gold silver blond blonde "
        "one two three four five six seven eight nine ten no not without nobody none nothing "
        "left right above below over under top bottom up down behind front between inside outside"
    )
)
PROTECTED = {"kept": GRAMMAR | MEANING, "new": GRAMMAR}
SEEN = 2  # times that a word must have stood between the same neighbours
BEST, LEAST, RELATIVE = 10, 0.03, 0.1  # of a model's proposals: how many, least probability, and least as a share


# ---- who proposes -----------------------------------------------------------------------------------------------


class Neighbours:
    """Proposes the words that the captions have between the same two neighbours, as often as they have them."""

    def __init__(self, captions):
        self.between = defaultdict(Counter)
        for caption in captions:
            for before, word, after in triples(words_of(caption)):
                self.between[before, after][word] += 1

    def __call__(self, words, position):
        """{word: weight} for the word at `position`."""
        before, _, after = triples(words)[position]
        return {word: count for word, count in self.between[before, after].items() if count >= SEEN}

    def knows(self, caption):
        """Whether every three words in a row occur in the captions: a reader of the whole, not of the change alone."""
        return all(self.between[before, after][word] for before, word, after in triples(words_of(caption)))


class MaskedModel:
    """Proposes what a masked language model would put in a word's place; raises InputError.

    A model without its head fills in random words: it is refused.
    """

    def __init__(self, name, device="cpu"):
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        check_safetensors(name, "model")

        def load(**options):
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
            model, found = AutoModelForMaskedLM.from_pretrained(name, output_loading_info=True, **options)
            return tokenizer, model, set(found["missing_keys"])

        self.tokenizer, model, missing = from_cache_or_network(load, "model", name, "drop --model")
        tied = set(getattr(model, "_tied_weights_keys", None) or ())
        if missing - tied:
            raise InputError(
                f"model is {name}, whose weights lack {sorted(missing - tied)[0]}: without its masked-language head it "
                "would propose random words; give a masked language model, or drop --model"
            )
        self.model = model.to(device).eval()

    @torch.no_grad()
    def __call__(self, words, position):
        tokenizer = self.tokenizer
        own = tokenizer(words[position], add_special_tokens=False)["input_ids"]
        if len(own) != 1:
            return {}  # a word in pieces is a rare one: a name, a number
        hidden = [*words[:position], tokenizer.mask_token, *words[position + 1 :]]
        batch = tokenizer(" ".join(hidden), return_tensors="pt").to(self.model.device)
        masked = (batch["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0, 0]
        chances = self.model(**batch).logits[0, masked].float().softmax(-1)
        best = chances.topk(BEST)
        least = max(LEAST, RELATIVE * float(chances[own[0]]))
        pairs = zip(tokenizer.convert_ids_to_tokens(best.indices.tolist()), best.values.tolist(), strict=True)
        return {word.lower(): chance for word, chance in pairs if chance >= least}


def words_of(caption):
    return caption.lower().split()


def triples(words):
    """(before, word, after) of each word; "" beyond the ends."""
    return list(zip(["", *words], words, [*words[1:], ""], strict=False))


# ---- what is taken ----------------------------------------------------------------------------------------------


def variant_of(caption, siblings, propose, meaning, rng, changes=1):
    """The caption with up to `changes` words changed, one after another; None if nothing may be.

    `siblings` are the other captions of its photograph.
    """
    words, changed = words_of(caption), set()
    for _ in range(changes):
        for position in rng.permutation(len(words)).tolist():
            if position in changed or words[position] in PROTECTED[meaning] or not WORD.fullmatch(words[position]):
                continue
            weights = allowed(words, position, propose(words, position), siblings, meaning)
            if weights:
                chances = np.array(list(weights.values()), dtype=float)
                words[position] = str(rng.choice(list(weights), p=chances / chances.sum()))
                changed.add(position)
                break
    return restore_case(words, caption) if changed else None


def allowed(words, position, proposals, siblings, meaning):
    """Those of the proposals {word: weight} that pass the filters."""
    passed = {
        word: weight
        for word, weight in proposals.items()
        if WORD.fullmatch(word) and word not in words and word not in PROTECTED[meaning]
    }
    if meaning == "kept":
        before, _, after = triples(words)[position]
        said = {pair[:2] for sibling in siblings for pair in triples(words_of(sibling))}  # two words in a row
        telling = {word for word in (before, after) if tells(word) and words.count(word) == 1}  # "red" of which of two?
        found = {word for first, word in said if first == before and first in telling}
        found |= {word for word, second in said if second == after and second in telling}
        passed = {word: weight for word, weight in passed.items() if word in found}
    return passed


def tells(word):
    """Whether a word beside another says what that other is about: "the" does not."""
    return bool(WORD.fullmatch(word)) and word not in GRAMMAR


def restore_case(words, caption):
    """The words as a caption, with capitals where the original has them."""
    olds = caption.split()
    return " ".join(new.capitalize() if old[:1].isupper() else new for new, old in zip(words, olds, strict=True))


def augment_captions(pairs, propose, meaning, seed=0, number=None, changes=1, known=()):
    """(image number, original, variant) rows: at most one variant of each caption, none of them a training caption or
    one of the `known`.

    `number`: how many are wanted at most, from captions drawn at random; None: one of every caption that has one.
    """
    rng, rows, known = np.random.default_rng(seed), [], {caption.lower() for caption in [*pairs.captions, *known]}
    for caption in rng.permutation(len(pairs.captions)).tolist():
        if number is not None and len(rows) == number:
            break
        image, original = int(pairs.image_index[caption]), pairs.captions[caption]
        siblings = [pairs.captions[j] for j in range(*pairs.first[image : image + 2]) if j != caption]
        variant = variant_of(original, siblings, propose, meaning, rng, changes)
        if variant is not None and variant.lower() not in known:
            known.add(variant.lower())
            rows.append((image, original, variant))
    return rows


# ---- the command ------------------------------------------------------------------------------------------------


def parse_arguments(argv):
    parser = OneLineParser(prog="augmentation.py", description="New captions out of a run's training captions.")
    parser.add_argument("--run", required=True, help="a run, whose training captions are taken")
    parser.add_argument("--meaning", choices=("kept", "new"), default="kept", help="what the variants may say")
    parser.add_argument("--model", help="a masked language model, by name or folder (default: the training captions)")
    parser.add_argument("--number", type=int, default=1000, help="how many variants at most (default: 1000)")
    parser.add_argument("--changes", type=int, default=1, help="words changed in each (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image_path", help="where the run's pictures are now, if they were moved")
    parser.add_argument("--captions_path", help="and its captions")
    parser.add_argument("--output", help="file to write (default: captions_kept.csv or captions_new.txt)")
    return parser.parse_args(argv)


@exit_on_input_error
def main(argv=None):
    """Write the variants, and print a hundred of them for a person to judge."""
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    if arguments.number < 1 or arguments.changes < 1 or arguments.seed < 0:
        raise InputError("number and changes must be at least 1, seed at least 0")
    saved = read_json(Path(arguments.run) / "config.json")
    moved = {name: getattr(arguments, name) for name in ("image_path", "captions_path") if getattr(arguments, name)}
    splits = load_splits(build_config({**saved, **moved}))
    pairs, others = splits["train"], [*splits["validation"].captions, *splits["test"].captions]  # not to be learned
    neighbours = Neighbours(pairs.captions)
    propose = MaskedModel(arguments.model) if arguments.model else neighbours
    asked = (arguments.meaning, arguments.seed, arguments.number, arguments.changes)
    rows = augment_captions(pairs, propose, *asked, known=others)
    accepted = read_again(rows, arguments.meaning, neighbours, pairs, arguments.run)
    print(f"the second reader accepts {sum(accepted)} of {len(rows)} variants")
    rows = [row for row, good in zip(rows, accepted, strict=True) if good]
    if not rows:
        raise InputError("no caption has a variant that passes the filters: try --meaning new, or --model")
    path = Path(arguments.output or {"kept": "captions_kept.csv", "new": "captions_new.txt"}[arguments.meaning])
    write_variants(path, rows, pairs, arguments.meaning)
    print(f"{len(rows)} variants are in {path}; a hundred of them at random:\n")
    for row in np.random.default_rng(arguments.seed).permutation(len(rows))[:100].tolist():
        print(f"{rows[row][1]}\n  -> {rows[row][2]}")


def read_again(rows, meaning, neighbours, pairs, run):
    """Which variants the second reader accepts, a list of booleans."""
    if meaning == "new" or not rows:
        return [neighbours.knows(variant) for _, _, variant in rows]
    model = load_model(run)
    images, texts = [image for image, _, _ in rows], embed_captions(model, [variant for _, _, variant in rows])
    found = embed_images(model, [pairs.files[image] for image in images])
    good, parts = [], max(1, len(rows) // 100)
    for number in range(parts):  # among a hundred photographs or more, one of the first ten
        part = slice(number * len(rows) // parts, (number + 1) * len(rows) // parts)
        own = (texts[part] * found[part]).sum(1, keepdim=True)
        others = np.not_equal.outer(images[part], images[part])
        above = (texts[part] @ found[part].T >= own).cpu().numpy() & others
        good += (above.sum(1) < 10).tolist()
    return good


def write_variants(path, rows, pairs, meaning):
    """A CSV of images and variants, or a list of variants, one a line."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        if meaning == "kept":
            csv.writer(file).writerows([("image", "caption"), *((pairs.names[i], v) for i, _, v in rows)])
        else:
            file.writelines(f"{variant}\n" for _, _, variant in rows)


if __name__ == "__main__":
    main()

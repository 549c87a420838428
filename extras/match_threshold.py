"""Match threshold: the minimum cosine similarity at which a search result counts as a match.

The rates of `utils.match_rates` come from the validation split. With N candidates there, none of n other candidates
reaches a cosine with probability (1 - false positive rate)^(n / N), the true negative rate. The threshold maximises
the balanced accuracy, the mean of the true positive and the true negative rate.
"""

import contextlib
import sys

import numpy as np

from config import InputError
from dataset import load_splits
from utils.cli import one_line
from utils.embed import embed_captions
from utils.files import read_json, write_json
from utils.match_rates import DIRECTIONS, GRID, MAX_IMAGES, RATES, fit_rates, matching_pairs

MIN_BALANCED_ACCURACY = 0.65  # on the validation split; below it no decision is made
MIN_IMAGES = 20  # of the validation split
OLD_NAMES = {"gallery": "num_candidates", "right": RATES[0], "wrong": RATES[1]}  # in files of earlier versions


def load_match_rates(runs):
    """The rates of an ensemble of `search_index.Run`, fitted and saved at first use; None without validation images."""
    hashes = "-".join(run.hash[:8] for run in runs)
    path = runs[0].folder / f"match_threshold-{hashes}.json"
    saved = path if path.exists() else path.with_name(f"calibration-{hashes}.json")
    if saved.exists():
        try:
            return read_rates(saved)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            print(f"match threshold {saved} is damaged ({one_line(error)}): it is fitted again", file=sys.stderr)
    try:
        pairs = load_splits(runs[0].model.config)["validation"]
    except InputError:
        return None
    from inference import embed_images

    files = pairs.files[:MAX_IMAGES]
    captions = pairs.captions[: pairs.caption_offsets[len(files)]]
    scores = sum(embed_captions(run.model, captions) @ embed_images(run.model, files).T for run in runs) / len(runs)
    rates = fit_rates(scores, matching_pairs(pairs, *scores.shape))
    with contextlib.suppress(OSError):  # a read-only folder: fitted again next time
        write_json(path, rates)
    return rates


def read_rates(path):
    """The rates in a file; raises AttributeError, KeyError, OverflowError, TypeError or ValueError if it is damaged."""
    content = read_json(path)
    rates = {d: {OLD_NAMES.get(name, name): value for name, value in content[d].items()} for d in DIRECTIONS}
    values = np.array([rates[d][name] for d in DIRECTIONS for name in RATES], dtype=float)
    counts = [rates[d]["num_candidates"] for d in DIRECTIONS]
    if values.shape != (4, len(GRID)) or not ((values >= 0) & (values <= 1)).all():
        raise ValueError("the rates are not shares")
    if not all(type(count) is int and 1 <= count < 2**53 for count in counts):
        raise ValueError(f"num_candidates is {counts}")
    return rates


def choose_threshold(rates, direction, num_candidates):
    """The minimum cosine of a match among n images ("text_to_image") or captions ("image_to_text").

    None if the model is too weak, the candidates are too many, or the validation images are too few for a decision.
    """
    if min(each["num_candidates"] for each in rates.values()) < MIN_IMAGES:
        return None
    tpr, fpr = (np.array(rates[direction][name]) for name in RATES)
    balanced_accuracy = (tpr + (1 - fpr) ** (num_candidates / rates[direction]["num_candidates"])) / 2
    maximum = balanced_accuracy.max()
    best = np.flatnonzero(balanced_accuracy >= maximum - 1e-9)
    return float(GRID[best[len(best) // 2]]) if maximum >= MIN_BALANCED_ACCURACY else None  # the middle of a plateau

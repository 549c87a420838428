"""Match threshold: the minimum cosine similarity at which a search result counts as a match.

It is fitted to the validation split. For every cosine on a grid, the true positive rate is the share of queries whose
matching result scores at least that; the false positive rate is the share for which another candidate does. The
true negative rate, the probability that none of n others does, is (1 - false positive rate)^(n / N) for a split
with N candidates.
The threshold maximises the balanced accuracy, the mean of the true positive and the true negative rate.
"""

import contextlib
from pathlib import Path

import numpy as np
import torch

from config import InputError
from dataset import load_splits
from utils.embed import embed_captions
from utils.files import read_json, write_json
from utils.hashing import model_hash

GRID = np.linspace(-1, 1, 401)  # cosines
MIN_BALANCED_ACCURACY = 0.65  # on the validation split; below it no decision is made
MIN_IMAGES, MAX_IMAGES = 20, 1000  # of the validation split; 1000 determine the rates to 0.1%
DIRECTIONS, RATES = ("text_to_image", "image_to_text"), ("true_positive_rate", "false_positive_rate")
OLD_NAMES = {"gallery": "num_candidates", "right": RATES[0], "wrong": RATES[1]}  # in files of earlier versions


def save_match_threshold(run, pairs, image_embeddings, text_embeddings):
    """Save the rates of a run after training, from the embeddings (N, D) and (T, D) of its validation split."""
    images = image_embeddings[:MAX_IMAGES]
    scores = text_embeddings[: pairs.caption_offsets[len(images)]] @ images.T
    rates = fit_rates(scores, matching_pairs(pairs, *scores.shape))
    write_json(Path(run) / f"index/match_threshold-{model_hash(run)[:8]}.json", rates)


def load_match_rates(runs):
    """The rates of an ensemble of `search_index.Run`, fitted and saved at first use; None without validation images."""
    hashes = "-".join(run.hash[:8] for run in runs)
    path = runs[0].folder / f"match_threshold-{hashes}.json"
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):  # missing or damaged
        content = read_json(path if path.exists() else path.with_name(f"calibration-{hashes}.json"))
        rates = {d: {OLD_NAMES.get(name, name): value for name, value in content[d].items()} for d in DIRECTIONS}
        values = np.array([rates[d][name] for d in DIRECTIONS for name in RATES], dtype=float)
        num_candidates = min(rates[d]["num_candidates"] for d in DIRECTIONS)
        if values.shape == (4, len(GRID)) and np.isfinite(values).all() and num_candidates >= 1:
            return rates
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


def matching_pairs(pairs, num_captions, num_images):
    """(T, N) booleans for the first captions and images: caption j, or one with the same words, belongs to image i."""
    texts = [" ".join(caption.lower().split()) for caption in pairs.captions[:num_captions]]
    texts = np.unique(texts, return_inverse=True)[1]
    matches = torch.zeros(texts.max() + 1, num_images, dtype=torch.bool)
    matches[texts, pairs.image_index[:num_captions]] = True
    return matches[texts]


def fit_rates(scores, matches):
    """The rates of text-to-image and image-to-text search, from (T, N) cosines and booleans."""
    rates, scores = {}, scores.cpu()
    for direction, s, m in zip(DIRECTIONS, (scores, scores.T), (matches, matches.T), strict=True):
        rates[direction] = {"num_candidates": s.shape[1]}
        for name, excluded in zip(RATES, (~m, m), strict=True):
            best = np.sort(s.masked_fill(excluded, -2).amax(1).double().numpy())
            rates[direction][name] = ((len(best) - np.searchsorted(best, GRID)) / len(best)).tolist()
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

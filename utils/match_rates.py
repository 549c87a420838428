"""True and false positive rates of a run on its validation split, from which a search derives its match threshold.

For every cosine on a grid, the true positive rate is the share of queries whose matching result scores at least that;
the false positive rate is the share for which another candidate does.
"""

from pathlib import Path

import numpy as np
import torch

from utils.files import write_json
from utils.hashing import model_hash

GRID = np.linspace(-1, 1, 401)  # cosines
MAX_IMAGES = 1000  # of the validation split; they determine the rates to 0.1%
DIRECTIONS, RATES = ("text_to_image", "image_to_text"), ("true_positive_rate", "false_positive_rate")


def save_match_threshold(run, pairs, image_embeddings, text_embeddings):
    """Save the rates of a run after training, from the embeddings (N, D) and (T, D) of its validation split."""
    images = image_embeddings[:MAX_IMAGES]
    scores = text_embeddings[: pairs.caption_offsets[len(images)]] @ images.T
    rates = fit_rates(scores, matching_pairs(pairs, *scores.shape))
    write_json(Path(run) / f"index/match_threshold-{model_hash(run)[:8]}.json", rates)


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

"""When is a score a match? Learned from the validation split, where it is known which pictures and captions belong.

Cosine similarities mean little by themselves: what is high depends on the model and on how many pictures compete.
For every cosine on a grid this module notes two shares of the validation queries: those whose right answer scores at
least that, and those for which some wrong one does. In a gallery of another size n the second share grows as chances
do, 1 - (1 - share)^(n / n_validation), and the threshold is where the two kinds of error, averaged, are fewest.
"""

import contextlib

import numpy as np
import torch

from config import InputError, read_json, write_json
from dataset import load_splits
from index import embed_captions, embed_images

GRID = np.linspace(-1, 1, 401)  # cosines
WORTH_SAYING = 0.65  # the least share of right verdicts, on the validation split, with which they are given
FEWEST = 20  # pictures of the validation split from which anything is learned
MOST_IMAGES = 1000  # of the validation split: enough for shares to a tenth of a per cent


def belonging(captions, image_index, number):
    """(T, N) booleans: caption j, or one in the same words, belongs to image i."""
    same = {}
    for caption, image in zip(captions, image_index, strict=True):
        same.setdefault(plain(caption), set()).add(int(image))
    belongs = torch.zeros(len(captions), number, dtype=torch.bool)
    for j, caption in enumerate(captions):
        belongs[j, list(same[plain(caption)])] = True
    return belongs


def plain(caption):
    return " ".join(caption.lower().split())


def calibrate(scores, belongs):
    """What `threshold` needs, for captions that look for images and images that look for captions, JSON-ready.

    Args:
        scores: (T, N) cosines of validation captions and images. belongs: (T, N) booleans.
    """
    directions = {"text_to_image": (scores, belongs), "image_to_text": (scores.T, belongs.T)}
    calibration = {}
    for name, (s, right) in directions.items():
        best_right = s.masked_fill(~right, -2).amax(1)
        best_wrong = s.masked_fill(right, -2).amax(1)  # as if the right answers were taken out of the gallery
        calibration[name] = {
            "gallery": s.shape[1],
            "right": share_at_least(best_right),
            "wrong": share_at_least(best_wrong),
        }
    return calibration


def share_at_least(values):
    """For each cosine of the grid the share of values that are at least that, a list."""
    ordered = np.sort(values.double().cpu().numpy())
    return ((len(ordered) - np.searchsorted(ordered, GRID, side="left")) / len(ordered)).tolist()


def threshold(calibration, direction, number):
    """The cosine from which a result counts as a match among `number` pictures (or captions).

    None where the verdicts would be little better than a coin's, so many pictures, or so weak a model, that wrong
    ones score as high as right ones; or where too few validation pictures were there to tell.
    """
    known = calibration[direction]
    if min(one["gallery"] for one in calibration.values()) < FEWEST:
        return None
    quiet = (1 - np.array(known["wrong"])) ** (number / known["gallery"])  # nothing wrong reaches the cosine
    quality = np.array(known["right"]) + quiet
    if quality.max() / 2 < WORTH_SAYING:
        return None
    best = np.flatnonzero(quality >= quality.max() - 1e-9)
    return float(GRID[best[len(best) // 2]])  # the middle of a plateau


def calibration_of(runs):
    """The calibration of one run, or of several as one; made at first use. None without the validation pictures.

    It is kept beside the first run, in a file for this very set of models.
    """
    path = runs[0].folder / f"calibration-{'-'.join(run.digest[:8] for run in runs)}.json"
    with contextlib.suppress(InputError, KeyError, TypeError, ValueError):  # missing or damaged: made anew
        content = read_json(path)
        known = [content[name] for name in ("text_to_image", "image_to_text")]
        shares = np.array([one[kind] for one in known for kind in ("right", "wrong")], dtype=float)
        if shares.shape == (4, len(GRID)) and np.isfinite(shares).all() and all(one["gallery"] >= 1 for one in known):
            return content
    try:
        pairs = load_splits(runs[0].model.config)["validation"]
    except InputError:
        return None
    files = pairs.files[:MOST_IMAGES]
    captions = pairs.captions[: pairs.first[len(files)]]
    scores = sum(embed_captions(run.model, captions) @ embed_images(run.model, files).T for run in runs) / len(runs)
    content = calibrate(scores.cpu(), belonging(captions, pairs.image_index[: len(captions)], len(files)))
    with contextlib.suppress(OSError):  # a folder that cannot be written to: made anew next time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
    return content

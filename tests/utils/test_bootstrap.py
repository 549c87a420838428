"""Confidence intervals of recalls against their theory."""

import numpy as np
import pytest

from utils.bootstrap import bootstrap_intervals


def test_interval_of_independent_hits_is_the_binomial_one():
    rng = np.random.default_rng(0)
    found = rng.random(2000) < 0.3
    intervals = bootstrap_intervals({"R@1": (np.arange(2000), found)}, 2000)
    p = found.mean()
    assert intervals["R@1"] == pytest.approx(100 * 1.96 * np.sqrt(p * (1 - p) / 2000), rel=0.1)
    assert intervals["rsum"] == intervals["R@1"]


def test_captions_of_an_image_are_drawn_together():
    found = np.random.default_rng(0).random(400) < 0.5
    alone = bootstrap_intervals({"R@1": (np.arange(400), found)}, 400)["R@1"]
    repeated = bootstrap_intervals({"R@1": (np.repeat(np.arange(400), 5), np.repeat(found, 5))}, 400)["R@1"]
    assert repeated == pytest.approx(alone)  # five equal captions carry no more information than one


def test_interval_covers_the_mean_in_95_percent_of_cases():
    rng, covered = np.random.default_rng(1), 0
    for trial in range(200):
        found = rng.random(150) < 0.4
        half_width = bootstrap_intervals({"R@1": (np.arange(150), found)}, 150, num_draws=300, seed=trial)["R@1"]
        covered += abs(100 * found.mean() - 40) <= half_width
    assert 0.90 <= covered / 200 <= 0.99


def test_order_of_captions_and_unequal_counts_do_not_matter():
    rng = np.random.default_rng(2)
    images = np.concatenate([np.arange(50), rng.integers(0, 50, 70)])
    found = rng.random(120) < 0.5
    order = rng.permutation(120)
    expected = bootstrap_intervals({"R@5": (images, found)}, 50)
    assert bootstrap_intervals({"R@5": (images[order], found[order])}, 50) == expected


def test_interval_of_a_perfect_result_is_zero():
    assert bootstrap_intervals({"R@1": (np.arange(9), np.ones(9, bool))}, 9) == {"R@1": 0, "rsum": 0}

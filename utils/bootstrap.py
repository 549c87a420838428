"""Confidence intervals of recalls."""

import numpy as np

CHUNK = 2**24  # elements of the weight matrix at once


def bootstrap_intervals(hits, num_images, num_draws=1000, seed=0):
    """Half widths of 95% confidence intervals by the percentile bootstrap over images (Efron 1979), in points.

    An image is drawn with all its captions, whose hits are not independent.

    Args:
        hits: {metric: (image of each query, whether it is a hit)}, both (Q,).

    Returns:
        {metric: half width}, and "rsum" for the sum of all metrics.
    """
    columns = np.stack([np.bincount(images, hit, num_images) for images, hit in hits.values()], 1)  # (N, metrics)
    sizes = np.stack([np.bincount(images, minlength=num_images) for images, _ in hits.values()], 1)
    rng, recalls = np.random.default_rng(seed), []
    step = max(1, CHUNK // num_images)
    for start in range(0, num_draws, step):
        draws = min(step, num_draws - start)
        weights = rng.multinomial(num_images, np.full(num_images, 1 / num_images), draws).astype(float)  # (draws, N)
        recalls.append(100 * (weights @ columns) / (weights @ sizes))
    recalls = np.concatenate(recalls)  # (num_draws, metrics)
    recalls = np.column_stack([recalls, recalls.sum(1)])
    low, high = np.quantile(recalls, (0.025, 0.975), axis=0)
    return dict(zip([*hits, "rsum"], ((high - low) / 2).tolist(), strict=True))

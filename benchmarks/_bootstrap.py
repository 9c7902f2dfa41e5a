"""Paired bootstrap over scenes: is B better than A on the same scenes, and how sure is that?

A score is kept as sums, [N scenes, M parts, 2] = (sum of readings, number of readings), so that scenes with more
readings weigh more, as they do in the pooled score. Both sides resample the same scenes, which takes the difficulty of
a scene out of the difference (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13: percentiles).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Difference:
    """Pooled scores of both sides and after - before with its confidence interval."""

    before: float
    after: float
    difference: float
    low: float
    high: float
    count_before: int
    count_after: int


def pooled(sums: np.ndarray) -> np.ndarray:
    """Score of sums [..., N, M, 2]: per part the mean over all readings, then the mean over parts that have any."""
    total = sums.sum(axis=-3)
    count = total[..., 1]
    parts = np.divide(total[..., 0], count, out=np.full(count.shape, np.nan), where=count > 0)
    return np.nanmean(parts, axis=-1)


def paired_bootstrap(
    before: np.ndarray, after: np.ndarray, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Difference:
    """Both sides as sums [N, M, 2] of the same N scenes in the same order.

    Raises ValueError for shapes that differ, fewer than two scenes, or a side without a reading.
    """
    if before.shape != after.shape or before.ndim != 3 or before.shape[2] != 2:
        raise ValueError(f"both sides must be [scenes, parts, 2], got {before.shape} and {after.shape}")
    scenes = len(before)
    if scenes < 2:
        raise ValueError(f"{scenes} scene: a bootstrap needs at least two")
    if not before[..., 1].sum() or not after[..., 1].sum():
        raise ValueError("a side has no reading, so there is nothing to compare")
    rng = np.random.Generator(np.random.PCG64(seed))
    chosen = rng.integers(scenes, size=(resamples, scenes))
    differences = pooled(after[chosen]) - pooled(before[chosen])
    differences = differences[np.isfinite(differences)]  # a resample may hold scenes without readings only
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    a, b = float(pooled(before)), float(pooled(after))
    return Difference(a, b, b - a, float(low), float(high), int(before[..., 1].sum()), int(after[..., 1].sum()))


def paired_bootstrap_of(
    before: Callable[[np.ndarray], float],
    after: Callable[[np.ndarray], float],
    count: int,
    *,
    resamples: int = 1_000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """The same of any statistic of the chosen rows [N] of `count` prompts, such as a Frechet distance.

    A distance of a resample is biased, because some rows stand in it twice; the interval is centred on the difference.
    """
    if count < 2:
        raise ValueError(f"{count} prompt: a bootstrap needs at least two")
    rng = np.random.Generator(np.random.PCG64(seed))
    everything = np.arange(count)
    a, b = before(everything), after(everything)
    chosen = rng.integers(count, size=(resamples, count))
    differences = np.array([after(rows) - before(rows) for rows in chosen])
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2]) - (differences.mean() - (b - a))
    return Difference(a, b, b - a, float(low), float(high), count, count)

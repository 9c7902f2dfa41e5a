"""Frechet distance between two sets of clips in the space of what the judge reads.

d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2)   (Heusel et al. 2017, eq. 6, in the symmetric form, whose
square root is of a symmetric positive matrix and so needs no complex numbers).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from toyworld.judge_pixels import rgb_to_lab
from toyworld.judge_read import Reading
from toyworld.vocabulary import SHAPES

# One number each, all of order 1. Colours are CIELAB / 50; the character is the most legible one, zeros if none.
FEATURES: tuple[str, ...] = (
    "sky L", "sky a", "sky b", "ground L", "ground a", "ground b", "place cover",
    "characters per frame", "legibility", "similarity to its shape", "outlined",
    "colour L", "colour a", "colour b", "size * 5",
    "mean x", "mean y", "travel x", "travel y", "growth (log)", "path length",
    *(f"share of frames read as {shape}" for shape in SHAPES),
    "share of frames with marks",
)  # fmt: skip


def clip_features(reading: Reading) -> np.ndarray:
    """The documented feature vector of one read clip, float64 [len(FEATURES)]."""
    sky, ground = rgb_to_lab(reading.place_rgb) / 50.0
    head = [*sky, *ground, reading.place_confidence, sum(t.legibility for t in reading.tracks)]
    if not reading.tracks:
        return np.array([*head, *[0.0] * (len(FEATURES) - len(head))])
    track = max(reading.tracks, key=lambda t: (t.legibility, t.confidence.sum()))
    seen = np.flatnonzero(track.readable)
    x, y, size = track.x[seen], track.y[seen], np.log(np.maximum(track.scale[seen], 1e-3))
    marks = [p not in (None, "plain") for p in track.patterns]
    body = [
        track.legibility, float(track.confidence[seen].mean()), float(track.outlined), *(rgb_to_lab(track.rgb) / 50.0),
        track.size * 5.0, float(x.mean()), float(y.mean()), float(x[-1] - x[0]), float(y[-1] - y[0]),
        float(size[-1] - size[0]), float(np.hypot(np.diff(x), np.diff(y)).sum()),
        *(float(np.mean([s == shape for s in track.shapes])) for shape in SHAPES), float(np.mean(marks)),
    ]  # fmt: skip
    return np.array([*head, *body], dtype=np.float64)


def _root(matrix: np.ndarray) -> np.ndarray:
    """Square root of a symmetric positive semi-definite matrix by its eigenvalues."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def gaussian_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """Squared Frechet distance between two Gaussians (means [D], covariances [D,D]), in float64."""
    root = _root(np.asarray(cov1, np.float64))
    inner = root @ np.asarray(cov2, np.float64) @ root
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh((inner + inner.T) / 2), 0.0)).sum()
    gap = np.asarray(mean1, np.float64) - np.asarray(mean2, np.float64)
    return max(float(gap @ gap + np.trace(cov1) + np.trace(cov2) - 2.0 * cross), 0.0)


def sample_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance between the Gaussians fitted to samples [N,D] and [M,D]; N and M at least 2."""
    if min(len(a), len(b)) < 2:
        raise ValueError(f"samples of {len(a)} and {len(b)}: a covariance needs at least 2")
    return gaussian_distance(
        a.mean(0), np.atleast_2d(np.cov(a, rowvar=False)), b.mean(0), np.atleast_2d(np.cov(b, rowvar=False))
    )


@dataclass(frozen=True)
class FrechetDistance:
    """`floor`: what two samples of these sizes from the reference alone would show on average, because of their size.
    `low`, `high`: 95 % bootstrap interval of `value`."""

    value: float
    floor: float
    low: float
    high: float
    count: int
    reference_count: int


def frechet(features: np.ndarray, reference: np.ndarray, *, rounds: int = 200, seed: int = 0) -> FrechetDistance:
    """Squared Frechet distance of clips' features [N,D] from a reference's [M,D], with its floor and interval."""
    a, b = np.asarray(features, np.float64), np.asarray(reference, np.float64)
    value = sample_distance(a, b)
    rng = np.random.default_rng(seed)

    def draw(rows: np.ndarray, count: int) -> np.ndarray:
        return rows[rng.integers(len(rows), size=count)]

    floor = float(np.mean([sample_distance(draw(b, len(a)), draw(b, len(b))) for _ in range(rounds)]))
    spread = [sample_distance(draw(a, len(a)), draw(b, len(b))) for _ in range(rounds)]
    # the bootstrap adds the samples' own scatter once more; centre its interval on the value
    low, high = np.quantile(spread, [0.025, 0.975]) - (float(np.mean(spread)) - value)
    return FrechetDistance(value, floor, max(float(low), 0.0), float(high), len(a), len(b))

"""Paired bootstrap: pooling, pairing, coverage."""

from __future__ import annotations

import numpy as np
import pytest
from _bootstrap import paired_bootstrap, pooled


def one_part(values: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Per-scene means as sums [N,1,2]."""
    counts = np.ones(len(values)) if counts is None else counts
    return np.stack([values * counts, counts], axis=-1)[:, None]


def test_pooled_weighs_scenes_by_their_readings_and_parts_equally() -> None:
    sums = np.array([[[3.0, 3], [0.0, 1]], [[0.0, 1], [0.0, 0]]])  # part 0: 3 of 4, part 1: 0 of 1
    assert pooled(sums) == pytest.approx((0.75 + 0.0) / 2)


def test_pooled_leaves_out_parts_without_readings() -> None:
    assert pooled(np.array([[[1.0, 2], [0.0, 0]]])) == pytest.approx(0.5)


def test_equal_sides_differ_by_exactly_nothing() -> None:
    sums = one_part(np.random.default_rng(0).random(20))
    found = paired_bootstrap(sums, sums, resamples=200)
    assert (found.difference, found.low, found.high) == (0.0, 0.0, 0.0)


def test_pairing_takes_the_difficulty_of_scenes_out() -> None:
    rng = np.random.default_rng(1)
    before = rng.random(24)  # scenes differ widely, the gain is the same in all
    found = paired_bootstrap(one_part(before), one_part(before + 0.05), resamples=500)
    assert found.low == pytest.approx(0.05) and found.high == pytest.approx(0.05)
    shuffled = paired_bootstrap(one_part(before), one_part(rng.permutation(before) + 0.05), resamples=500)
    assert shuffled.low < 0 < shuffled.high  # without pairs the same gain is lost in the noise


def test_interval_covers_the_true_difference_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for trial in range(300):
        before = rng.normal(0.5, 0.2, 32)
        after = before + rng.normal(0.1, 0.15, 32)
        found = paired_bootstrap(one_part(before), one_part(after), resamples=300, seed=trial)
        hits += found.low <= 0.1 <= found.high
    assert 0.89 <= hits / 300 <= 0.98


def test_sign_and_counts() -> None:
    worse = paired_bootstrap(one_part(np.full(4, 0.9), np.full(4, 3.0)), one_part(np.full(4, 0.4)), resamples=50)
    assert worse.difference == pytest.approx(-0.5) and worse.high < 0
    assert (worse.count_before, worse.count_after) == (12, 4)


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [
        (np.zeros((4, 1, 2)), np.zeros((3, 1, 2)), "both sides"),
        (np.ones((1, 1, 2)), np.ones((1, 1, 2)), "at least two"),
        (np.zeros((4, 1, 2)), np.ones((4, 1, 2)), "no reading"),
    ],
)
def test_refuses_what_cannot_be_compared(before: np.ndarray, after: np.ndarray, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        paired_bootstrap(before, after)

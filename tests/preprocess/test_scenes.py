"""Scenes of consecutive shots: what looks alike stays together, and nothing is lost or torn out of order."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from preprocess.scenes import REACH, group_shots
from preprocess.signature import DIM


def signature(place: int, seed: int = 0) -> str:
    """Signatures of one place agree to about 0.9, those of two to about 0."""
    rng = np.random.default_rng(place)
    vector = rng.normal(size=DIM) + 0.3 * np.random.default_rng([place, seed]).normal(size=DIM)
    return base64.b64encode(np.rint(40 * vector / np.abs(vector).max()).astype(np.int8).tobytes()).decode()


def places(*named: int) -> list[str]:
    return ["" if place < 0 else signature(place, k) for k, place in enumerate(named)]


def test_a_scene_ends_where_nothing_comes_back() -> None:
    assert group_shots(places(1, 1, 1, 2, 2), 9) == [3, 2]
    assert group_shots(places(1, 2, 3), 9) == [1, 1, 1]


def test_a_conversation_is_one_scene() -> None:
    """Two pictures take turns: no shot looks like the one before it."""
    assert group_shots(places(1, 2, 1, 2, 1, 3, 4, 3), 9) == [5, 3]


def test_a_picture_comes_back_within_reach_only() -> None:
    between = list(range(10, 10 + REACH - 1))
    assert group_shots(places(1, *between, 1), 9) == [REACH + 1]
    assert group_shots(places(1, *between, 99, 1), 9) == [1] * (REACH + 2)


def test_shots_too_short_for_a_signature_stay_with_their_neighbours() -> None:
    assert group_shots(places(-1, 1, -1, 2, -1), 9) == [3, 2]
    assert group_shots(places(-1, -1), 9) == [2]
    assert group_shots([], 9) == []


@pytest.mark.parametrize("most", [1, 2, 4, 9])
def test_long_scenes_are_split_and_no_shot_is_lost(most: int) -> None:
    sizes = group_shots(places(*[1] * 10, *[2] * 3), most)
    assert sum(sizes) == 13 and max(sizes) <= most
    assert 10 in np.cumsum(sizes)  # the change of place is kept

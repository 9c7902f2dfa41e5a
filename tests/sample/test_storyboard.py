"""Storyboards: what is refused and why, and what decides a shot's noise."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from sample.generate import shot_generators
from sample.shot import nearest_frames
from sample.storyboard import Storyboard, StoryboardError, StoryboardShot, derive_seed

BOARD = Storyboard("walk", "[Story] A walk.", [StoryboardShot("one"), StoryboardShot("two", frames=9)])
SHOT = StoryboardShot("a")


def test_dict_round_trip_through_json() -> None:
    assert Storyboard.from_dict(json.loads(json.dumps(BOARD.to_dict()))) == BOARD


@pytest.mark.parametrize(
    ("board", "param", "word"),
    [
        (replace(BOARD, name="../up"), "name", "file name"),
        (replace(BOARD, name=""), "name", "file name"),
        (replace(BOARD, shots=[]), "shots", "no shots"),
        (replace(BOARD, shots=[StoryboardShot(" ")]), "shots.0.prompt", "write one"),
        (replace(BOARD, shots=[SHOT, StoryboardShot("b", frames=16)]), "shots.1.frames", "nearest is 17"),
        (replace(BOARD, shots=[StoryboardShot("a", frames=0)]), "shots.0.frames", "nearest is 1"),
        (replace(BOARD, shots=[SHOT] * 4), "shots", "at most 3"),
        (replace(BOARD, shots=[replace(SHOT, given="a.png")]), "shots", "nothing to make"),
        (replace(BOARD, shots=[replace(SHOT, given="a", first_frame="b")]), "shots.0.first_frame", "both"),
    ],
)  # fmt: skip
def test_errors_name_the_field(board: Storyboard, param: str, word: str) -> None:
    with pytest.raises(StoryboardError, match=word) as caught:
        board.validate(max_shots=3)
    assert caught.value.param == param
    BOARD.validate(max_shots=3)


def test_nearest_frames_is_of_the_form_4k_plus_1() -> None:
    assert [nearest_frames(n) for n in (0, 1, 2, 4, 16, 17, 18, 20)] == [1, 1, 1, 5, 17, 17, 17, 21]


def draw(generators: list[torch.Generator]) -> list[list[float]]:
    return [torch.randn(4, generator=generator).tolist() for generator in generators]


def test_seeds_decide_the_noise_of_each_shot() -> None:
    first, again, other = (
        draw(shot_generators(BOARD, 1)),
        draw(shot_generators(BOARD, 1)),
        draw(shot_generators(BOARD, 2)),
    )
    assert first == again and first[0] != other[0] and first[0] != first[1]
    pinned = replace(BOARD, shots=[BOARD.shots[0], replace(BOARD.shots[1], seed=5)])
    assert draw(shot_generators(pinned, 1))[1] == draw(shot_generators(pinned, 2))[1]
    assert draw(shot_generators(pinned, 1))[0] == first[0]


def test_derived_seeds_are_the_same_everywhere() -> None:
    assert derive_seed(0, 1) == 6096812863120040317
    assert 0 <= derive_seed("x") < 2**63


def test_fingerprint_changes_with_anything_that_decides_pixels() -> None:
    base = BOARD.fingerprint(seed=1, steps=4)
    assert base == BOARD.fingerprint(steps=4, seed=1)
    assert base != BOARD.fingerprint(seed=2, steps=4)
    assert base != replace(BOARD, story="").fingerprint(seed=1, steps=4)

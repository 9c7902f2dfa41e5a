"""Judge: scores of what was read against what a prompt asked for.

What cannot be read counts as wrong. Every score is a mean with the count it was taken over, so that scores of many
clips can be pooled. Directions: all shares and the state order are better high; state timing (frames) and unsaid
identity (1 = no memory, 0 = perfect) are better low.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from toyworld.judge_action import expected_labels, label_states, onsets, script, state_spans, without_camera
from toyworld.judge_read import Reading, Track, motion_of, read
from toyworld.words import CharacterWords, PlaceWords, ShotAttributes, shot_attributes
from toyworld.world import ToyScene


@dataclass(frozen=True)
class Score:
    """A mean and the number of things it was taken over."""

    value: float
    count: int = 1


Scores = dict[str, Score]
UNSAID_TRAITS = ("hue", "size", "stripe_angle", "landmark_x")


def summarise(scores: Iterable[Mapping[str, Score]]) -> dict[str, dict[str, float]]:
    """Pool the scores of many clips: {metric: {"value": mean, "count": number of things judged}}."""
    total: dict[str, float] = {}
    count: dict[str, int] = {}
    for one in scores:
        for name, score in one.items():
            total[name] = total.get(name, 0.0) + score.value * score.count
            count[name] = count.get(name, 0) + score.count
    return {name: {"value": total[name] / count[name], "count": count[name]} for name in total if count[name]}


def mean_score(values: Sequence[float]) -> Score:
    """Mean and count; 0 over nothing."""
    return Score(float(np.mean(values)) if values else 0.0, len(values))


# ------------------------------------------------------------------------------------------ one shot


def assign(reading: Reading, wanted: ShotAttributes) -> list[Track | None]:
    """For each wanted character the track that agrees best with it, no track twice; None where tracks run out."""

    def agreement(track: Track | None, who: CharacterWords) -> float:
        if track is None:
            return 0.0
        said = 2.0 * (track.colour == who.colour) + (track.shape == who.shape) + 0.5 * (track.pattern == who.pattern)
        return said + 0.1 * track.legibility + 0.1

    slots: list[Track | None] = [*reading.tracks, *[None] * len(wanted.characters)]
    best = max(
        permutations(range(len(slots)), len(wanted.characters)),
        key=lambda order: sum(agreement(slots[k], who) for k, who in zip(order, wanted.characters, strict=True)),
    )
    return [slots[k] for k in best]


def due_frames(wanted: ShotAttributes, judged: np.ndarray) -> np.ndarray:
    """Whether each wanted character should be in sight and is judged, bool [characters, T]."""
    due = np.repeat(judged[None], len(wanted.characters), axis=0)
    if wanted.action == "hide":
        due[0] &= script("hide", len(judged))[0].visible
    return due


def _has(track: Track | None, due: np.ndarray) -> bool:
    """Is there a track, readable in more than half of the frames in which it is due?"""
    return track is not None and float(track.readable[due].mean()) > 0.5


def has_colour(track: Track | None, who: CharacterWords, due: np.ndarray) -> bool:
    if track is None:
        return False
    right = np.array([c == who.colour for c in track.colours])
    return float(right[due].mean()) > 0.5


def has_shape(track: Track | None, who: CharacterWords, due: np.ndarray) -> bool:
    return track is not None and _has(track, due) and track.shape == who.shape


def has_pattern(track: Track | None, who: CharacterWords, due: np.ndarray, changes: bool) -> bool:
    """`changes`: the character turns striped in this shot, so only its beginning is compared."""
    if track is None or not _has(track, due):
        return False
    if not changes:
        return track.pattern == who.pattern
    early = [p for p in track.patterns[: int(0.45 * len(track.patterns))] if p is not None]
    return bool(early) and early.count(who.pattern) > len(early) / 2


def has_place(reading: Reading, place: PlaceWords) -> bool:
    return reading.place == place.name and reading.light == place.light


def has_landmark(reading: Reading, place: PlaceWords) -> bool:
    if reading.place is None or reading.landmark != place.landmark:
        return False
    return place.landmark == "none" or reading.landmark_side == place.side


def score_reading(reading: Reading, wanted: ShotAttributes) -> Scores:
    """Score one shot that has been read; see `score_clip`."""
    tracks = assign(reading, wanted)
    due = due_frames(wanted, reading.judged)
    in_sight = np.array([t.readable for t in reading.tracks]).reshape(-1, reading.num_frames).sum(0)
    cast = list(zip(tracks, wanted.characters, due, strict=True))
    changes = [wanted.action == "change" and k == 0 for k in range(len(cast))]
    scores = {
        "legibility": Score(float(np.minimum(in_sight, due.sum(0)).sum() / due.sum()), int(due.sum())),
        "colour": mean_score([has_colour(t, who, d) for t, who, d in cast]),
        "shape": mean_score([has_shape(t, who, d) for t, who, d in cast]),
        "pattern": mean_score([has_pattern(t, who, d, c) for (t, who, d), c in zip(cast, changes, strict=True)]),
        "place": Score(float(has_place(reading, wanted.place))),
        "style": Score(float(reading.style == wanted.style)),
        "landmark": Score(float(has_landmark(reading, wanted.place))),
        "action": Score(float(_has_action(reading, wanted, tracks))),
    }
    parts = [scores[name] for name in ("colour", "shape", "pattern", "place", "style", "landmark")]
    count = sum(s.count for s in parts)
    scores["attributes"] = Score(sum(s.value * s.count for s in parts) / count, count)
    scores["state_order"], scores["state_timing"] = _score_states(reading, wanted, tracks)
    return scores


def _has_action(reading: Reading, wanted: ShotAttributes, tracks: list[Track | None]) -> bool:
    """The right action by the right character. Approach and part look the same from either side."""
    seen = reading.action
    if seen.action != wanted.action or seen.actor is None:
        return False
    doers = [seen.actor] if seen.partner is None else [seen.actor, seen.partner]
    asked = tracks[: len(doers)]
    pairs = [reading.tracks[k] for k in doers]
    if wanted.action in ("approach", "part", "swap"):
        return all(any(p is a for a in asked) for p in pairs)
    return all(p is a for p, a in zip(pairs, asked, strict=True))


def _score_states(reading: Reading, wanted: ShotAttributes, tracks: list[Track | None]) -> tuple[Score, Score]:
    """(Kendall tau of the wanted states' order over pairs of frames, mean absolute error of their onsets in frames).

    A state that never shows adds nothing to the order and the shot's whole length to the error.
    """
    frames = reading.num_frames
    names = state_spans(wanted.action, frames)
    script_labels = expected_labels(wanted.action, frames)
    lost = Score(0.0), Score(float(frames), len(names) - 1)
    actor = tracks[0]
    partner = tracks[1] if wanted.partner is not None else None
    if actor is None or (wanted.partner is not None and partner is None):
        return lost
    steady = [without_camera(motion_of(t), reading.action.camera) for t in (actor, partner) if t is not None]
    labels = label_states(steady[0], wanted.action, steady[1] if len(steady) > 1 else None)
    got, expected = onsets(labels, len(names)), onsets(script_labels, len(names))
    errors = [
        float(frames) if g is None else float(abs(g - e))
        for g, e in zip(got[1:], expected[1:], strict=True)
        if e is not None
    ]
    return Score(min(_in_order(labels) / max(_in_order(script_labels), 1), 1.0)), mean_score(errors)


def _in_order(labels: np.ndarray) -> int:
    """Pairs of frames in the order of their states, less pairs in the wrong order; unread frames (-1) count nothing."""
    read_labels = labels[labels >= 0]
    return int(np.triu(np.sign(read_labels[None, :] - read_labels[:, None])).sum())


def score_clip(frames: np.ndarray, wanted: ToyScene | ShotAttributes, index: int = 0) -> Scores:
    """Score one shot, RGB [T,H,W,3] 0..255, against shot `index` of a scene or against parsed prompt attributes.

    legibility: share of due (frame, character) pairs with a readable character. colour, shape, pattern (per
    character), place, style, landmark, action (per shot): share right; attributes: all of these but action together.
    state_order: Kendall tau, -1..1; state_timing: frames.
    """
    return score_reading(read(frames), shot_attributes(wanted, index) if isinstance(wanted, ToyScene) else wanted)


def split_shots(frames: np.ndarray, cuts: Sequence[int]) -> list[np.ndarray]:
    """Cut frames [T,H,W,3] at the first frames of all shots but the first."""
    edges = [0, *cuts, len(frames)]
    if any(b <= a for a, b in zip(edges, edges[1:], strict=False)):
        raise ValueError(f"cuts {list(cuts)} of {len(frames)} frames: must rise, within 1..{len(frames) - 1}")
    return [frames[a:b] for a, b in zip(edges, edges[1:], strict=False)]

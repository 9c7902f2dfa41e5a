"""Judge: scores of what was read against what a prompt asked for.

What cannot be read counts as wrong. Every score is a mean with the count it was taken over, so that scores of many
clips can be pooled. Directions: all shares and the state order are better high; state timing (frames) and unsaid
identity (1 = no memory, 0 = perfect) are better low.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations

import numpy as np

from toyworld.judge_action import expected_labels, label_states, onsets, script, state_spans, without_camera
from toyworld.judge_pixels import SIDE, area_resize
from toyworld.judge_read import Reading, Track, motion_of, read
from toyworld.text import CharacterWords, PlaceWords, ShotAttributes, shot_attributes
from toyworld.world import ToyScene


@dataclass(frozen=True)
class Score:
    """A mean and the number of things it was taken over."""

    value: float
    count: int = 1


Scores = dict[str, Score]


def summarise(scores: Iterable[Mapping[str, Score]]) -> dict[str, dict[str, float]]:
    """Pool the scores of many clips: {metric: {"value": mean, "count": number of things judged}}."""
    total: dict[str, float] = {}
    count: dict[str, int] = {}
    for one in scores:
        for name, score in one.items():
            total[name] = total.get(name, 0.0) + score.value * score.count
            count[name] = count.get(name, 0) + score.count
    return {name: {"value": total[name] / count[name], "count": count[name]} for name in total if count[name]}


def _mean(values: Sequence[float]) -> Score:
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
        "colour": _mean([has_colour(t, who, d) for t, who, d in cast]),
        "shape": _mean([has_shape(t, who, d) for t, who, d in cast]),
        "pattern": _mean([has_pattern(t, who, d, c) for (t, who, d), c in zip(cast, changes, strict=True)]),
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
    return Score(min(_in_order(labels) / max(_in_order(script_labels), 1), 1.0)), _mean(errors)


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


# ------------------------------------------------------------------------------------------ whole scenes


@dataclass(frozen=True)
class SceneReading:
    """The shots of one generated scene as read, beside what was asked of each."""

    wanted: tuple[ShotAttributes, ...]
    places: tuple[int, ...]  # which place of the scene each shot is in
    readings: tuple[Reading, ...]


def split_shots(frames: np.ndarray, cuts: Sequence[int]) -> list[np.ndarray]:
    """Cut frames [T,H,W,3] at the first frames of all shots but the first."""
    edges = [0, *cuts, len(frames)]
    if any(b <= a for a, b in zip(edges, edges[1:], strict=False)):
        raise ValueError(f"cuts {list(cuts)} of {len(frames)} frames: must rise, within 1..{len(frames) - 1}")
    return [frames[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def read_scene(frames: np.ndarray, cuts: Sequence[int], scene: ToyScene) -> SceneReading:
    """Read every shot of a scene; frames of dissolves and fades, which show two shots at once, are left out.

    Raises ValueError where the number of shots differs from the scene's.
    """
    clips = split_shots(frames, cuts)
    if len(clips) != len(scene.shots):
        raise ValueError(f"{len(clips)} shots (cuts {list(cuts)}), but scene {scene.scene_id} has {len(scene.shots)}")
    readings = [read(clip, skip) for clip, skip in zip(clips, _blended(scene, [len(c) for c in clips]), strict=True)]
    return SceneReading(
        tuple(shot_attributes(scene, k) for k in range(len(clips))),
        tuple(s.place for s in scene.shots),
        tuple(readings),
    )


def _blended(scene: ToyScene, lengths: Sequence[int]) -> list[np.ndarray]:
    """Per shot which of its frames show another shot or black as well, bool [T]; at least half a shot is kept."""
    skips = [np.zeros(n, dtype=bool) for n in lengths]
    for k, shot in enumerate(scene.shots):
        if shot.transition == "dissolve":
            skips[k][: min(shot.transition_frames, lengths[k] // 2)] = True
        elif shot.transition == "fade":
            half = shot.transition_frames // 2
            skips[k][: min(half, lengths[k] // 4)] = True
            skips[k - 1][lengths[k - 1] - min(half, lengths[k - 1] // 4) :] = True
    return skips


@dataclass(frozen=True)
class _Appearance:
    """A character in one shot of a scene; `track` is None where it could not be found with all its said traits."""

    shot: int
    who: CharacterWords
    said: bool
    track: Track | None
    enlarged: float  # how much shot size and camera enlarge it on average


def _appearances(scene: SceneReading) -> dict[int, list[_Appearance]]:
    """Per character of the cast its appearances in order."""
    result: dict[int, list[_Appearance]] = {}
    for k, (wanted, reading) in enumerate(zip(scene.wanted, scene.readings, strict=True)):
        due = due_frames(wanted, reading.judged)
        enlarged = (1.4 if wanted.shot_size == "close" else 1.0) * (1.15 if wanted.camera.startswith("zoom") else 1.0)
        for c, (who, track) in enumerate(zip(wanted.characters, assign(reading, wanted), strict=True)):
            changes = wanted.action == "change" and c == 0
            said = (
                has_colour(track, who, due[c])
                and has_shape(track, who, due[c])
                and has_pattern(track, who, due[c], changes)
            )
            result.setdefault(wanted.ids[c], []).append(_Appearance(k, who, said, track if said else None, enlarged))
    return result


def score_scene_reading(scene: SceneReading) -> Scores:
    """Mean scores of the shots and the scores that compare shots; see `score_scene`."""
    shots = [score_reading(r, w) for r, w in zip(scene.readings, scene.wanted, strict=True)]
    scores = {name: Score(v["value"], int(v["count"])) for name, v in summarise(shots).items()}
    pairs, returns = [], []
    for seen in _appearances(scene).values():
        for a, b in combinations(seen, 2):
            agree = float(a.said and b.said)
            pairs.append(agree)
            if not any(a.shot < other.shot < b.shot for other in seen) and b.shot > a.shot + 1:
                returns.append(agree)
    scores["identity_said"] = _mean(pairs)
    scores["identity_said_return"] = _mean(returns)
    places = [
        float(all(has_place(scene.readings[k], scene.wanted[k].place) for k in (a, b)))
        for a, b in combinations(range(len(scene.places)), 2)
        if scene.places[a] == scene.places[b]
    ]
    scores["place_agreement"] = _mean(places)
    return scores


def score_scene(frames: np.ndarray, cuts: Sequence[int], scene: ToyScene) -> Scores:
    """Score a generated scene, RGB [T,H,W,3], whose shots but the first begin at `cuts`.

    The scores of `score_clip` over its shots, and: identity_said (share of pairs of shots with the same character in
    which colour, shape and pattern are right in both), identity_said_return (the same, over returns after an absence
    of at least one shot), place_agreement (share of pairs of shots in one place that both show it),
    cut_precision and cut_recall of the hard cuts seen in the pixels. Scores with count 0 do not apply.
    """
    scores = score_scene_reading(read_scene(frames, cuts, scene))
    hard = [start for start, shot in zip(scene.cuts, scene.shots[1:], strict=True) if shot.transition == "cut"]
    return {**scores, **score_cuts(frames, hard)}


UNSAID_TRAITS = ("hue", "size", "stripe_angle", "landmark_x")


def unsaid_traits(scene: SceneReading) -> list[dict[str, tuple[str, list[float | None]]]]:
    """Per subject (character or place) of a scene: {trait: (kind, value in each of its shots or None if unread)}.

    Only subjects in two shots or more. `kind` names what may be compared between scenes.
    """
    subjects: list[dict[str, tuple[str, list[float | None]]]] = []
    for seen in _appearances(scene).values():
        if len(seen) < 2:
            continue
        who = seen[0].who
        traits: dict[str, tuple[str, list[float | None]]] = {
            "hue": (who.colour, [a.track.hue_offset if a.track else None for a in seen]),
            "size": ("any", [a.track.size / a.enlarged if a.track else None for a in seen]),
        }
        if who.pattern == "striped":
            traits["stripe_angle"] = ("striped", [a.track.stripe_angle if a.track else None for a in seen])
        subjects.append(traits)
    for place in sorted(set(scene.places)):
        where = [k for k, p in enumerate(scene.places) if p == place]
        said = scene.wanted[where[0]].place
        if said.landmark != "none" and len(where) > 1:
            xs = [r.landmark_x if has_landmark(r, said) else None for r in (scene.readings[k] for k in where)]
            subjects.append({"landmark_x": (f"{said.landmark} {said.side}", xs)})
    return subjects


def _trait_distance(trait: str, a: float, b: float) -> float:
    if trait == "stripe_angle":
        return abs((a - b + 90.0) % 180.0 - 90.0)
    return abs(a - b)


def unsaid_identity(scenes: Sequence[SceneReading]) -> Scores:
    """How well the traits that no text mentions are kept from shot to shot, over several scenes.

    Per trait: mean distance between two shots of the same subject, over the mean distance between subjects of
    different scenes that sound the same. 1 = no memory of earlier shots, 0 = perfect. A pair in which the subject
    cannot be found with its said traits counts 1. `identity_unsaid` is the mean over traits; count = pairs of shots.
    Needs two scenes with the same kind of subject; a trait without them is left out.
    """
    subjects = [(k, s) for k, scene in enumerate(scenes) for s in unsaid_traits(scene)]
    scores: Scores = {}
    for trait in UNSAID_TRAITS:
        series = [(k, *s[trait]) for k, s in subjects if trait in s]
        between = [
            _trait_distance(trait, x, y)
            for (ka, kind_a, a), (kb, kind_b, b) in combinations(series, 2)
            if ka != kb and kind_a == kind_b
            for x in a
            for y in b
            if x is not None and y is not None
        ]
        if not between or float(np.mean(between)) <= 0:
            continue
        typical = float(np.mean(between))
        within = [
            1.0 if x is None or y is None else _trait_distance(trait, x, y) / typical
            for _, _, values in series
            for x, y in combinations(values, 2)
        ]
        scores[f"unsaid_{trait}"] = _mean(within)
    if scores:
        count = sum(s.count for s in scores.values())
        scores["identity_unsaid"] = Score(float(np.mean([s.value for s in scores.values()])), count)
    return scores


# ------------------------------------------------------------------------------------------ frames


def find_cuts(frames: np.ndarray) -> list[int]:
    """First frames of shots: where the step between two frames stands out from the steady steps around it.

    Larger or smaller: a character that turns back at a cut makes a smaller step. Cuts across which a character seems
    to move on at its own speed cannot be seen this way.
    """
    small = area_resize(frames, SIDE, SIDE)
    step = np.sqrt(((small[1:] - small[:-1]) ** 2).mean((1, 2, 3)))
    cuts: list[int] = []
    for t in range(len(step)):
        near = np.concatenate([step[max(t - 4, 0) : t], step[t + 1 : t + 5]])
        if len(near) < 4:
            continue
        usual = float(np.median(near))
        spread = 4.0 * float(np.median(np.abs(near - usual)))
        rises = step[t] > usual + max(spread, 0.3 * usual, 2.0) and step[t] > near.max()
        falls = step[t] < usual - max(spread, 0.3 * usual, 2.0) and step[t] < near.min()
        if rises or falls:
            cuts.append(t + 1)
    return cuts


def score_cuts(frames: np.ndarray, expected: Sequence[int]) -> Scores:
    """Precision and recall of the cuts seen in the pixels, to the frame."""
    found = find_cuts(frames)
    hits = len(set(found) & set(expected))
    return {
        "cut_precision": Score(hits / len(found) if found else 0.0, len(found)),
        "cut_recall": Score(hits / len(expected) if expected else 0.0, len(expected)),
    }


def psnr(given: np.ndarray, generated: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of frames 0..255; infinity when equal."""
    error = float(((np.asarray(given, np.float64) - np.asarray(generated, np.float64)) ** 2).mean())
    return float("inf") if error == 0 else 10.0 * float(np.log10(255.0**2 / error))


def continuity(frames: np.ndarray, given: Sequence[bool]) -> float:
    """Step between given and generated frames over the mean step elsewhere, for frames [T,H,W,3]; 1 is seamless.

    Raises ValueError if no given frame borders a generated one.
    """
    step = np.sqrt((np.diff(np.asarray(frames, np.float64), axis=0) ** 2).mean((1, 2, 3)))
    seam = np.asarray(given)[1:] != np.asarray(given)[:-1]
    if not seam.any():
        raise ValueError(f"given={list(given)}: no given frame borders a generated one")
    elsewhere = float(step[~seam].mean()) if (~seam).any() else 0.0
    return float(step[seam].mean()) / max(elsewhere, 1e-6)

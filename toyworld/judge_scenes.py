"""Judge: scores that compare the shots of a scene: identity said and unsaid, places, cuts, given frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from toyworld.judge_pixels import SIDE, area_resize
from toyworld.judge_read import Reading, Track, read
from toyworld.judge_score import (
    UNSAID_TRAITS,
    Score,
    Scores,
    assign,
    due_frames,
    has_colour,
    has_landmark,
    has_pattern,
    has_place,
    has_shape,
    mean_score,
    score_reading,
    split_shots,
    summarise,
)  # fmt: skip
from toyworld.words import CharacterWords, ShotAttributes, shot_attributes
from toyworld.world import ToyScene


@dataclass(frozen=True)
class SceneReading:
    """The shots of one generated scene as read, beside what was asked of each."""

    wanted: tuple[ShotAttributes, ...]
    places: tuple[int, ...]  # which place of the scene each shot is in
    readings: tuple[Reading, ...]


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
    scores["identity_said"] = mean_score(pairs)
    scores["identity_said_return"] = mean_score(returns)
    places = [
        float(all(has_place(scene.readings[k], scene.wanted[k].place) for k in (a, b)))
        for a, b in combinations(range(len(scene.places)), 2)
        if scene.places[a] == scene.places[b]
    ]
    scores["place_agreement"] = mean_score(places)
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


def trait_distance(trait: str, a: float, b: float) -> float:
    """Distance between two values of an unsaid trait; a stripe's angle repeats after 180 degrees."""
    if trait == "stripe_angle":
        return abs((a - b + 90.0) % 180.0 - 90.0)
    return abs(a - b)


def unsaid_sums(scenes: Sequence[SceneReading]) -> np.ndarray:
    """Per scene and trait of `UNSAID_TRAITS` the sum of its distances and their number, [scenes, traits, 2].

    One distance per pair of shots of a subject, over the mean distance between subjects of different scenes that sound
    the same: 1 = no memory of the other shot, 0 = perfect. A pair in which the subject cannot be found with its said
    traits counts 1. A trait that no two scenes share is left out (zeros), as is a pair that is read where no two
    scenes can be compared.
    """
    subjects = [(k, subject) for k, scene in enumerate(scenes) for subject in unsaid_traits(scene)]
    sums = np.zeros((len(scenes), len(UNSAID_TRAITS), 2))
    for part, trait in enumerate(UNSAID_TRAITS):
        series = [(k, *subject[trait]) for k, subject in subjects if trait in subject]
        alike = [
            (a, b) for (ka, kind_a, a), (kb, kind_b, b) in combinations(series, 2) if ka != kb and kind_a == kind_b
        ]
        if not alike:
            continue
        between = [
            trait_distance(trait, x, y) for a, b in alike for x in a for y in b if x is not None and y is not None
        ]
        typical = float(np.mean(between)) if between else 0.0
        for k, _, values in series:
            for x, y in combinations(values, 2):
                if x is None or y is None:
                    sums[k, part] += (1.0, 1)
                elif typical > 0:
                    sums[k, part] += (trait_distance(trait, x, y) / typical, 1)
    return sums


def unsaid_identity(scenes: Sequence[SceneReading]) -> Scores:
    """How well the traits that no text mentions are kept from shot to shot, over several scenes: see `unsaid_sums`.

    `unsaid_TRAIT` is the mean distance of a trait, `identity_unsaid` the mean over traits; count = pairs of shots.
    """
    totals = unsaid_sums(scenes).sum(axis=0)
    scores = {
        f"unsaid_{trait}": Score(float(total / count), int(count))
        for trait, (total, count) in zip(UNSAID_TRAITS, totals, strict=True)
        if count
    }
    if scores:
        count = sum(s.count for s in scores.values())
        scores["identity_unsaid"] = Score(float(np.mean([s.value for s in scores.values()])), count)
    return scores


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

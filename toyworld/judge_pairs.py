"""Judge: how a shot made from references (toyworld.pairs) agrees with them.

What the references show is checked against what is read in the made shot. What cannot be read counts as wrong.
"""

from __future__ import annotations

import numpy as np

from toyworld.judge_pixels import area_resize
from toyworld.judge_read import Reading, read
from toyworld.judge_scenes import psnr, trait_distance
from toyworld.judge_score import (
    Score,
    Scores,
    assign,
    due_frames,
    has_colour,
    has_landmark,
    has_pattern,
    has_shape,
    mean_score,
    score_reading,
)
from toyworld.pairs import PairRole, ToyPair, render_reference
from toyworld.render import CLOSE_FACTOR, render_scene
from toyworld.vocabulary import HUE_OFFSET_DEGREES, SIZE_RANGE
from toyworld.words import ShotAttributes, shot_attributes

# which attributes of the made shot each kind of reference shows
SHOWS: dict[PairRole, tuple[str, ...]] = {
    "portrait": ("colour", "shape", "pattern"),
    "place": ("place", "landmark"),
    "keyframe": ("colour", "shape", "pattern", "place", "landmark"),
    "source": ("colour", "shape", "pattern", "place", "landmark", "action"),
    "first_frame": ("colour", "shape", "pattern", "place", "landmark"),
    "action": ("action",),
}
# mean distance of two independent draws: a third of the range, a quarter of a circle
UNRELATED = {
    "hue": 2 * HUE_OFFSET_DEGREES / 3,
    "size": (SIZE_RANGE[1] - SIZE_RANGE[0]) / 3,
    "stripe_angle": 45.0,
    "landmark_x": 0.18 / 3,
}
LARGEST_PSNR = 60.0  # dB; equal frames have no finite one
ZOOM_FACTOR = 1.15  # mean enlargement of a zooming camera


def score_pair(frames: np.ndarray, pair: ToyPair) -> Scores:
    """Score a made shot, RGB [T,H,W,3] 0..255, at 64x64 or larger, against its pair.

    The scores of `score_clip` against the target, and:
    condition_fidelity: share of the attributes shown by the references that the shot has.
    identity: 1 if its character has colour, shape and pattern of the given one, else 0.
    style_error: share of frames, of those with a character due, that are not in the target's style.
    unsaid_hue, _size, _stripe_angle, _landmark_x: distance of what no text says from what the references show, over
        the mean distance of unrelated draws: 0 perfect, about 1 for a shot that never saw them; unread counts 1.
    frame_psnr: dB of the frames that were given (keyframes, first frame), at most 60.
    motion_error: mean distance of the character from where the source or the keyframes have it, in widths of the
        picture; a frame in which it is unread counts 1.
    Scores with count 0 do not apply.
    """
    wanted, reading = shot_attributes(pair.target, 0), read(frames)
    scores = score_reading(reading, wanted)
    shown = sorted({name for one in pair.references for name in SHOWS[one.role]})
    scores["condition_fidelity"] = mean_score([scores[name].value for name in shown])
    scores["identity"] = _identity(reading, wanted)
    scores["style_error"] = _style_error(np.asarray(frames), wanted)
    scores |= _unsaid(reading, wanted, pair, shown)
    scores["frame_psnr"] = _frame_psnr(np.asarray(frames), pair)
    scores["motion_error"] = _motion_error(reading, wanted, pair)
    return scores


def _identity(reading: Reading, wanted: ShotAttributes) -> Score:
    track, due = assign(reading, wanted)[0], due_frames(wanted, reading.judged)[0]
    who, changes = wanted.actor, wanted.action == "change"
    right = has_colour(track, who, due) and has_shape(track, who, due) and has_pattern(track, who, due, changes)
    return Score(float(right))


def _style_error(frames: np.ndarray, wanted: ShotAttributes) -> Score:
    due = due_frames(wanted, np.ones(len(frames), dtype=bool))[0]
    return mean_score([float(read(frames[t : t + 1]).style != wanted.style) for t in np.flatnonzero(due)])


def _unsaid(reading: Reading, wanted: ShotAttributes, pair: ToyPair, shown: list[str]) -> Scores:
    """Unsaid traits against the target's, which the references share."""
    who, place, shot = pair.target.characters[0], pair.target.places[0], pair.target.shots[0]
    track = assign(reading, wanted)[0]
    if track is not None and track.colour != who.colour:
        track = None  # another character: its hue and size are not those asked for
    enlarged = CLOSE_FACTOR if shot.shot_size == "close" else 1.0
    enlarged *= ZOOM_FACTOR if shot.camera.startswith("zoom") else 1.0
    found: dict[str, tuple[float, float | None]] = {}
    if "colour" in shown:
        found["hue"] = who.hue_offset, track.hue_offset if track else None
        found["size"] = who.size, track.size / enlarged if track else None
        if who.pattern == "striped":
            found["stripe_angle"] = who.stripe_angle, track.stripe_angle if track else None
    if "landmark" in shown and place.landmark != "none" and shot.camera == "static":
        found["landmark_x"] = place.landmark_x, reading.landmark_x if has_landmark(reading, wanted.place) else None
    return {
        f"unsaid_{trait}": Score(1.0 if seen is None else trait_distance(trait, true, seen) / UNRELATED[trait])
        for trait, (true, seen) in found.items()
    }


def _frame_psnr(frames: np.ndarray, pair: ToyPair) -> Score:
    """A made shot of another length is compared at the same share of its length."""
    size, last = min(frames.shape[1:3]), pair.target.shots[0].num_frames - 1
    values = []
    for one in pair.references:
        if one.frame is not None:
            made = frames[round(one.frame / last * (len(frames) - 1))]
            given = area_resize(render_reference(one, size), *frames.shape[1:3])[0]
            values.append(min(psnr(given, made), LARGEST_PSNR))
    return mean_score(values)


def _motion_error(reading: Reading, wanted: ShotAttributes, pair: ToyPair) -> Score:
    if not {one.role for one in pair.references} & {"source", "keyframe"}:
        return Score(0.0, 0)
    truth = [frame[0] for frame in render_scene(pair.target, 32)[1]]
    track, due = assign(reading, wanted)[0], due_frames(wanted, reading.judged)[0]
    errors = []
    for t in np.flatnonzero(due):
        true = truth[round(t / max(len(due) - 1, 1) * (len(truth) - 1))]
        seen = track is not None and bool(track.readable[t])
        far = np.hypot(track.x[t] - true["x"], track.y[t] - true["y"]) if track is not None and seen else 1.0
        errors.append(min(float(far), 1.0))
    return mean_score(errors)

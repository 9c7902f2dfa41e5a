"""Judge: from the RGB frames of one shot to a Reading of place, characters, action and states."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from toyworld.judge_action import ActionReading, Motion, read_action
from toyworld.judge_pattern import PatternReading, read_pattern
from toyworld.judge_pixels import (
    LANDMARK_CLASSES,
    SIDE,
    Background,
    alpha_of,
    area_resize,
    classify_pixels,
    name_colour,
    read_background,
    rgb_to_lab,
)  # fmt: skip
from toyworld.judge_shape import SYMMETRY, Match, match_shapes
from toyworld.render import PIXELATED_BLOCKS
from toyworld.vocabulary import COLOURS, SHAPES, Colour, Landmark, Light, Pattern, PlaceName, Shape, Side, Style

MIN_SIMILARITY = 0.65  # below this overlap with every template a mask has no readable shape
MAX_SOFTNESS = 1.0  # and so has one whose rim is as large as its body: blur must not pass for a picture
BODY_SIMILARITY = 0.45  # from here on it is a body, whose colour can be read even if its shape cannot
MIN_MASS = 12.0  # pixels at SIDE x SIDE that a character must cover
MIN_SHARE = 0.25  # a track is a character if readable in this share of the frames
MAX_TRACKS = 4
PIXELATED_SHARE = 0.8  # of all steps between neighbours that lie on the grid of blocks; a fair share is 0.5


@dataclass(frozen=True)
class Track:
    """One character over the T frames of a shot. Arrays [T]; positions and radius as shares of the frame.

    `readable` marks frames in which colour and shape could be read; all arrays but `colours` mean something only there.
    The named attributes are votes over the readable frames.
    """

    colour: Colour
    shape: Shape
    pattern: Pattern
    outlined: bool
    readable: np.ndarray
    colours: tuple[Colour | None, ...]
    shapes: tuple[Shape | None, ...]
    patterns: tuple[Pattern | None, ...]
    x: np.ndarray
    y: np.ndarray
    scale: np.ndarray
    angle: np.ndarray
    confidence: np.ndarray
    rgb: np.ndarray  # of the paint [3], 0..255
    hue_offset: float  # degrees from the named colour's hue
    size: float  # mean scale over the shot
    stripe_angle: float | None  # degrees, modulo 180 (striped) or 90 (dotted); None for plain

    @property
    def legibility(self) -> float:
        return float(self.readable.mean())


@dataclass(frozen=True)
class Reading:
    """All that the judge sees in one shot; None and empty where it cannot read."""

    num_frames: int
    judged: np.ndarray  # bool [T]: False for frames that the caller asked to skip
    place: PlaceName | None
    light: Light | None
    place_confidence: float
    place_rgb: np.ndarray  # top and bottom of the estimated empty place [2,3]
    landmark: Landmark
    landmark_side: Side | None
    landmark_x: float | None
    style: Style | None
    tracks: tuple[Track, ...]
    action: ActionReading


def read(frames: np.ndarray, skip: np.ndarray | None = None) -> Reading:
    """Read one shot, RGB [T,H,W,3] uint8 or float in 0..255, at 64x64 or larger.

    `skip` bool [T] marks frames not to be judged, such as those of a dissolve. Raises ValueError for another shape, a
    side under 64, or nothing left to judge.
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[3] != 3 or min(frames.shape[1:3]) < SIDE:
        raise ValueError(f"frames of shape {frames.shape}: the judge reads [T,H,W,3] with H and W of at least {SIDE}")
    judged = np.ones(len(frames), dtype=bool) if skip is None else ~np.asarray(skip, dtype=bool)
    if not judged.any():
        raise ValueError(f"skip marks all {len(frames)} frames: nothing is left to judge")
    kept = np.flatnonzero(judged)
    nearest = kept[np.argmin(np.abs(np.arange(len(frames))[:, None] - kept[None]), axis=1)]
    small = area_resize(frames, SIDE, SIDE)[nearest]  # a skipped frame is stood in for by the nearest judged one
    background = read_background(small)
    labels, cover = classify_pixels(small, background)
    tracks = _read_tracks(small, background, labels, cover, judged)
    action = read_action([motion_of(track) for track in tracks], background.horizon)
    landmark, landmark_x = _read_landmark(labels)
    return Reading(
        num_frames=len(frames),
        judged=judged,
        place=background.name,
        light=background.light,
        place_confidence=background.cover,
        place_rgb=background.image[:, [0, -1], 0].mean(0),
        landmark=landmark,
        landmark_side=None if landmark_x is None else "left" if landmark_x < 0.5 else "right",
        landmark_x=landmark_x,
        style=_read_style(small, background, tracks),
        tracks=tracks,
        action=action,
    )


def _read_tracks(
    frames: np.ndarray, background: Background, labels: np.ndarray, cover: np.ndarray, judged: np.ndarray
) -> tuple[Track, ...]:
    area = np.stack([((labels == k) * cover).sum((1, 2)) for k in range(len(COLOURS))])  # [8,T]
    present = (area > MIN_MASS).mean(1) >= MIN_SHARE
    candidates = [int(k) for k in np.argsort(-area.sum(1)) if present[k]][:MAX_TRACKS]
    tracks = [_read_track(frames, background, labels, k, judged) for k in candidates]
    return tuple(t for t in tracks if t is not None)


def _core_colour(pixels: np.ndarray) -> np.ndarray:
    """Colour of a character from its pixels [n,3]: its most colourful third, free of edges and light marks."""
    chroma = np.hypot(*rgb_to_lab(pixels)[:, 1:].T)
    top = pixels[chroma >= np.quantile(chroma, 0.67)]
    return np.median(top, axis=0)


def _read_track(
    frames: np.ndarray, background: Background, labels: np.ndarray, k: int, judged: np.ndarray
) -> Track | None:
    core = labels == k
    mine = frames[core]
    rgb = _core_colour(mine[:: max(len(mine) // 3000, 1)])
    name, hue_offset = name_colour(rgb)
    if name is None:
        return None
    plain, marked = alpha_of(frames, background, rgb, (labels >= 0) & ~core)
    match = match_shapes(plain, marked, core, MIN_MASS)
    if float(match.similarity.mean()) < 0.93:  # holes where the light marks of a pattern are?
        other = match_shapes(marked, marked, core, MIN_MASS)
        if other.similarity.mean() > match.similarity.mean() + 0.01:
            match = other
    colours: list[Colour | None] = []
    for t in range(len(frames)):
        pixels = frames[t][core[t]]
        colours.append(name_colour(_core_colour(pixels))[0] if len(pixels) >= 4 else None)
    is_body = judged & match.found & (match.similarity >= BODY_SIMILARITY)
    is_sharp = (match.similarity >= MIN_SIMILARITY) & (match.softness <= MAX_SOFTNESS)
    readable = is_body & is_sharp & np.array([c is not None for c in colours])
    if readable[judged].mean() < MIN_SHARE:
        return None
    weight = np.where(readable, match.similarity * np.clip(match.lead, 0.02, 0.2), 0.0)
    votes = np.bincount(match.shape, weights=weight, minlength=len(SHAPES))
    shape = SHAPES[int(np.argmax(votes))]
    pattern = read_pattern(frames, rgb, match, readable)
    large = weight * match.radius  # blur closes small outlines: larger frames know better
    hollow = match.outlined if pattern.pattern == "plain" else match.outlined_marked
    outlined = bool((large * hollow).sum() > 0.5 * large.sum())
    seen_colours: list[Colour] = [c for c, ok in zip(colours, readable, strict=True) if ok and c is not None]
    side = float(frames.shape[1])
    scale = match.radius / side
    return Track(
        colour=max(set(seen_colours), key=lambda c: (seen_colours.count(c), c == name)) or name,
        shape=shape,
        pattern=pattern.pattern,
        outlined=outlined,
        readable=readable,
        colours=tuple(c if ok else None for c, ok in zip(colours, is_body, strict=True)),
        shapes=tuple(SHAPES[s] if ok else None for s, ok in zip(match.shape, readable, strict=True)),
        patterns=tuple(p if ok else None for p, ok in zip(pattern.per_frame, readable, strict=True)),
        x=match.x / side,
        y=match.y / side,
        scale=scale,
        angle=_angle(match, shape, pattern),
        confidence=np.where(readable, match.similarity, 0.0),
        rgb=rgb,
        hue_offset=hue_offset,
        size=float(scale[readable].mean()),
        stripe_angle=pattern.angle,
    )


def _angle(match: Match, shape: Shape, pattern: PatternReading) -> np.ndarray:
    """Angle per frame; a round character shows it only by its stripes, which turn against it."""
    return -pattern.angles if shape == "circle" else match.angle


def motion_of(track: Track) -> Motion:
    period = SYMMETRY[track.shape]
    if track.shape == "circle":
        period = 180.0 if track.pattern == "striped" else 0.0
    return Motion(
        seen=track.readable,
        x=track.x,
        y=track.y,
        log_scale=np.log(np.maximum(track.scale, 1e-3)),
        angle=track.angle,
        angle_period=period,
        striped=np.array([p == "striped" for p in track.patterns]),
    )


# per landmark: the rows it may cover, the least share of the frame, the most its columns may scatter
_LANDMARKS: tuple[tuple[Landmark, tuple[float, float], float, float], ...] = (
    ("tree", (0.20, 0.95), 0.02, 0.17), ("house", (0.20, 0.95), 0.03, 0.17), ("moon", (0.0, 0.32), 0.004, 0.10),
)  # fmt: skip


def _read_landmark(labels: np.ndarray) -> tuple[Landmark, float | None]:
    """The landmark whose colours cover most, against the least it needs, and the column of its centre."""
    best: tuple[float, Landmark, float | None] = (1.0, "none", None)
    height, width = labels.shape[1:]
    column = (np.arange(width) + 0.5) / width
    for name, (top, bottom), least, scatter in _LANDMARKS:
        mask = (labels == LANDMARK_CLASSES[name])[:, int(top * height) : int(bottom * height)]
        share = float(np.median(mask.sum((1, 2)))) / (height * width) / least
        if share <= best[0]:
            continue
        middle = mask[len(mask) // 2].sum(0).astype(np.float64)
        centre = float(middle @ column / max(middle.sum(), 1.0))
        if math.sqrt(float(middle @ (column - centre) ** 2) / max(middle.sum(), 1.0)) <= scatter:
            best = (share, name, centre)
    return best[1], best[2]


def _read_style(frames: np.ndarray, background: Background, tracks: tuple[Track, ...]) -> Style | None:
    """Pixelated shows in the picture's grid, duotone in a grey place, outlined in the characters."""
    if background.name is None:
        return None
    at_edge = np.arange(1, SIDE) % (SIDE // PIXELATED_BLOCKS) == 0
    columns = np.abs(np.diff(frames, axis=2)).sum((0, 1, 3))  # step from column c to c+1, over all frames
    rows = np.abs(np.diff(frames, axis=1)).sum((0, 2, 3))
    if all(step.sum() > 0 and step[at_edge].sum() > PIXELATED_SHARE * step.sum() for step in (columns, rows)):
        return "pixelated"
    if background.duotone:
        return "duotone"
    if not tracks:
        return None
    return "outlined" if any(t.outlined for t in tracks) else "filled"  # blur closes outlines and opens none

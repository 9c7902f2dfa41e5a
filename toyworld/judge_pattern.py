"""Judge: plain, striped or dotted, and the direction of the marks, from the light marks inside a character."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from toyworld.judge_pixels import LIGHT_MIX
from toyworld.judge_shape import Match, shape_cover
from toyworld.render import OUTLINE_WIDTH
from toyworld.vocabulary import SHAPES, Pattern, Shape

GRID = 21  # samples across the body
REACH = 1.15  # half-width of the sampled square in radii
STEP = 5.0  # degrees between templates
MIN_CONTRAST = 0.025  # weakest spread of the marks (0: no marks, 1: pure colour beside pure light)
CLEAR_CONTRAST = 0.10  # from here on MIN_CORRELATION is enough; fainter marks must fit a template better
MIN_CORRELATION = {False: 0.48, True: 0.62}  # by outlined: a blurred outline alone reaches 0.6


@dataclass(frozen=True)
class PatternReading:
    pattern: Pattern
    per_frame: tuple[Pattern, ...]
    angles: np.ndarray  # direction of the marks per frame [T], degrees
    angle: float | None  # over the shot; None for plain


@cache
def _axes() -> tuple[np.ndarray, np.ndarray]:
    axis = np.linspace(-REACH, REACH, GRID)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return x.ravel(), y.ravel()


@cache
def _templates() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Marks as the renderer paints them -> (masks [P,GRID^2], is it striped [P], angle [P])."""
    x, y = _axes()
    masks, striped, angles = [], [], []
    for is_striped, turns in ((True, 180.0), (False, 90.0)):
        for angle in np.arange(0.0, turns, STEP):
            turn = np.radians(angle)
            u, v = x * np.cos(turn) + y * np.sin(turn), -x * np.sin(turn) + y * np.cos(turn)
            if is_striped:
                mark = 0.5 + (np.abs((u / 0.62) % 1.0 - 0.5) - 0.27) * 0.62 * 6.0
            else:
                mark = 0.5 + (0.30 - np.hypot((u / 0.66 + 0.5) % 1.0 - 0.5, (v / 0.66 + 0.5) % 1.0 - 0.5)) * 0.66 * 6.0
            masks.append(np.clip(mark, 0.0, 1.0))
            striped.append(is_striped)
            angles.append(angle)
    return np.stack(masks), np.array(striped), np.array(angles)


@cache
def _inside(shape: Shape, outlined: bool, angle: float) -> np.ndarray:
    """Samples well inside the paint [GRID^2], as weights."""
    x, y = _axes()
    cover = shape_cover(shape, outlined, x, y, angle, 1.0)  # 0.5 - distance
    margin = 0.18 * OUTLINE_WIDTH[shape] if outlined else 0.14
    return np.clip((cover - 0.5 - margin) * 20.0, 0.0, 1.0)


def _is_marked(contrast: np.ndarray, correlation: np.ndarray, outlined: bool) -> np.ndarray:
    needed = MIN_CORRELATION[outlined] + 3.0 * np.maximum(CLEAR_CONTRAST - contrast, 0.0)
    return (contrast > MIN_CONTRAST) & (correlation > needed)


def read_pattern(frames: np.ndarray, rgb: np.ndarray, match: Match, readable: np.ndarray) -> PatternReading:
    """Read the marks of one character of base colour `rgb` in float frames [T,H,W,3]."""
    count, height, width = frames.shape[:3]
    x, y = _axes()
    sx = np.clip(match.x[:, None] + x * match.radius[:, None] - 0.5, 0, width - 1.001)
    sy = np.clip(match.y[:, None] + y * match.radius[:, None] - 0.5, 0, height - 1.001)
    x0, y0 = sx.astype(int), sy.astype(int)
    fx, fy = (sx - x0)[..., None], (sy - y0)[..., None]
    n = np.arange(count)[:, None]
    top = frames[n, y0, x0] * (1 - fx) + frames[n, y0, x0 + 1] * fx
    low = frames[n, y0 + 1, x0] * (1 - fx) + frames[n, y0 + 1, x0 + 1] * fx
    pixels = top * (1 - fy) + low * fy  # [T,GRID^2,3]
    to_light = LIGHT_MIX * (255.0 - rgb)
    mark = np.clip(((pixels - rgb) @ to_light) / float((to_light**2).sum()), -0.5, 1.5)
    weight = np.stack([
        _inside(SHAPES[s], bool(o), float(a)) for s, o, a in zip(match.shape, match.outlined, match.angle, strict=True)
    ])  # fmt: skip
    total = np.maximum(weight.sum(1, keepdims=True), 1e-6)
    centred = mark - (weight * mark).sum(1, keepdims=True) / total
    contrast = np.sqrt((weight * centred**2).sum(1) / total[:, 0])
    masks, striped, angles = _templates()
    mean = weight @ masks.T / total
    variance = np.maximum(weight @ (masks**2).T / total - mean**2, 1e-6)
    covariance = (weight * centred) @ masks.T / total
    correlation = covariance / np.sqrt(variance) / np.maximum(contrast, 1e-6)[:, None]  # [T,P]
    outlined = bool(readable.any()) and bool(match.outlined[readable].mean() > 0.5)
    marked = _is_marked(contrast, correlation.max(1), outlined)
    if readable.any() and marked[readable].mean() <= 0.5:
        # marks that one frame shows too faintly may show in all frames together
        together = correlation[readable].mean(0).max()
        marked |= bool(_is_marked(contrast[readable].mean(), together, outlined)) & (contrast > MIN_CONTRAST)
    best_striped = correlation[:, striped].max(1)
    best_dotted = correlation[:, ~striped].max(1)
    # small bodies blur their marks: let the larger frames of a shot speak louder
    loud = np.where(readable & marked, match.radius**2, 0.0)
    is_striped = float((loud * (best_striped - best_dotted)).sum()) >= 0
    kind: Pattern = "striped" if is_striped else "dotted"
    per_frame: tuple[Pattern, ...] = tuple(kind if m else "plain" for m in marked)
    some = float(marked[readable].mean()) if readable.any() else 0.0
    members = np.flatnonzero(striped == is_striped)
    per_angle = angles[members[np.argmax(correlation[:, members], axis=1)]]
    if some <= 0.5:
        return PatternReading("plain", per_frame, per_angle, None)
    summed = (loud[:, None] * correlation[:, members]).sum(0)
    return PatternReading(kind, per_frame, per_angle, float(angles[members[int(np.argmax(summed))]]))

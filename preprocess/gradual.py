"""Dissolves and fades, read off a short stretch of luma pictures, float32 [pixels] each, and what is measured of them.

A dissolve runs on a straight line from one picture to the other, is explained by no motion, and is busier than what
is around it. A fade is a dip of brightness in which every picture is a darker print of the one beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from preprocess.pixels import change_between

# what they were chosen on: benchmarks/results/shots.md
LENGTHS = (4, 5, 6, 7, 8, 9, 11, 13, 16, 20, 24, 30, 36)  # of a dissolve, frames from one whole picture to the other
MIN_CHANGE = 4.0  # grey levels of luma between the ends of a dissolve
OFF_LINE = 0.25  # how far the share of the second picture may be from even growth
OFF_BLEND = 0.3  # of the change: what the average of the ends may leave unexplained
NO_MOTION = 0.7  # of the change from picture to picture: what motion must leave unexplained
BUSY = 1.05  # motion-free change inside over that outside, times one minus the worst of OFF_BLEND
LIGHT = 0.12  # of the change: what scaling the brighter picture leaves unexplained in a mere change of light
FADE_SIDE = 16  # frames within which a fade reaches its darkest
FADE_DEPTH = 2.2  # brightness on each side over brightness in the dip
FADE_DROP = 12.0  # grey levels from each side to the dip
FADE_EDGE = 0.93  # a fade begins where brightness leaves the last 7 % of its way
FADE_OTHER = 0.35  # of the drop: what may change other than by light


@dataclass(frozen=True)
class Gradual:
    """Frames start..end-1 are neither the old nor the new picture; the new shot is taken to begin at `at`."""

    at: int
    start: int
    end: int
    confidence: float


def find_dissolve(
    luma: Sequence[np.ndarray],
    pictures: Sequence[np.ndarray],
    end: int,
    length: int,
    residual: Callable[[int], float],
) -> Gradual | None:
    """A blend from picture end-length to picture `end`; two pictures before it and two after it must be there.

    `pictures`: those of `luma`, with their colour axes around 0, which light scales as it does luma.
    `residual(k)`: what motion does not explain between pictures k-1 and k, in grey levels; asked for only where all
    else speaks for a dissolve.
    """
    start = end - length
    if start < 2 or end + 2 >= len(luma):
        return None
    first, last = luma[start], luma[end]
    whole = mean_size(last - first)
    if whole < MIN_CHANGE:
        return None
    way = (last - first) / float((last - first) @ (last - first))
    if (luma[start - 2] - first) @ way < -1.0 / length or (luma[end + 2] - last) @ way > 1.0 / length:
        return None  # it goes on outside
    off = 0.0
    for k in sorted({max(1, length // 4), length // 2, length - max(1, length // 4)}):
        moved = luma[start + k] - first
        if abs(float(moved @ way) - k / length) > OFF_LINE:
            return None
        off = max(off, mean_size(moved - (k / length) * (last - first)) / whole)
        if off > OFF_BLEND:
            return None
    if _only_light_changes(pictures[start], pictures[end]):
        return None
    inside = np.array([residual(k) for k in range(start + 1, end + 1)])
    steps = [change_between(pictures[k - 1], pictures[k]) for k in range(start + 1, end + 1)]
    if inside.sum() < NO_MOTION * sum(steps):
        return None
    around = [*range(max(1, start - 2), start + 1), *range(end + 1, min(end + 4, len(luma)))]
    outside = np.array([residual(k) for k in around])
    busy = float(inside.mean() / (0.2 + outside.mean())) * (1.0 - off)
    if busy < BUSY or inside.max() > 2.5 * inside.mean():
        return None
    confidence = (1.0 - off) * whole / (whole + 10.0) * min(1.0, 0.5 * busy)
    return Gradual(start + (length + 1) // 2, start + 1, end, round(min(0.99, confidence), 4))


def find_fade(luma: Sequence[np.ndarray], brightness: Sequence[float], dip: int) -> Gradual | None:
    """The fade out and in again whose first darkest picture is `dip`: at least two pictures down and two up."""
    low = brightness[dip]
    if not 2 <= dip < len(luma) - 2 or not brightness[dip - 1] > low <= brightness[dip + 1]:
        return None
    first, last = dip, dip
    while first > max(0, dip - FADE_SIDE) and brightness[first - 1] >= brightness[first]:
        first -= 1
    while last + 1 < min(len(luma), dip + FADE_SIDE) and brightness[last + 1] >= brightness[last]:
        last += 1
    sides = brightness[first], brightness[last]
    if min(sides) < FADE_DEPTH * max(low, 1.0) or min(sides) - low < FADE_DROP:
        return None
    start = next(k for k in range(dip, first - 1, -1) if brightness[k] >= low + FADE_EDGE * (sides[0] - low)) + 1
    end = next(k for k in range(dip, last + 1) if brightness[k] >= low + FADE_EDGE * (sides[1] - low))
    if dip - start < 1 or end - dip < 2:
        return None
    other = [_other_than_light(luma[k - 1], luma[k]) for k in range(start, end + 1)]
    for drop, steps in ((sides[0] - low, other[: dip - start]), (sides[1] - low, other[dip + 2 - start :])):
        if sum(steps) > FADE_OTHER * drop:
            return None
    dark = [k for k in range(start, end) if brightness[k] <= low + 0.05 * (min(sides) - low)]
    if dark[-1] - dark[0] > 1:
        at = (dark[0] + dark[-1] + 1) // 2
    else:
        at = dip if other[dip - start] > other[dip + 1 - start] else dip + 1
    return Gradual(at, start, end, round(1.0 - max(low, 1.0) / min(sides), 4))


def mean_size(differences: np.ndarray) -> float:
    """Mean of the absolute values, float32 [pixels]; what numpy's `mean` gives for a fraction of its overhead."""
    total = np.add.reduce(np.abs(differences, out=differences))
    return float(np.float32(float(total) / differences.size))


def _other_than_light(before: np.ndarray, after: np.ndarray) -> float:
    """What is left of the change between two pictures when the brighter one may be darkened, grey levels."""
    darker, brighter = sorted((before, after), key=lambda picture: float(np.abs(picture).sum()))
    scale = float((darker * brighter).sum() / max(float((brighter * brighter).sum()), 1.0))
    return float(np.abs(darker - scale * brighter).mean())


def _only_light_changes(first: np.ndarray, last: np.ndarray) -> bool:
    """Whether one picture is the other made darker or brighter, black included: a fade's half, no blend of two."""
    first, last = first.astype(np.float32), last.astype(np.float32)
    return _other_than_light(first, last) < LIGHT * float(np.abs(last - first).mean())

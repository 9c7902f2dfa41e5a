"""Shot boundaries, found while the frames stream by: hard cuts, dissolves and fades, exact to the frame.

Works on the small stream [27,48,3] of every frame. A hard cut is a change that motion does not explain and that stands
out from its surroundings: frame differences pick candidates, a block of pixels is then looked for near its place in
the other frame, and what is found nowhere is compared with the same residual of the frames around. A dissolve is a
stretch whose middle is the average of its ends; a fade is a dip of brightness to a third and back. Decisions lag
`LOOKAHEAD` frames behind the newest frame, which bounds the memory.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from models.scene import Transition
from preprocess.pixels import TO_YCC

# chosen on ToyWorld and on annotated real clips, hard cuts at zero frames tolerance
SIDE = 5  # frames on each side that say how much change is normal
PEAK = 1.1  # a candidate differs more than both neighbours by this factor
MIN_CHANGE = 0.8  # grey levels, mean over pixels and channels: below it nothing is a cut
OVER_MAX = 1.4  # a cut's residual exceeds the largest one around (one neighbouring cut forgiven) by this factor
OVER_NEAR = 2.5  # and the mean of the two frames on each side by this one
MARGIN = 1.5  # grey levels on top of both
FLASH = 3  # frames: a change that is undone this soon is a flash, not a cut
REACH = 3  # pixels at 48x27 that motion may carry a block between two frames
DISSOLVES = (4, 6, 8, 12, 16, 24)  # lengths tried, frames
DISSOLVE_CHANGE = 4.0  # grey levels of luma between the ends of a dissolve
DISSOLVE_RESIDUAL = 0.22  # of that change: how far the middle may be from the average of the ends
LIGHT_RESIDUAL = 0.3  # of that change: what scaling the brighter picture leaves unexplained in a mere change of light
FADE_DEPTH = 3.0  # brightness on each side over brightness in the dip
FADE_SIDE = 16  # frames within which a fade reaches its dip
DARK = 40.0  # mean luma of a dip
LOOKAHEAD = max(max(DISSOLVES) + SIDE, 2 * FADE_SIDE) + 3

_SHIFTS = [
    (dy, dx) for dy in range(-REACH, REACH + 1) for dx in range(-REACH, REACH + 1) if abs(dy) + abs(dx) <= REACH + 1
]


def to_picture(small: np.ndarray) -> np.ndarray:
    """Luma and two colour axes, int16 [3,27,48], of a frame uint8 [27,48,3]."""
    return np.rint(np.moveaxis(small.astype(np.float32) @ TO_YCC.T, -1, 0)).astype(np.int16)


def change_between(before: np.ndarray, after: np.ndarray) -> float:
    """Mean difference of two pictures, in grey levels."""
    return float(np.abs(after - before).mean())


@dataclass(frozen=True)
class Boundary:
    """A new shot begins at frame `at`; frames start..end-1 belong to the transition (none for a cut)."""

    at: int
    start: int
    end: int
    transition: Transition
    confidence: float


class ShotDetector:
    """Feed every frame in order with `push`; `take` gives the boundaries that are final."""

    def __init__(self) -> None:
        self.count = 0
        self.pictures: deque[np.ndarray] = deque(maxlen=2 * LOOKAHEAD)  # int16 [3,27,48]: luma and two colour axes
        self.changes: deque[float] = deque(maxlen=2 * LOOKAHEAD)  # frame i against frame i-1
        self.brightness: deque[float] = deque(maxlen=2 * LOOKAHEAD)
        self._residuals: dict[int, float] = {}
        self._pending: list[Boundary] = []
        self._decided_to = -1  # last frame of the last boundary given out
        self._last_cut = -LOOKAHEAD
        self._finished = False

    def push(self, small: np.ndarray) -> float:
        """Take the next frame, uint8 [27,48,3]; returns its change against the frame before, in grey levels."""
        picture = to_picture(small)
        change = change_between(self.pictures[-1], picture) if self.pictures else 0.0
        self.pictures.append(picture)
        self.changes.append(change)
        self.brightness.append(float(picture[0].mean()))
        self.count += 1
        self._decide(self.count - 1 - SIDE)
        return change

    def finish(self) -> None:
        """No more frames: decide what was waiting for them."""
        for i in range(max(0, self.count - SIDE), self.count + FADE_SIDE):
            self._decide(i)
        self._finished = True

    @property
    def settled(self) -> int:
        """Frames before this one will see no further boundary."""
        return self.count if self._finished else max(0, self.count - LOOKAHEAD)

    def take(self) -> list[Boundary]:
        """Boundaries whose transition begins before `settled`, in order, each given once."""
        final = [b for b in self._pending if b.start < self.settled]
        self._pending = self._pending[len(final) :]
        if final:
            self._decided_to = max(final[-1].at, final[-1].end)
        return final

    # ------------------------------------------------------------------ decisions

    def _slot(self, i: int) -> int:
        """Position of frame `i` in the bounded history; negative when it has gone."""
        return i - (self.count - len(self.changes))

    def _decide(self, i: int) -> None:
        """What ends at frame i, whose SIDE followers are known, and the fade whose FADE_SIDE followers are known."""
        self._residuals.pop(i - LOOKAHEAD, None)
        gradual = [self._fade(i + SIDE - FADE_SIDE)]
        if 1 <= i < self.count and self._slot(i) >= 1:
            confidence = self._cut(i)
            if confidence > 0:
                self._last_cut = i
                gradual.append(Boundary(i, i, i, "cut", confidence))
            else:
                gradual += [self._dissolve(i, length) for length in DISSOLVES]
        for boundary in gradual:
            if boundary is not None:
                self._add(boundary)

    def _add(self, new: Boundary) -> None:
        """Keep one boundary per place: a fade before what else its steps look like, then the more confident one."""
        if new.start <= self._decided_to:
            return
        rivals = [old for old in self._pending if old.start <= new.end + 1 and new.start <= old.end + 1]
        for old in rivals:
            if old.transition == "fade" or (new.transition != "fade" and old.confidence >= new.confidence):
                return
        self._pending = sorted([b for b in self._pending if b not in rivals] + [new], key=lambda b: b.at)

    def _cut(self, i: int) -> float:
        """Confidence that a new shot begins at frame i by a hard cut; 0 if not."""
        at = self._slot(i)
        change = self.changes[at]
        beside = max(
            self.changes[at - 1] if i > 1 else 0.0, self.changes[at + 1] if at + 1 < len(self.changes) else 0.0
        )
        if change < max(MIN_CHANGE, PEAK * beside):
            return 0.0
        residual = self._residual(i)
        near = self._around(i, 2)
        needed = OVER_NEAR * (sum(near) / len(near) if near else 0.0) + MARGIN
        if residual < needed:
            return 0.0
        wide = sorted(self._around(i, SIDE))
        calm = wide[:-1] if len(wide) > 4 else wide
        needed = max(needed, OVER_MAX * max(calm, default=0.0) + MARGIN)
        if residual < needed or self._flash(at, change):
            return 0.0
        return round(1.0 - 0.5 * needed / residual, 4)

    def _around(self, i: int, side: int) -> list[float]:
        """Residuals of up to `side` frames on each side of frame i."""
        first, last = max(1, i - side, self.count - len(self.pictures) + 1), min(self.count - 1, i + side)
        return [self._residual(k) for k in range(first, last + 1) if k != i]

    def _residual(self, i: int) -> float:
        """What motion does not explain between frames i-1 and i, in grey levels; the worse of both directions."""
        if i not in self._residuals:
            at = self._slot(i)
            change = self.changes[at]
            before, after = self.pictures[at - 1], self.pictures[at]
            self._residuals[i] = (
                change if change < MIN_CHANGE else max(_unexplained(before, after), _unexplained(after, before))
            )
        return self._residuals[i]

    def _flash(self, at: int, change: float) -> bool:
        before = self.pictures[at - 1]
        after = [self.pictures[k] for k in range(at + 1, min(at + 1 + FLASH, len(self.pictures)))]
        return any(float(np.abs(before - picture).mean()) < 0.35 * change for picture in after)

    def _fade(self, i: int) -> Boundary | None:
        """A dip of brightness whose darkest frame is i: at least two frames down and two up, each to a third."""
        at, bright = self._slot(i), list(self.brightness)
        if not 2 <= at < len(bright) - 2:
            return None
        low = bright[at]
        if low > DARK or not bright[at - 1] > low <= bright[at + 1]:
            return None
        down, up = at, at
        while down > max(0, at - FADE_SIDE) and bright[down - 1] > bright[down]:
            down -= 1
        while up + 1 < min(len(bright), at + FADE_SIDE) and bright[up + 1] >= bright[up]:
            up += 1
        sides = min(bright[down], bright[up])
        if at - down < 2 or up - at < 2 or sides < FADE_DEPTH * max(low, 1.0):
            return None
        offset = i - at
        return Boundary(i + 1, down + offset + 1, up + offset, "fade", round(1.0 - max(low, 1.0) / sides, 4))

    def _dissolve(self, end: int, length: int) -> Boundary | None:
        """A blend from frame end-length to frame `end`: its middle and quarters are averages of its ends."""
        at, start = self._slot(end), self._slot(end - length)
        if start < 3 or end - length <= self._last_cut <= end:
            return None
        first, last = self.pictures[start][0].astype(np.float32), self.pictures[at][0]
        whole = float(np.abs(last - first).mean())
        if whole < DISSOLVE_CHANGE:
            return None
        for k in (length // 4, length // 2, 3 * length // 4):
            blend = first + k / length * (last - first)
            if float(np.abs(self.pictures[start + k][0] - blend).mean()) > DISSOLVE_RESIDUAL * whole:
                return None
        if _only_light_changes(first, last, whole):
            return None
        changes = list(self.changes)
        inside = np.array(changes[start + 1 : at + 1])
        outside = np.array(changes[max(1, start - 2) : start + 1] + changes[at + 1 : at + 4])
        if inside.max() > 2.5 * inside.mean() or inside.mean() < 1.5 * (outside.mean() + 0.2):
            return None
        middle = end - length + (length + 1) // 2
        return Boundary(middle, end - length + 1, end, "dissolve", round(min(0.99, whole / (whole + 10.0)), 4))


def _only_light_changes(first: np.ndarray, last: np.ndarray, whole: float) -> bool:
    """Whether one picture is the other made darker or brighter, black included: a fade's half, no blend of two."""
    darker, brighter = sorted((first, last), key=lambda luma: float(luma.mean()))
    scale = float((darker * brighter).sum() / max(float((brighter * brighter).sum()), 1.0))
    return float(np.abs(darker - scale * brighter).mean()) < LIGHT_RESIDUAL * whole


def _unexplained(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over `b` of the best match of each 3x3 block of b within REACH pixels in `a`; int16 [3,27,48] each."""
    height, width = b.shape[1:]
    wide = np.pad(a, ((0, 0), (REACH + 1, REACH + 1), (REACH + 1, REACH + 1)), mode="edge")
    block = np.pad(b, ((0, 0), (1, 1), (1, 1)), mode="edge")
    best = np.full((height, width), np.iinfo(np.int16).max, np.int16)
    for dy, dx in _SHIFTS:
        there = wide[:, REACH + dy : REACH + dy + height + 2, REACH + dx : REACH + dx + width + 2]
        difference = np.abs(there - block).sum(0, dtype=np.int16)
        rows = difference[:-2] + difference[1:-1] + difference[2:]
        np.minimum(best, rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:], out=best)
    inside = best[REACH:-REACH, REACH:-REACH]  # what enters over the edge of the picture is no cut
    return float(inside.mean()) / 27.0  # 3 channels, 3x3 pixels

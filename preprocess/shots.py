"""Shot boundaries, found while the frames stream by: hard cuts, dissolves and fades, exact to the frame.

Works on the small stream [27,48,3] of every frame. A hard cut is a change that stands out from the changes around it:
the threshold adapts to the motion of the place. A dissolve is a stretch whose middle is the average of its ends; a fade
is a dip of brightness to a third or less and back. Decisions lag `LOOKAHEAD` frames behind the newest frame, which
bounds the memory.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from models.scene import Transition

SIDE = 5  # frames on each side that say how much change is normal
MIN_CHANGE = 3.0  # grey levels, mean over pixels and channels: below it nothing is a cut
OVER_MAX = 1.6  # a cut exceeds the largest change around it (one neighbouring cut forgiven) by this factor
OVER_MEAN = 2.0  # and the mean of the two frames on each side by this one
OVER_SPREAD = 3.0  # and the mean around it by this many standard deviations
FLASH = 3  # frames: a change that is undone this soon is a flash, not a cut
DISSOLVES = (4, 6, 8, 12, 16, 24)  # lengths tried, frames
DISSOLVE_CHANGE = 8.0  # grey levels between the ends of a dissolve
DISSOLVE_RESIDUAL = 0.22  # of that change: how far the middle may be from the average of the ends
FADE_DEPTH = 3.0  # brightness on each side over brightness in the dip
FADE_SIDE = 16  # frames within which a fade reaches its dip
DARK = 40.0  # mean luma of a dip
LOOKAHEAD = max(DISSOLVES) + SIDE + 3

_TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]], np.float32).T


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
        self.changes: deque[float] = deque(maxlen=2 * LOOKAHEAD)  # change[i] is frame i against frame i-1
        self.lumas: deque[np.ndarray] = deque(maxlen=2 * LOOKAHEAD)
        self.brightness: deque[float] = deque(maxlen=2 * LOOKAHEAD)
        self._previous: np.ndarray | None = None
        self._pending: list[Boundary] = []
        self._last_cut = -LOOKAHEAD
        self._finished = False

    def push(self, small: np.ndarray) -> float:
        """Take the next frame, uint8 [27,48,3]; returns its change against the frame before, in grey levels."""
        picture = small.astype(np.float32) @ _TO_YCC
        change = 0.0 if self._previous is None else float(np.abs(picture - self._previous).mean())
        self._previous = picture
        self.changes.append(change)
        self.lumas.append(picture[..., 0].copy())
        self.brightness.append(float(picture[..., 0].mean()))
        self.count += 1
        self._decide(self.count - 1 - SIDE)
        return change

    def finish(self) -> None:
        """No more frames: decide what was waiting for them."""
        for i in range(max(0, self.count - SIDE), self.count):
            self._decide(i)
        self._finished = True

    @property
    def settled(self) -> int:
        """Frames before this one will see no further boundary."""
        return self.count if self._finished else max(0, self.count - LOOKAHEAD)

    def take(self) -> list[Boundary]:
        """Boundaries whose transition begins before `settled`, in order, each given once."""
        final = [b for b in self._pending if b.start < self.settled]
        self._pending = [b for b in self._pending if b.start >= self.settled]
        return final

    # ------------------------------------------------------------------ decisions

    def _slot(self, i: int) -> int:
        """Position of frame `i` in the bounded history; negative when it has gone."""
        return i - (self.count - len(self.changes))

    def _decide(self, i: int) -> None:
        if i < 1 or self._slot(i) < 1:
            return
        confidence = self._cut(i)
        if confidence > 0:
            self._add(Boundary(i, i, i, "cut", confidence))
            self._last_cut = i
        else:
            fade = self._fade(i)
            if fade is not None:
                self._add(fade)
            for length in DISSOLVES:
                dissolve = self._dissolve(i, length)
                if dissolve is not None:
                    self._add(dissolve)

    def _add(self, new: Boundary) -> None:
        """Keep one boundary per place: a fade over a cut in it, then the more confident one."""
        for old in [b for b in self._pending if b.start <= new.end and new.start <= b.end]:
            keeps_old = old.confidence >= new.confidence and not (new.transition == "fade" and old.transition == "cut")
            if keeps_old:
                return
            self._pending.remove(old)
        self._pending.append(new)
        self._pending.sort(key=lambda b: b.at)

    def _around(self, i: int, side: int) -> np.ndarray:
        changes = list(self.changes)
        at = self._slot(i)
        first = max(1 if self._slot(0) >= 0 else 0, at - side)
        return np.array(changes[first:at] + changes[at + 1 : at + 1 + side])

    def _cut(self, i: int) -> float:
        """Confidence that a new shot begins at frame i by a hard cut; 0 if not."""
        change = self.changes[self._slot(i)]
        if change < MIN_CHANGE:
            return 0.0
        wide, near = self._around(i, SIDE), self._around(i, 2)
        if len(wide) == 0:
            return 0.0
        calm = np.sort(wide)[:-1] if len(wide) > 4 else wide
        needed = max(
            OVER_MAX * calm.max() + 0.3,
            calm.mean() + OVER_SPREAD * (calm.std() + 0.1),
            OVER_MEAN * (near.mean() + 0.2),
            MIN_CHANGE,
        )
        if change < needed or self._flash(i, change):
            return 0.0
        return float(round(1.0 - 0.5 * needed / change, 4))

    def _flash(self, i: int, change: float) -> bool:
        at = self._slot(i)
        before = self.lumas[at - 1]
        after = [self.lumas[k] for k in range(at + 1, min(at + 1 + FLASH, len(self.lumas)))]
        return any(float(np.abs(before - luma).mean()) < 0.35 * change for luma in after)

    def _fade(self, i: int) -> Boundary | None:
        """A dip of brightness whose darkest frame is i: at least two frames down and two up, each to a third."""
        at, bright = self._slot(i), list(self.brightness)
        low = bright[at]
        if low > DARK or at < 2 or not low < bright[at - 1] or not (at + 1 < len(bright) and low <= bright[at + 1]):
            return None
        down, up = at, at
        while down > max(0, at - FADE_SIDE) and bright[down - 1] > bright[down]:
            down -= 1
        while up + 1 < min(len(bright), at + FADE_SIDE) and bright[up + 1] >= bright[up]:
            up += 1
        if at - down < 2 or up - at < 2 or min(bright[down], bright[up]) < FADE_DEPTH * max(low, 1.0):
            return None
        offset = i - at
        where = i + 1 if bright[at + 1] > low * 1.02 else i + 1
        depth = max(low, 1.0) / min(bright[down], bright[up])
        return Boundary(where, down + offset + 1, up + offset, "fade", round(1.0 - depth, 4))

    def _dissolve(self, end: int, length: int) -> Boundary | None:
        """A blend from frame end-length to frame `end`: its middle and quarters are averages of its ends."""
        at, start = self._slot(end), self._slot(end - length)
        if start < 3 or end - length <= self._last_cut <= end:
            return None
        first, last = self.lumas[start], self.lumas[at]
        whole = float(np.abs(last - first).mean())
        if whole < DISSOLVE_CHANGE:
            return None
        for k in (length // 4, length // 2, 3 * length // 4):
            share = k / length
            blend = first + share * (last - first)
            if float(np.abs(self.lumas[start + k] - blend).mean()) > DISSOLVE_RESIDUAL * whole:
                return None
        changes = list(self.changes)
        inside = np.array(changes[start + 1 : at + 1])
        outside = np.array(changes[max(1, start - 2) : start + 1] + changes[at + 1 : at + 4])
        if inside.max() > 2.5 * inside.mean() or inside.mean() < 1.5 * (outside.mean() + 0.2):
            return None
        middle = end - length + (length + 1) // 2
        return Boundary(middle, end - length + 1, end, "dissolve", round(min(0.99, whole / (whole + 10.0)), 4))

"""Shot boundaries, found while the frames stream by: hard cuts, dissolves and fades, exact to the frame.

Works on the small stream [27,48,3] of every frame. A hard cut is a change that motion does not explain and that stands
out from its surroundings, or a break in otherwise steady motion. Dissolves and fades: `preprocess.gradual`. Decisions
lag `LOOKAHEAD` frames behind the newest frame, which bounds the memory.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from dataclasses import dataclass
from statistics import median

import numpy as np

from models.scene import Transition
from preprocess.blocks import uneven, unexplained
from preprocess.gradual import FADE_SIDE, LENGTHS, Gradual, find_dissolve, find_fade
from preprocess.pixels import change_between, to_picture

# what they were chosen on: benchmarks/results/shots.md
SIDE = 5  # frames on each side that say how much change is normal
PEAK = 1.1  # a candidate differs more than both neighbours by this factor
MIN_CHANGE = 0.8  # grey levels, mean over pixels and channels: below it nothing is a cut
OVER_MAX = 1.4  # a cut's residual exceeds the largest one around (one neighbouring cut forgiven) by this factor
OVER_NEAR = 2.5  # and the mean of the two frames on each side by this one
MARGIN = 1.5  # grey levels on top of both
MARGIN_PLAIN = 0.5  # the same where the worst is plain: a key frame of the encoder changes all a little, a cut much
PLAIN = 24.0  # grey levels of what is explained worst
NEAR_MISS = 0.6  # of the residual that a cut needs: from here on another detector may be asked
FLASH = 3  # frames: a change that is undone this soon is a flash, not a cut
STEADY = 1.5  # motion is steady where changes on one side differ by no more than this factor
STEADY_CHANGE = 0.7  # grey levels: less is no motion
TURN_OVER = 1.4  # a break in steady motion exceeds the largest unevenness around by this factor
TURN_MARGIN = 0.1  # and grey levels on top
TURN_STEPS = 0.15  # by this much the way of three frames over a break differs from that beside it, or it is none
TURN_SIDE = 4  # frames on each side that are compared
LOOKAHEAD = max(max(LENGTHS) + SIDE, 2 * FADE_SIDE) + 3


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
        self.luma: deque[np.ndarray] = deque(maxlen=2 * LOOKAHEAD)  # float32 [1296]
        self.changes: deque[float] = deque(maxlen=2 * LOOKAHEAD)  # frame i against frame i-1
        self.brightness: deque[float] = deque(maxlen=2 * LOOKAHEAD)
        self._residuals: dict[int, tuple[float, float]] = {}
        self._unevenness: dict[int, float] = {}
        self._pending: list[Boundary] = []
        self._near_misses: list[int] = []
        self._decided_to = -1  # last frame of the last boundary given out
        self._last_cut = -LOOKAHEAD
        self._finished = False

    def push(self, small: np.ndarray) -> float:
        """Take the next frame, uint8 [27,48,3]; returns its change against the frame before, in grey levels."""
        picture = to_picture(small)
        change = change_between(self.pictures[-1], picture) if self.pictures else 0.0
        self.pictures.append(picture)
        self.luma.append(picture[0].ravel().astype(np.float32))
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

    def state(self) -> str:
        """Hash of all that later decisions depend on. Two detectors in one state go on alike, whatever each saw before.

        2 * LOOKAHEAD frames after the last that they did not both see, they are in one state, but for a chain of
        boundaries so dense that each suppresses the next.
        """
        known = [
            [b.at - self.count, b.start - self.count, b.end - self.count, b.transition, b.confidence]
            for b in self._pending
        ]
        reach = [max(at - self.count, -2 * LOOKAHEAD) for at in (self._last_cut, self._decided_to)]
        digest = hashlib.sha256(json.dumps([known, reach]).encode())
        for picture in self.pictures:
            digest.update(picture.tobytes())
        return digest.hexdigest()

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

    def take_near_misses(self) -> list[int]:
        """Frames before `settled` that nearly were cuts, in order, each given once."""
        final = [i for i in self._near_misses if i < self.settled]
        self._near_misses = self._near_misses[len(final) :]
        return final

    # ------------------------------------------------------------------ decisions

    def _slot(self, i: int) -> int:
        """Position of frame `i` in the bounded history; negative when it has gone."""
        return i - (self.count - len(self.changes))

    def _decide(self, i: int) -> None:
        """What ends at frame i, whose SIDE followers are known, and the fade whose FADE_SIDE followers are known."""
        self._residuals.pop(i - LOOKAHEAD, None)
        self._unevenness.pop(i - LOOKAHEAD, None)
        found = [self._fade(i + SIDE - FADE_SIDE)]
        if 1 <= i < self.count and self._slot(i) >= 1:
            confidence = max(self._sudden(i), self._turn(i))
            if confidence > 0:
                self._last_cut = i
                found.append(Boundary(i, i, i, "cut", confidence))
            else:
                found += [self._dissolve(i, length) for length in LENGTHS]
        for boundary in found:
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

    def _sudden(self, i: int) -> float:
        """Confidence that frame i begins a shot because it differs as no motion explains; 0 if not."""
        at = self._slot(i)
        change = self.changes[at]
        beside = max(
            self.changes[at - 1] if i > 1 else 0.0, self.changes[at + 1] if at + 1 < len(self.changes) else 0.0
        )
        if change < max(MIN_CHANGE, PEAK * beside):
            return 0.0
        residual, strongest = self._residual(i)
        near = self._around(i, 2)
        margin = MARGIN_PLAIN if strongest >= PLAIN else MARGIN
        needed = OVER_NEAR * (sum(near) / len(near) if near else 0.0) + margin
        if residual < NEAR_MISS * needed:
            return 0.0
        wide = sorted(self._around(i, SIDE))
        calm = wide[:-1] if len(wide) > 4 else wide
        needed = max(needed, OVER_MAX * max(calm, default=0.0) + margin)
        if residual < NEAR_MISS * needed or self._flash(at, change):
            return 0.0
        if residual < needed:
            self._near_misses.append(i)
            return 0.0
        return round(1.0 - 0.5 * needed / residual, 4)

    def _turn(self, i: int) -> float:
        """Confidence that frame i begins a shot because motion, steady on both sides, breaks there; 0 if not.

        Two shots of one place differ little where one ends as the next begins. A turn within a shot breaks the motion
        through the three frames around it, a cut also that through the next three.
        """
        at, changes = self._slot(i), list(self.changes)
        before, after = changes[max(1, at - SIDE) : at], changes[at + 1 : at + 1 + SIDE]
        for side in (before, after):
            if len(side) < SIDE - 1 or median(side) < STEADY_CHANGE or max(side) > STEADY * min(side) + 0.1:
                return 0.0
        if self._slot(i - TURN_SIDE - 2) < 0 or i + TURN_SIDE + 1 >= self.count:
            return 0.0
        beside = (self._three_steps(i - 3) + self._three_steps(i + 3)) / 2
        if abs(self._three_steps(i) - beside) < TURN_STEPS * beside:
            return 0.0
        here = self._broken(i)
        around = [self._broken(i + k) for side in (-1, 1) for k in range(2 * side, (TURN_SIDE + 1) * side, side)]
        if max(around) > median(before + after):
            return 0.0  # steady motion explains nothing here: what changes are details and the encoder's noise
        needed = max(TURN_OVER * max(around) + TURN_MARGIN, self._broken(i - 1), self._broken(i + 1))
        return round(1.0 - 0.5 * needed / here, 4) if here >= needed else 0.0

    def _three_steps(self, i: int) -> float:
        """Change from two frames before frame i to the one after it: even motion always goes as far in three steps."""
        at = self._slot(i)
        return change_between(self.pictures[at - 2], self.pictures[at + 1])

    def _broken(self, i: int) -> float:
        """How uneven motion is both up to frame i and from it on: grey levels that no steady motion explains."""
        return min(self._uneven(i), self._uneven(i + 1))

    def _uneven(self, i: int) -> float:
        if i not in self._unevenness:
            at = self._slot(i)
            self._unevenness[i] = uneven(*(self.pictures[k] for k in (at - 2, at - 1, at)))
        return self._unevenness[i]

    def _around(self, i: int, side: int) -> list[float]:
        """Residuals of up to `side` frames on each side of frame i."""
        first, last = max(1, i - side, self.count - len(self.pictures) + 1), min(self.count - 1, i + side)
        return [self._residual(k)[0] for k in range(first, last + 1) if k != i]

    def _residual(self, i: int) -> tuple[float, float]:
        """What motion does not explain between frames i-1 and i, in grey levels: mean, and where it is worst."""
        if i not in self._residuals:
            at = self._slot(i)
            change = self.changes[at]
            before, after = self.pictures[at - 1], self.pictures[at]
            self._residuals[i] = (change, 0.0) if change < 0.1 else unexplained(before, after)
        return self._residuals[i]

    def _flash(self, at: int, change: float) -> bool:
        before = self.pictures[at - 1]
        after = [self.pictures[k] for k in range(at + 1, min(at + 1 + FLASH, len(self.pictures)))]
        return any(change_between(before, picture) < 0.35 * change for picture in after)

    def _fade(self, dip: int) -> Boundary | None:
        at = self._slot(dip)
        if not 2 <= at < len(self.luma) - 2:
            return None
        return self._boundary(find_fade(self.luma, self.brightness, at), "fade")

    def _dissolve(self, end: int, length: int) -> Boundary | None:
        if self._slot(end - length) < 3 or end - length <= self._last_cut <= end:
            return None
        shift = self.count - len(self.luma)
        found = find_dissolve(
            self.luma, self.pictures, self._slot(end), length, lambda at: self._residual(at + shift)[0]
        )
        return self._boundary(found, "dissolve")

    def _boundary(self, found: Gradual | None, transition: Transition) -> Boundary | None:
        """What was found by position in the bounded history, by frame number."""
        if found is None:
            return None
        shift = self.count - len(self.luma)
        return Boundary(found.at + shift, found.start + shift, found.end + shift, transition, found.confidence)

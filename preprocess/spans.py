"""One pass over a video: every frame feeds the shot detector, and each shot keeps its encoded span.

A frame waits in a bounded window until the detector is sure on which side of a cut it lies. Then it either becomes one
of the at most `shot_frames` frames of its shot at the training rate, or goes. The kept frames are written to a scratch
file as raw uint8, so memory holds one window and one span, whatever the length of the video.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from models.scene import Transition
from preprocess.decode import DecodeCount, Frame, frames
from preprocess.filters import judge, thresholds
from preprocess.letterbox import NO_BARS, Bars
from preprocess.measure import measure_shot
from preprocess.probe import VideoInfo
from preprocess.quality import measure_quality
from preprocess.settings import PrepareSettings
from preprocess.shots import Boundary, ShotDetector
from preprocess.signature import make_signature
from preprocess.transnet import TransNetDetector, load_transnet

if TYPE_CHECKING:
    from preprocess.known_cuts import KnownCuts


@dataclass
class RawShot:
    """A shot as found: where it lies, and where its encoded frames wait in the scratch file."""

    start_frame: int
    end_frame: int  # exclusive
    start_pts: int
    end_pts: int
    transition: Transition
    confidence: float
    blend_frames: list[int] = field(default_factory=list)  # [first, end) of the transition it begins with; cut: empty
    blend_pts: list[int] = field(default_factory=list)
    span_frames: list[int] = field(default_factory=list)  # source frame per encoded frame; empty: too short to encode
    span_pts: list[int] = field(default_factory=list)  # its PTS
    offset: int = 0  # encoded frames before this span in the scratch file
    scores: dict[str, float] = field(default_factory=dict)
    filtered: str = ""  # why it has no span; "" for a shot that has one
    signature: str = ""


def read_shots(
    path: str,
    info: VideoInfo,
    settings: PrepareSettings,
    scratch: BinaryIO,
    deadline: float | None = None,
    cuts: KnownCuts | None = None,
    bars: Bars = NO_BARS,
) -> tuple[list[RawShot], DecodeCount]:
    """Decode once; find the shots, or take `cuts`; write the encoded spans, one after another, to `scratch`.

    A span is uint8 [n,H,W,3], of the picture inside of `bars`. A shot that a filter takes has no span.
    Shots are gap-free and cover what was read. Raises Failed where decoding fails.
    """
    count = DecodeCount()
    size = bars.decode_size(info, settings.height, settings.width)
    detector = cuts or (TransNetDetector(load_transnet()) if settings.cuts == "transnet" else ShotDetector())
    shots = _ShotBuilder(info, settings, scratch, bars)
    window: deque[tuple[Frame, np.ndarray, float]] = deque()
    boundaries: deque[Boundary] = deque()

    def settle() -> None:
        boundaries.extend(detector.take())
        while window and window[0][0].index < detector.settled:
            shots.add(*window.popleft(), boundaries)

    for frame in frames(path, info, *size, count=count, max_seconds=settings.max_seconds, deadline=deadline):
        frame.image = bars.inside(frame.image)
        small = frame.small()
        change = detector.push(small)
        frame.image = frame.cropped(settings.height, settings.width).copy()  # the rest of the picture can go
        window.append((frame, small, change))
        settle()
    detector.finish()
    settle()
    return shots.finish(), count


class _ShotBuilder:
    """Receives settled frames in order; cuts them into shots and samples each at the training rate."""

    def __init__(self, info: VideoInfo, settings: PrepareSettings, scratch: BinaryIO, bars: Bars) -> None:
        self.info, self.settings, self.scratch, self.bars = info, settings, scratch, bars
        self.limits = thresholds(settings)
        self.shots: list[RawShot] = []
        self.written = 0
        self.step = Fraction(info.time_base[1], info.time_base[0]) / Fraction(settings.fps).limit_denominator(1000)
        self.last: Frame | None = None
        self.span: _Span | None = None
        self.opening = Boundary(0, 0, 0, "start", 1.0)
        self.start: Frame | None = None
        self.changes: list[float] = []
        self.blend_pts: list[int] = []  # of the transition that opens the shot, as far as it has been seen
        self.next_blend_pts: list[int] = []  # of the one that closes it

    def add(self, frame: Frame, small: np.ndarray, change: float, boundaries: deque[Boundary]) -> None:
        if boundaries and frame.index == boundaries[0].start < boundaries[0].end:
            self.next_blend_pts = [frame.pts]
        if boundaries and frame.index == boundaries[0].at:
            self._close(frame.pts)
            self.opening = boundaries.popleft()
            self.blend_pts, self.next_blend_pts = self.next_blend_pts, []
        if len(self.blend_pts) == 1 and frame.index == self.opening.end:
            self.blend_pts.append(frame.pts)
        if self.start is None:
            self.start, self.span, self.changes = frame, _Span(self.step, self.settings.shot_frames), []
        else:
            self.changes.append(change)
        self.last = frame
        assert self.span is not None
        blending = frame.index < self.opening.end or (boundaries and frame.index >= boundaries[0].start)
        if blending:
            self.span.stop(frame.pts)
        else:
            self.span.add(frame, small)

    def finish(self) -> list[RawShot]:
        if self.last is not None:
            self._close(self.last.pts + self.info.frame_ticks)
        return self.shots

    def _close(self, end_pts: int) -> None:
        assert self.start is not None and self.last is not None and self.span is not None
        shot = RawShot(
            self.start.index,
            self.last.index + 1,
            self.start.pts,
            end_pts,
            self.opening.transition,
            self.opening.confidence,
        )
        if self.blend_pts:
            shot.blend_pts = [self.blend_pts[0], *(self.blend_pts[1:] or [end_pts])]
            shot.blend_frames = [self.opening.start, min(self.opening.end, shot.end_frame)]
        chosen = self.span.finish(end_pts)
        step = self.settings.frame_step
        keep = (len(chosen) - 1) // step * step + 1 if chosen else 0
        if keep >= self.settings.min_shot_frames:
            chosen = chosen[:keep]
        shot.scores = self._scores(chosen, self.changes) | {"frames": float(keep)}
        shot.signature = make_signature([small for _, small in chosen])
        shot.filtered = judge(shot.scores, self.limits)
        if not shot.filtered:
            shot.span_frames = [frame.index for frame, _ in chosen]
            shot.span_pts = [frame.pts for frame, _ in chosen]
            shot.offset = self.written
            self.written += keep
            for frame, _ in chosen:
                self.scratch.write(np.ascontiguousarray(frame.image).data)
        self.shots.append(shot)
        self.start = self.last = self.span = None

    def _scores(self, chosen: list[tuple[Frame, np.ndarray]], changes: list[float]) -> dict[str, float]:
        """All that is measured of a shot, from the frames that would be encoded and the changes of all frames."""
        small = [one for _, one in chosen]
        images, source = [frame.image for frame, _ in chosen], [frame.index for frame, _ in chosen]
        rate = self.info.fps * (float(np.mean(changes)) if changes else 0.0)
        return {
            **measure_shot(small, self.settings.fps),
            **measure_quality(images, small, source, self.settings.fps),
            "motion": round(rate, 3),  # grey levels per second, over every frame
            "bars": round(self.bars.area, 4),
        }


class _Span:
    """Nearest frames to a grid of `step` ticks that begins at the first frame added; at most `limit` of them."""

    def __init__(self, step: Fraction, limit: int) -> None:
        self.step, self.limit = step, limit
        self.chosen: list[tuple[Frame, np.ndarray]] = []
        self.previous: tuple[Frame, np.ndarray] | None = None
        self.origin: int | None = None
        self.end: int | None = None

    def add(self, frame: Frame, small: np.ndarray) -> None:
        if self.end is not None or len(self.chosen) >= self.limit:
            return
        if self.origin is None:
            self.origin = frame.pts
        if self.previous is not None:
            self._choose(Fraction(self.previous[0].pts + frame.pts, 2))
        self.previous = frame, small

    def stop(self, pts: int) -> None:
        """Frames from `pts` on are part of a transition; before the first frame this only delays the start."""
        if self.origin is not None and self.end is None:
            self.end = pts

    def finish(self, end_pts: int) -> list[tuple[Frame, np.ndarray]]:
        if self.previous is not None:
            self._choose(Fraction(self.end if self.end is not None else end_pts), inclusive=False)
        return self.chosen

    def _choose(self, until: Fraction, inclusive: bool = True) -> None:
        """Take the previous frame for all grid points up to `until`."""
        assert self.origin is not None and self.previous is not None
        while len(self.chosen) < self.limit:
            point = self.origin + len(self.chosen) * self.step
            if point > until or (point == until and not inclusive):
                return
            self.chosen.append(self.previous)

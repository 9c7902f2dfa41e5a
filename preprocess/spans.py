"""One pass over a video: every frame feeds the shot detector, and each shot keeps its encoded span.

A frame waits in a bounded window until the detector is sure on which side of a cut it lies. Then it either becomes one
of the at most `shot_frames` frames of its shot at the training rate, or goes. The kept frames are written to a scratch
file as raw uint8, so memory holds one window and one span, whatever the length of the video.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import BinaryIO

import numpy as np

from models.scene import Transition
from preprocess.decode import SMALL_HEIGHT, SMALL_WIDTH, DecodeCount, DecordGaveUp, Frame, frames
from preprocess.filters import judge, thresholds
from preprocess.known_cuts import KnownCuts
from preprocess.letterbox import NO_BARS, Bars
from preprocess.measure import measure_shot
from preprocess.outcome import Failed
from preprocess.probe import VideoInfo
from preprocess.quality import measure_quality
from preprocess.settings import PrepareSettings
from preprocess.shots import Boundary, ShotDetector
from preprocess.signature import make_signature
from preprocess.transnet import TransNetDetector, load_transnet


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
    samples: int = 0  # frames that wait in the scratch file only to be scored, of a shot that a filter took
    offset: int = 0  # encoded frames before this span in the scratch file,
    piece: int = 0  # which is that of this piece
    scores: dict[str, float] = field(default_factory=dict)
    filtered: str = ""  # why it has no span; "" for a shot that has one
    signature: str = ""
    recalled: tuple[str, int] | None = None  # key and index of it in an earlier sample, which has its latents


@dataclass(frozen=True)
class Piece:
    """A stretch of a video that is decoded by itself, from key frame `first` on: what `preprocess.pieces` cuts it into.

    It owns the frames begin..end-1 of the index and the shots that begin in them. What is decoded before is for the
    detector, which decides by what came before; what is decoded from `end` on completes the last shot.
    """

    number: int = 0  # from 1; 0 is a whole video
    first: int = 0
    begin: int = 0
    end: int | None = None  # None: the end of the video


WHOLE = Piece()
_EVER = 2**62  # ticks


@dataclass
class PieceShots:
    """What was found in a piece. Frames are numbered as if all frames of the index before `first` were shown."""

    shots: list[RawShot] = field(default_factory=list)
    count: DecodeCount = field(default_factory=DecodeCount)
    first_owned: int = -1  # number of the first owned frame that was shown; -1: none was
    owned: int = 0  # how many were
    end_pts: int = 0  # where the last of them ends
    lead: list[int] = field(default_factory=lambda: [0, 0])  # changes (`_Changes`) of the shot that was going on
    tail: list[int] = field(default_factory=lambda: [0, 0])  # of the last shot, as far as its frames are owned
    begin_state: str = ""  # of the detector before the first owned frame,
    end_state: str = ""  # and after the last; "" where there is no neighbour, or it was not reached
    lost: str = ""  # why the rest could not be decoded


def read_shots(
    path: str,
    info: VideoInfo,
    settings: PrepareSettings,
    scratch: BinaryIO,
    deadline: float | None = None,
    cuts: Sequence[int] | None = None,
    bars: Bars = NO_BARS,
) -> tuple[list[RawShot], DecodeCount]:
    """Decode once; find the shots, or take `cuts`; write the encoded spans, one after another, to `scratch`.

    A span is uint8 [n,H,W,3], of the picture inside of `bars`. A shot that a filter takes has no span.
    Shots are gap-free and cover what was read. Raises Failed where decoding fails.
    """
    found = read_piece(path, info, settings, scratch, WHOLE, deadline, cuts, bars)
    return found.shots, found.count


def read_piece(
    path: str,
    info: VideoInfo,
    settings: PrepareSettings,
    scratch: BinaryIO,
    piece: Piece,
    deadline: float | None = None,
    cuts: Sequence[int] | None = None,
    bars: Bars = NO_BARS,
) -> PieceShots:
    """`read_shots` for the shots that a piece owns. Of a piece of several, what was read before a failure is kept.

    Where decord fails on the way, PyAV begins anew, under the same deadline; `count.decoded` has the frames of both.
    """
    found = PieceShots()
    try:
        _read_piece(path, info, settings, scratch, piece, deadline, cuts, bars, found)
    except DecordGaveUp:
        spent, found = found.count.decoded, PieceShots()
        scratch.seek(0)
        scratch.truncate()
        found.count.reason = "decord cannot decode all of it"
        try:
            _read_piece(path, replace(info, decoder="pyav"), settings, scratch, piece, deadline, cuts, bars, found)
        finally:
            found.count.decoded += spent
    return found


def _read_piece(
    path: str,
    info: VideoInfo,
    settings: PrepareSettings,
    scratch: BinaryIO,
    piece: Piece,
    deadline: float | None,
    cuts: Sequence[int] | None,
    bars: Bars,
    found: PieceShots,
) -> None:
    """Fill `found`. Raises DecordGaveUp whatever the piece: what decord gave before is not to be kept."""
    size = bars.decode_size(info, settings.height, settings.width)
    detector: TransNetDetector | ShotDetector | KnownCuts
    if cuts is not None:
        detector = KnownCuts(cuts, piece.first)
    else:
        detector = TransNetDetector(load_transnet()) if settings.cuts == "transnet" else ShotDetector()
    # by PTS: where frames are missing, numbers of frames are known only when all pieces are
    own = range(info.pts[piece.begin] if piece.begin else -_EVER, _EVER if piece.end is None else info.pts[piece.end])
    shots = _ShotBuilder(info, settings, scratch, bars, own, found)
    window: deque[tuple[Frame, np.ndarray, float]] = deque()
    boundaries: deque[Boundary] = deque()

    def settle() -> None:
        boundaries.extend(_moved(boundary, piece.first) for boundary in detector.take())
        while window and window[0][0].index < piece.first + detector.settled:
            shots.add(*window.popleft(), boundaries)

    count = found.count
    decoded = frames(
        path, info, *size, count=count, max_seconds=settings.max_seconds, deadline=deadline, first=piece.first
    )
    try:
        for frame in decoded:
            if frame.pts >= own.start and found.first_owned < 0 and piece.begin:
                found.begin_state = _state(detector)
            if frame.pts >= own.stop and not found.end_state and piece.end is not None:
                found.end_state = _state(detector)
            if frame.pts in own:
                found.first_owned = frame.index if found.first_owned < 0 else found.first_owned
                found.owned += 1
            frame.image = bars.inside(frame.image)
            small = frame.small()
            change = detector.push(small)
            frame.image = frame.cropped(settings.height, settings.width).copy()  # the rest of the picture can go
            window.append((frame, small, change))
            settle()
            if shots.complete:
                break
    except DecordGaveUp:
        raise
    except Failed as end:
        if not piece.number:
            raise
        found.lost = "" if found.end_state else end.reason  # what is owned has been read
    if not shots.complete:
        detector.finish()
        settle()
    shots.finish()


def _state(detector: TransNetDetector | ShotDetector | KnownCuts) -> str:
    return "" if isinstance(detector, TransNetDetector) else detector.state()


def _moved(boundary: Boundary, by: int) -> Boundary:
    """A boundary of a detector that was pushed frame `by` first."""
    return replace(boundary, at=boundary.at + by, start=boundary.start + by, end=boundary.end + by) if by else boundary


class _Changes:
    """Mean change from frame to frame over a shot, from exact sums: parts add up to what one pass gives."""

    _VALUES = SMALL_WIDTH * SMALL_HEIGHT * 3  # differences of whole grey levels that a change is the mean of

    def __init__(self) -> None:
        self.parts = [0, 0]  # sum in grey levels over all values, number of changes

    def add(self, change: float) -> None:
        self.parts = [self.parts[0] + round(change * self._VALUES), self.parts[1] + 1]


def scored_frames(count: int) -> list[int]:
    """Which of a shot's frames an aesthetic score looks at: first, middle and last."""
    return sorted({0, count // 2, count - 1}) if count else []


def motion(parts: Sequence[int], fps: float) -> float:
    """Grey levels per second, over every frame of a shot; `parts` as `_Changes` has them."""
    total, number = parts
    return round(fps * (total / _Changes._VALUES / number if number else 0.0), 3)


class _ShotBuilder:
    """Receives settled frames in order; cuts them into shots and samples each at the training rate."""

    def __init__(
        self,
        info: VideoInfo,
        settings: PrepareSettings,
        scratch: BinaryIO,
        bars: Bars,
        own: range,
        found: PieceShots,
    ) -> None:
        self.info, self.settings, self.scratch, self.bars = info, settings, scratch, bars
        self.own, self.found = own, found  # PTS of the frames whose shots are kept, and where to put them
        self.limits = thresholds(settings)
        self.written = 0
        self.step = Fraction(info.time_base[1], info.time_base[0]) / Fraction(settings.fps).limit_denominator(1000)
        self.last: Frame | None = None
        self.span: _Span | None = None
        self.opening = Boundary(0, 0, 0, "start", 1.0)
        self.start: Frame | None = None
        self.changes = _Changes()
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
            self.start, self.span, self.changes = frame, _Span(self.step, self.settings.shot_frames), _Changes()
        elif frame.pts in self.own:
            self.changes.add(change)
        if frame.pts in self.own:
            self.found.end_pts = frame.pts + self.info.frame_ticks
        self.last = frame
        assert self.span is not None
        blending = frame.index < self.opening.end or (boundaries and frame.index >= boundaries[0].start)
        if blending:
            self.span.stop(frame.pts)
        else:
            self.span.add(frame, small)

    @property
    def complete(self) -> bool:
        """Whether frames after those seen would change no shot that is owned, but for its end."""
        if self.start is None or self.last is None or self.span is None or self.last.pts < self.own.stop:
            return False
        return self.start.pts not in self.own or self.span.complete

    def finish(self) -> None:
        if self.last is not None:
            self._close(self.last.pts + self.info.frame_ticks)

    def _close(self, end_pts: int) -> None:
        assert self.start is not None and self.last is not None and self.span is not None
        if self.start.pts < self.own.start:
            self.found.lead = self.changes.parts
        if self.start.pts in self.own:
            self._keep(end_pts)
        self.start = self.last = self.span = None

    def _keep(self, end_pts: int) -> None:
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
        shot.scores = self._scores(chosen) | {"frames": float(keep)}
        shot.signature = make_signature([small for _, small in chosen])
        shot.filtered = judge(shot.scores, self.limits)
        shot.offset = self.written
        if not shot.filtered:
            shot.span_frames = [frame.index for frame, _ in chosen]
            shot.span_pts = [frame.pts for frame, _ in chosen]
        elif self.settings.aesthetic_key:
            chosen = [chosen[k] for k in scored_frames(len(chosen))]
            shot.samples = len(chosen)
        else:
            chosen = []
        self.written += len(chosen)
        for frame, _ in chosen:
            self.scratch.write(np.ascontiguousarray(frame.image).data)
        self.found.shots.append(shot)
        self.found.tail = self.changes.parts

    def _scores(self, chosen: list[tuple[Frame, np.ndarray]]) -> dict[str, float]:
        """All that is measured of a shot, from the frames that would be encoded and the changes of all frames."""
        small = [one for _, one in chosen]
        images, source = [frame.image for frame, _ in chosen], [frame.index for frame, _ in chosen]
        return {
            **measure_shot(small, self.settings.fps),
            **measure_quality(images, small, source, self.settings.fps),
            "motion": motion(self.changes.parts, self.info.fps),
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
        if self.complete:
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

    @property
    def complete(self) -> bool:
        """Whether no later frame can become part of it."""
        return self.end is not None or len(self.chosen) >= self.limit

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

"""Long videos in pieces: where to cut them, one piece as a job of its own, and how the pieces make one video again.

Pieces are cut at key frames. Each begins to decode `WARM_UP` frames before the frames it owns, so that the detector has
seen all that its decisions depend on, and goes on after them until the last shot that it owns is complete. Both
neighbours of a border record the state of their detector there: where the states agree, so does all that follows, and
the shots are those of one pass. Where they do not (key frames that are none, say), the video is decoded as one piece.
"""

from __future__ import annotations

import json
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from itertools import pairwise
from math import ceil
from pathlib import Path

from infra.storage import atomic_write_json
from models.records import decode as from_json
from preprocess.decode import DecodeCount, check_decoded
from preprocess.letterbox import Bars
from preprocess.outcome import Failed
from preprocess.probe import VideoInfo
from preprocess.settings import PrepareSettings
from preprocess.shots import LOOKAHEAD
from preprocess.spans import Piece, PieceShots, RawShot, motion, read_piece
from preprocess.watch import Attempts

WARM_UP = 2 * LOOKAHEAD + 32  # frames: what the detector remembers, and pictures after a key frame that lack their past
FRAMES = ".frames"  # suffix of files in which encoded spans wait
LEAST = 12  # a piece owns at least so many times the frames that are decoded twice for it


@dataclass(frozen=True)
class Job:
    """One piece to decode: all that another process needs to know."""

    path: str
    info: VideoInfo
    settings: PrepareSettings
    piece: Piece
    frames: Path  # for the encoded spans; what was found goes beside it, when it is whole
    attempts: Path
    cuts: list[int] | None
    bars: Bars


# (decode_piece, jobs) -> what was found in each; None for a job whose worker died in every attempt
SideBySide = Callable[[Callable[[Job], PieceShots], Sequence[Job]], list[PieceShots | None]]


def in_turn(work: Callable[[Job], PieceShots], jobs: Sequence[Job]) -> list[PieceShots | None]:
    """One job after another, in this process."""
    return [work(job) for job in jobs]


def plan_pieces(info: VideoInfo, settings: PrepareSettings) -> list[Piece]:
    """Pieces of about `unit_seconds` each; one piece, `spans.WHOLE`, for a video under one and a half of that."""
    total = frames_taken(info, settings)
    # of a shot that begins in the last frame: a transition, its span, and what the detector waits for
    overrun = 2 * LOOKAHEAD + ceil(settings.shot_frames / settings.fps * info.fps)
    length = max(settings.unit_seconds * info.fps, LEAST * (WARM_UP + overrun))
    number = int(total / length + 0.5)
    if number < 2 or settings.cuts == "transnet" or info.decoder == "images":
        return [Piece()]  # TransNetV2's batches depend on all doubts before
    keys = [0, *(bisect_left(info.pts, pts) for pts in info.key_pts)]
    firsts = [0]
    for k in range(1, number):
        key = keys[max(0, bisect_right(keys, k * total // number - WARM_UP) - 1)]
        owned = key + WARM_UP - (firsts[-1] + WARM_UP if firsts[-1] else 0)  # by the piece before
        if key > firsts[-1] and owned >= length / 2:
            firsts.append(key)
    return cut_at(firsts)


def cut_at(firsts: Sequence[int]) -> list[Piece]:
    """Pieces that are decoded from these frames on; the first is 0, the others are key frames."""
    begins = [first + WARM_UP if first else 0 for first in firsts]
    if len(firsts) == 1:
        return [Piece()]
    return [
        Piece(k + 1, first, begin, end)
        for k, (first, begin, end) in enumerate(zip(firsts, begins, [*begins[1:], None], strict=True))
    ]


def decode_piece(job: Job) -> PieceShots:
    """Decode a piece as one counted attempt under a time limit; a piece that is done is not done again.

    What fails is in `lost`.
    """
    done = job.frames.with_suffix(".json")
    if done.exists():
        return from_json(PieceShots, json.loads(done.read_text()), str(done))
    job.frames.parent.mkdir(parents=True, exist_ok=True)
    limit = job.settings.seconds_per_video
    try:
        with (
            Attempts(job.attempts).attempt(job.frames.parent.name + job.frames.stem, "decode", 1.25 * limit + 10),
            job.frames.open("wb") as file,
        ):
            deadline = time.monotonic() + limit
            found = read_piece(job.path, job.info, job.settings, file, job.piece, deadline, job.cuts, job.bars)
    except Failed as end:
        found = PieceShots(lost=end.reason)
    atomic_write_json(done, asdict(found))
    return found


def read_pieces(jobs: Sequence[Job], side_by_side: SideBySide) -> tuple[list[RawShot], DecodeCount, list[str]]:
    """Shots of a whole video as one pass finds them, what decoding them took, and which stretches are lost, and why.

    Raises Failed where one pass would, and where nothing is left.
    """
    info, settings = jobs[0].info, jobs[0].settings
    results = _run(jobs, side_by_side)
    spent, taken, reason = 0, len(jobs), ""
    by_decord = [k for k, found in enumerate(results) if found.count.decoder == "decord"]
    if by_decord and any(found.count.decoder == "pyav" for found in results):
        # decord failed in some: in one pass, PyAV gives all frames
        spent += sum(results[k].count.decoded for k in by_decord)
        reason = next((found.count.reason for found in results if found.count.reason), "")
        jobs = [replace(job, info=replace(info, decoder="pyav")) for job in jobs]
        anew = [_anew(jobs[k], replace(jobs[k].piece, number=taken + jobs[k].piece.number)) for k in by_decord]
        for k, job, found in zip(by_decord, anew, _run(anew, side_by_side), strict=True):
            jobs[k], results[k] = job, found
        taken *= 2
    if not agree(results, settings):
        spent += sum(found.count.decoded for found in results)
        jobs = [_anew(jobs[0], Piece(taken + 1))]
        results = _run(jobs, side_by_side)
    shots, count, lost = join([job.piece for job in jobs], results, info, settings)
    count.decoded += spent
    count.reason = count.reason or reason
    return shots, count, lost


def _anew(job: Job, piece: Piece) -> Job:
    """The job for another piece; its number is one that no other has, as what was found earlier stays."""
    return replace(job, piece=piece, frames=frames_file(job.frames.parent, piece.number))


def _name(number: int) -> str:
    return f"{number:04d}"


def make_jobs(
    path: str,
    info: VideoInfo,
    settings: PrepareSettings,
    pieces: Sequence[Piece],
    folder: Path,
    attempts: Path,
    cuts: list[int] | None,
    bars: Bars,
) -> list[Job]:
    """The jobs of a video, whose frames and results go into `folder`."""
    return [
        Job(path, info, settings, piece, frames_file(folder, piece.number), attempts, cuts, bars) for piece in pieces
    ]


def frames_file(folder: Path, number: int) -> Path:
    """Where the encoded spans of a piece wait."""
    return folder / f"{_name(number)}{FRAMES}"


def _run(jobs: Sequence[Job], side_by_side: SideBySide) -> list[PieceShots]:
    results = []
    for job, found in zip(jobs, side_by_side(decode_piece, jobs), strict=True):
        if found is None:
            attempts, name = Attempts(job.attempts), job.frames.parent.name + job.frames.stem
            found = PieceShots(lost=attempts.cause(name, "decode", attempts.deaths(name, "decode")))
        results.append(found)
    return results


def agree(results: Sequence[PieceShots], settings: PrepareSettings) -> bool:
    """Whether pieces that lie side by side are pieces of one pass."""
    counted = 0
    for k, (one, following) in enumerate(pairwise(results)):
        counted += one.owned
        if one.lost or following.lost:
            continue
        if not one.end_state and not any(later.owned for later in results[k + 1 :]):
            return True  # the file ends before its index does
        if one.end_state != following.begin_state:
            return False
        if settings.cuts == "captions" and following.first_owned != counted:
            return False  # frames are missing, and captions count frames
    return True


def join(
    pieces: Sequence[Piece], results: Sequence[PieceShots], info: VideoInfo, settings: PrepareSettings
) -> tuple[list[RawShot], DecodeCount, list[str]]:
    """The shots of a video from those of its pieces, which agree; frames are numbered as one pass numbers them."""
    shots: list[RawShot] = []
    lost: list[tuple[int, int, str]] = []  # PTS of begin and end, reason
    decoders, reasons = ([getattr(found.count, name) for found in results] for name in ("decoder", "reason"))
    count = DecodeCount(decoder=next(filter(None, decoders), ""), reason=next(filter(None, reasons), ""))
    counted = 0  # frames before the piece
    tail = [0, 0]
    open_since: tuple[int, str] | None = None  # a stretch that is lost, up to the next shot that is found
    for piece, found in zip(pieces, results, strict=True):
        if open_since is None and shots:  # the shot that was going on
            tail = [a + b for a, b in zip(tail, found.lead, strict=True)]
            shots[-1].scores["motion"] = motion(tail, info.fps)
            shots[-1].end_frame, shots[-1].end_pts = counted + found.owned, max(found.end_pts, shots[-1].end_pts)
        for k, raw in enumerate(found.shots):
            shot = _shifted(raw, counted - found.first_owned, piece.number)
            if open_since is not None:
                lost.append((open_since[0], shot.start_pts, open_since[1]))
                open_since = None
            elif shots and k == 0:
                shots[-1].end_frame, shots[-1].end_pts = shot.start_frame, shot.start_pts
            shots.append(shot)
        if found.shots:  # the last one ends where the next begins, or for now where the piece does
            shots[-1].end_frame, shots[-1].end_pts = counted + found.owned, found.end_pts
            tail = found.tail
        counted += found.owned
        if found.lost:
            counted = max(counted, piece.end or 0)
            open_since = open_since or (found.end_pts if found.owned else info.pts[piece.begin], found.lost)
        for name in ("decoded", "damaged", "dropped"):
            setattr(count, name, getattr(count, name) + getattr(found.count, name))
        count.shown += found.owned
    if open_since is not None:
        lost.append((open_since[0], info.pts[-1] + info.frame_ticks, open_since[1]))
    if not shots and lost:
        raise Failed("decode", lost[0][2])
    check_decoded(count, info, settings.max_seconds)
    return shots, count, [_in_words(info, *one) for one in lost]


def _shifted(raw: RawShot, by: int, piece: int) -> RawShot:
    return replace(
        raw,
        start_frame=raw.start_frame + by,
        end_frame=raw.end_frame + by,
        blend_frames=[frame + by for frame in raw.blend_frames],
        span_frames=[frame + by for frame in raw.span_frames],
        scores=dict(raw.scores),
        piece=piece,
    )


def _in_words(info: VideoInfo, begin: int, end: int, why: str) -> str:
    times = [timedelta(seconds=round((pts - info.pts[0]) * info.seconds_per_tick)) for pts in (begin, end)]
    return f"{times[0]} to {times[1]}: {why}"


def frames_taken(info: VideoInfo, settings: PrepareSettings) -> int:
    """Frames of the index that are decoded, all or those of the first `max_seconds`."""
    if settings.max_seconds is None:
        return len(info.pts)
    return bisect_left(info.pts, info.pts[0] + settings.max_seconds / info.seconds_per_tick)

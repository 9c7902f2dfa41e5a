"""Probe: what a video holds, from its container index and its first frame. Nothing else is decoded.

The index gives the timestamp (PTS) of every frame, and with it frame rate, variable rate, duration and key frames, for
about a thousandth of the cost of a decode. The first frame tells the rotation and whether the codec works at all.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import av
import av.error

from preprocess.outcome import Failed, short

Decoder = Literal["decord", "pyav"]

# packets read before giving up on a first frame: more than one group of pictures of broadcast streams
_FIRST_FRAME_PACKETS = 300
_DECORD_CONTAINERS = ("mov,mp4", "matroska", "webm", "avi")
_DECORD_CODECS = ("h264", "mpeg4", "vp8")
_PLAIN_FORMATS = ("yuv420p", "yuvj420p")
_HDR_TRANSFERS = (16, 18)  # PQ, HLG (ITU-T H.273)


@dataclass
class VideoInfo:
    """Facts of one video stream. PTS are integers in units of `time_base` seconds, in order of presentation."""

    container: str
    codec: str
    pix_fmt: str
    coded_width: int
    coded_height: int
    width: int  # as displayed: sample aspect ratio and rotation applied
    height: int
    rotation: int  # degrees counter-clockwise to turn a decoded frame for display: 0, 90, 180 or 270
    time_base: list[int]
    pts: list[int] = field(repr=False)
    frame_ticks: int  # typical time between frames, in ticks
    fps: float
    variable_rate: bool
    duration_s: float
    key_frames: int
    hdr: bool
    interlaced: bool
    audio: bool
    video_streams: int
    decoder: Decoder
    decoder_reason: str  # why not decord; "" for a plain file
    packet_errors: int = 0
    probe_frames: int = 0  # frames decoded to learn the rotation

    @property
    def seconds_per_tick(self) -> float:
        return self.time_base[0] / self.time_base[1]

    def facts(self) -> dict[str, Any]:
        """All but the PTS table, for records."""
        return {k: v for k, v in vars(self).items() if k != "pts"}


@contextmanager
def open_video(path: str) -> Iterator[tuple[Any, Any]]:
    """(container, its first video stream), set up so that damaged files cannot dead-lock the decoder.

    One slice thread: FFmpeg's frame threads wait for each other when a broken frame never arrives. Metadata that is
    not UTF-8 is replaced, not fatal. Raises Failed with what is wrong.
    """
    try:
        # FFmpeg takes names in UTF-8 only; the few files with other names are opened here and read through Python
        container = av.open(path if _is_text(path) else open(path, "rb"), metadata_errors="replace")  # noqa: SIM115
    except FileNotFoundError:
        raise Failed("probe", "no such file") from None
    except PermissionError:
        raise Failed("probe", "no permission to read the file") from None
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise Failed("probe", f"not a readable video container ({short(error)})") from error
    with container:
        if not container.streams.video:
            kinds = sorted({stream.type for stream in container.streams})
            raise Failed("probe", f"no video stream; the file holds {', '.join(kinds) or 'no streams'}")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise Failed("probe", "its video codec is unknown to FFmpeg")
        stream.thread_type = "SLICE"
        stream.codec_context.thread_count = 1
        yield container, stream


def probe(path: str) -> VideoInfo:
    """Facts of the first video stream of a file. Raises Failed, naming what is wrong, if none can be read."""
    with open_video(path) as (container, stream):
        index = _read_index(container, stream)
        if not index.shown:
            raise Failed("probe", f"no frame in its video stream ({index.packets} packets, {index.errors} damaged)")
        context = stream.codec_context
        facts = {
            "container": container.format.name,
            "codec": context.codec.canonical_name,
            "pix_fmt": context.pix_fmt or "unknown",
            "audio": bool(container.streams.audio),
            "video_streams": len(container.streams.video),
            "hdr": context.color_trc in _HDR_TRANSFERS,
        }
        aspect = stream.sample_aspect_ratio or Fraction(1)
        base = stream.time_base or Fraction(1, 1000)
        guessed = stream.guessed_rate or stream.average_rate
    first, decoded = _first_frame(path)
    pts = sorted(set(index.shown))  # hidden frames (VP9) share the timestamp of the shown one
    ticks = _frame_ticks(pts, base, guessed)
    span = pts[-1] - pts[0] + ticks
    rotation = first.rotation % 360
    turned = rotation in (90, 270)
    width, height = max(1, round(first.width * aspect)), first.height
    reason = _not_for_decord(facts, index, rotation) or ("" if _is_text(path) else "file name")
    return VideoInfo(
        **facts,
        coded_width=first.width,
        coded_height=first.height,
        width=height if turned else width,
        height=width if turned else height,
        rotation=rotation,
        time_base=[base.numerator, base.denominator],
        pts=pts,
        frame_ticks=ticks,
        fps=len(pts) / float(span * base),
        variable_rate=_varies(pts, ticks),
        duration_s=float(span * base),
        key_frames=index.key_frames,
        interlaced=bool(first.interlaced_frame),
        decoder="pyav" if reason else "decord",
        decoder_reason=reason,
        packet_errors=index.errors,
        probe_frames=decoded,
    )


def _is_text(path: str) -> bool:
    return path.isascii() or not any("\ud800" <= c <= "\udfff" for c in path)


@dataclass
class _Index:
    shown: list[int] = field(default_factory=list)  # PTS of frames that are presented
    packets: int = 0
    discarded: int = 0  # by an edit list
    key_frames: int = 0
    errors: int = 0
    missing_pts: int = 0


def _read_index(container: Any, stream: Any) -> _Index:
    index = _Index()
    last = 0
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return index
        except av.error.FFmpegError:
            index.errors += 1  # the rest of the file is cut off or garbage; what came before it counts
            return index
        if packet.size == 0:
            continue  # the flush packet at the end
        index.packets += 1
        if packet.has_sidedata("encryption_info"):
            raise Failed("probe", "the video is encrypted")
        index.errors += packet.is_corrupt
        index.key_frames += packet.is_keyframe
        if packet.is_discard:
            index.discarded += 1
            continue
        if packet.pts is None:
            index.missing_pts += 1
        last = next((t for t in (packet.pts, packet.dts) if t is not None), last + (packet.duration or 1))
        index.shown.append(last)


def _first_frame(path: str) -> tuple[Any, int]:
    error: BaseException | None = None
    with open_video(path) as (container, stream):
        packets = container.demux(stream)
        for _ in range(_FIRST_FRAME_PACKETS):
            try:
                packet = next(packets, None)
                frames = packet.decode() if packet is not None else []
            except av.error.FFmpegError as caught:
                error = caught
                continue
            if packet is None:
                break
            if frames:
                return frames[0], len(frames)
    raise Failed("probe", "no frame can be decoded" + (f" ({short(error)})" if error else ""))


def _frame_ticks(pts: list[int], base: Fraction, guessed: Fraction | None) -> int:
    steps = [b - a for a, b in zip(pts, pts[1:], strict=False) if b > a]
    if steps:
        return max(1, round(statistics.median(steps)))
    return max(1, round(1 / (guessed * base))) if guessed else max(1, round(Fraction(1, 25) / base))


def _varies(pts: list[int], ticks: int) -> bool:
    """Whether frames are unevenly spaced, by more than a tenth and more than the rounding of the time base."""
    slack = max(1.0, 0.1 * ticks) if ticks >= 5 else 0.1 * ticks
    uneven = sum(abs(b - a - ticks) > slack for a, b in zip(pts, pts[1:], strict=False))
    return uneven >= max(1, len(pts) // 100)


def _not_for_decord(facts: dict[str, Any], index: _Index, rotation: int) -> str:
    """Why PyAV must decode this file: what decord gets wrong (edit lists, stream choice, hidden frames) or lacks."""
    problems = {
        f"container {facts['container']}": not facts["container"].startswith(_DECORD_CONTAINERS),
        f"codec {facts['codec']}": facts["codec"] not in _DECORD_CODECS,
        f"pixel format {facts['pix_fmt']}": facts["pix_fmt"] not in _PLAIN_FORMATS,
        "several video streams": facts["video_streams"] > 1,
        "edit list": index.discarded > 0,
        "rotation": rotation != 0,
        "damaged packets": index.errors > 0,
        "frames without a timestamp": index.missing_pts > 0 or len(set(index.shown)) != len(index.shown),
    }
    return ", ".join(name for name, there in problems.items() if there)

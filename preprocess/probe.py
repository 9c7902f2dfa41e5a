"""Probe: what a video holds, from its container index and its first frame. Nothing else is decoded.

The index gives the timestamp (PTS) of every frame, and with it frame rate, variable rate, duration and key frames, for
about a thousandth of the cost of a decode. The first frame tells the rotation and whether the codec works at all.
"""

from __future__ import annotations

import math
import os
import statistics
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import av
import av.error

from preprocess.colour import Colour, read_colour, side_data
from preprocess.outcome import Failed, Filtered, short

Decoder = Literal["decord", "pyav", "images"]

# packets read before giving up on a first frame: more than one group of pictures of broadcast streams
_FIRST_FRAME_PACKETS = 300
# FFmpeg's demuxers of one file; playlists (HLS, DASH, concat) would open whatever paths and addresses they name
_CONTAINERS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpegtsraw,mpeg,mpegvideo,m4v,h264,hevc,vvc,av1,obu,ivf,gif,apng,webp_anim,flv,"
    "live_flv,asf,ogg,nut,mxf,mxf_opatom,dv,rm,wtv,gxf,lxf,roq,smk,bink,h263,h261,mjpeg,yuv4mpegpipe,c93,nsv,avs,avs2,avs3"
)
_DECORD_CONTAINERS = ("mov,mp4", "matroska", "webm", "avi")
_DECORD_CODECS = ("h264", "mpeg4", "vp8")
_PLAIN_FORMATS = ("yuv420p", "yuvj420p")
_INTERLACED_ORDERS = (2, 3, 4, 5)  # AVFieldOrder: TT, BB, TB, BT
_DOLBY_TAGS = ("dvhe", "dvh1", "dvav", "dva1", "dav1")  # no base layer that another decoder shows in right colours
_LARGEST_INDEX = 2**26  # bytes of an MP4's index that are searched for the reason why it does not open
_LOST_FRAMES = 0.02  # share of the frames that the header counts and a whole file may lack


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
    mirrored: bool  # left and right change places after that
    sample_aspect: list[int]  # width to height of a coded pixel
    time_base: list[int]
    pts: list[int] = field(repr=False)
    frame_ticks: int  # typical time between frames, in ticks
    fps: float
    variable_rate: bool
    duration_s: float
    key_frames: int
    key_pts: list[int] = field(repr=False)  # of the key frames that are presented
    colour: Colour
    hdr: bool  # PQ or HLG
    interlaced: bool
    audio: bool
    video_streams: int
    decoder: Decoder
    decoder_reason: str  # why not decord; "" for a plain file
    truncated: str = ""  # how much of the file is there, where its own header says there should be more
    packet_errors: int = 0
    probe_frames: int = 0  # frames decoded to learn the rotation

    @property
    def seconds_per_tick(self) -> float:
        return self.time_base[0] / self.time_base[1]

    def facts(self) -> dict[str, Any]:
        """All but the PTS tables, for records."""
        return {k: v for k, v in vars(self).items() if k not in ("pts", "key_pts")}


@contextmanager
def open_video(path: str) -> Iterator[tuple[Any, Any]]:
    """(container, its first video stream), set up so that damaged files cannot dead-lock the decoder.

    One slice thread: FFmpeg's frame threads wait for each other when a broken frame never arrives. Metadata that is
    not UTF-8 is replaced, not fatal. Raises Failed with what is wrong.
    """
    try:
        # FFmpeg takes names in UTF-8 only; the few files with other names are opened here and read through Python
        file = path if _is_text(path) else open(path, "rb")  # noqa: SIM115
        container = av.open(file, metadata_errors="replace", options={"format_whitelist": _CONTAINERS})
    except FileNotFoundError:
        raise Failed("probe", "no such file") from None
    except PermissionError:
        raise Failed("probe", "no permission to read the file") from None
    except (av.error.FFmpegError, OSError, ValueError) as error:
        what = _wrong_with_mp4(path) or f"not a readable video container ({short(error)})"
        raise Failed("probe", what) from error
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
        }
        aspect = stream.sample_aspect_ratio or Fraction(1)
        interlaced = context.field_order in _INTERLACED_ORDERS
        dolby = _codec_tag(context) in _DOLBY_TAGS
        truncated = _truncated(path, facts["container"], stream.frames, index)
        base = stream.time_base or Fraction(1, 1000)
        guessed = stream.guessed_rate or stream.average_rate
    first, decoded = _first_frame(path)
    colour = read_colour(first)
    if dolby and colour.transfer == "sdr":
        raise Filtered("probe", "Dolby Vision without a base layer: other decoders show its colours wrong")
    rotation, mirrored = _orientation(first)
    facts |= {"colour": colour, "hdr": colour.transfer != "sdr", "interlaced": interlaced or first.interlaced_frame}
    pts = sorted(set(index.shown))  # hidden frames (VP9) share the timestamp of the shown one
    ticks = _frame_ticks(pts, base, guessed)
    span = pts[-1] - pts[0] + ticks
    turned = rotation in (90, 270)
    width, height = max(1, round(first.width * aspect)), first.height
    problems = _not_for_decord(facts, index)
    problems += ["rotation"] * bool(rotation) + ["mirrored"] * mirrored
    problems += ["truncated"] * bool(truncated) + ["file name"] * (not _is_text(path))
    return VideoInfo(
        **facts,
        coded_width=first.width,
        coded_height=first.height,
        width=height if turned else width,
        height=width if turned else height,
        rotation=rotation,
        mirrored=mirrored,
        sample_aspect=[aspect.numerator, aspect.denominator],
        time_base=[base.numerator, base.denominator],
        pts=pts,
        frame_ticks=ticks,
        fps=len(pts) / float(span * base),
        variable_rate=_varies(pts, ticks),
        duration_s=float(span * base),
        key_frames=index.key_frames,
        key_pts=sorted(set(index.key_pts)),
        decoder="pyav" if problems else "decord",
        decoder_reason=", ".join(problems),
        truncated=truncated,
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
    key_pts: list[int] = field(default_factory=list)
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
        if packet.is_keyframe:
            index.key_pts.append(last)


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


def _not_for_decord(facts: dict[str, Any], index: _Index) -> list[str]:
    """Why PyAV must decode this file: what decord gets wrong (edit lists, stream choice, hidden frames) or lacks."""
    colour: Colour = facts["colour"]
    problems = {
        f"container {facts['container']}": not facts["container"].startswith(_DECORD_CONTAINERS),
        f"codec {facts['codec']}": facts["codec"] not in _DECORD_CODECS,
        f"pixel format {facts['pix_fmt']}": facts["pix_fmt"] not in _PLAIN_FORMATS,
        "several video streams": facts["video_streams"] > 1,
        "edit list": index.discarded > 0,
        "damaged packets": index.errors > 0,
        "frames without a timestamp": index.missing_pts > 0 or len(set(index.shown)) != len(index.shown),
        "interlaced": facts["interlaced"],
        f"{colour.transfer} with {colour.primaries} primaries": not colour.plain,
        "HD that states no colour matrix": colour.swscale_matrix is not None,
    }
    return [name for name, there in problems.items() if there]


def _codec_tag(context: Any) -> str:
    try:
        return str(context.codec_tag)
    except UnicodeDecodeError:
        return ""


def _orientation(frame: Any) -> tuple[int, bool]:
    """(rotation, mirrored) of the display matrix: x' = a x + c y, y' = b x + d y, y down. Raises Filtered."""
    matrix = side_data(frame, "DISPLAYMATRIX")
    if matrix is None or len(matrix) < 36:
        return 0, False
    a, b, _, c, d = struct.unpack_from("<5i", matrix)
    mirrored = a * d - b * c < 0
    if mirrored:  # looked at in a mirror, it is turned only
        a, c = -a, -c
    degrees = math.degrees(math.atan2(-b, a))
    rotation = 90 * round(degrees / 90)
    if abs(degrees - rotation) > 1:
        raise Filtered("probe", f"shown at an angle of {degrees:.0f} degrees; only quarter turns are taken")
    return rotation % 360, mirrored


def _truncated(path: str, container: str, frames: int, index: _Index) -> str:
    """How much is there of a file that is cut off; "" for a whole one, and where the format cannot tell."""
    if container.startswith("mov,mp4") and frames - index.packets > max(2, _LOST_FRAMES * frames):
        return f"{index.packets} of {frames} frames"
    size = 0
    if container.startswith(("matroska", "webm")):
        size = _matroska_size(path)
    elif container == "avi":
        with open(path, "rb") as file:
            size = 8 + int.from_bytes(file.read(8)[4:], "little")
        size *= size < 2**32  # all ones: not said
    there = os.path.getsize(path)
    return f"{there} of {size} bytes" if there < size else ""


def _matroska_size(path: str) -> int:
    """Bytes that a Matroska file should have by its own headers; 0 where they do not say (live recordings)."""
    with open(path, "rb") as file:
        head = file.read(4096)
    at = 0
    for name in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):  # EBML header, segment
        if head[at : at + 4] != name or len(head) < at + 12:
            return 0
        length = 9 - head[at + 4].bit_length()  # leading zeros say how long a number is
        size = int.from_bytes(head[at + 4 : at + 4 + length], "big") - (1 << 7 * length)
        at += 4 + length
        if size == (1 << 7 * length) - 1:  # unknown
            return 0
        at += size
    return at


def _wrong_with_mp4(path: str) -> str:
    """Why an MP4 or MOV file does not open, by its boxes: encrypted, or without an index; "" for other files."""
    kinds: list[bytes] = []
    try:
        with open(path, "rb") as file:
            while len(head := file.read(8)) == 8 and len(kinds) < 1000:
                size, kind = struct.unpack(">I4s", head)
                long = file.read(8) if size == 1 else b""
                size = struct.unpack(">Q", long)[0] if len(long) == 8 else size
                kinds.append(kind)
                if kind == b"moov" and b"encv" in file.read(min(max(size, 8), _LARGEST_INDEX) - 8):
                    return "the video is encrypted"
                if kind == b"moov":
                    return ""
                if size < 8 + len(long):
                    break
                file.seek(size - 8 - len(long), 1)
    except OSError:
        return ""
    if not kinds or kinds[0] not in (b"ftyp", b"styp", b"moof", b"sidx", b"wide", b"free"):
        return ""
    if b"moof" in kinds:
        return "fragments of an MP4 without their initialisation (no moov box)"
    return "an MP4 without its index (no moov box): cut off, or never finished"

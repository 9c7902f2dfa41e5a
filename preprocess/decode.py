"""Decode once: every frame of a video, upright, at about training size, with its exact timestamp.

decord where the probe shows a plain file (it scales inside its own decoder), PyAV for everything else; both give the
same frames in the same order. Scaling happens on the decoder's planes, so full-size RGB never exists. What is
interlaced, turned, mirrored, of other than square pixels, HDR or of wide colours comes out progressive, upright, square
and as SDR BT.709.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import av.error
import numpy as np
from av.filter import Graph
from PIL import Image

from preprocess.colour import to_sdr
from preprocess.outcome import Failed, short
from preprocess.probe import VideoInfo, open_video
from preprocess.stills import scaled_images

SMALL_WIDTH, SMALL_HEIGHT = 48, 27  # the analysis stream
_MAX_DAMAGED = 0.1  # share of packets that may be damaged before the file is set aside


@dataclass
class Frame:
    index: int  # position in order of presentation
    pts: int
    image: np.ndarray  # uint8 [h,w,3], covers the training size

    def small(self) -> np.ndarray:
        """The whole picture at analysis size: uint8 [27,48,3]."""
        return np.asarray(Image.fromarray(self.image).resize((SMALL_WIDTH, SMALL_HEIGHT), Image.Resampling.BOX))

    def cropped(self, height: int, width: int) -> np.ndarray:
        """The central part at training size: uint8 [height,width,3]."""
        top, left = (self.image.shape[0] - height) // 2, (self.image.shape[1] - width) // 2
        return self.image[top : top + height, left : left + width]


@dataclass
class DecodeCount:
    """What one pass over a file did; `decoded` counts every frame that left the decoder, shown or not."""

    decoded: int = 0
    shown: int = 0
    damaged: int = 0  # packets that could not be decoded
    dropped: int = 0  # frames whose timestamp did not advance
    decoder: str = ""
    reason: str = ""  # why not decord, where the probe gave the file to it


class DecordGaveUp(Failed):
    """decord met what it cannot decode; PyAV may pass over it, so it should begin anew.

    decord reads ahead: where it raises differs from run to run, and what it gave before must not stay.
    """


def cover_size(info: VideoInfo, height: int, width: int) -> tuple[int, int]:
    """(height, width) of the displayed picture scaled to just cover the training size, aspect ratio kept."""
    scale = max(height / info.height, width / info.width)
    return max(height, ceil(info.height * scale - 1e-6)), max(width, ceil(info.width * scale - 1e-6))


def frames(
    path: str,
    info: VideoInfo,
    height: int,
    width: int,
    *,
    count: DecodeCount,
    max_seconds: float | None = None,
    deadline: float | None = None,
    first: int = 0,
) -> Iterator[Frame]:
    """Frames of a probed video in order of presentation, each scaled to cover [height,width].

    Args:
        count: filled in while frames are taken.
        max_seconds: stop after this much of the video.
        deadline: `time.monotonic()` after which the file is given up.
        first: begin at this frame of the index, a key frame; it gets this number. Whether too much is missing is then
            not judged (`check_decoded`): the rest of the file counts, too.
    Raises:
        Failed: nothing can be decoded, more than a tenth of the packets is damaged, or the time is over.
        DecordGaveUp: begin anew with `info.decoder` = "pyav".
    """
    size = cover_size(info, height, width)
    source: Iterator[tuple[int, np.ndarray]] | None = None
    if info.decoder == "images":
        source = _images(path, info, size, count)
    elif info.decoder == "decord":
        source = _decord(path, info, size, count, first)
    if source is None:
        source = _pyav(path, info, size, count, first)
    end = info.pts[0] + max_seconds / info.seconds_per_tick if max_seconds is not None else None
    last: int | None = None
    for pts, image in source:
        count.decoded += 1
        if deadline is not None and time.monotonic() > deadline:
            raise Failed("decode", f"took too long: given up after {count.decoded} frames")
        if end is not None and pts >= end:
            break
        if last is not None and pts <= last:
            count.dropped += 1
            continue
        last = pts
        yield Frame(first + count.shown, pts, image)
        count.shown += 1
    if not first:
        check_decoded(count, info, max_seconds)


def check_decoded(count: DecodeCount, info: VideoInfo, max_seconds: float | None = None) -> None:
    """Raises Failed where a whole pass over a file, or over its first seconds, has shown too little."""
    if count.shown == 0:
        where = f" in the first {max_seconds:g} s (max_seconds)" if max_seconds is not None else ""
        raise Failed("decode", f"no frame can be decoded{where} ({count.damaged} damaged packets of {len(info.pts)})")
    if count.damaged > _MAX_DAMAGED * (count.decoded + count.damaged):
        raise Failed("decode", f"{count.damaged} of {count.decoded + count.damaged} packets are damaged")


def _images(path: str, info: VideoInfo, size: tuple[int, int], count: DecodeCount) -> Iterator[tuple[int, np.ndarray]]:
    count.decoder = "images"
    for pts, image in scaled_images(Path(path), size, (info.height, info.width)):
        if image is None:
            count.damaged += 1
        else:
            yield pts, image


def _decord(
    path: str, info: VideoInfo, size: tuple[int, int], count: DecodeCount, first: int
) -> Iterator[tuple[int, np.ndarray]] | None:
    """Frames through decord, or None, and the reason in `count`, if it does not see the frames of the index."""
    import decord

    try:
        reader = decord.VideoReader(path, width=size[1], height=size[0], num_threads=1)
    except (decord.DECORDError, RuntimeError, AssertionError):
        count.reason = "decord cannot open it"
        return None
    if len(reader) != len(info.pts):
        count.reason = f"decord counts {len(reader)} frames, the index {len(info.pts)}"
        return None
    count.decoder = "decord"
    return _read_decord(reader, info, first)


def _read_decord(reader: object, info: VideoInfo, first: int) -> Iterator[tuple[int, np.ndarray]]:
    import decord

    for i, pts in enumerate(info.pts[first:], first):
        try:
            yield pts, _rgb(reader[i].asnumpy())  # type: ignore[index]
        except (decord.DECORDError, RuntimeError) as error:
            what = f"decord cannot decode frame {i} of {len(info.pts)} ({short(error)})"
            raise DecordGaveUp("decode", what) from error


def _rgb(image: np.ndarray) -> np.ndarray:
    """[h,w,3] from decord2, which at some narrow widths returns its padded rows as [h,w,4] and more."""
    height, width, depth = image.shape
    return image if depth == 3 else image.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)


def _pyav(
    path: str, info: VideoInfo, size: tuple[int, int], count: DecodeCount, first: int
) -> Iterator[tuple[int, np.ndarray]]:
    count.decoder = "pyav"
    with open_video(path) as (container, stream):
        if first:
            with contextlib.suppress(av.error.FFmpegError, OSError):  # it cannot be searched: read from its beginning
                container.seek(info.pts[first], stream=stream)
        decoded = _decoded(container, stream, info, count, first)
        for frame in _progressive(decoded, Fraction(*info.time_base)) if info.interlaced else decoded:
            if first and frame.pts < info.pts[first]:
                count.decoded += 1
            else:
                yield frame.pts, _displayed(frame, info, size)


def _decoded(container: Any, stream: Any, info: VideoInfo, count: DecodeCount, first: int) -> Iterator[Any]:
    """Frames as they leave the decoder, each with a PTS; damaged packets are counted."""
    last = info.pts[first] - info.frame_ticks
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
            if packet is None:
                return
            frames = packet.decode()
        except av.error.FFmpegError:
            count.damaged += 1
            if packet is None or count.damaged > len(info.pts):
                return
            continue
        for frame in frames:
            if frame.pts is None:
                frame.pts = last + info.frame_ticks
            last = frame.pts
            yield frame


def _progressive(frames: Iterator[Any], base: Fraction) -> Iterator[Any]:
    """Each frame as it was at its first field, by FFmpeg's bwdif; frames that are not interlaced pass as they are."""
    graph: Graph | None = None
    shape = None
    for frame in frames:
        before, shape = shape, (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range)
        if graph is None or before != shape:
            yield from _pulled(graph, base, end=True)
            graph = _deinterlacer(*shape, base)
        graph.vpush(frame)
        yield from _pulled(graph, base)
    yield from _pulled(graph, base, end=True)


def _deinterlacer(width: int, height: int, pix_fmt: str, matrix: int, color_range: int, base: Fraction) -> Graph:
    graph = Graph()
    graph.threads = 1
    source = graph.add(
        "buffer",
        video_size=f"{width}x{height}",
        pix_fmt=pix_fmt,
        time_base=f"{base.numerator}/{base.denominator}",
        pixel_aspect="1/1",
        colorspace=str(int(matrix)),
        range=str(int(color_range)),
    )
    bwdif = graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced")
    graph.link_nodes(source, bwdif, graph.add("buffersink")).configure()
    return graph


def _pulled(graph: Graph | None, base: Fraction, end: bool = False) -> Iterator[Any]:
    """What the filter has ready, with PTS in ticks of `base` again (bwdif halves the tick)."""
    if graph is None:
        return
    if end:
        graph.vpush(None)
    while True:
        try:
            frame: Any = graph.vpull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return
        frame.pts = round(frame.pts * frame.time_base / base)
        yield frame


def _displayed(frame: Any, info: VideoInfo, size: tuple[int, int]) -> np.ndarray:
    """uint8 RGB of a decoded frame, upright, `size` (height, width)."""
    colour, turns = info.colour, info.rotation // 90
    height, width = size if turns % 2 == 0 else size[::-1]
    scaled = frame.reformat(
        width=width,
        height=height,
        format="rgb24" if colour.plain else "rgb48le",
        src_colorspace=colour.swscale_matrix,
        interpolation="BICUBIC",
        threads=1,
    )
    image = scaled.to_ndarray() if colour.plain else to_sdr(scaled.to_ndarray(), colour)
    image = np.rot90(image, turns) if turns else image
    return np.ascontiguousarray(image[:, ::-1] if info.mirrored else image)

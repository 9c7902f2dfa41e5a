"""Find black bars around the picture (letterbox, pillarbox, both) before the decode, so that it can leave them out.

A few key frames, spread over the video and decoded small, are enough: bars are in all of them, at the same place. A row
or column belongs to a bar where it is black in every frame; a bar is flat, of one level over time, and the picture
begins behind it with a step. A dark room is not flat, and a night sky fades in.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av.error
import numpy as np
from PIL import Image

from preprocess.outcome import Failed
from preprocess.pixels import LUMA
from preprocess.probe import VideoInfo, open_video
from preprocess.stills import open_image, read_images

_SAMPLES = 8  # key frames looked at, at most
_SHARE = 0.05  # of the frames, at most: they are decoded besides the one decode
_WIDTH = 480  # pixels of the longer side, at most
_BLACK = 28.0  # grey levels: 98 of 100 pixels of a bar are darker
_FLAT = 3.0  # grey levels, standard deviation inside of a bar
_EDGE = 12.0  # grey levels by which the picture right behind a bar is brighter, at its brightest over time,
_STRAIGHT = 0.7  # on this share of the bar's length: things on a black ground touch a line in few places
_STRAIGHT_PAIR = 0.15  # enough where the other side has as wide a bar
_LEAST = 0.008  # of the side: a thinner bar is a dirty edge, and stays
_MOST = 0.4  # of the side, each bar: where more is black, too little can be said
_INSET = 0.004  # of the side, cut besides the bar: its edge is soft


@dataclass(frozen=True)
class Bars:
    """Shares of the displayed picture's height and width that lie in bars; 0 where there is none."""

    top: float = 0.0
    bottom: float = 0.0
    left: float = 0.0
    right: float = 0.0

    @property
    def height(self) -> float:
        """Share of the height that remains."""
        return 1.0 - self.top - self.bottom

    @property
    def width(self) -> float:
        """Share of the width that remains."""
        return 1.0 - self.left - self.right

    @property
    def area(self) -> float:
        """Share of the picture that lies in bars."""
        return 1.0 - self.height * self.width

    def decode_size(self, info: VideoInfo, height: int, width: int) -> tuple[int, int]:
        """(height, width) to ask the decoder for, so that the picture inside of the bars covers [height,width]."""
        if not self.area:
            return height, width
        scale = max(height / (self.height * info.height), width / (self.width * info.width))
        return int(np.ceil(scale * info.height)) + 2, int(np.ceil(scale * info.width)) + 2

    def picture(self, info: VideoInfo) -> tuple[int, int]:
        """(height, width) in displayed pixels of what lies inside of the bars."""
        return max(1, round(self.height * info.height)), max(1, round(self.width * info.width))

    def inside(self, image: np.ndarray) -> np.ndarray:
        """The picture without its bars, a view of [h,w,3]."""
        if not self.area:
            return image
        height, width = image.shape[:2]
        rows = slice(int(np.ceil(self.top * height)), int(np.floor((1 - self.bottom) * height)))
        columns = slice(int(np.ceil(self.left * width)), int(np.floor((1 - self.right) * width)))
        return image[rows, columns]


NO_BARS = Bars()


def find_bars(path: str, info: VideoInfo, max_seconds: float | None = None) -> tuple[Bars, int]:
    """The bars of a probed video, or of its first seconds, and how many frames were decoded to find them."""
    end = len(info.pts)
    if max_seconds is not None:
        end = max(1, bisect_left(info.pts, info.pts[0] + max_seconds / info.seconds_per_tick))
    frames = list(_key_frames(path, info, end))
    return bars_of(frames), len(frames)


def bars_of(frames: list[np.ndarray]) -> Bars:
    """Bars that all frames share, from float luma [h,w] of equal size. No frames, or only black ones: no bars."""
    if not frames:
        return Bars()
    luma = np.stack(frames)  # [n,h,w]
    top, bottom = _along(luma)
    left, right = _along(luma.swapaxes(1, 2))
    return Bars(top, bottom, left, right)


def _along(luma: np.ndarray) -> tuple[float, float]:
    """Shares of the rows that lie in a bar at the beginning and at the end."""
    bright = np.percentile(luma, 98, axis=2).max(0)  # [h]: brightest over time
    rows = len(bright)
    inside = np.flatnonzero(bright >= _BLACK)
    if not len(inside):
        return 0.0, 0.0
    before, after = int(inside[0]), rows - 1 - int(inside[-1])
    straight = _STRAIGHT_PAIR if abs(before - after) <= 1 else _STRAIGHT
    return _bar(luma, before, straight), _bar(luma[:, ::-1], after, straight)


def _bar(luma: np.ndarray, size: int, straight: float) -> float:
    """Share of the rows to cut for a bar of `size` rows at the beginning; 0 where these rows are no bar."""
    rows = luma.shape[1]
    if not _LEAST * rows <= size <= _MOST * rows:
        return 0.0
    core = luma[:, : max(1, size - 1)]  # without the soft edge
    behind = luma[:, size : size + 3].max((0, 1))  # [w]
    if core.std() > _FLAT or float((behind - core.mean() > _EDGE).mean()) < straight:
        return 0.0
    return size / rows + max(_INSET, 1 / rows)


def _key_frames(path: str, info: VideoInfo, end: int) -> Iterator[np.ndarray]:
    """Upright luma of a few key frames before frame `end`; fewer where the file cannot be searched."""
    count = max(1, min(_SAMPLES, info.key_frames, int(_SHARE * end)))
    # the first frame is often black: with several, each from the middle of its part
    places = [end * (2 * k + 1) // (2 * count) for k in range(count)] if count > 1 else [0]
    for image in _stills(path, places) if info.decoder == "images" else _searched(path, info, places):
        luma = np.rot90(image.astype(np.float32) @ LUMA, info.rotation // 90)
        yield luma[:, ::-1] if info.mirrored else luma


def _searched(path: str, info: VideoInfo, places: list[int]) -> Iterator[np.ndarray]:
    """The key frames before `places`, each once, as small RGB."""
    seen: set[int] = set()
    with open_video(path) as (container, stream):
        stream.codec_context.skip_frame = "NONKEY"
        for place in places:
            try:
                container.seek(info.pts[place], stream=stream)
                frame = next(container.decode(stream), None)
            except (av.error.FFmpegError, OSError):
                return
            if frame is None or frame.pts in seen:
                continue
            seen.add(frame.pts)
            height, width = _small(frame.height, frame.width)
            yield frame.reformat(width=width, height=height, format="rgb24", interpolation="AREA").to_ndarray()


def _stills(folder: str, places: list[int]) -> Iterator[np.ndarray]:
    """The images at `places` of a folder of images; those that are damaged are left out."""
    images = read_images(Path(folder))
    for place in places:
        try:
            image = open_image(images[place][1])
        except Failed:
            continue
        height, width = _small(image.height, image.width)
        yield np.asarray(image.resize((width, height), Image.Resampling.BOX))


def _small(height: int, width: int) -> tuple[int, int]:
    scale = min(1.0, _WIDTH / max(height, width, 1))
    return max(16, round(scale * height)), max(16, round(scale * width))

"""Uploaded images and videos: decoded once, within bounds, to frames of the model's size, and packed without loss.

An upload is untrusted. Its format is told by its first bytes and must be on a short list: FFmpeg also opens playlists
and scripts that name other files or addresses, and these are not. Sizes are checked before pixels are made.
"""

from __future__ import annotations

import hashlib
import io
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import av
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sample.video_io import fit_frames

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
VIDEO_CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "ffv1")
MAX_IMAGE_PIXELS = 64_000_000
MAX_VIDEO_PIXELS = 4096 * 2304  # of a frame
MAX_ASPECT = 8  # a sliver would be scaled up to thousands of pixels before its middle is cut out

_one_at_a_time = threading.Lock()  # bounds memory: a large image takes a quarter of a gigabyte while it is scaled


class UploadError(ValueError):
    """Not a readable image or video within the bounds; the message says which and what is taken."""


@dataclass(frozen=True)
class Upload:
    """What an upload shows, ready to be kept: `name` tells contents apart and ends in .png (an image) or .mkv."""

    name: str
    data: bytes
    num_frames: int

    @property
    def is_image(self) -> bool:
        return self.name.endswith(".png")


def read_upload(data: bytes, height: int, width: int, max_frames: int) -> Upload:
    """The image, or the first `max_frames` frames of the video, scaled to cover height x width and cut to it.

    Raises UploadError for what is no image or video of the known formats, is broken, or is too large.
    """
    container = _container(data)
    with _one_at_a_time:
        if container is None:
            frames = fit_frames(_decode_image(data)[None], height, width)
        else:
            shown = [fit_frames(frame[None], height, width)[0] for frame in _decode_video(data, container, max_frames)]
            if not shown:
                raise UploadError("a video without frames")
            frames = np.stack(shown)
        packed = _to_png(frames[0]) if container is None else _to_ffv1(frames)
    digest = hashlib.sha256(repr(frames.shape).encode() + frames.tobytes()).hexdigest()[:32]
    return Upload(f"{digest}{'.png' if container is None else '.mkv'}", packed, len(frames))


def _container(data: bytes) -> str | None:
    """FFmpeg's name of a video's container; None where the bytes begin like none of those taken."""
    if data[4:8] == b"ftyp":
        return "mov"  # MP4 and QuickTime
    return "matroska" if data[:4] == b"\x1aE\xdf\xa3" else None  # also WebM


def _decode_image(data: bytes) -> np.ndarray:
    """Upright pixels uint8 [H, W, 3]."""
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:  # reads the header only
            _check_size(image.width, image.height, MAX_IMAGE_PIXELS)
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except UploadError:
        raise
    except UnidentifiedImageError as error:
        raise UploadError(_unreadable("unknown format")) from error
    # what Pillow raises for broken files, too, besides its own error (an OSError)
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, KeyError, struct.error) as error:
        raise UploadError(_unreadable(error)) from error
    except Image.DecompressionBombError as error:
        raise UploadError(_unreadable(error)) from error


def _decode_video(data: bytes, container: str, max_frames: int) -> Iterator[np.ndarray]:
    """Frames uint8 [H, W, 3], from the first on, at most `max_frames`."""
    options = {"protocol_whitelist": "none"} | (
        {"enable_drefs": "0"} if container == "mov" else {}
    )  # opens no other file
    try:
        with av.open(io.BytesIO(data), format=container, options=options) as file:
            if not file.streams.video:
                raise UploadError("a video file without a video stream")
            stream = file.streams.video[0]
            codec = "something unknown" if stream.codec_context is None else stream.codec_context.codec.canonical_name
            if codec not in VIDEO_CODECS:
                raise UploadError(f"a video coded as {codec}; taken are {', '.join(VIDEO_CODECS)}")
            _check_size(stream.width, stream.height, MAX_VIDEO_PIXELS)
            stream.codec_context.options = {"max_pixels": str(MAX_VIDEO_PIXELS)}  # a stream may change its size
            stream.codec_context.thread_count = 1
            for number, frame in enumerate(file.decode(stream)):
                if number == max_frames:
                    return
                _check_size(frame.width, frame.height, MAX_VIDEO_PIXELS)
                yield frame.to_ndarray(format="rgb24")
    except UploadError:
        raise
    except (av.FFmpegError, ValueError, OSError, IndexError) as error:
        raise UploadError(_unreadable(error)) from error


def _check_size(width: int, height: int, most: int) -> None:
    if min(width, height) < 1 or width * height > most:
        raise UploadError(f"{width}x{height} pixels; at most {most / 1e6:.3g} million are read")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UploadError(f"{width}x{height} pixels; one side may be at most {MAX_ASPECT} times the other")


def _unreadable(error: Exception | str) -> str:
    return (
        f"not a readable image or video ({error}); taken are {', '.join(IMAGE_FORMATS)}, and MP4, QuickTime, Matroska "
        "and WebM files"
    )


def _to_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _to_ffv1(frames: np.ndarray) -> bytes:
    """Frames uint8 [T, H, W, 3] as a Matroska file, lossless; the frame rate means nothing."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()

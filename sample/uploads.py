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
MAX_VIDEO_FRAMES = 1000
MAX_DECODED_PIXELS = 2_000_000_000  # of all frames of a video: 1000 of 1920x1080
MAX_KEPT_BYTES = 256 * 2**20  # of the packed frames of a request
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


def read_upload(data: bytes, height: int, width: int) -> Upload:
    """The image, or the whole video, with every frame scaled to cover height x width and cut to it.

    Raises UploadError for what is no image or video of the known formats, is broken, or is too large.
    """
    container = _container(data)
    with _one_at_a_time:
        if container is None:
            return _keep_image(fit_frames(_decode_image(data)[None], height, width)[0])
        return _keep_video(fit_frames(frame[None], height, width)[0] for frame in _decode_video(data, container))


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


def _decode_video(data: bytes, container: str) -> Iterator[np.ndarray]:
    """Frames uint8 [H, W, 3], one after another."""
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
            pixels = 0
            for number, frame in enumerate(file.decode(stream)):
                _check_size(frame.width, frame.height, MAX_VIDEO_PIXELS)
                pixels += frame.width * frame.height
                if number == MAX_VIDEO_FRAMES or pixels > MAX_DECODED_PIXELS:
                    most = f"{MAX_VIDEO_FRAMES} frames and {MAX_DECODED_PIXELS / 1e9:.3g} billion pixels"
                    raise UploadError(f"a video of more than {most}; cut or scale it down first")
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


def _keep_image(pixels: np.ndarray) -> Upload:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes())
    return Upload(f"{digest.hexdigest()[:32]}.png", buffer.getvalue(), 1)


def _keep_video(frames: Iterator[np.ndarray]) -> Upload:
    """Frames uint8 [H, W, 3] as a Matroska file of FFV1, which loses nothing; the frame rate means nothing."""
    buffer, digest, count, size = io.BytesIO(), hashlib.sha256(), 0, 0
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.pix_fmt = "bgr0"
        for count, pixels in enumerate(frames, 1):
            if count == 1:
                stream.height, stream.width = pixels.shape[:2]
                digest.update(repr(pixels.shape).encode())
            digest.update(pixels.tobytes())
            packets = stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24"))
            container.mux(packets)
            size += sum(packet.size for packet in packets)
            if size > MAX_KEPT_BYTES:
                raise UploadError(f"a video that takes more than {MAX_KEPT_BYTES // 2**20} MiB at the model's size")
        if count == 0:
            raise UploadError("a video without frames")
        container.mux(stream.encode(None))
    return Upload(f"{digest.hexdigest()[:32]}.mkv", buffer.getvalue(), count)

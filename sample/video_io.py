"""Video files: uint8 RGB frames to H.264 and back, through PyAV."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps

from infra.storage import atomic_path

CRF = 16  # visually lossless; the default 23 smears small synthetic frames


def write_video(frames: np.ndarray, path: Path | str, fps: float) -> Path:
    """Write uint8 frames [T, H, W, 3] as H.264 (yuv420p) and return the path; the file appears whole or not at all.

    The same frames give the same bytes. Raises ValueError for another dtype or shape, an odd height or width
    (4:2:0 chroma needs even sizes), or a frame rate that is not positive.
    """
    path = Path(path)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) == 0:
        raise ValueError(f"{path}: need uint8 frames [T, H, W, 3] with T >= 1, got {frames.dtype} {frames.shape}")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"{path}: {width}x{height} has an odd side; H.264 in yuv420p needs even ones")
    if not fps > 0:
        raise ValueError(f"{path}: fps is {fps}; give a positive frame rate")
    rate = Fraction(fps).limit_denominator(1001)
    with (
        atomic_path(path) as partial,
        av.open(str(partial), "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": str(CRF), "threads": "1"}  # x264's output depends on its thread count
        stream.codec_context.time_base = 1 / rate
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def read_video(path: Path | str) -> tuple[np.ndarray, float]:
    """All frames of a video, uint8 [T, H, W, 3], and its average frame rate. Raises ValueError naming the file."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            rate = stream.average_rate
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path}: not a readable video ({error})") from error
    if not frames:
        raise ValueError(f"{path}: holds no video frames")
    return np.stack(frames), float(rate or 0)


def read_image(path: Path | str) -> np.ndarray:
    """An image as uint8 [H, W, 3]. Raises ValueError naming the file."""
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))  # upright
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from error


def enlarge(frames: np.ndarray, min_side: int) -> np.ndarray:
    """Frames [T, H, W, 3] whose pixels are repeated by the whole factor that brings both sides to `min_side` or more.

    Colour in 4:2:0 has half the resolution: at 64x64 a thin outline of another colour is lost, repeated pixels are not.
    """
    factor = -(-min_side // min(frames.shape[1:3]))
    return frames if factor <= 1 else frames.repeat(factor, axis=1).repeat(factor, axis=2)


def fit_frames(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale uint8 frames [T, H, W, 3] to cover height x width, then cut the centre out."""
    _, source_height, source_width, _ = frames.shape
    if (source_height, source_width) == (height, width):
        return frames
    scale = max(height / source_height, width / source_width)
    size = (max(width, round(source_width * scale)), max(height, round(source_height * scale)))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    resized = [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)) for frame in frames]
    return np.stack(resized)[:, top : top + height, left : left + width]

"""Video files for the tests, written with PyAV: exact frames, exact timestamps."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

TIME_BASE = Fraction(1, 1000)


def write(
    path: Path,
    frames: Sequence[np.ndarray],
    fps: float = 8.0,
    pts: Sequence[int] | None = None,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
) -> Path:
    """Frames uint8 [h,w,3] at `pts` (milliseconds; default: even at `fps`)."""
    pts = pts if pts is not None else [round(1000 * i / fps) for i in range(len(frames))]
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=container or {}) as output:
        stream = output.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.time_base = stream.codec_context.time_base = TIME_BASE
        if options or codec != "libx264":
            stream.options = options or {}
        else:
            stream.options = {"crf": "12", "preset": "ultrafast", "x264-params": "threads=1:log-level=none"}
        for image, at in zip(frames, pts, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = at, TIME_BASE
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def moving_square(
    count: int,
    background: tuple[int, int, int],
    square: tuple[int, int, int],
    size: int = 96,
    start: int = 0,
    step: float = 2.0,
    y: float = 0.4,
) -> list[np.ndarray]:
    """A square a quarter of the picture wide moves right by `step` pixels a frame over a flat background."""
    frames = []
    side = size // 4
    for i in range(count):
        image = np.full((size, size, 3), background, np.uint8)
        left = int(start + step * i) % (size - side)
        top = int(y * size)
        image[top : top + side, left : left + side] = square
        frames.append(image)
    return frames


def three_shots(count: int = 17, size: int = 96) -> list[np.ndarray]:
    """Three shots of `count` frames, each in its own colours."""
    return [
        *moving_square(count, (30, 120, 40), (220, 40, 40), size),
        *moving_square(count, (200, 190, 120), (40, 60, 200), size, y=0.1),
        *moving_square(count, (40, 40, 90), (230, 200, 40), size, y=0.6),
    ]


LUMA = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}  # Kr, Kb of ITU-T H.273
CODES = {"bt601": 6, "bt709": 1, "bt2020": 9}


def to_yuv(image: np.ndarray, matrix: str, full_range: bool = False, bits: int = 8) -> list[np.ndarray]:
    """4:4:4 planes of coded RGB in [0, 1], float [h,w,3], by the formulas of H.273; uint8 or little-endian uint16."""
    kr, kb = LUMA[matrix]
    r, g, b = np.moveaxis(image, -1, 0)
    y = kr * r + (1 - kr - kb) * g + kb * b
    cb, cr = (b - y) / (2 * (1 - kb)), (r - y) / (2 * (1 - kr))
    scale, most = 2 ** (bits - 8), 2**bits - 1
    if full_range:
        planes = [most * y, 2 ** (bits - 1) + most * cb, 2 ** (bits - 1) + most * cr]
    else:
        planes = [scale * (16 + 219 * y), scale * (128 + 224 * cb), scale * (128 + 224 * cr)]
    return [np.clip(np.rint(plane), 0, most).astype("u1" if bits == 8 else "<u2") for plane in planes]


def write_planes(
    path: Path,
    planes: Sequence[np.ndarray],
    pix_fmt: str,
    codec: str = "ffv1",
    options: dict[str, str] | None = None,
    matrix: int = 2,
    primaries: int = 2,
    transfer: int = 2,
    color_range: int = 0,
    count: int = 4,
    aspect: Fraction | None = None,
    orient: dict[str, bool | float] | None = None,
) -> Path:
    """The same planes in `count` frames, bit for bit with FFV1, under the given H.273 code points (2: not stated)."""
    height, width = planes[0].shape
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        context = stream.codec_context
        context.colorspace, context.color_primaries, context.color_trc = matrix, primaries, transfer
        context.color_range = color_range
        if aspect:
            context.sample_aspect_ratio = aspect
        if orient:
            stream.set_display_rotation(**orient)
        for index in range(count):
            frame = av.VideoFrame(width, height, pix_fmt)
            for target, plane in zip(frame.planes, planes, strict=True):
                rows = np.zeros((plane.shape[0], target.line_size // plane.itemsize), plane.dtype)
                rows[:, : plane.shape[1]] = plane
                target.update(rows.tobytes())
            frame.pts, frame.time_base = index, Fraction(1, 24)
            frame.colorspace, frame.color_primaries, frame.color_trc = matrix, primaries, transfer
            frame.color_range = color_range
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def texture(seed: int, size: int = 128, margin: int = 96) -> np.ndarray:
    """A picture with detail of all sizes, as photographs have: uint8 [size+margin,size+margin,3]."""
    rng = np.random.default_rng(seed)
    whole = size + margin
    v, u = np.fft.fftfreq(whole)[:, None], np.fft.fftfreq(whole)[None]
    falls = 1.0 / np.maximum(np.hypot(u, v), 1.0 / whole)
    layers = [np.fft.ifft2(falls * np.fft.fft2(rng.normal(size=(whole, whole)))).real for _ in range(4)]
    shared = layers.pop()
    mixed = np.stack([2 * shared + one for one in layers], -1)
    return np.clip(128 + 45 * mixed / mixed.std(), 8, 247).astype(np.uint8)


def pan(seed: int = 0, count: int = 17, size: int = 128, step: float = 2.0) -> list[np.ndarray]:
    """A camera that moves right over a `texture` at a constant speed, pixels per frame."""
    picture = texture(seed, size)
    return [picture[20 : 20 + size, (left := int(step * i)) : left + size] for i in range(count)]


def write_unusable(folder: Path) -> None:
    """An empty file, a text, and a clip that is too short: empty.mp4, text.mp4, short.mp4."""
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("not a video")
    write(folder / "short.mp4", three_shots(17)[:3])


def damage_packet(path: Path, number: int) -> Path:
    """Overwrite packet `number` (in the order of the file) of a video with noise, in place."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(container.streams.video[0]) if packet.size]
        position, size = packets[number].pos, packets[number].size
    data = bytearray(path.read_bytes())
    data[position : position + size] = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8).tobytes()
    path.write_bytes(bytes(data))
    return path

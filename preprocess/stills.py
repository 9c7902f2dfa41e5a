"""A folder of numbered images as a video: frame_0001.png, frame_0002.png, ... at a stated rate.

A number is a time: where one is missing, the frame before it is shown longer, and the rate varies.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from functools import reduce
from math import gcd
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from preprocess.colour import Colour
from preprocess.outcome import Failed, short
from preprocess.probe import VideoInfo

IMAGE_SUFFIXES = frozenset(".png .jpg .jpeg .webp .bmp .tif .tiff".split())
_NUMBERED = re.compile(r"(.*?)(\d+)$")


def numbered_images(folder: Path) -> list[tuple[int, Path]]:
    """(number, file) of the images of a folder, in order; empty where it holds none with a number at the end.

    Raises ValueError where they are not one sequence.
    """
    found: dict[int, Path] = {}
    kinds = set()
    for path in sorted(folder.iterdir()):
        match = _NUMBERED.match(path.stem)
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith(".") or not match or not path.is_file():
            continue
        number = int(match[2])
        if number in found:
            raise ValueError(f"{found[number].name} and {path.name} have the same number; one sequence a folder")
        found[number] = path
        kinds.add((match[1], path.suffix.lower()))
    if len(kinds) > 1:
        names = ", ".join(sorted(f"{prefix}*{suffix}" for prefix, suffix in kinds)[:3])
        raise ValueError(f"holds several sequences of images ({names}); give each a folder of its own")
    return sorted(found.items())


def frame_times(numbers: list[int]) -> list[int]:
    """Times in frames from 0: numbers less the first, in steps of what divides them all."""
    step = reduce(gcd, (number - numbers[0] for number in numbers), 0) or 1
    return [(number - numbers[0]) // step for number in numbers]


def read_images(folder: Path) -> list[tuple[int, Path]]:
    """(time in frames, file). Raises Failed."""
    try:
        images = numbered_images(folder)
    except (OSError, ValueError) as error:
        raise Failed("probe", str(error) if isinstance(error, ValueError) else short(error)) from error
    if not images:
        raise Failed("probe", "holds no numbered images")
    return list(zip(frame_times([number for number, _ in images]), (path for _, path in images), strict=True))


def rate(fps: float) -> Fraction:
    """29.97 and its kin as what they are meant to be."""
    near = Fraction(round(fps * 1.001)) / Fraction(1001, 1000)
    return near if abs(float(near) - fps) < 1e-3 and fps != round(fps) else Fraction(fps).limit_denominator(1000)


def open_image(path: Path) -> Image.Image:
    """Upright RGB of 8 bits. Raises Failed naming the file."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):
                return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Failed("decode", f"{path.name} is no readable image ({short(error)})") from error


def probe_images(folder: Path, fps: float) -> VideoInfo:
    """Facts of a folder of images, of which the first is opened. Raises Failed."""
    times, files = zip(*read_images(folder), strict=True)
    first = open_image(files[0])
    step = 1 / rate(fps)
    uneven = len(times) != times[-1] + 1
    return VideoInfo(
        container="images",
        codec=files[0].suffix[1:].lower(),
        pix_fmt="rgb24",
        coded_width=first.width,
        coded_height=first.height,
        width=first.width,
        height=first.height,
        rotation=0,
        mirrored=False,
        sample_aspect=[1, 1],
        time_base=[step.numerator, step.denominator],
        pts=list(times),
        frame_ticks=1,
        fps=len(times) / float((times[-1] + 1) * step),
        variable_rate=uneven,
        duration_s=float((times[-1] + 1) * step),
        key_frames=len(times),
        key_pts=list(times),
        colour=Colour(matrix="rgb", full_range=True),
        hdr=False,
        interlaced=False,
        audio=False,
        video_streams=1,
        decoder="images",
        decoder_reason="a folder of images",
        probe_frames=0,
    )


def scaled_images(
    folder: Path, size: tuple[int, int], shape: tuple[int, int]
) -> Iterator[tuple[int, np.ndarray | None]]:
    """(time, uint8 [h,w,3]) of each image at `size` (height, width); None in place of one that is damaged.

    Raises Failed for one of another shape than the first, `shape` (height, width).
    """
    for time, path in read_images(folder):
        try:
            image = open_image(path)
        except Failed:
            yield time, None
            continue
        if (image.height, image.width) != shape:
            raise Failed("decode", f"{path.name} is {image.width}x{image.height}, the first {shape[1]}x{shape[0]}")
        yield time, np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC))

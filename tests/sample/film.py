"""A small film whose picture moves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from sample.video_io import write_video


def write_film(folder: Path, frames: int) -> Path:
    """film.mp4, 32x32: a pattern that moves right by an eighth a frame. Its first frame lies beside it, as film.png."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    path = folder / "film.mp4"
    write_video(np.stack([np.roll(pixels, 4 * t, axis=1) for t in range(frames)]), path, 8)
    Image.fromarray(pixels).save(path.with_suffix(".png"))
    return path

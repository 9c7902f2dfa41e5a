"""Measure a shot from its small frames: colours, light, camera move. No model; feeds filters and `describe`."""

from __future__ import annotations

import numpy as np
from PIL import Image

from preprocess.pixels import LUMA

# representative sRGB values of the basic colour terms (Berlin and Kay)
COLOURS = {
    "black": (15, 15, 15), "grey": (128, 128, 128), "white": (245, 245, 245), "red": (200, 30, 35),
    "orange": (240, 140, 30), "yellow": (240, 220, 60), "green": (50, 150, 60), "blue": (40, 90, 200),
    "purple": (130, 50, 160), "pink": (240, 150, 180), "brown": (110, 70, 40),
}  # fmt: skip
_MAX_SHIFT = (2, 3)  # rows, columns at 48x27: how far the picture may move between two encoded frames
_ZOOM = 0.08
_WIDESPREAD = 0.6  # share of the picture that changes when the camera moves
_MATCH = 0.7  # a move counts if it leaves less than this share of the difference


def measure_shot(small: list[np.ndarray], fps: float) -> dict[str, float]:
    """Scores of one shot from its encoded frames at analysis size, uint8 [27,48,3] each.

    brightness, contrast, saturation in 0..1; share of each named colour; pan_x and pan_y in picture widths and heights
    over the shot (positive: the camera moves right, down); zoom over the shot (positive: in); seconds.
    """
    if not small:
        return {}
    pictures = np.stack(small).astype(np.float32) / 255.0  # [n,27,48,3]
    luma = pictures @ LUMA  # [n,27,48]
    red, green, blue = (np.ascontiguousarray(pictures[..., k]) for k in range(3))
    high, low = (pick(pick(red, green), blue) for pick in (np.maximum, np.minimum))
    scores = {
        "brightness": float(luma.mean()),
        "contrast": float(luma.std(axis=(1, 2)).mean()),
        "saturation": float(np.mean((high - low) / np.maximum(high, 1e-3))),
        "seconds": len(small) / fps,
        **_colour_shares(pictures[:: max(1, len(small) // 4)]),
        **_camera(luma),
    }
    return {name: round(value, 4) for name, value in scores.items()}


def _colour_shares(pictures: np.ndarray) -> dict[str, float]:
    """Share of pixels nearest to each colour term in CIELAB; shares under 5 % are left out."""
    pixels = _to_lab(pictures.reshape(-1, 3))
    terms = _to_lab(np.array(list(COLOURS.values()), np.float32) / 255.0)
    apart = [(pixels[:, k, None] - terms[None, :, k]) ** 2 for k in range(3)]
    nearest = (apart[0] + apart[1] + apart[2]).argmin(1)
    shares = np.bincount(nearest, minlength=len(COLOURS)) / len(pixels)
    return {f"colour_{name}": float(share) for name, share in zip(COLOURS, shares, strict=True) if share >= 0.05}


def _to_lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB (D65) of sRGB values in 0..1, [N,3]."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], np.float32)
    xyz = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089], np.float32)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


def _camera(luma: np.ndarray) -> dict[str, float]:
    """Global move of the picture, from the best shift or zoom between neighbouring frames, luma [n,27,48]."""
    rows = columns = zoom = 0.0
    before, after = luma[:-1], luma[1:]
    stills = differences(before, after, 0, 0).tolist()
    moving = [
        k for k, still in enumerate(stills) if still >= 0.004 and _moving_share(before[k], after[k]) >= _WIDESPREAD
    ]  # else nothing moves, or only something in the picture
    before, after = before[moving], after[moving]
    shifts = [
        (dy, dx) for dy in range(-_MAX_SHIFT[0], _MAX_SHIFT[0] + 1) for dx in range(-_MAX_SHIFT[1], _MAX_SHIFT[1] + 1)
    ]
    shifted = np.stack([differences(before, after, *shift) for shift in shifts])  # [shifts,pairs]
    for k, (a, b) in enumerate(zip(before, after, strict=True)):
        best = int(shifted[:, k].argmin())
        least, (dy, dx) = float(shifted[best, k]), shifts[best]
        zooms = {1: difference(_zoomed(a), b, 0, 0), -1: difference(a, _zoomed(b), 0, 0)}
        direction, zoomed = min(zooms.items(), key=lambda item: item[1])
        if min(least, zoomed) > _MATCH * stills[moving[k]]:
            continue
        if zoomed < least:
            zoom += direction * _ZOOM
        else:
            rows, columns = rows - dy, columns - dx  # the picture moves against the camera
    return {"pan_x": columns / luma.shape[2], "pan_y": rows / luma.shape[1], "zoom": zoom}


def _moving_share(a: np.ndarray, b: np.ndarray) -> float:
    """Share of the 3x4 cells of a picture in which something changes."""
    cells = np.abs(a - b).reshape(3, a.shape[0] // 3, 4, a.shape[1] // 4).mean((1, 3))
    return float((cells > 0.01).mean())


def _zoomed(picture: np.ndarray) -> np.ndarray:
    """The central part, enlarged by 1 + _ZOOM."""
    height, width = picture.shape
    x, y = width * _ZOOM / (2 * (1 + _ZOOM)), height * _ZOOM / (2 * (1 + _ZOOM))
    image = Image.fromarray(picture.astype(np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box=(x, y, width - x, height - y)))


def difference(a: np.ndarray, b: np.ndarray, dy: int, dx: int) -> float:
    """Mean difference where `a` moved by (dy, dx) overlaps `b`."""
    return float(differences(a[None], b[None], dy, dx)[0])


def differences(a: np.ndarray, b: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """`difference` of each pair of pictures, float [n,h,w] each: [n]."""
    _, height, width = a.shape
    part_a = a[:, max(0, -dy) : height - max(0, dy), max(0, -dx) : width - max(0, dx)]
    part_b = b[:, max(0, dy) : height - max(0, -dy), max(0, dx) : width - max(0, -dx)]
    apart = part_a - part_b
    return np.abs(apart, out=apart).reshape(len(a), apart.shape[1] * apart.shape[2]).mean(1)

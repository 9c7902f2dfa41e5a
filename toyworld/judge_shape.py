"""Judge: shape, style, angle and size from the covered share of pixels, by similarity to silhouettes.

A mask is sampled on rays from its centroid. Filled inwards from its rim it is a silhouette, which an outline of any
thickness shares with a filled body; it is normalised by its root-mean-square radius and compared with the silhouette
of every shape, at every angle, from sharp to blurred. Whether the middle is covered tells filled from outlined.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from toyworld.render import OUTLINE_WIDTH, signed_distance
from toyworld.vocabulary import SHAPES, Shape

RAYS = 60  # 6 degrees apart: the judge's resolution of angles
RINGS = 22  # samples along a ray
REACH = 2.4  # length of a ray in root-mean-square radii
SYMMETRY: dict[Shape, float] = {
    "circle": 360.0, "square": 90.0, "triangle": 120.0, "star": 72.0, "heart": 360.0, "cross": 90.0,
}  # fmt: skip
TILT_COST = (
    0.04  # of similarity: characters stand upright unless they spin, and a blurred triangle is a heart upside down
)
MAX_UPRIGHT = 13.0  # degrees
HOLLOW = 0.8  # outlined if its middle is covered less than this share of its densest part
BLURS = (0.04, 0.14, 0.24)  # of the silhouettes, in radii: from a sharp picture to that of a small video codec


@dataclass(frozen=True)
class Bank:
    """Silhouettes, one row per shape and blur, upright. `unit`: root-mean-square radius for a character of radius 1."""

    masks: np.ndarray  # [B, RAYS, RINGS]
    holes: np.ndarray  # [B, RAYS, RINGS]: weights of the samples that only a filled body covers; each sums to 1
    shape: np.ndarray  # index into SHAPES [B]
    unit: np.ndarray  # [B]
    offset: np.ndarray  # centroid [B,2]


@dataclass(frozen=True)
class Match:
    """Best silhouette per mask (arrays [N]): centre and radius in pixels; similarity 0..1 (intersection over union)."""

    found: np.ndarray  # bool: a mask was there at all
    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    shape: np.ndarray  # index into SHAPES
    outlined: np.ndarray
    outlined_marked: np.ndarray  # the same where light marks count as covered: right for patterns, less for blur
    softness: np.ndarray  # area of the rim that is neither covered nor free, over the area covered
    angle: np.ndarray  # degrees, counter-clockwise
    similarity: np.ndarray
    lead: np.ndarray  # similarity less the best of any other shape


def shape_cover(
    shape: Shape, outlined: bool, px: np.ndarray, py: np.ndarray, angle: float, softness: float
) -> np.ndarray:
    """Covered share at points (px, py) in units of the radius; `softness` is the radius in pixels."""
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    distance = signed_distance(shape, px * cos - py * sin, px * sin + py * cos)
    if outlined:
        half = OUTLINE_WIDTH[shape] / 2
        distance = np.abs(distance + half) - half
    return np.clip(0.5 - distance * softness, 0.0, 1.0)


@cache
def _rays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, y, radius) of the samples, each [RAYS, RINGS], in root-mean-square radii; ray k points at 6 k degrees."""
    turn = 2 * np.pi * np.arange(RAYS) / RAYS
    radius = (np.arange(RINGS) + 0.5) * REACH / RINGS
    return np.cos(turn)[:, None] * radius, -np.sin(turn)[:, None] * radius, np.broadcast_to(radius, (RAYS, RINGS))


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of [n,n] by `sigma` samples."""
    taps = np.arange(-int(3 * sigma) - 1, int(3 * sigma) + 2)
    kernel = np.exp(-0.5 * (taps / sigma) ** 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        image = np.apply_along_axis(np.convolve, axis, image, kernel, mode="same")
    return image


def _sample(images: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear samples of images [N,H,W] at column x, row y [N,...] -> (values, inside the picture)."""
    height, width = images.shape[1:]
    inside = (x > -0.75) & (x < width - 0.25) & (y > -0.75) & (y < height - 0.25)
    x, y = np.clip(x, 0, width - 1.001), np.clip(y, 0, height - 1.001)
    x0, y0 = x.astype(int), y.astype(int)
    fx, fy = x - x0, y - y0
    n = np.arange(len(images)).reshape(-1, *[1] * (x.ndim - 1))
    top = images[n, y0, x0] * (1 - fx) + images[n, y0, x0 + 1] * fx
    low = images[n, y0 + 1, x0] * (1 - fx) + images[n, y0 + 1, x0 + 1] * fx
    return top * (1 - fy) + low * fy, inside


@cache
def bank() -> Bank:
    """All silhouettes; built once, in about 0.1 s."""
    reach, samples = 2.4, 121
    axis = np.linspace(-reach, reach, samples)
    fine_y, fine_x = np.meshgrid(axis, axis, indexing="ij")
    per_unit = (samples - 1) / (2 * reach)
    rx, ry, _ = _rays()
    masks, holes, shapes, units, offsets = [], [], [], [], []
    for k, shape in enumerate(SHAPES):
        sharp = shape_cover(shape, False, fine_x, fine_y, 0.0, 24.0)
        for blur in BLURS:
            cover = _blur(sharp, blur * per_unit)
            weight = cover / cover.sum()
            cx, cy = float((weight * fine_x).sum()), float((weight * fine_y).sum())
            unit = math.sqrt(float((weight * ((fine_x - cx) ** 2 + (fine_y - cy) ** 2)).sum()))
            x, y = cx + rx * unit, cy + ry * unit
            masks.append(_sample(cover[None], ((x + reach) * per_unit)[None], ((y + reach) * per_unit)[None])[0][0])
            depth = shape_cover(shape, False, x, y, 0.0, 1.0) - 0.5 - OUTLINE_WIDTH[shape]
            hole = np.maximum(depth - min(0.0, float(depth.max()) - 0.05), 0.0)
            holes.append(hole / hole.sum())
            shapes.append(k)
            units.append(unit)
            offsets.append((cx, cy))
    return Bank(np.stack(masks), np.stack(holes), np.array(shapes), np.array(units), np.array(offsets))


def _moments(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mass, centroid and root-mean-square radius of masks [N,H,W], in pixels."""
    height, width = weight.shape[1:]
    py, px = np.arange(height) + 0.5, np.arange(width) + 0.5
    mass = weight.sum((1, 2))
    safe = np.maximum(mass, 1e-6)
    columns, rows = weight.sum(1), weight.sum(2)
    x, y = columns @ px / safe, rows @ py / safe
    spread = columns @ px**2 / safe - x**2 + rows @ py**2 / safe - y**2
    return mass, x, y, np.sqrt(np.maximum(spread, 1e-6))


def _locate(alpha: np.ndarray, core: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Window the largest body of each mask -> (mass, x, y, rms, windowed alpha); `core` are surely of the body."""
    height, width = alpha.shape[1:]
    grid_y, grid_x = np.mgrid[0:height, 0:width] + 0.5
    weight = np.where(core, alpha, 0.0)
    columns, rows = np.cumsum(weight.sum(1), 1), np.cumsum(weight.sum(2), 1)
    x = (columns < 0.5 * columns[:, -1:]).sum(1) + 0.5  # medians: strays far away do not move them
    y = (rows < 0.5 * rows[:, -1:]).sum(1) + 0.5
    reach = np.full(len(alpha), 0.3 * width)

    def near() -> np.ndarray:
        return (grid_x - x[:, None, None]) ** 2 + (grid_y - y[:, None, None]) ** 2 < (reach**2)[:, None, None]

    for _ in range(3):
        _, x, y, rms = _moments(weight * near())
        reach = 2.3 * rms + 1.5
    windowed = alpha * near()
    return *_moments(windowed), windowed


def _silhouettes(
    alpha: np.ndarray, x: np.ndarray, y: np.ndarray, unit: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks on rays -> (covered share, silhouette, weight), each [N, RAYS, RINGS].

    The weight is the area that a sample stands for; 0 outside the picture and where a ray leaves it.
    """
    rx, ry, radius = _rays()
    scale = unit[:, None, None]
    raw, inside = _sample(alpha, x[:, None, None] + rx * scale - 0.5, y[:, None, None] + ry * scale - 0.5)
    raw = np.where(inside, raw, 0.0)
    outward = np.maximum.accumulate(raw[:, :, ::-1], axis=2)[:, :, ::-1]  # covered here or anywhere further out
    # of a ray that leaves the picture nobody knows whether an outline lies beyond: only its covered part counts
    known = inside & (inside.all(2, keepdims=True) | (raw > 0.5))
    return raw, outward, np.where(known, radius, 0.0)


def _overlap(seen: np.ndarray, area: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Intersection over union of silhouettes [N,RAYS,RINGS] with every template turned by `turn` [N,B] rays: [N,B]."""
    masks = bank().masks
    rays = (np.arange(RAYS)[None, None] - turn[:, :, None]) % RAYS
    turned = masks[np.arange(len(masks))[None, :, None], rays]  # [N,B,RAYS,RINGS]
    seen, area = seen[:, None], area[:, None]
    both, either = (np.minimum(seen, turned) * area).sum((2, 3)), (np.maximum(seen, turned) * area).sum((2, 3))
    return both / np.maximum(either, 1e-6)


def match_shapes(alpha: np.ndarray, marked: np.ndarray, core: np.ndarray, min_mass: float) -> Match:
    """Read masks [N,H,W]: covered share `alpha` in 0..1, and `marked`, the same with light marks taken for covered.

    `core` [N,H,W] are pixels decided to be this character's.
    """
    templates = bank()
    mass, x, y, rms, windowed = _locate(alpha, core)
    dense = np.quantile(windowed.reshape(len(alpha), -1), 0.99, axis=1)  # a blurred outline covers no pixel fully
    windowed = np.minimum(windowed / np.clip(dense, 0.6, 1.0)[:, None, None], 1.0)
    _, filled, _ = _silhouettes(windowed, x, y, rms)
    _, _, radius = _rays()
    body = (filled * radius).sum((1, 2))
    unit = rms * np.sqrt((filled * radius**3).sum((1, 2)) / np.maximum(body, 1e-6))  # of the silhouette, not the mask
    raw, filled, weight = _silhouettes(windowed, x, y, unit)

    # the angle by circular correlation along the rays, in one product of spectra
    norms = np.sqrt((templates.masks**2 * radius).sum((1, 2)))
    spectrum = np.fft.rfft(filled * weight, axis=1)
    wanted = np.fft.rfft(templates.masks, axis=1)
    match_at = np.fft.irfft(np.einsum("nfr,bfr->nbf", spectrum, wanted.conj()), n=RAYS, axis=2) / norms[None, :, None]
    turn = np.argmax(match_at, axis=2)  # [N,B] rays, counter-clockwise
    period = np.array([SYMMETRY[SHAPES[k]] for k in templates.shape])
    tilt = np.abs((turn * (360.0 / RAYS) + period / 2) % period - period / 2)
    turned = _overlap(filled, weight, turn) - TILT_COST * (tilt > MAX_UPRIGHT)
    upright = _overlap(filled, weight, np.zeros_like(turn))
    turn = np.where(turned >= upright, turn, 0)
    overlap = np.maximum(turned, upright)
    rays = (np.arange(RAYS)[None, None] - turn[:, :, None]) % RAYS  # [N,B,RAYS]

    n = np.arange(len(alpha))
    best = np.argmax(overlap, axis=1)
    shape = templates.shape[best]
    holes = templates.holes[best[:, None], rays[n, best]]  # [N,RAYS,RINGS]
    rx, ry, _ = _rays()
    at = [c[:, None, None] + r * unit[:, None, None] - 0.5 for c, r in ((x, rx), (y, ry))]
    middle = (raw * holes).sum((1, 2))
    middle_marked = (np.maximum(raw, _sample(marked, *at)[0]) * holes).sum((1, 2))
    covered = HOLLOW * np.quantile(raw.reshape(len(raw), -1), 0.95, axis=1)
    rim = (weight * ((filled > 0.2) & (filled < 0.8))).sum((1, 2))
    angle = turn[n, best] * (360.0 / RAYS)
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    size = unit / templates.unit[best]
    ox, oy = templates.offset[best].T
    return Match(
        found=mass > min_mass,
        x=x - (ox * cos + oy * sin) * size,
        y=y - (oy * cos - ox * sin) * size,
        radius=size,
        shape=shape,
        outlined=middle < covered,
        outlined_marked=middle_marked < covered,
        softness=rim / np.maximum((weight * (filled > 0.5)).sum((1, 2)), 1e-6),
        angle=angle % np.array([SYMMETRY[s] for s in SHAPES])[shape],
        similarity=overlap[n, best],
        lead=overlap[n, best] - np.where(templates.shape[None] == shape[:, None], -1.0, overlap).max(1),
    )

"""Judge: shape, style, angle and size from the covered share of pixels, by similarity to normalised templates.

A mask is normalised by its own centroid and root-mean-square radius, which a filled and an outlined mask both have,
and compared with every (shape, filled or outlined, angle) template normalised the same way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from toyworld.render import OUTLINE_WIDTH, signed_distance
from toyworld.vocabulary import SHAPES, Shape

GRID = 25  # samples across the normalised window
REACH = 2.4  # half-width of the window in root-mean-square radii
SYMMETRY: dict[Shape, float] = {"circle": 360.0, "square": 90.0, "triangle": 120.0, "star": 72.0, "heart": 360.0, "cross": 90.0}  # fmt: skip
ANGLE_STEP = 6.0
HOLLOW = 0.6  # outlined if its middle is covered less than this share of its densest part
_SOFT = 8.0  # templates are drawn as sharp as a character of this radius in pixels


@dataclass(frozen=True)
class Bank:
    """Templates as rows. `unit`: root-mean-square radius for a character radius of 1; `offset`: its centroid [B,2]."""

    masks: np.ndarray  # float32 [B, GRID*GRID]
    shape: np.ndarray  # index into SHAPES [B]
    outlined: np.ndarray  # bool [B]
    angle: np.ndarray  # degrees [B]
    unit: np.ndarray  # [B]
    offset: np.ndarray  # [B,2]


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
def window() -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of the normalised samples, each [GRID*GRID], in root-mean-square radii."""
    axis = np.linspace(-REACH, REACH, GRID)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return x.ravel(), y.ravel()


@cache
def bank() -> Bank:
    """All templates; built once, about 0.3 s."""
    axis = np.linspace(-1.6, 1.6, 81)
    fine_y, fine_x = np.meshgrid(axis, axis, indexing="ij")
    wx, wy = window()
    masks, shapes, outlines, angles, units, offsets = [], [], [], [], [], []
    for k, shape in enumerate(SHAPES):
        turns = 1 if shape == "circle" else round(SYMMETRY[shape] / ANGLE_STEP)
        for outlined in (False, True):
            for turn in range(turns):
                angle = turn * ANGLE_STEP
                cover = shape_cover(shape, outlined, fine_x, fine_y, angle, 24.0)
                weight = cover / cover.sum()
                cx, cy = float((weight * fine_x).sum()), float((weight * fine_y).sum())
                unit = math.sqrt(float((weight * ((fine_x - cx) ** 2 + (fine_y - cy) ** 2)).sum()))
                masks.append(shape_cover(shape, outlined, cx + wx * unit, cy + wy * unit, angle, _SOFT))
                shapes.append(k)
                outlines.append(outlined)
                angles.append(angle)
                units.append(unit)
                offsets.append((cx, cy))
    return Bank(
        np.stack(masks).astype(np.float32),
        np.array(shapes),
        np.array(outlines),
        np.array(angles),
        np.array(units),
        np.array(offsets),
    )


@cache
def _outlined_twin() -> np.ndarray:
    """For every template the outlined one of the same shape and angle [B]."""
    b = bank()
    same = (b.shape[:, None] == b.shape[None]) & (b.angle[:, None] == b.angle[None]) & b.outlined[None]
    return np.argmax(same, axis=1)


@dataclass(frozen=True)
class Match:
    """Best template per mask (arrays [N]): centre and radius in pixels; similarity 0..1 (intersection over union)."""

    found: np.ndarray  # bool: a mask was there at all
    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    shape: np.ndarray  # index into SHAPES
    outlined: np.ndarray
    angle: np.ndarray
    similarity: np.ndarray
    lead: np.ndarray  # similarity less the best of any other shape in the same style


def _moments(alpha: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mass, centroid and root-mean-square radius of masks [N,H,W] under 0/1 windows."""
    height, width = alpha.shape[1:]
    py, px = np.arange(height) + 0.5, np.arange(width) + 0.5
    weight = alpha * inside
    mass = weight.sum((1, 2))
    safe = np.maximum(mass, 1e-6)
    columns, rows = weight.sum(1), weight.sum(2)
    x, y = columns @ px / safe, rows @ py / safe
    spread = columns @ px**2 / safe - x**2 + rows @ py**2 / safe - y**2
    return mass, x, y, np.sqrt(np.maximum(spread, 1e-6))


def _locate(alpha: np.ndarray, core: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Window the largest body of each mask -> (mass, x, y, rms, windowed alpha); `core` are pixels surely of the body."""
    height, width = alpha.shape[1:]
    grid_y, grid_x = np.mgrid[0:height, 0:width] + 0.5
    weight = np.where(core, alpha, 0.0)
    columns, rows = np.cumsum(weight.sum(1), 1), np.cumsum(weight.sum(2), 1)
    x = (columns < 0.5 * columns[:, -1:]).sum(1) + 0.5  # medians: strays far away do not move them
    y = (rows < 0.5 * rows[:, -1:]).sum(1) + 0.5
    reach = np.full(len(alpha), 0.3 * width)
    for _ in range(3):
        near = (grid_x - x[:, None, None]) ** 2 + (grid_y - y[:, None, None]) ** 2 < (reach**2)[:, None, None]
        _, x, y, rms = _moments(weight, near)
        reach = 2.3 * rms + 1.5
    near = (grid_x - x[:, None, None]) ** 2 + (grid_y - y[:, None, None]) ** 2 < (reach**2)[:, None, None]
    mass, x, y, rms = _moments(alpha, near)
    return mass, x, y, rms, alpha * near


def _sample(alpha: np.ndarray, x: np.ndarray, y: np.ndarray, unit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear samples of masks [N,H,W] in normalised windows -> (values, inside the frame) each [N,GRID*GRID]."""
    count, height, width = alpha.shape
    wx, wy = window()
    sx, sy = x[:, None] + wx * unit[:, None] - 0.5, y[:, None] + wy * unit[:, None] - 0.5
    valid = (sx > -0.75) & (sx < width - 0.25) & (sy > -0.75) & (sy < height - 0.25)
    sx, sy = np.clip(sx, 0, width - 1.001), np.clip(sy, 0, height - 1.001)
    x0, y0 = sx.astype(int), sy.astype(int)
    fx, fy = sx - x0, sy - y0
    n = np.arange(count)[:, None]
    top = alpha[n, y0, x0] * (1 - fx) + alpha[n, y0, x0 + 1] * fx
    bottom = alpha[n, y0 + 1, x0] * (1 - fx) + alpha[n, y0 + 1, x0 + 1] * fx
    return (top * (1 - fy) + bottom * fy).astype(np.float32), valid


def match_shapes(alpha: np.ndarray, core: np.ndarray, min_mass: float) -> Match:
    """Read masks [N,H,W]: covered share `alpha` in 0..1 and `core` [N,H,W], the pixels decided to be this character's."""
    templates = bank()
    mass, x, y, rms, windowed = _locate(alpha, core)
    values, valid = _sample(windowed, x, y, rms)
    weight = valid.astype(np.float32)
    # cosine similarity over the part of the window that is in the frame picks candidates; soft IoU decides
    dot = (values * weight) @ templates.masks.T
    norm = np.sqrt(((values**2) * weight).sum(1))[:, None] * np.sqrt(weight @ (templates.masks**2).T)
    cosine = dot / np.maximum(norm, 1e-6)
    groups = templates.shape * 2 + templates.outlined
    count = len(alpha)
    n = np.arange(count)
    best_of = np.zeros((count, 2 * len(SHAPES)), dtype=int)
    overlap = np.zeros((count, 2 * len(SHAPES)))
    for g in range(2 * len(SHAPES)):
        members = np.flatnonzero(groups == g)
        best_of[:, g] = members[np.argmax(cosine[:, members], axis=1)]
        masks = templates.masks[best_of[:, g]]
        overlap[:, g] = (np.minimum(values, masks) * weight).sum(1) / np.maximum(
            (np.maximum(values, masks) * weight).sum(1), 1e-6
        )
    winner = np.argmax(overlap, axis=1)
    # blur fills a small outline until the filled template overlaps it better: the middle of the body decides instead
    filled = best_of[n, winner - winner % 2]
    hole = templates.masks[filled] * (1.0 - templates.masks[_outlined_twin()[filled]])
    middle = (values * hole).sum(1) / np.maximum(hole.sum(1), 1e-6)
    is_outlined = middle < HOLLOW * np.quantile(values, 0.97, axis=1)
    same_style = np.arange(2 * len(SHAPES))[None] % 2 == is_outlined[:, None]
    winner = np.argmax(np.where(same_style, overlap, -1.0), axis=1)
    chosen = best_of[n, winner]
    rivals = np.where(same_style & (np.arange(2 * len(SHAPES))[None] != winner[:, None]), overlap, -1.0)
    radius = rms / templates.unit[chosen]
    return Match(
        found=mass > min_mass,
        x=x - templates.offset[chosen, 0] * radius,
        y=y - templates.offset[chosen, 1] * radius,
        radius=radius,
        shape=templates.shape[chosen],
        outlined=templates.outlined[chosen],
        angle=templates.angle[chosen],
        similarity=overlap[n, winner],
        lead=overlap[n, winner] - rivals.max(1),
    )

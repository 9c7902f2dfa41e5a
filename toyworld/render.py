"""Draw ToyWorld scenes: attributes -> RGB frames, with the truth of every frame.

Shapes are signed distances in pixels, so edges are anti-aliased the same way at every size. Coordinates are shares of
the frame: x to the right, y down, both 0..1; a scale is a radius as a share of the width.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from toyworld.vocabulary import DIM_FACTOR, HORIZON, LANDMARK_RGB, PLACE_RGB, Action, Shape, colour_rgb
from toyworld.world import Character, Place, ToyScene, ToyShot

TRAVEL = 0.30  # a move goes from centre - TRAVEL to centre + TRAVEL
GROWTH = 0.40  # grow runs from 1 - GROWTH to 1 + GROWTH times the character's size
CLOSE_FACTOR = 1.4  # a close shot draws characters this much larger
OUTLINE_WIDTH: dict[Shape, float] = {  # of the radius; thin bodies have thin outlines, or they would look filled
    "circle": 0.34, "square": 0.34, "triangle": 0.34, "star": 0.22, "heart": 0.34, "cross": 0.18,
}  # fmt: skip
PIXELATED_BLOCKS = 32  # blocks across the width: as coarse as shapes and patterns can bear


class Pose(NamedTuple):
    x: float
    y: float
    scale: float  # relative to the character's size
    angle: float  # degrees, counter-clockwise
    visible: bool
    striped: float  # 0..1: how far a `change` has gone


# --------------------------------------------------------------------------------------------- actions


def _state_names(action: Action) -> list[tuple[str, float]]:
    """The named states of an action and the share of the shot at which each begins."""
    third, two_thirds = 1 / 3, 2 / 3
    return {
        "move_right": [("left", 0.0), ("middle", third), ("right", two_thirds)],
        "move_left": [("right", 0.0), ("middle", third), ("left", two_thirds)],
        "move_up": [("bottom", 0.0), ("middle", third), ("top", two_thirds)],
        "move_down": [("top", 0.0), ("middle", third), ("bottom", two_thirds)],
        "grow": [("small", 0.0), ("medium", third), ("large", two_thirds)],
        "shrink": [("large", 0.0), ("medium", third), ("small", two_thirds)],
        "jump": [("ground", 0.0), ("air", 0.25), ("ground", 0.75)],
        "rise_and_drop": [("ground", 0.0), ("rising", 0.125), ("dropping", 0.75)],
        "spin": [("upright", 0.0), ("upside down", 0.375), ("upright", 0.75)],
        "hide": [("visible", 0.0), ("hidden", 0.36), ("visible", 0.64)],
        "change": [("plain", 0.0), ("striped", 0.5)],
        "approach": [("apart", 0.0), ("together", two_thirds)],
        "part": [("together", 0.0), ("apart", third)],
        "chase": [("left", 0.0), ("middle", third), ("right", two_thirds)],
        "swap": [("own side", 0.0), ("crossing", 0.375), ("other side", 0.625)],
    }[action]


def state_names(action: Action) -> list[str]:
    """The named states of an action, in order."""
    return [name for name, _ in _state_names(action)]


def states(shot: ToyShot) -> list[tuple[str, int]]:
    """The states of a shot in order, each with the frame (0-based, inside the shot) from which it holds."""
    last = shot.num_frames - 1
    return [(name, math.ceil(start * last - 1e-9)) for name, start in _state_names(shot.action)]


def _actor_pose(action: Action, x: float, y: float, t: float, place: Place) -> Pose:
    """Pose of the acting character at time t in 0..1."""
    go = TRAVEL * (2 * t - 1)
    still = Pose(x, y, 1.0, 0.0, True, 0.0)
    if action == "move_right":
        return still._replace(x=x + go)
    if action == "move_left":
        return still._replace(x=x - go)
    if action == "move_up":
        return still._replace(y=y - go)
    if action == "move_down":
        return still._replace(y=y + go)
    if action == "grow":
        return still._replace(scale=1 + GROWTH * (2 * t - 1))
    if action == "shrink":
        return still._replace(scale=1 - GROWTH * (2 * t - 1))
    if action == "jump":
        hop = min(max((t - 0.25) / 0.5, 0.0), 1.0)
        return still._replace(y=0.72 - 0.42 * 4 * hop * (1 - hop))
    if action == "rise_and_drop":
        height = min(t / 0.75, 1.0) if t <= 0.75 else 1.0 - ((t - 0.75) / 0.25) ** 2
        return still._replace(y=0.76 - 0.50 * height)
    if action == "spin":
        return still._replace(angle=360.0 * t)
    if action == "hide":  # from the open side behind the landmark and back, never out of the picture
        reach = 0.45 * abs(2 * t - 1) * (1 if place.side == "left" else -1)
        return still._replace(x=place.landmark_x + reach, y=0.66, visible=not 0.36 <= t < 0.64)
    if action == "change":
        return still._replace(striped=1.0 if t >= 0.5 else 0.0)
    if action == "approach":
        return still._replace(x=0.20 + 0.17 * min(t * 1.5, 1.0))
    if action == "part":
        return still._replace(x=0.37 - 0.17 * max((t - 1 / 3) * 1.5, 0.0))
    if action == "chase":
        return still._replace(x=0.12 + 0.40 * t)
    return still._replace(x=0.22 + 0.56 * t, y=0.32)  # swap


def _partner_pose(action: Action, y: float, t: float) -> Pose:
    x = {
        "approach": 0.80 - 0.17 * min(t * 1.5, 1.0),
        "part": 0.63 + 0.17 * max((t - 1 / 3) * 1.5, 0.0),
        "chase": 0.48 + 0.40 * t,
        "swap": 0.78 - 0.56 * t,
    }[action]
    return Pose(x, y, 1.0, 0.0, True, 0.0)


def poses(scene: ToyScene, shot: ToyShot, frame: int) -> dict[int, Pose]:
    """Pose of every present character (by its index in the scene) at one frame of a shot, before the camera."""
    t = frame / max(shot.num_frames - 1, 1)
    place = scene.places[shot.place]
    result = {}
    for character, (x, y) in zip(shot.present, shot.anchors, strict=True):
        if character == shot.actor:
            pose = _actor_pose(shot.action, x, y, t, place)
            if shot.action in ("approach", "part", "chase"):
                pose = pose._replace(y=0.5)
        elif character == shot.partner:
            pose = _partner_pose(shot.action, 0.68 if shot.action == "swap" else 0.5, t)
        else:
            pose = Pose(x, y, 1.0, 0.0, True, 0.0)
        result[character] = pose
    return result


# --------------------------------------------------------------------------------------------- shapes


@cache
def polygon(shape: Shape) -> np.ndarray:
    """Corners [V,2] of a shape of radius about 1, centred on its area, y down. Circles have no corners: ValueError."""
    if shape == "square":
        half = 0.86
        points = [(-half, -half), (half, -half), (half, half), (-half, half)]
    elif shape == "triangle":
        points = [(1.15 * math.sin(a), -1.15 * math.cos(a)) for a in (0.0, 2 * math.pi / 3, 4 * math.pi / 3)]
    elif shape == "star":
        radii = (1.2, 0.5)
        points = [
            (radii[k % 2] * math.sin(k * math.pi / 5), -radii[k % 2] * math.cos(k * math.pi / 5)) for k in range(10)
        ]
    elif shape == "cross":
        arm, long = 0.36, 1.05
        points = [(-arm, -long), (arm, -long), (arm, -arm), (long, -arm), (long, arm), (arm, arm),
                  (arm, long), (-arm, long), (-arm, arm), (-long, arm), (-long, -arm), (-arm, -arm)]  # fmt: skip
    elif shape == "heart":
        angles = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        xs = 16 * np.sin(angles) ** 3
        ys = -(13 * np.cos(angles) - 5 * np.cos(2 * angles) - 2 * np.cos(3 * angles) - np.cos(4 * angles))
        points = list(zip(xs / 15.0, (ys - 1.5) / 15.0, strict=True))
    else:
        raise ValueError(f"shape {shape!r} has no corners")
    return np.asarray(points, dtype=np.float64)


def signed_distance(shape: Shape, px: np.ndarray, py: np.ndarray) -> np.ndarray:
    """Distance to the outline of a shape of radius 1 at points (px, py), negative inside."""
    if shape == "circle":
        return np.hypot(px, py) - 1.0
    corners = polygon(shape)
    nearest = np.full(px.shape, np.inf)
    inside = np.zeros(px.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((px - ax) * ex + (py - ay) * ey) / (ex * ex + ey * ey), 0.0, 1.0)
        nearest = np.minimum(nearest, (px - ax - along * ex) ** 2 + (py - ay - along * ey) ** 2)
        crosses = (ay > py) != (by > py)
        if ay != by:
            inside ^= crosses & (px < ax + (py - ay) * ex / ey)
    distance = np.sqrt(nearest)
    return np.where(inside, -distance, distance)


# --------------------------------------------------------------------------------------------- painting


def _blend(canvas: np.ndarray, rows: slice, cols: slice, alpha: np.ndarray, rgb: np.ndarray) -> None:
    patch = canvas[rows, cols]
    patch += alpha[..., None] * (rgb - patch)


def _patch(size: int, x: float, y: float, reach: float) -> tuple[slice, slice, np.ndarray, np.ndarray]:
    """Slices and pixel-centre coordinates (in pixels from (x, y)) of the square of half-width `reach` pixels."""
    cx, cy = x * size, y * size
    rows = slice(*np.clip([int(cy - reach) - 1, int(cy + reach) + 3], 0, size))
    cols = slice(*np.clip([int(cx - reach) - 1, int(cx + reach) + 3], 0, size))
    py, px = np.mgrid[rows, cols].astype(np.float64)
    return rows, cols, px + 0.5 - cx, py + 0.5 - cy


def _draw_character(canvas: np.ndarray, who: Character, pose: Pose, radius: float, outlined: bool) -> None:
    """Paint one character of `radius` pixels onto a float canvas [H,W,3]."""
    size = canvas.shape[0]
    rows, cols, px, py = _patch(size, pose.x, pose.y, 1.5 * radius)
    if px.size == 0:
        return
    cos, sin = math.cos(math.radians(pose.angle)), math.sin(math.radians(pose.angle))
    lx, ly = (px * cos - py * sin) / radius, (px * sin + py * cos) / radius
    distance = signed_distance(who.shape, lx, ly)
    if outlined:
        half = OUTLINE_WIDTH[who.shape] / 2
        distance = np.abs(distance + half) - half
    alpha = np.clip(0.5 - distance * radius, 0.0, 1.0)
    base = np.asarray(colour_rgb(who.colour, who.hue_offset), dtype=np.float64)
    light = base + 0.62 * (255.0 - base)
    paint = np.broadcast_to(base, (*lx.shape, 3))
    striped = who.pattern == "striped" or pose.striped > 0.5
    if striped or who.pattern == "dotted":
        turn = math.radians(who.stripe_angle)
        u, v = lx * math.cos(turn) + ly * math.sin(turn), -lx * math.sin(turn) + ly * math.cos(turn)
        if striped:
            mark = np.clip(0.5 + (np.abs((u / 0.62) % 1.0 - 0.5) - 0.27) * 0.62 * radius, 0.0, 1.0)
        else:
            near = np.hypot((u / 0.66 + 0.5) % 1.0 - 0.5, (v / 0.66 + 0.5) % 1.0 - 0.5)
            mark = np.clip(0.5 + (0.30 - near) * 0.66 * radius, 0.0, 1.0)
        paint = base + mark[..., None] * (light - base)
    _blend(canvas, rows, cols, alpha, paint)


def _draw_landmark(canvas: np.ndarray, place: Place) -> None:
    size = canvas.shape[0]
    brightness = DIM_FACTOR if place.light == "dim" else 1.0

    def box(x: float, y: float, half_w: float, half_h: float, rgb: tuple[int, int, int]) -> None:
        rows, cols, px, py = _patch(size, x, y, max(half_w, half_h) * size)
        alpha = np.clip(0.5 - (np.abs(px) - half_w * size), 0, 1) * np.clip(0.5 - (np.abs(py) - half_h * size), 0, 1)
        _blend(canvas, rows, cols, alpha, np.asarray(rgb) * brightness)

    def disc(x: float, y: float, r: float, rgb: tuple[int, int, int]) -> None:
        rows, cols, px, py = _patch(size, x, y, r * size)
        _blend(canvas, rows, cols, np.clip(0.5 - (np.hypot(px, py) - r * size), 0, 1), np.asarray(rgb) * brightness)

    if place.landmark == "tree":
        box(place.landmark_x, 0.66, 0.025, 0.16, LANDMARK_RGB["tree"][1])
        disc(place.landmark_x, 0.44, 0.15, LANDMARK_RGB["tree"][0])
    elif place.landmark == "house":
        box(place.landmark_x, 0.58, 0.15, 0.20, LANDMARK_RGB["house"][0])
        box(place.landmark_x, 0.37, 0.17, 0.025, LANDMARK_RGB["house"][1])
    elif place.landmark == "moon":
        disc(place.landmark_x, 0.16, 0.075, LANDMARK_RGB["moon"][0])


def _background(place: Place, size: int, horizon: float, duotone: bool) -> np.ndarray:
    """Sky over ground, float [size,size,3]."""
    sky, ground = (np.asarray(rgb, dtype=np.float64) for rgb in PLACE_RGB[place.name])
    if duotone:
        sky, ground = (np.full(3, rgb.mean()) for rgb in (sky, ground))
    if place.light == "dim":
        sky, ground = sky * DIM_FACTOR, ground * DIM_FACTOR
    share = np.clip((np.arange(size) + 1) - horizon * size, 0.0, 1.0)[:, None, None]  # of each row that is ground
    return np.broadcast_to(sky + share * (ground - sky), (size, size, 3)).copy()


def _camera(shot: ToyShot, frame: int) -> tuple[float, float]:
    """(zoom, horizontal shift) of the camera at a frame."""
    t = frame / max(shot.num_frames - 1, 1)
    if shot.camera == "zoom_in":
        return 1.0 + 0.30 * t, 0.0
    if shot.camera == "zoom_out":
        return 1.30 - 0.30 * t, 0.0
    if shot.camera == "pan":
        return 1.0, 0.12 * (2 * t - 1)
    return 1.0, 0.0


def _view(x: float, y: float, zoom: float, shift: float) -> tuple[float, float]:
    return 0.5 + (x - 0.5 - shift) * zoom, 0.5 + (y - 0.5) * zoom


def _draw_frame(scene: ToyScene, shot: ToyShot, frame: int, size: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """One frame as float [size,size,3], and what is true of each present character in it."""
    place = scene.places[shot.place]
    zoom, shift = _camera(shot, frame)
    close = CLOSE_FACTOR if shot.shot_size == "close" else 1.0
    horizon = _view(0.5, HORIZON, zoom, shift)[1]
    canvas = _background(place, size, horizon, shot.style == "duotone")
    lx, _ = _view(place.landmark_x, 0.5, zoom, shift)
    landmark = Place(place.name, place.landmark, place.side, lx, place.light)
    behind = shot.action == "hide"  # the actor walks behind the landmark, so it is painted first
    if not behind:
        _draw_landmark(canvas, landmark)
    truth = []
    for index, pose in poses(scene, shot, frame).items():
        who = scene.characters[index]
        x, y = _view(pose.x, pose.y, zoom, shift)
        scale = who.size * pose.scale * close * zoom
        if pose.visible:
            _draw_character(canvas, who, pose._replace(x=x, y=y), scale * size, shot.style == "outlined")
        truth.append({
            "character": index, "visible": pose.visible, "colour": who.colour, "shape": who.shape,
            "pattern": "striped" if pose.striped > 0.5 else who.pattern,
            "x": round(x, 4), "y": round(y, 4), "scale": round(scale, 4), "angle": round(pose.angle % 360.0, 2),
        })  # fmt: skip
    if behind:
        _draw_landmark(canvas, landmark)
    if shot.style == "pixelated":
        block = max(size // PIXELATED_BLOCKS, 1)
        n = size // block
        coarse = canvas[: n * block, : n * block].reshape(n, block, n, block, 3).mean(axis=(1, 3))
        canvas[: n * block, : n * block] = coarse.repeat(block, 0).repeat(block, 1)
    return canvas, truth


def _to_uint8(frames: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


def render_shot(scene: ToyScene, index: int, size: int = 64) -> np.ndarray:
    """Shot `index` without its transition: uint8 RGB [T,size,size,3]."""
    shot = scene.shots[index]
    return _to_uint8(np.stack([_draw_frame(scene, shot, f, size)[0] for f in range(shot.num_frames)]))


def render_scene(scene: ToyScene, size: int = 64) -> tuple[np.ndarray, list[list[dict[str, Any]]]]:
    """All shots with their transitions: uint8 RGB [T,size,size,3], and per frame the truth of each present character.

    A dissolve fades the last frame of the shot before out over the first `transition_frames` of the new shot; a fade
    darkens the end of one shot and brightens the start of the next, half its frames on each side.
    """
    frames: list[np.ndarray] = []
    truth: list[list[dict[str, Any]]] = []
    for shot in scene.shots:
        drawn = [_draw_frame(scene, shot, f, size) for f in range(shot.num_frames)]
        images = [image for image, _ in drawn]
        if shot.transition == "dissolve":
            before = frames[-1].copy()
            for k in range(shot.transition_frames):
                share = (k + 1) / (shot.transition_frames + 1)
                images[k] = before + share * (images[k] - before)
        elif shot.transition == "fade":
            half = shot.transition_frames // 2
            for k in range(half):
                frames[-1 - k] = frames[-1 - k] * (k + 1) / (half + 1)
                images[k] = images[k] * (k + 1) / (half + 1)
        frames += images
        truth += [record for _, record in drawn]
    return _to_uint8(np.stack(frames)), truth


def render_portrait(who: Character, size: int = 64) -> np.ndarray:
    """A character alone in the middle of a white picture, filled and in its own size: uint8 RGB [size,size,3]."""
    canvas = np.full((size, size, 3), 255.0)
    _draw_character(canvas, who, Pose(0.5, 0.5, 1.0, 0.0, True, 0.0), who.size * size, outlined=False)
    return _to_uint8(canvas)


def render_place(scene: ToyScene, index: int, size: int = 64) -> np.ndarray:
    """The place of a shot with nobody in it, seen wide and in the shot's style: uint8 RGB [size,size,3]."""
    empty = replace(scene.shots[index], present=(), anchors=(), shot_size="wide", camera="static")
    return _to_uint8(_draw_frame(scene, empty, 0, size)[0])

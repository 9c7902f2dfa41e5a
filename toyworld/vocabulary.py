"""The words of ToyWorld: every colour, shape, place, action, camera move and style, in one place.

The renderer (attributes -> pixels) and the judge (pixels -> attributes) share this file and nothing else.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import Literal, get_args

Colour = Literal["red", "yellow", "green", "cyan", "blue", "purple", "orange", "pink"]
Shape = Literal["circle", "square", "triangle", "star", "heart", "cross"]
Pattern = Literal["plain", "striped", "dotted"]
PlaceName = Literal["meadow", "desert", "night", "ocean", "snow", "room"]
Landmark = Literal["none", "tree", "house", "moon"]
Side = Literal["left", "right"]
Light = Literal["day", "dim"]
Action = Literal[
    "move_right", "move_left", "move_up", "move_down", "grow", "shrink",
    "jump", "rise_and_drop", "spin", "hide", "change", "approach", "part", "chase", "swap",
]  # fmt: skip
Camera = Literal["static", "pan", "zoom_in", "zoom_out"]
ShotSize = Literal["wide", "close"]
Style = Literal["filled", "outlined", "pixelated", "duotone"]
Transition = Literal["start", "cut", "dissolve", "fade"]
LevelName = Literal["small", "medium", "full"]
Split = Literal["train", "test"]

COLOURS: tuple[Colour, ...] = get_args(Colour)
SHAPES: tuple[Shape, ...] = get_args(Shape)
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)
PLACES: tuple[PlaceName, ...] = get_args(PlaceName)
LANDMARKS: tuple[Landmark, ...] = get_args(Landmark)
ACTIONS: tuple[Action, ...] = get_args(Action)
CAMERAS: tuple[Camera, ...] = get_args(Camera)
STYLES: tuple[Style, ...] = get_args(Style)
LIGHTS: tuple[Light, ...] = get_args(Light)

PAIR_ACTIONS: frozenset[Action] = frozenset({"approach", "part", "chase", "swap"})

FPS = 8
SHOT_FRAMES = 17  # 4k+1, so that a stride-4 causal VAE encodes a whole shot
MAX_SHOTS = 9
HUE_OFFSET_DEGREES = 10.0  # unsaid: a character's hue lies within this of its named colour
SIZE_RANGE = (0.13, 0.18)  # unsaid: a character's radius as a share of the frame's width

# (hue in degrees, saturation, value) of each named colour
COLOUR_HSV: dict[Colour, tuple[float, float, float]] = {
    "red": (0.0, 0.85, 0.88),
    "orange": (28.0, 0.90, 0.98),
    "yellow": (54.0, 0.85, 0.98),
    "green": (130.0, 0.80, 0.62),
    "cyan": (184.0, 0.80, 0.85),
    "blue": (226.0, 0.82, 0.88),
    "purple": (282.0, 0.70, 0.72),
    "pink": (326.0, 0.50, 0.98),
}


def colour_rgb(name: Colour, hue_offset: float = 0.0) -> tuple[int, int, int]:
    """RGB (0..255) of a named colour, its hue turned by `hue_offset` degrees."""
    hue, saturation, value = COLOUR_HSV[name]
    r, g, b = colorsys.hsv_to_rgb(((hue + hue_offset) % 360.0) / 360.0, saturation, value)
    return round(r * 255), round(g * 255), round(b * 255)


# (sky, ground): pale or dark and unsaturated, so that every character stands out
PLACE_RGB: dict[PlaceName, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "meadow": ((196, 219, 235), (168, 192, 146)),
    "desert": ((238, 226, 206), (206, 184, 148)),
    "night": ((24, 28, 52), (48, 52, 64)),
    "ocean": ((214, 224, 228), (122, 150, 172)),
    "snow": ((206, 216, 228), (246, 248, 250)),
    "room": ((200, 188, 198), (132, 112, 104)),
}
# the colours of each landmark, crown, wall or disc first; the moon is brighter than every sky, so that it shows
LANDMARK_RGB: dict[Landmark, tuple[tuple[int, int, int], ...]] = {
    "tree": ((104, 124, 100), (96, 78, 66)),
    "house": ((150, 138, 130), (92, 76, 74)),
    "moon": ((250, 246, 226),),
}
HORIZON = 0.62  # share of the height that is sky
DIM_FACTOR = 0.62  # a dim place keeps this share of its brightness; characters keep theirs


@dataclass(frozen=True)
class Level:
    """Which part of the vocabulary a world uses; stored with every model and data set."""

    name: LevelName
    colours: tuple[Colour, ...]
    shapes: tuple[Shape, ...]
    patterns: tuple[Pattern, ...]
    places: tuple[PlaceName, ...]
    landmarks: tuple[Landmark, ...]
    lights: tuple[Light, ...]
    actions: tuple[Action, ...]
    cameras: tuple[Camera, ...]
    shot_sizes: tuple[ShotSize, ...]
    styles: tuple[Style, ...]
    transitions: tuple[Transition, ...]
    max_characters: int


LEVELS: dict[LevelName, Level] = {
    "small": Level(
        name="small", colours=COLOURS[:6], shapes=SHAPES[:3], patterns=("plain",), places=PLACES[:3],
        landmarks=("none",), lights=("day",), actions=ACTIONS[:6], cameras=("static",), shot_sizes=("wide",),
        styles=("filled", "outlined"), transitions=("cut",), max_characters=2,
    ),
    "medium": Level(
        name="medium", colours=COLOURS, shapes=SHAPES, patterns=PATTERNS, places=PLACES, landmarks=LANDMARKS,
        lights=("day",), actions=tuple(a for a in ACTIONS if a not in PAIR_ACTIONS and a != "spin"),
        cameras=("static",), shot_sizes=("wide",), styles=("filled", "outlined"), transitions=("cut",),
        max_characters=2,
    ),
    "full": Level(
        name="full", colours=COLOURS, shapes=SHAPES, patterns=PATTERNS, places=PLACES, landmarks=LANDMARKS,
        lights=LIGHTS, actions=ACTIONS, cameras=CAMERAS, shot_sizes=("wide", "close"), styles=STYLES,
        transitions=("cut", "dissolve", "fade"), max_characters=3,
    ),
}  # fmt: skip


def identity_held_out(colour: Colour, shape: Shape, pattern: Pattern) -> bool:
    """True for the fifth of the 144 identities that never appears in training (balanced over colours and shapes)."""
    return (COLOURS.index(colour) + 2 * SHAPES.index(shape) + PATTERNS.index(pattern)) % 5 == 0


def pair_held_out(colour: Colour, shape: Shape, pattern: Pattern, action: Action) -> bool:
    """True for the fifth of the (identity, action) pairs that never appears in training."""
    key = 2 * COLOURS.index(colour) + SHAPES.index(shape) + PATTERNS.index(pattern) + ACTIONS.index(action)
    return key % 5 == 2

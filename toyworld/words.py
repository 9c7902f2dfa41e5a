"""The phrasings of every word of ToyWorld, and what a text says: the attributes that captions are made from.

Shared by the writer (text.py), the reader (parse.py) and the judge, which scores what it saw against them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from toyworld.vocabulary import (
    COLOURS,
    LANDMARKS,
    PAIR_ACTIONS,
    SHAPES,
    STYLES,
    Action,
    Camera,
    Colour,
    Landmark,
    Light,
    Pattern,
    PlaceName,
    Shape,
    ShotSize,
    Side,
    Style,
)  # fmt: skip
from toyworld.world import Character, Place, ToyScene

Marker = Literal["cut", "dissolve", "fade"]

# Every word maps to its phrasings; the first is canonical. No phrasing may be a phrasing of two words.
COLOUR_WORDS: dict[Colour, tuple[str, ...]] = {
    **{c: (c,) for c in COLOURS},
    "cyan": ("cyan", "turquoise"),
    "purple": ("purple", "violet"),
}
SHAPE_WORDS: dict[Shape, tuple[str, ...]] = {
    **{s: (s,) for s in SHAPES},
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "cross": ("cross", "plus sign"),
}
PATTERN_WORDS: dict[Pattern, tuple[str, ...]] = {
    "plain": ("",), "striped": ("striped", "stripy"), "dotted": ("dotted", "spotted"),
}  # fmt: skip
PLACE_WORDS: dict[PlaceName, tuple[str, ...]] = {
    "meadow": ("a meadow", "a grassland"),
    "desert": ("a desert", "the sands"),
    "night": ("the night", "the darkness"),
    "ocean": ("the ocean", "the sea"),
    "snow": ("the snow", "a snowfield"),
    "room": ("a room", "a chamber"),
}
LANDMARK_WORDS: dict[Landmark, tuple[str, ...]] = {name: (name,) for name in LANDMARKS if name != "none"}
STYLE_WORDS: dict[Style, tuple[str, ...]] = {s: (f"{s} style", f"in {s} style", f"drawn {s}") for s in STYLES}
CAMERA_WORDS: dict[Camera, tuple[str, ...]] = {
    "static": ("",),
    "pan": ("camera pans", "panning camera"),
    "zoom_in": ("camera zooms in", "zooming in"),
    "zoom_out": ("camera zooms out", "zooming out"),
}
# {who} is the partner, {what} the landmark
ACTION_WORDS: dict[Action, tuple[str, ...]] = {
    "move_right": ("moves from left to right", "goes from the left to the right", "slides to the right"),
    "move_left": ("moves from right to left", "goes from the right to the left", "slides to the left"),
    "move_up": ("moves from bottom to top", "goes from the bottom to the top", "slides up"),
    "move_down": ("moves from top to bottom", "goes from the top to the bottom", "slides down"),
    "grow": ("grows", "gets bigger", "becomes larger"),
    "shrink": ("shrinks", "gets smaller", "becomes smaller"),
    "jump": ("jumps", "leaps up and lands"),
    "rise_and_drop": ("rises and drops", "floats up, then falls"),
    "spin": ("spins", "turns around itself"),
    "hide": ("hides behind the {what}", "passes behind the {what}"),
    "change": ("turns striped", "gets stripes"),
    "approach": ("approaches {who}", "comes up to {who}"),
    "part": ("parts from {who}", "leaves {who}"),
    "chase": ("chases {who}", "runs after {who}"),
    "swap": ("swaps places with {who}", "trades places with {who}"),
}
# what a named state of render.states looks like; {who} is the partner, {what} the landmark
STATE_WORDS: dict[str, str] = {
    "left": "is on the left", "middle": "is in the middle", "right": "is on the right",
    "top": "is at the top", "bottom": "is at the bottom",
    "small": "is small", "medium": "is of medium size", "large": "is large",
    "ground": "is on the ground", "air": "is in the air", "rising": "rises", "dropping": "drops",
    "upright": "is upright", "upside down": "is upside down",
    "visible": "is in sight", "hidden": "is hidden behind the {what}",
    "plain": "is plain", "striped": "is striped",
    "apart": "is far from {who}", "together": "is near {who}",
    "own side": "is on its own side", "crossing": "crosses over", "other side": "is on the other side",
}  # fmt: skip
STILL_WORDS = ("stays still", "does not move")
MARKERS: dict[Marker, str] = {"cut": "[SHOT CUT]", "dissolve": "[DISSOLVE]", "fade": "[FADE]"}


@dataclass(frozen=True)
class CharacterWords:
    """What the text says of a character."""

    colour: Colour
    shape: Shape
    pattern: Pattern


@dataclass(frozen=True)
class PlaceWords:
    """What the text says of a place; `side` is None where there is no landmark."""

    name: PlaceName
    landmark: Landmark = "none"
    side: Side | None = None
    light: Light = "day"


@dataclass(frozen=True)
class ShotAttributes:
    """What a prompt asks of one shot. `characters`: the actor, then its partner if any, then those who stay still."""

    characters: tuple[CharacterWords, ...]
    action: Action
    place: PlaceWords
    style: Style
    shot_size: ShotSize = "wide"
    camera: Camera = "static"
    ids: tuple[int, ...] = field(default=(), compare=False)  # index in the scene's cast, per character

    @property
    def actor(self) -> CharacterWords:
        return self.characters[0]

    @property
    def partner(self) -> CharacterWords | None:
        return self.characters[1] if self.action in PAIR_ACTIONS else None


@dataclass(frozen=True)
class StoryAttributes:
    """What a story says: the cast in order, the places in order of appearance, the style and the number of shots."""

    characters: tuple[CharacterWords, ...]
    places: tuple[PlaceWords, ...]
    style: Style
    num_shots: int


@dataclass(frozen=True)
class PromptAttributes:
    """What a shot prompt says; `place` and `style` are None where it leaves them to the story."""

    begins: Marker
    ids: tuple[int, ...]  # actor, partner if any, those who stay still
    action: Action
    place: PlaceWords | None
    style: Style | None
    shot_size: ShotSize
    camera: Camera

    def resolve(self, story: StoryAttributes) -> ShotAttributes:
        """The shot asked for, with characters and place looked up in `story`."""
        if max(self.ids) >= len(story.characters):
            raise ValueError(f"shot prompt names Character {max(self.ids) + 1}; the story has {len(story.characters)}")
        return ShotAttributes(
            characters=tuple(story.characters[k] for k in self.ids),
            action=self.action,
            place=self.place or story.places[0],
            style=self.style or story.style,
            shot_size=self.shot_size,
            camera=self.camera,
            ids=self.ids,
        )


def character_words(character: Character) -> CharacterWords:
    return CharacterWords(character.colour, character.shape, character.pattern)


def place_words(place: Place) -> PlaceWords:
    return PlaceWords(place.name, place.landmark, None if place.landmark == "none" else place.side, place.light)


def shot_attributes(scene: ToyScene, index: int) -> ShotAttributes:
    """Truth of shot `index` in the terms of a prompt: what every text of that shot must parse back to."""
    shot = scene.shots[index]
    first = [shot.actor] if shot.partner is None else [shot.actor, shot.partner]
    ids = (*first, *(k for k in shot.present if k not in first))
    return ShotAttributes(
        characters=tuple(character_words(scene.characters[k]) for k in ids),
        action=shot.action,
        place=place_words(scene.places[shot.place]),
        style=shot.style,
        shot_size=shot.shot_size,
        camera=shot.camera,
        ids=ids,
    )


def story_attributes(scene: ToyScene) -> StoryAttributes:
    """Truth of a scene in the terms of a story; places that sound the same are said once."""
    places = dict.fromkeys(place_words(scene.places[shot.place]) for shot in scene.shots)
    return StoryAttributes(
        tuple(character_words(c) for c in scene.characters), tuple(places), scene.shots[0].style, len(scene.shots)
    )

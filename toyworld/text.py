"""The grammar of ToyWorld: scenes into captions, and captions back into attributes.

Three texts per shot, each with its inverse: the story (global prompt of the scene), the shot prompt (speaks of
"Character 1" and needs the story) and the sentence (stands alone). Defaults are left unsaid: plain pattern, no
landmark, day light, static camera; in sentences also the wide shot. All text is ASCII, because the text encoder
reads bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, TypeVar, cast

import numpy as np

from toyworld.render import states
from toyworld.vocabulary import (
    COLOURS,
    LANDMARKS,
    PAIR_ACTIONS,
    PLACES,
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

W = TypeVar("W", bound=str)
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


# ---------------------------------------------------------------- writing


def _pick(words: tuple[str, ...], rng: np.random.Generator | None) -> str:
    return words[0] if rng is None else words[int(rng.integers(len(words)))]


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _capital(phrase: str) -> str:
    return phrase[0].upper() + phrase[1:]


def describe(character: CharacterWords, rng: np.random.Generator | None = None) -> str:
    """ "a red striped circle": the noun phrase of a character."""
    colour = _pick(COLOUR_WORDS[character.colour], rng)
    pattern = _pick(PATTERN_WORDS[character.pattern], rng)
    return _article(" ".join(w for w in (colour, pattern, _pick(SHAPE_WORDS[character.shape], rng)) if w))


def _place_phrase(place: PlaceWords, rng: np.random.Generator | None) -> str:
    article, noun = _pick(PLACE_WORDS[place.name], rng).split(" ", 1)
    phrase = f"{article} {'dim ' if place.light == 'dim' else ''}{noun}"
    if place.landmark != "none":
        phrase += f" with {_article(place.landmark)} on the {place.side}"
    return phrase


def _action_phrase(shot: ShotAttributes, who: str, rng: np.random.Generator | None) -> str:
    return _pick(ACTION_WORDS[shot.action], rng).format(who=who, what=shot.place.landmark)


def story(scene: ToyScene) -> str:
    """The global prompt: cast, places with style, number of shots."""
    said = story_attributes(scene)
    cast_text = " ".join(f"Character {k + 1}: {describe(c)}." for k, c in enumerate(said.characters))
    places = _capital(" and ".join(_place_phrase(p, None) for p in said.places))
    shots = "1 shot" if said.num_shots == 1 else f"{said.num_shots} shots"
    return f"[Character] {cast_text} [Environment] {places}, {STYLE_WORDS[said.style][0]}. [Story] In {shots}."


def shot_prompt(scene: ToyScene, index: int, rng: np.random.Generator | None = None) -> str:
    """Prompt of one shot, to be read after the story; `rng` picks among phrasings, None gives the canonical one.

    Place and style are said only where the story leaves them open (several places, or a style other than its own).
    """
    shot, said = shot_attributes(scene, index), story_attributes(scene)
    transition = scene.shots[index].transition
    framing = [f"{shot.shot_size} shot"]
    if len(said.places) > 1:
        framing[0] += f" in {_place_phrase(shot.place, None)}"
    if shot.camera != "static":
        framing.append(_pick(CAMERA_WORDS[shot.camera], rng))
    if shot.style != said.style:
        framing.append(STYLE_WORDS[shot.style][0])
    names = [f"Character {k + 1}" for k in shot.ids]
    still = names[2:] if shot.partner else names[1:]
    action = _action_phrase(shot, names[1] if shot.partner else "", rng)
    parts = [MARKERS["cut" if transition == "start" else transition], _capital(", ".join(framing)) + "."]
    parts += [f"{names[0]} {action}.", *(f"{name} {_pick(STILL_WORDS, rng)}." for name in still)]
    return " ".join(parts)


def sentence(scene: ToyScene, index: int, rng: np.random.Generator | None = None) -> str:
    """A caption of one shot that needs no story; `rng` picks among phrasings, None gives the canonical one."""
    shot = shot_attributes(scene, index)
    names = [describe(c, rng) for c in shot.characters]
    still = names[2:] if shot.partner else names[1:]
    action = f"{names[0]} {_action_phrase(shot, names[1] if shot.partner else '', rng)}"
    place = f"in {_place_phrase(shot.place, rng)}"
    tail = [_pick(STYLE_WORDS[shot.style], rng)]
    if shot.shot_size == "close":
        tail.append("close shot")
    if shot.camera != "static":
        tail.append(_pick(CAMERA_WORDS[shot.camera], rng))
    waits = f" while {' and '.join(f'{name} {_pick(STILL_WORDS, rng)}' for name in still)}" if still else ""
    order = 0 if rng is None else int(rng.integers(3))
    if order == 0:
        return f"{_capital(action)}{waits} {place}, {', '.join(tail)}."
    if order == 1:
        return f"{_capital(place)}, {action}{waits}, {', '.join(tail)}."
    return f"{_capital(', '.join(tail))}: {action} {place}{waits}."


def state_sentences(scene: ToyScene, index: int) -> list[tuple[str, int]]:
    """Each state of a shot's action as a sentence, with the frame (inside the shot) from which it holds."""
    shot = shot_attributes(scene, index)
    who = "The " + describe(shot.actor).split(" ", 1)[1]
    partner = "the " + describe(shot.partner).split(" ", 1)[1] if shot.partner else ""
    return [
        (f"{who} {STATE_WORDS[name].format(who=partner, what=shot.place.landmark)}.", frame)
        for name, frame in states(scene.shots[index])
    ]


# ---------------------------------------------------------------- reading


def _any(words: list[str]) -> str:
    return "|".join(re.escape(w) for w in sorted(words, key=len, reverse=True))


def _inverse(table: dict[W, tuple[str, ...]]) -> dict[str, W]:
    return {phrase: name for name, phrases in table.items() for phrase in phrases if phrase}


_COLOUR, _SHAPE, _PATTERN = _inverse(COLOUR_WORDS), _inverse(SHAPE_WORDS), _inverse(PATTERN_WORDS)
_STYLE, _CAMERA = _inverse(STYLE_WORDS), _inverse(CAMERA_WORDS)
_PLACE = {phrase.split(" ", 1)[1]: name for phrase, name in _inverse(PLACE_WORDS).items()}
_CHARACTER_RE = re.compile(
    rf"\ban? ({_any([*_COLOUR])})(?: ({_any([*_PATTERN])}))? ({_any([*_SHAPE])})\b", re.IGNORECASE
)
_PLACE_RE = re.compile(
    rf"\b(?:an?|the) (dim )?({_any([*_PLACE])})\b(?: with an? ({_any([*LANDMARK_WORDS])}) on the (left|right))?",
    re.IGNORECASE,
)
_STYLE_RE, _CAMERA_RE = (re.compile(rf"\b({_any([*table])})\b", re.IGNORECASE) for table in (_STYLE, _CAMERA))
_NAME_RE = re.compile(r"\bCharacter ([1-9])\b")
_ACTION_RES: list[tuple[Action, re.Pattern[str]]] = [
    (name, re.compile(r"\b" + phrase.format(who="", what=rf"(?:{_any([*LANDMARK_WORDS])})"), re.IGNORECASE))
    for name, phrases in ACTION_WORDS.items()
    for phrase in phrases
]


def _find_action(text: str) -> Action:
    found = {name for name, pattern in _ACTION_RES if pattern.search(text)}
    if len(found) != 1:
        raise ValueError(f"text {text!r} must name one action of {list(ACTION_WORDS)}; it names {sorted(found)}")
    return found.pop()


def _find_characters(text: str) -> tuple[CharacterWords, ...]:
    found = [
        CharacterWords(_COLOUR[m[1].lower()], _SHAPE[m[3].lower()], _PATTERN[m[2].lower()] if m[2] else "plain")
        for m in _CHARACTER_RE.finditer(text)
    ]
    if not found:
        raise ValueError(f"text {text!r} names no character like 'a red circle' (of {COLOURS}, {SHAPES})")
    return tuple(found)


def _find_places(text: str) -> tuple[PlaceWords, ...]:
    return tuple(
        PlaceWords(
            _PLACE[m[2].lower()],
            cast(Landmark, (m[3] or "none").lower()),
            cast(Side, m[4].lower()) if m[4] else None,
            "dim" if m[1] else "day",
        )
        for m in _PLACE_RE.finditer(text)
    )


def _find_style(text: str) -> Style | None:
    match = _STYLE_RE.search(text)
    return _STYLE[match[1].lower()] if match else None


def _find_camera(text: str) -> Camera:
    match = _CAMERA_RE.search(text)
    return _CAMERA[match[1].lower()] if match else "static"


def parse_sentence(text: str) -> ShotAttributes:
    """Inverse of `sentence`. Raises ValueError where actor, action, place or style is missing."""
    characters, places, style = _find_characters(text), _find_places(text), _find_style(text)
    if not places or style is None:
        missing = f"style of {STYLES}" if places else f"place of {PLACES}"
        raise ValueError(f"sentence {text!r} names no {missing}")
    return ShotAttributes(
        characters=characters,
        action=_find_action(text),
        place=places[0],
        style=style,
        shot_size="close" if "close shot" in text.lower() else "wide",
        camera=_find_camera(text),
        ids=tuple(range(len(characters))),
    )


def parse_story(text: str) -> StoryAttributes:
    """Inverse of `story`. Raises ValueError where a part is missing."""
    match = re.fullmatch(r"\[Character\] (.*) \[Environment\] (.*) \[Story\] In (\d+) shots?\.", text)
    if match is None:
        raise ValueError(f"story {text!r} is not '[Character] ... [Environment] ... [Story] In N shots.'")
    places, style = _find_places(match[2]), _find_style(match[2])
    if not places or style is None:
        raise ValueError(f"story {text!r}: [Environment] names no place of {PLACES} or no style of {STYLES}")
    return StoryAttributes(_find_characters(match[1]), places, style, int(match[3]))


def parse_shot_prompt(text: str) -> PromptAttributes:
    """Inverse of `shot_prompt`; `.resolve(story)` looks its characters up. Raises ValueError where a part is missing."""
    begins = next((name for name, marker in MARKERS.items() if text.startswith(marker)), None)
    names = tuple(int(m[1]) - 1 for m in _NAME_RE.finditer(text))
    if begins is None or not names:
        raise ValueError(f"shot prompt {text!r} must begin with one of {list(MARKERS.values())} and name 'Character 1'")
    places = _find_places(text)
    return PromptAttributes(
        begins=begins,
        ids=names,
        action=_find_action(text),
        place=places[0] if places else None,
        style=_find_style(text),
        shot_size="close" if "close shot" in text.lower() else "wide",
        camera=_find_camera(text),
    )

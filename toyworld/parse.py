"""Captions back into attributes: the inverse of text.py. Used by tests, and to judge a video against a prompt alone."""

from __future__ import annotations

import re
from typing import TypeVar, cast

from toyworld.vocabulary import COLOURS, PLACES, SHAPES, STYLES, Action, Camera, Landmark, Side, Style
from toyworld.words import (
    ACTION_WORDS,
    CAMERA_WORDS,
    COLOUR_WORDS,
    LANDMARK_WORDS,
    MARKERS,
    PATTERN_WORDS,
    PLACE_WORDS,
    SHAPE_WORDS,
    STYLE_WORDS,
    CharacterWords,
    PlaceWords,
    PromptAttributes,
    ShotAttributes,
    StoryAttributes,
)  # fmt: skip

W = TypeVar("W", bound=str)


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
    """Inverse of `shot_prompt`; `.resolve(story)` looks characters up. Raises ValueError where a part is missing."""
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

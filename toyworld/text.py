"""The grammar of ToyWorld: scenes into captions, and captions back into attributes.

Three texts per shot, each with its inverse: the story (global prompt of the scene), the shot prompt (speaks of
"Character 1" and needs the story) and the sentence (stands alone). Defaults are left unsaid: plain pattern, no
landmark, day light, static camera; in sentences also the wide shot. All text is ASCII, because the text encoder
reads bytes.
"""

from __future__ import annotations

import numpy as np

from toyworld.parse import parse_sentence, parse_shot_prompt, parse_story
from toyworld.render import states
from toyworld.words import (
    ACTION_WORDS,
    CAMERA_WORDS,
    COLOUR_WORDS,
    MARKERS,
    PATTERN_WORDS,
    PLACE_WORDS,
    SHAPE_WORDS,
    STATE_WORDS,
    STILL_WORDS,
    STYLE_WORDS,
    CharacterWords,
    PlaceWords,
    PromptAttributes,
    ShotAttributes,
    StoryAttributes,
    shot_attributes,
    story_attributes,
)  # fmt: skip
from toyworld.world import ToyScene

__all__ = [
    "CharacterWords", "PlaceWords", "PromptAttributes", "ShotAttributes", "StoryAttributes",
    "describe", "parse_sentence", "parse_shot_prompt", "parse_story", "place_phrase", "sentence",
    "shot_attributes", "shot_prompt", "state_sentences", "story", "story_attributes",
]  # fmt: skip


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


def place_phrase(place: PlaceWords, rng: np.random.Generator | None = None) -> str:
    """ "a dim meadow with a tree on the left": the noun phrase of a place."""
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
    places = _capital(" and ".join(place_phrase(p, None) for p in said.places))
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
        framing[0] += f" in {place_phrase(shot.place, None)}"
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
    place = f"in {place_phrase(shot.place, rng)}"
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

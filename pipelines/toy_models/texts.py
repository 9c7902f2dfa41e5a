"""ToyWorld texts and what each of them says, for training the text encoder."""

from __future__ import annotations

import numpy as np

from toyworld.text import ShotAttributes, sentence, shot_attributes, shot_prompt, story, story_attributes
from toyworld.vocabulary import (
    ACTIONS,
    CAMERAS,
    COLOURS,
    LANDMARKS,
    LEVELS,
    LIGHTS,
    MAX_SHOTS,
    PATTERNS,
    PLACES,
    SHAPES,
    STYLES,
    LevelName,
)  # fmt: skip
from toyworld.world import sample_scene

MAX_CHARACTERS = 3
SHOT_SIZES = ("wide", "close")

SLOTS: dict[str, int] = {
    "actor": MAX_CHARACTERS, "action": len(ACTIONS), "place": len(PLACES), "landmark": len(LANDMARKS), "side": 2,
    "light": len(LIGHTS), "style": len(STYLES), "shot_size": len(SHOT_SIZES), "camera": len(CAMERAS),
    "shots": MAX_SHOTS,
    **{f"character{k}_{trait}": len(words) for k in range(MAX_CHARACTERS)
       for trait, words in (("colour", COLOURS), ("shape", SHAPES), ("pattern", PATTERNS))},
    **{f"present{k}": 2 for k in range(MAX_CHARACTERS)},
}  # fmt: skip


def _says_place(said: dict[str, int], place) -> None:
    said["place"] = PLACES.index(place.name)
    said["landmark"] = LANDMARKS.index(place.landmark)
    said["light"] = LIGHTS.index(place.light)
    if place.side is not None:
        said["side"] = 0 if place.side == "left" else 1


def _says_characters(said: dict[str, int], characters) -> None:
    for k, character in enumerate(characters):
        said[f"character{k}_colour"] = COLOURS.index(character.colour)
        said[f"character{k}_shape"] = SHAPES.index(character.shape)
        said[f"character{k}_pattern"] = PATTERNS.index(character.pattern)
    for k in range(MAX_CHARACTERS):
        said[f"present{k}"] = int(k < len(characters))


def _says_shot(said: dict[str, int], shot: ShotAttributes) -> None:
    said["action"] = ACTIONS.index(shot.action)
    said["shot_size"] = SHOT_SIZES.index(shot.shot_size)
    said["camera"] = CAMERAS.index(shot.camera)


def fitting(batch: tuple[list[str], dict[str, list[int]]], most: int) -> tuple[list[str], dict[str, list[int]]]:
    """The texts of a batch that have at most so many bytes, with their classes."""
    texts, classes = batch
    kept = [row for row, text in enumerate(texts) if len(text.encode()) <= most]
    return [texts[row] for row in kept], {name: [values[row] for row in kept] for name, values in classes.items()}


def text_batch(seed: int, step: int, batch: int = 48) -> tuple[list[str], dict[str, list[int]]]:
    """Texts of all three kinds (single-shot sentence, story, shot prompt) and the class of each slot (-1 unsaid).

    Only training scenes: no held-out identity is ever read.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, step, 7])))
    texts: list[str] = []
    rows: list[dict[str, int]] = []
    for _ in range(batch):
        level: LevelName = ("small", "medium", "full")[int(rng.integers(3))]  # type: ignore[assignment]
        cast = 1 + int(
            rng.integers(LEVELS[level].max_characters)
        )  # bindings are the hard part: casts of every size alike
        scene = sample_scene(level, seed=seed, index=int(rng.integers(1 << 31)), split="train", num_characters=cast)
        index = int(rng.integers(len(scene.shots)))
        shot = shot_attributes(scene, index)
        said: dict[str, int] = {}
        kind = int(rng.integers(3))
        if kind == 0:
            texts.append(sentence(scene, index, rng))
            _says_characters(said, shot.characters)
            _says_place(said, shot.place)
            _says_shot(said, shot)
            said["style"] = STYLES.index(shot.style)
        elif kind == 1:
            texts.append(story(scene))
            whole = story_attributes(scene)
            _says_characters(said, whole.characters)
            _says_place(said, whole.places[0])
            said["style"] = STYLES.index(whole.style)
            said["shots"] = whole.num_shots - 1
        else:
            texts.append(shot_prompt(scene, index, rng))
            _says_shot(said, shot)
            said["actor"] = shot.ids[0]
            for k in range(MAX_CHARACTERS):
                said[f"present{k}"] = int(k in shot.ids)
        rows.append(said)
    return texts, {name: [row.get(name, -1) for row in rows] for name in SLOTS}

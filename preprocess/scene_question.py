"""The question that a vision language model is asked about a scene, and what its answer becomes.

One question asks for all layers as one JSON object (`prompts/scene.schema.json`): entities with one id over all shots,
environment, story, and per shot a prompt that leans on them, a sentence that stands alone, camera, and states with the
frame they hold from. The texts are put together in LCT's form (2503.10589, section 3.1): "[Character] Character 1: ...
[Environment] ... [Story] ..." for the scene, "[SHOT CUT] ..." for a shot.

All words that a model is shown are files in `prompts/`; `question_hash` changes with any of them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

import jsonschema
import numpy as np

from models.scene import CUT_MARKER, Entity, Scene, Shot, State

_FOLDER = Path(__file__).parent / "prompts"
_FILES = ("scene.md", "first_picture.md", "picture.md", "repair.md", "scene.schema.json")
_MOST_PROBLEMS = 8  # that are told to the model
_NAME = re.compile(r"\bCharacter (\d+)\b")


class BadAnswer(ValueError):
    """An answer is not what was asked for; the message says how, for the model as for people."""


@cache
def _text(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8").rstrip("\n")


def question_hash() -> str:
    """Changes when a model would be asked otherwise, or other answers would be taken."""
    digest = hashlib.sha256()
    for name in _FILES:
        digest.update(f"{name}\n{_text(name)}\n".encode())
    return digest.hexdigest()[:16]


def shown_shots(scene: Scene) -> list[Shot]:
    """The shots that a question is about: those with encoded frames."""
    return [shot for shot in scene.shots if shot.encoded is not None]


def shown_frames(count: int, most: int) -> list[int]:
    """Which of `count` encoded frames are shown: at most `most`, evenly from the first to the last."""
    shown = min(most, count)
    return [round(i * (count - 1) / max(1, shown - 1)) for i in range(shown)]


def answer_schema(count: int) -> dict[str, Any]:
    """The JSON Schema of the answer about `count` shots."""
    schema: dict[str, Any] = json.loads(_text("scene.schema.json"))
    schema["properties"]["shots"] |= {"minItems": count, "maxItems": count}
    return schema


def answer_form() -> dict[str, Any]:
    """`response_format` of a chat completion: the schema, without the number of shots."""
    schema = json.loads(_text("scene.schema.json"))
    return {"type": "json_schema", "json_schema": {"name": "scene", "schema": schema}}


def make_question(scene: Scene, pictures: list[list[np.ndarray]], frames: int, words: int) -> list[str | np.ndarray]:
    """What the model reads about a scene: instructions, then pictures with their place, shot by shot.

    Args:
        pictures: per shown shot the images uint8 [H,W,3] of its `shown_frames`.
        frames: pictures per shot at most.
        words: of story and prompt together at most.
    """
    shown = shown_shots(scene)
    schema = answer_schema(len(shown))
    most_states = schema["properties"]["shots"]["items"]["properties"]["states"]["maxItems"]
    said = Template(_text("scene.md")).substitute(
        count=len(shown), words=words, states=most_states, schema=json.dumps(schema)
    )
    parts: list[str | np.ndarray] = [said]
    for shot, images in zip(shown, pictures, strict=True):
        assert shot.encoded is not None
        for frame, image in zip(shown_frames(shot.encoded.num_frames, frames), images, strict=True):
            label = Template(_text("picture.md" if frame else "first_picture.md")).substitute(
                shot=shot.index,
                frame=frame,
                frames=shot.encoded.num_frames,
                fps=f"{shot.encoded.fps:g}",
                transition=shot.transition,
            )
            parts += [label, image]
    return parts


def repair_text(error: BadAnswer) -> str:
    """What the model is told about an answer that cannot be used."""
    return Template(_text("repair.md")).substitute(problems=error)


def read_answer(text: str, scene: Scene, words: int) -> dict[str, Any]:
    """The JSON object of an answer, checked. Raises BadAnswer naming each field that is not as it should be."""
    begin, end = text.find("{"), text.rfind("}")
    try:
        value = json.loads(text[begin : end + 1], parse_constant=_no_constant)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise BadAnswer(f"it holds no JSON object: {error}; it begins {text[:80]!r} and ends {text[-40:]!r}") from error
    validator = jsonschema.Draft202012Validator(answer_schema(len(shown_shots(scene))))
    broken = sorted(validator.iter_errors(value), key=lambda one: [str(step) for step in one.absolute_path])
    problems = [f"{_place(one.absolute_path)}: {one.message[:200]}" for one in broken]
    problems = problems or list(_problems(_stripped(value), scene, words))
    if problems:
        more = f"; and {len(problems) - _MOST_PROBLEMS} more" if len(problems) > _MOST_PROBLEMS else ""
        raise BadAnswer("; ".join(problems[:_MOST_PROBLEMS]) + more)
    checked: dict[str, Any] = _stripped(value)
    return checked


def fill_scene(scene: Scene, answer: dict[str, Any]) -> None:
    """Put a checked answer into the record: story, entities, and all layers of the shots it is about, in place."""
    scene.entities = [
        Entity(one["id"], f"Character {number}", one["description"])
        for number, one in enumerate(answer["entities"], start=1)
    ]
    scene.story = _story(answer)
    for said in answer["shots"]:
        shot = scene.shots[said["shot"]]
        shot.prompt = f"{CUT_MARKER} {_no_marker(said['prompt'])}"
        shot.sentence, shot.camera, shot.entities = said["sentence"], said["camera"], said["entities"]
        shot.states = [State(state["text"], state["frame"]) for state in said["states"]]


def _story(answer: dict[str, Any]) -> str:
    cast = " ".join(f"Character {k}: {_ended(one['description'])}" for k, one in enumerate(answer["entities"], start=1))
    return f"[Character] {cast or 'None.'} [Environment] {_ended(answer['environment'])} [Story] {answer['story']}"


def _problems(answer: dict[str, Any], scene: Scene, words: int) -> Iterator[str]:
    """What a schema cannot say: ids, numbers of shots and frames, names and lengths that fit one another."""
    ids = [one["id"] for one in answer["entities"]]
    wanted = [f"c{k}" for k in range(1, len(ids) + 1)]
    if ids != wanted:
        yield f"entities have the ids {ids}, expected {wanted}"
    shown = [shot.index for shot in shown_shots(scene)]
    numbers = [said["shot"] for said in answer["shots"]]
    if numbers != shown:
        yield f"shots have the numbers {numbers}, expected {shown}"
        return
    story = _story(answer)
    for i, entity in enumerate(answer["entities"]):
        yield from _names(f"entities[{i}].description", entity["description"], len(ids))
    yield from _names("story", answer["story"], len(ids))
    yield from _names("environment", answer["environment"], 0)
    for i, said in enumerate(answer["shots"]):
        at = f"shots[{i}]"
        unknown = [one for one in said["entities"] if one not in ids]
        if unknown:
            yield f"{at}.entities: {unknown} are not among the entities {ids}"
        yield from _names(f"{at}.prompt", said["prompt"], len(ids))
        yield from _names(f"{at}.sentence", said["sentence"], 0)
        count = len(f"{story} {said['prompt']}".split())
        if count > words:
            yield f"{at}.prompt: story and prompt have {count} words together, at most {words} are allowed"
        span = scene.shots[said["shot"]].encoded
        assert span is not None
        frames = [state["frame"] for state in said["states"]]
        if frames != sorted(set(frames)):
            yield f"{at}.states: the frames {frames} do not rise"
        if frames[0] != 0 or frames[-1] >= span.num_frames:
            yield f"{at}.states: the frames {frames} have to begin at 0 and lie below {span.num_frames}"


def _names(at: str, text: str, count: int) -> Iterator[str]:
    """Names in a text for which there is no entity; `count` 0: names have no place in it."""
    for number in sorted({int(found) for found in _NAME.findall(text)}):
        if not count:
            yield f"{at}: says 'Character {number}', which this text must not; describe it in words"
        elif not 1 <= number <= count:
            yield f"{at}: says 'Character {number}', but there are {count} entities"


def _place(path: Any) -> str:
    """shots[1].states[0].frame"""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.lstrip(".") or "the answer"


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _stripped(value: Any) -> Any:
    """The answer with single spaces in its texts: line breaks and tabs have no meaning in a caption."""
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, list):
        return [_stripped(one) for one in value]
    return {key: _stripped(one) for key, one in value.items()} if isinstance(value, dict) else value


def _no_marker(text: str) -> str:
    return text.removeprefix(CUT_MARKER).lstrip()


def _ended(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."

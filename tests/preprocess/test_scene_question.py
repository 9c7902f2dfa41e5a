"""The question about a scene and its answer: what is shown, what is refused and why, LCT's form of what is kept."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preprocess import scene_question
from preprocess.captions import finish_asked, template_hash
from preprocess.scene_question import (
    BadAnswer,
    answer_schema,
    fill_scene,
    make_question,
    question_hash,
    read_answer,
    repair_text,
    shown_frames,
)
from preprocess.settings import PrepareSettings
from tests.preprocess.test_captions import make_scene

CUTS = [0, 17, 20, 37]  # the middle shot is too short to be encoded

ANSWER: dict[str, Any] = {
    "entities": [{"id": "c1", "description": "a red circle"}, {"id": "c2", "description": "a blue square."}],
    "environment": "A meadow\nin daylight",
    "story": "Character 1 follows Character 2.",
    "shots": [
        {
            "shot": number,
            "entities": ["c1", "c2"][: 1 + number // 2],
            "prompt": "[SHOT CUT] Wide shot. Character 1 moves.",
            "sentence": "A red circle  moves over a meadow.",
            "camera": "camera pans left",
            "states": [{"text": "It is left.", "frame": 0}, {"text": "It is right.", "frame": 16}],
        }
        for number in (0, 2)
    ],
}


def changed(path: list[str | int], value: Any) -> str:
    answer = copy.deepcopy(ANSWER)
    inner: Any = answer
    for step in path[:-1]:
        inner = inner[step]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return json.dumps(answer)


def test_frames_are_spread_from_first_to_last() -> None:
    assert shown_frames(17, 3) == [0, 8, 16] and shown_frames(17, 2) == [0, 16] and shown_frames(17, 1) == [0]
    assert shown_frames(2, 5) == [0, 1] and shown_frames(1, 3) == [0]


def test_the_question_shows_each_encoded_shot_with_its_place_and_asks_for_that_many() -> None:
    scene, _ = make_scene(CUTS)
    pictures = [[np.full((4, 4, 3), 10 * shot + i, np.uint8) for i in range(3)] for shot in range(2)]
    text, *rest = make_question(scene, pictures, frames=3, words=77)
    assert isinstance(text, str) and "2 consecutive shots" in text and "at most 77 words" in text
    schema = json.loads(text[text.index('{"type"') :])
    assert schema == answer_schema(2) and schema["properties"]["shots"]["minItems"] == 2
    labels, images = rest[::2], rest[1::2]
    assert [int(image[0, 0, 0]) for image in images if isinstance(image, np.ndarray)] == [0, 1, 2, 10, 11, 12]
    assert labels == [
        "Shot 0 has 17 frames, 8 per second, and begins with a cut. Its frame 0:",
        "Shot 0, frame 8:",
        "Shot 0, frame 16:",
        "Shot 2 has 17 frames, 8 per second, and begins with a cut. Its frame 0:",
        "Shot 2, frame 8:",
        "Shot 2, frame 16:",
    ]


def test_a_good_answer_becomes_lcts_form_and_fills_every_layer() -> None:
    scene, _ = make_scene(CUTS)
    fill_scene(scene, read_answer(f"Here it is:\n```json\n{json.dumps(ANSWER, indent=1)}\n```", scene, 130))
    settings = PrepareSettings(captions="endpoint", caption_model="some-vlm")
    finish_asked(scene, settings)
    assert scene.story == (
        "[Character] Character 1: a red circle. Character 2: a blue square. [Environment] A meadow in daylight. "
        "[Story] Character 1 follows Character 2."
    )
    assert [(e.id, e.name, e.description) for e in scene.entities] == [
        ("c1", "Character 1", "a red circle"),
        ("c2", "Character 2", "a blue square."),
    ]
    first, unseen, last = scene.shots
    assert first.prompt == "[SHOT CUT] Wide shot. Character 1 moves." and first.camera == "camera pans left"
    assert first.sentence == "A red circle moves over a meadow."
    assert first.entities == ["c1"] and last.entities == ["c1", "c2"] and unseen.entities == []
    assert [(s.text, s.frame) for s in last.states] == [("It is left.", 0), ("It is right.", 16)]
    assert unseen.prompt.startswith("[SHOT CUT]") and "motion" in unseen.prompt and not unseen.states
    assert scene.captions is not None and scene.captions.backend == "endpoint+describe"
    assert scene.captions.model == "some-vlm" and scene.captions.template_hash == template_hash("endpoint")
    scene.validate()


def test_a_scene_in_which_nothing_acts_keeps_the_form() -> None:
    scene, _ = make_scene([0, 17])
    shot = ANSWER["shots"][0] | {"entities": [], "prompt": "Wide shot of grass."}
    fill_scene(
        scene, read_answer(json.dumps(ANSWER | {"entities": [], "story": "Grass.", "shots": [shot]}), scene, 130)
    )
    assert scene.story == "[Character] None. [Environment] A meadow in daylight. [Story] Grass."


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("I cannot see the pictures.", "it holds no JSON object"),
        (json.dumps(ANSWER)[:-30], "it holds no JSON object"),
        ('{"story": NaN}', "NaN is no JSON number"),
        (json.dumps(ANSWER).replace("a red circle", "\\ud800"), "it holds no JSON object: 'utf-8' codec"),
        (changed(["story"], None), "the answer: 'story' is a required property"),
        (changed(["story"], " \n"), "story: ' \\n' does not match"),
        (changed(["extra"], 1), "'extra' was unexpected"),
        (changed(["shots"], ANSWER["shots"][:1]), "shots: [{'shot': 0"),
        (changed(["shots", 1, "shot"], 1), "shots have the numbers [0, 1], expected [0, 2]"),
        (changed(["shots", 0, "camera"], "drone"), "shots[0].camera: 'drone' is not one of"),
        (changed(["shots", 1, "states", 1, "frame"], "16"), "shots[1].states[1].frame: '16' is not of type 'integer'"),
        (changed(["shots", 1, "states", 1, "frame"], 17), "frames [0, 17] have to begin at 0 and lie below 17"),
        (changed(["shots", 1, "states", 1, "frame"], 0), "shots[1].states: the frames [0, 0] do not rise"),
        (changed(["shots", 0, "states"], []), "shots[0].states: []"),
        (changed(["shots", 0, "entities"], ["c3"]), "shots[0].entities: ['c3'] are not among the entities"),
        (changed(["entities", 0, "id"], "c2"), "entities have the ids ['c2', 'c2'], expected ['c1', 'c2']"),
        (changed(["shots", 0, "prompt"], "Character 3 runs."), "shots[0].prompt: says 'Character 3', but there are 2"),
        (changed(["shots", 0, "sentence"], "Character 1 runs."), "sentence: says 'Character 1', which this text must"),
        (changed(["shots", 1, "prompt"], "word " * 120), "shots[1].prompt: story and prompt have 142 words together"),
    ],
)
def test_answers_that_cannot_be_used_are_refused_by_field(answer: str, problem: str) -> None:
    scene, _ = make_scene(CUTS)
    with pytest.raises(BadAnswer) as caught:
        read_answer(answer, scene, 130)
    assert problem in str(caught.value)
    assert problem in repair_text(caught.value) and "corrected" in repair_text(caught.value)


def test_many_problems_are_told_in_a_few_words() -> None:
    scene, _ = make_scene(CUTS)
    answer = copy.deepcopy(ANSWER) | {"entities": [{"id": "x", "description": ""}] * 12}
    with pytest.raises(BadAnswer, match="and 16 more") as caught:
        read_answer(json.dumps(answer), scene, 130)
    assert len(str(caught.value)) < 2000


def test_every_word_that_a_model_is_shown_is_in_the_hash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = Path(scene_question.__file__).parent / "prompts"
    files = {path.name for path in folder.iterdir()}
    assert files == set(scene_question._FILES)
    known = {question_hash()}
    settings = PrepareSettings(captions="endpoint", caption_model="m")
    keys = {settings.caption_key(template_hash("endpoint"))}
    real = scene_question._text
    for name in sorted(files):
        monkeypatch.setattr(scene_question, "_text", lambda asked, name=name: real(asked) + " " * (asked == name))
        known.add(question_hash())
        keys.add(settings.caption_key(template_hash("endpoint")))
    assert len(known) == len(keys) == 1 + len(files)
    assert settings.caption_key("x") != PrepareSettings(captions="endpoint", caption_model="n").caption_key("x")

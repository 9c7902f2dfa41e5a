"""Asking a server that speaks the real protocol: what goes over the wire, every fault, and nothing asked twice."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.chat import ChatEndpoint
from models.scene import Scene
from models.states import PromptedStates
from preprocess.answers import Answers
from preprocess.asked import Asker, Questions, Unasked
from preprocess.scene_question import answer_form
from preprocess.settings import PrepareSettings
from tests.preprocess.chat_server import KEY, ChatServer, Reply, Request, chat_server, good, scene_answer
from tests.preprocess.test_captions import make_scene

SETTINGS = PrepareSettings(captions="endpoint", caption_model="some-vlm")
COUNT = 3  # scenes


def scenes() -> list[Scene]:
    """Three scenes of one source, two shots each."""
    return [make_scene([34 * i, 34 * i + 17, 34 * i + 34], number=i)[0] for i in range(COUNT)]


def spans(scene: Scene) -> Sequence[np.ndarray | None]:
    """Frames whose grey says which they are."""
    first = int(scene.scene_id[-4:])
    return [
        np.stack([np.full((16, 24, 3), 80 * first + 40 * shot + 2 * i, np.uint8) for i in range(17)])
        for shot in range(2)
    ]


def endpoint(server: ChatServer, **options: Any) -> ChatEndpoint:
    options = {"api_key": KEY, "first_wait": 0.01, "timeout": 20.0, "pictures": "JPEG"} | options
    return ChatEndpoint(server.url, "some-vlm", answer_form=answer_form(), **options)


def ask(
    server: ChatServer, folder: Path, settings: PrepareSettings = SETTINGS, at_once: int = 1, **options: Any
) -> tuple[list[Scene], dict[str, str]]:
    made = scenes()
    asker = Asker(endpoint(server, **options), side_by_side=at_once)
    questions = Questions(settings, Answers(folder / "answers.parquet", folder / "answers"), asker)
    return made, questions.fill(made, [partial(spans, scene) for scene in made])


def only_first(fault: Reply | Sequence[Reply]):
    """The faults in turn for what comes first, then good answers."""
    faults = [fault] if isinstance(fault, Reply) else list(fault)
    return lambda request, number: faults[number] if number < len(faults) else good(request, number)


def only_scene(scene: int, reply: Reply):
    """The fault for every request about one scene, known by its first picture."""

    def answer(request: Request, number: int) -> Reply:
        grey = next(int(part.mean()) for part in request.parts if isinstance(part, np.ndarray))
        return reply if abs(grey - 80 * scene) < 4 else good(request, number)

    return answer


def test_a_question_goes_out_as_openai_has_it(tmp_path: Path) -> None:
    with chat_server() as server:
        made, aside = ask(server, tmp_path)
    assert aside == {} and len(server.requests) == COUNT
    for number, request in enumerate(server.requests):
        assert request.headers["authorization"] == f"Bearer {KEY}"
        assert request.body["model"] == "some-vlm" and request.body["temperature"] == 0
        assert request.body["response_format"]["json_schema"]["schema"]["required"][0] == "entities"
        greys = [part.mean() for part in request.parts if isinstance(part, np.ndarray)]
        wanted = [80 * number + 40 * shot + 2 * frame for shot in range(2) for frame in (0, 8, 16)]
        assert np.allclose(greys, wanted, atol=2), "first, middle and last encoded frame of each shot, in order"
        assert made[number].shots[1].prompt == "[SHOT CUT] Wide shot. Character 1 moves, part 1."
        assert made[number].shots[1].states[1].frame == 16


def test_a_busy_and_a_broken_server_are_asked_again_as_late_as_they_say(tmp_path: Path) -> None:
    faults = [Reply(status=429, headers={"retry-after": "1"}, body=b"{}"), Reply(status=500, body=b"oops")]
    with chat_server(only_first(faults)) as server:
        _, aside = ask(server, tmp_path)
    assert aside == {} and len(server.requests) == COUNT + 2
    assert server.requests[1].at - server.requests[0].at >= 1.0
    assert server.requests[1].body == server.requests[0].body == server.requests[2].body


@pytest.mark.parametrize(
    ("reply", "requests", "reason"),
    [
        (Reply(status=400, body=b'{"error": {"message": "image too large"}}'), 1, 'status 400: {"error": {"message'),
        (Reply(status=401, body=f"wrong key {KEY}".encode()), 1, "status 401: wrong key ***"),
        (Reply(status=503, body=b"down"), 2, "no answer in 2 attempts; the last: status 503: down"),
        (Reply(body=b"<html>a proxy</html>"), 1, "not a chat completion: <html>"),
        (Reply(text="Sorry, no."), 2, "no usable answer: it holds no JSON object"),
        (Reply(text='{"story": "x"}'), 2, "'entities' is a required property; the answer: 'environment'"),
    ],
)
def test_what_stays_wrong_sets_its_scene_aside_and_no_other(
    tmp_path: Path, reply: Reply, requests: int, reason: str
) -> None:
    with chat_server(only_scene(1, reply)) as server:
        made, aside = ask(server, tmp_path, attempts=2)
        assert list(aside) == ["v-0001"] and aside["v-0001"].startswith("captions: ") and reason in aside["v-0001"]
        assert len(server.requests) == COUNT - 1 + requests
        assert made[0].shots[0].prompt and made[2].shots[0].prompt and not made[1].shots[0].prompt
        assert KEY not in aside["v-0001"]
        server.reply = good
        server.requests.clear()
        _, aside = ask(server, tmp_path)  # again: only what has no answer is asked
        assert aside == {} and len(server.requests) == 1


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (lambda answer: "{broken", "it holds no JSON object"),
        (lambda answer: json.dumps(answer | {"shots": answer["shots"][:1]}), "shots: "),
        (lambda answer: json.dumps(answer | {"story": "Character 7 waits."}), "story: says 'Character 7'"),
    ],
)
def test_an_answer_is_repaired_once_and_the_model_is_told_why(tmp_path: Path, bad: Any, problem: str) -> None:
    said = {}

    def reply(request: Request, number: int) -> Reply:
        if number:
            return good(request, number)
        said["first"] = bad(scene_answer(request))
        return Reply(said["first"])

    with chat_server(reply) as server:
        _, aside = ask(server, tmp_path)
    assert aside == {} and len(server.requests) == COUNT + 1
    question, answer, complaint = server.requests[1].body["messages"]
    assert question == server.requests[0].body["messages"][0] and answer["content"] == said["first"]
    (told,) = complaint["content"]
    assert problem in told["text"] and told["text"].startswith("Your answer cannot be used: ")


@pytest.mark.parametrize("slow", [Reply(delay=1.5), Reply(text="slow", drip=0.2)])
def test_a_slow_answer_is_given_up_and_asked_for_again(tmp_path: Path, slow: Reply) -> None:
    """Silent, or byte after byte: the limit is on the whole attempt."""
    began = time.monotonic()
    with chat_server(only_first(slow)) as server:
        _, aside = ask(server, tmp_path, timeout=1.0)
        assert aside == {} and len(server.requests) == COUNT + 1
        server.reply = lambda request, number: slow
        _, aside = ask(server, tmp_path / "other", timeout=0.5, attempts=2, at_once=COUNT)
    assert len(aside) == COUNT and "no answer in 2 attempts; the last: ReadTimeout" in aside["v-0000"]
    assert time.monotonic() - began < 30


def test_questions_are_asked_side_by_side_and_never_more_than_allowed(tmp_path: Path) -> None:
    meet = threading.Barrier(2, timeout=20)  # a request is answered when another is there, too

    def reply(request: Request, number: int) -> Reply:
        if number < 2:
            meet.wait()
        return good(request, number)

    with chat_server(reply) as server:
        _, aside = ask(server, tmp_path, at_once=2)
    assert aside == {} and server.most_at_once == 2


def test_recorded_answers_are_asked_of_nobody_and_hold_no_key(tmp_path: Path) -> None:
    with chat_server() as server:
        first, _ = ask(server, tmp_path)
        again, _ = ask(server, tmp_path)
        assert len(server.requests) == COUNT and first == again
        answers = Answers(tmp_path / "answers.parquet", tmp_path / "answers")
        answers.write_table(tmp_path / "copy" / "answers.parquet")
        table = Answers(tmp_path / "copy" / "answers.parquet", tmp_path / "copy" / "answers")
        made = scenes()
        Questions(SETTINGS, table).fill(made, [partial(spans, scene) for scene in made])
        assert made == first
        for changes in ({"caption_model": "other"}, {"caption_frames": 2}, {"caption_words": 99}, {"height": 32}):
            with pytest.raises(Unasked):
                Questions(replace(SETTINGS, **changes), table).fill(scenes(), [partial(spans, made[0])] * COUNT)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()
    table.write_table(tmp_path / "twice.parquet")
    assert (tmp_path / "twice.parquet").read_bytes() == (tmp_path / "copy" / "answers.parquet").read_bytes()


def test_half_an_answer_on_disk_is_no_answer(tmp_path: Path) -> None:
    with chat_server() as server:
        ask(server, tmp_path)
    whole = sorted((tmp_path / "answers").glob("*/*.json"))
    (whole[0].parent / f".{whole[0].stem}.1-ab.tmp.json").write_text('{"key": ')  # a kill in the middle of writing
    Answers(tmp_path / "none.parquet", tmp_path / "answers").write_table(tmp_path / "t.parquet")
    assert Answers(tmp_path / "t.parquet", tmp_path / "none").find(whole[0].stem) is not None


def test_predicted_states_see_first_frame_and_instruction_only(tmp_path: Path) -> None:
    """AID's form, through the same server; a shot without an answer sets its scene aside, the rest is recorded."""

    def reply(request: Request, number: int) -> Reply:
        (text,) = [part for part in request.parts if isinstance(part, str)]
        (picture,) = [part for part in request.parts if isinstance(part, np.ndarray)]
        assert "sentence" in text and "prompt" not in text and "states seen" not in text
        if abs(picture.mean() - 120) < 1:  # first frame of the second shot of the second scene
            return Reply(status=400, body=b"no such thing")
        return Reply(json.dumps([f"at {picture.mean():.0f}", "then"]))

    settings = PrepareSettings(states_key="key")
    answers = Answers(tmp_path / "answers.parquet", tmp_path / "answers")
    with chat_server(reply) as server:
        made = scenes()
        for scene in made:
            for shot in scene.shots:
                shot.prompt, shot.sentence, shot.camera = "the prompt", f"sentence {shot.index}", "states seen"
        asker = Asker(predictor=PromptedStates(ChatEndpoint(server.url, "some-vlm", first_wait=0.0), "some-vlm", 2))
        frames = [partial(spans, scene) for scene in made]
        aside = Questions(settings, answers, asker).fill(made, frames)
        assert len(server.requests) == 2 * COUNT
        assert list(aside) == ["v-0001"] and "states: shot 1: ChatError" in aside["v-0001"]
        assert [(s.text, s.frame) for s in made[2].shots[1].predicted_states] == [("at 200", 0), ("then", 8)]
        assert not made[2].shots[1].states
        aside = Questions(settings, answers, asker).fill(made, frames)
        assert len(server.requests) == 2 * COUNT + 1 and list(aside) == ["v-0001"]

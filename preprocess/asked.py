"""Captions and predicted states that a model is asked for: recorded answers first, questions side by side, one repair.

What goes wrong with a scene ends that scene and no other; a scene's questions are asked by one thread, so as many
scenes are under way as the asker has threads, whichever videos they are of.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from models.scene import Scene, Shot, State
from models.states import StatePredictor, instruction_of
from preprocess.answers import Answer, Answers, question_key
from preprocess.outcome import Failed, short
from preprocess.scene_question import (
    BadAnswer,
    fill_scene,
    make_question,
    question_hash,
    read_answer,
    repair_text,
    shown_frames,
    shown_shots,
)
from preprocess.settings import ASKED, PrepareSettings

if TYPE_CHECKING:
    from infra.chat import Turn

_LONGEST_REASON = 600  # characters of what a server said, or of what is wrong with an answer

# encoded frames uint8 [n,H,W,3] of each shot of a scene, None for a shot without
Spans = Callable[[], Sequence[np.ndarray | None]]


class Chat(Protocol):
    """A vision chat model: `infra.chat.ChatEndpoint` or `models.vision_chat.LocalVisionChat`."""

    def chat(self, turns: Sequence[Turn]) -> str:
        """The next answer of a conversation. Raises RuntimeError or ValueError where there is none."""
        ...


class Unasked(Exception):
    """A question has no recorded answer, and nobody to ask was given."""


class Asker:
    """Whom a run asks: `chat` for captions, `predictor` for states, None where nobody is asked for them.

    At most `side_by_side` questions are under way at once, over all videos of this process.
    """

    def __init__(
        self, chat: Chat | None = None, predictor: StatePredictor | None = None, side_by_side: int = 1
    ) -> None:
        self.chat, self.predictor, self.side_by_side = chat, predictor, side_by_side
        self.pool = ThreadPoolExecutor(side_by_side, thread_name_prefix="ask")


@dataclass(frozen=True)
class Questions:
    """The questions of one run: its settings, its recorded answers, and who answers what is not recorded."""

    settings: PrepareSettings
    answers: Answers
    asker: Asker | None = None  # None: recorded answers only

    @property
    def any(self) -> bool:
        return self.settings.captions in ASKED or bool(self.settings.states_key)

    def fill(self, scenes: Sequence[Scene], spans: Sequence[Spans]) -> dict[str, str]:
        """Captions (where a model makes them) and predicted states of scenes, in place; `spans` gives their frames.

        Returns by scene id why a scene has none of them: "captions: ..." or "states: ...".

        Raises Unasked where an answer is not recorded and there is no asker.
        """
        if self.asker is None:
            for scene, frames in zip(scenes, spans, strict=True):
                self._fill(scene, frames)
            return {}
        jobs = [self.asker.pool.submit(self._fill, *one) for one in zip(scenes, spans, strict=True)]
        aside: dict[str, str] = {}
        failure: BaseException | None = None
        for scene, job in zip(scenes, jobs, strict=True):
            error = job.exception()
            if isinstance(error, Failed):
                aside[scene.scene_id] = str(error)
            elif error is not None:
                failure = failure or error
        if failure is not None:
            raise failure
        return aside

    def _fill(self, scene: Scene, spans: Spans) -> None:
        if self.settings.captions in ASKED:
            fill_scene(scene, self._caption(scene, spans))
        if self.settings.states_key:
            kept = cache(spans)  # read once, and only if a question is new
            predict_states(scene, lambda shot, instruction: self._states(scene, kept, shot, instruction))

    def _caption(self, scene: Scene, spans: Spans) -> dict[str, Any]:
        key = self._caption_key(scene)
        recorded = self.answers.find(key)
        if recorded is not None:
            with contextlib.suppress(BadAnswer):  # of a version that asked for something else: it is asked again
                return read_answer(recorded, scene, self.settings.caption_words)
        if self.asker is None or self.asker.chat is None:
            raise Unasked(scene.scene_id)
        answer = self._ask(self.asker.chat, scene, spans)
        text = json.dumps(answer, ensure_ascii=False, sort_keys=True)
        self.answers.record(Answer(key, "captions", scene.scene_id, self.settings.caption_model, question_hash(), text))
        return answer

    def _ask(self, chat: Chat, scene: Scene, spans: Spans) -> dict[str, Any]:
        """The checked answer about a scene; one that cannot be used is sent back once, with the reason."""
        frames, words = self.settings.caption_frames, self.settings.caption_words
        pictures = [[span[i] for i in shown_frames(len(span), frames)] for span in spans() if span is not None]
        turns: list[Turn] = [("user", make_question(scene, pictures, frames, words))]
        problems = []
        for _ in range(2):
            try:
                said = chat.chat(turns)
            except (RuntimeError, ValueError) as error:
                raise Failed("captions", short(error, _LONGEST_REASON)) from error
            try:
                return read_answer(said, scene, words)
            except BadAnswer as error:
                problems.append(str(error))
                turns += [("assistant", [said]), ("user", [repair_text(error)])]
        reason = f"no usable answer: {problems[0]}; nor when asked to correct that: {problems[1]}"
        raise Failed("captions", reason[:_LONGEST_REASON])

    def _caption_key(self, scene: Scene) -> str:
        """What the answer depends on, without looking at a frame: a recorded answer needs no decode."""
        shown = []
        for shot in shown_shots(scene):
            assert shot.encoded is not None
            span = shot.encoded
            pts = [span.pts[i] for i in shown_frames(span.num_frames, self.settings.caption_frames)]
            shown.append([shot.index, shot.transition, span.num_frames, span.fps, pts])
        asked = [self.settings.caption_model, self.settings.caption_words, question_hash()]
        return question_key("captions", *asked, self._picture(scene), shown)

    def _states(self, scene: Scene, spans: Spans, shot: Shot, instruction: str) -> list[str]:
        assert shot.encoded is not None
        first = self.settings.states_frames
        pts = shot.encoded.pts[:first]
        key = question_key("states", self.settings.states_key, self._picture(scene), pts, instruction)
        recorded = self.answers.find(key)
        if recorded is None:
            if self.asker is None or self.asker.predictor is None:
                raise Unasked(shot.shot_id)
            span = spans()[shot.index]
            assert span is not None
            try:
                said = self.asker.predictor(span[:first], instruction)
            except (RuntimeError, ValueError) as error:
                raise Failed("states", f"shot {shot.index}: {short(error, _LONGEST_REASON)}") from error
            recorded = json.dumps(said, ensure_ascii=False)
            self.answers.record(Answer(key, "states", shot.shot_id, "", self.settings.states_key, recorded))
        states: list[str] = json.loads(recorded)
        return states

    def _picture(self, scene: Scene) -> list[object]:
        """Which pixels a PTS of the scene's source stands for."""
        return [scene.source.sha256, self.settings.height, self.settings.width, self.settings.crop_bars]


def predict_states(scene: Scene, say: Callable[[Shot, str], Sequence[str]]) -> None:
    """Fill `predicted_states` of the encoded shots, in place; `say` gives them for a shot and its instruction.

    When a state will be reached is not asked: they are recorded evenly over the shot's encoded frames.
    """
    for shot in shown_shots(scene):
        assert shot.encoded is not None
        said = say(shot, instruction_of(scene.story, shot.prompt, shot.sentence))
        frames = shot.encoded.num_frames
        shot.predicted_states = [State(text, i * frames // len(said)) for i, text in enumerate(said)]

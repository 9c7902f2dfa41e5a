"""State predictors: what they are shown, how their answers are read, and that a local model answers."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from models.states import (
    PromptedStates,
    StatePredictor,
    encode_states,
    fit_states,
    instruction_of,
    null_states,
    read_states,
)
from models.text import null_text
from models.tiny import tiny_text_encoder
from toyworld.predict import predict_states
from toyworld.text import sentence, shot_prompt, state_sentences, story
from toyworld.world import sample_scene

FRAMES = np.zeros((1, 8, 8, 3), np.uint8)


def test_a_predictor_sees_given_frames_and_instruction_and_nothing_else() -> None:
    assert list(inspect.signature(StatePredictor.__call__).parameters) == ["self", "frames", "instruction"]
    asked = []

    def ask(images, question):
        asked.append((images, question))
        return '["a", "b"]'

    frames = np.arange(5 * 8 * 8 * 3, dtype=np.uint8).reshape(5, 8, 8, 3)
    assert PromptedStates(ask, "m", 2)(frames, "The cup falls.") == ["a", "b"]
    ((images, question),) = asked
    assert np.array_equal(np.stack(images), frames)
    assert "The cup falls." in question and "first 5 frames" in question and "2 short sentences" in question


@pytest.mark.parametrize(
    ("answer", "states"),
    [
        ('["On the left.", "On the right."]', ["On the left.", "On the right."]),
        ('Sure!\n```json\n["One.", " Two. ", ""]\n```', ["One.", "Two."]),
        ("1. One.\n2) Two.\n\n- Three.", ["One.", "Two.", "Three."]),
        ("One [a] thing.\nAnother.", ["One [a] thing.", "Another."]),
    ],
)
def test_answers_are_read(answer: str, states: list[str]) -> None:
    assert read_states(answer) == states


@pytest.mark.parametrize("answer", ["", "  \n ", "```\n```", "[]"])
def test_an_answer_without_states_is_refused(answer: str) -> None:
    with pytest.raises(ValueError, match="no states in the answer"):
        PromptedStates(lambda images, question: answer, "m")(FRAMES, "It moves.")


def test_missing_states_are_the_instruction_and_too_many_are_cut() -> None:
    assert fit_states(["a"], "go", 3) == ["a", "go", "go"] and fit_states(["a", "b", "c"], "go", 2) == ["a", "b"]


def test_the_key_tells_models_counts_and_questions_apart() -> None:
    keys = {PromptedStates(len, name, count).key for name in ("m", "n") for count in (2, 4)}  # type: ignore[arg-type]
    assert len(keys) == 4


def test_instruction_is_the_sentence_or_story_and_prompt() -> None:
    assert instruction_of("S.", "P.", "Alone.") == "Alone." and instruction_of("S.", "P.", "") == "S. P."


def test_states_are_encoded_each_alone() -> None:
    encoder = tiny_text_encoder()
    both = encode_states(["short", "a longer state"], encoder)
    assert (
        both.shape[:2] == (2, 15) and torch.equal(both[0, :6], encoder.encode(["short"])[0]) and not both[0, 6:].any()
    )
    assert torch.equal(null_states(null_text(encoder, 20)), encode_states([""], encoder))


@pytest.mark.parametrize("index", range(12))
def test_the_grammar_says_the_states_of_any_scene_from_its_words(index: int) -> None:
    scene = sample_scene("full", seed=5, index=index, num_shots=2)
    for shot in range(2):
        truth = [text for text, _ in state_sentences(scene, shot)]
        rng = np.random.default_rng(index)
        assert predict_states(sentence(scene, shot, rng)) == truth
        assert predict_states(f"{story(scene)} {shot_prompt(scene, shot, rng)}") == truth


def test_the_grammar_refuses_what_is_not_toyworlds() -> None:
    with pytest.raises(ValueError, match="names no character"):
        predict_states("A cat sits on the mat.")
    with pytest.raises(ValueError, match="needs its story"):
        predict_states("[SHOT CUT] Wide shot. Character 1 grows.")


def test_a_local_model_answers_greedily(tmp_path) -> None:
    """A random LLaVA of a few kilobytes: folder, chat template, images and decoding are real."""
    from models.vision_chat import LocalVisionChat
    from tests.models.tiny_llava import write_tiny_llava

    write_tiny_llava(tmp_path / "llava")
    chat = LocalVisionChat(tmp_path / "llava", max_tokens=5)
    images = [np.full((12, 16, 3), value, np.uint8) for value in (0, 200)]
    answers = [chat(images[:1], "What?"), chat(images[:1], "What?"), chat(images[:1], "What else then?")]
    assert answers[0] == answers[1] and isinstance(answers[2], str)
    tokens = chat.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "What?"}]}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    assert tokens["pixel_values"].shape[0] == 1
    with pytest.raises(FileNotFoundError, match="no transformers model folder"):
        LocalVisionChat(tmp_path)

"""State predictors: in which states a shot will be, said from its given frames and its instruction alone (AID).

AID (2406.06465, section 3.2) asks a multimodal language model for a few stages of the action. What it may see is part
of the interface: given frames and instruction, never the frames to be made, in training as in sampling. States read off
a whole clip would tell the model its future.

S states, L text tokens, D width of the text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from models.text import TextEncoder

# (images uint8 [H,W,3] each, question) -> the model's answer; decoding must be deterministic
Ask = Callable[[Sequence[np.ndarray], str], str]

QUESTION = (Path(__file__).parent / "prompts" / "states.md").read_text(encoding="utf-8").rstrip("\n")


class StatePredictor(Protocol):
    """What AID asks. `count` and `key` say what it would answer: another key, other states."""

    count: int
    key: str

    def __call__(self, frames: np.ndarray, instruction: str) -> list[str]:
        """Exactly `count` states in order of time, from the given frames uint8 [T,H,W,3] and the instruction.

        Raises ValueError for an answer that cannot be read, naming it.
        """
        ...


class PromptedStates:
    """A multimodal language model as state predictor; `ask` is a local model or an endpoint, `name` names it."""

    def __init__(self, ask: Ask, name: str, count: int = 4) -> None:
        self.ask, self.count, self.key = ask, count, prompted_key(name, count)

    def __call__(self, frames: np.ndarray, instruction: str) -> list[str]:
        shown = "first frame" if len(frames) == 1 else f"first {len(frames)} frames"
        answer = self.ask(list(frames), QUESTION.format(frames=shown, instruction=instruction, count=self.count))
        return fit_states(read_states(answer), instruction, self.count)


def prompted_key(name: str, count: int) -> str:
    """The key of `PromptedStates`, without its model."""
    return hashlib.sha256(json.dumps([name, QUESTION, count]).encode()).hexdigest()[:16]


def read_states(answer: str) -> list[str]:
    """The states of an answer: a JSON list of strings, as asked for, or one state a line, numbered or not."""
    found = re.search(r"\[.*\]", answer, re.DOTALL)
    if found:
        try:
            value = json.loads(found[0])
        except ValueError:
            value = None
        if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
            return [one.strip() for one in value if one.strip()]
    lines = [re.sub(r"^\s*(?:[-*]|\(?\d+[.):])\s*", "", line).strip() for line in answer.splitlines()]
    states = [line for line in lines if line and not line.startswith(("```", "[", "]", "{", "}"))]
    if not states:
        raise ValueError(f"no states in the answer {answer[:200]!r}; asked for was a JSON list of strings")
    return states


def fit_states(states: Sequence[str], instruction: str, count: int) -> list[str]:
    """`count` states: the first of too many; the instruction in the place of those that are missing."""
    return [*states[:count], *[instruction] * (count - len(states))]


def instruction_of(story: str, prompt: str, sentence: str) -> str:
    """What a shot's predictor is told: its self-contained sentence, or else story and prompt."""
    return sentence or f"{story} {prompt}".strip()


def encode_states(states: Sequence[str], encoder: TextEncoder) -> Tensor:
    """Embeddings [S,L,D] of states, each encoded alone, padded with zeros to the longest."""
    return torch.nn.utils.rnn.pad_sequence(encoder.encode(states), batch_first=True)


def null_states(null_text: Tensor) -> Tensor:
    """No states, [1,L,D]: the empty text, of which `null_text` [L',D] is the padded context, as the only state."""
    return null_text[(null_text != 0).any(dim=-1)][None]

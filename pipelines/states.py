"""Which state predictor prepare and sample ask: a local multimodal model, an endpoint, or ToyWorld's grammar."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from infra.knobs import knob

if TYPE_CHECKING:
    import numpy as np

    from models.states import StatePredictor


@dataclass(kw_only=True)
class StatesConfig:
    """Who says, from a shot's given frames and its instruction alone, in which states the shot will be (method aid)."""

    backend: Literal["none", "toyworld", "endpoint", "transformers"] = knob(
        "none", "endpoint = an OpenAI-compatible vision chat server, transformers = a local model, toyworld = grammar"
    )
    count: int = knob(4, "states per shot; aid's num_states")
    frames: int = knob(1, "frames shown from the shot's first, 4k+1: what aid is given")
    url: str = knob("", "endpoint: its address up to /v1; its key, if it wants one, in STATES_API_KEY")
    model: str = knob("", "endpoint: the name of the model; transformers: its folder")
    device: str = knob("cpu", "transformers: torch device")
    dtype: Literal["float32", "bfloat16"] = knob("float32", "transformers: of weights and activations")

    def __post_init__(self) -> None:
        if self.count < 1 or self.frames < 1:
            raise ValueError(f"states.count={self.count}, states.frames={self.frames}; give at least 1")
        needs = {"endpoint": ("url", "model"), "transformers": ("model",)}.get(self.backend, ())
        if missing := [name for name in needs if not getattr(self, name)]:
            raise ValueError(
                f"states.backend={self.backend} needs {' and '.join(f'states.{name}' for name in missing)}"
            )


class GrammarStates:
    """ToyWorld's grammar behind the interface of a state predictor; the frame adds nothing to its words."""

    def __init__(self, count: int) -> None:
        from toyworld.predict import KEY

        self.count, self.key = count, f"{KEY}-{count}"

    def __call__(self, frames: np.ndarray, instruction: str) -> list[str]:
        from models.states import fit_states
        from toyworld.predict import predict_states

        return fit_states(predict_states(instruction), instruction, self.count)


def make_predictor(config: StatesConfig) -> StatePredictor | None:
    """The predictor of a config; None for "none". Raises ValueError or OSError for a model that cannot be opened."""
    if config.backend == "toyworld":
        return GrammarStates(config.count)
    if config.backend == "none":
        return None
    from models.states import PromptedStates

    if config.backend == "endpoint":
        from infra.chat import ChatEndpoint

        ask = ChatEndpoint(config.url, config.model, api_key=os.environ.get("STATES_API_KEY", ""))
        return PromptedStates(ask, config.model, config.count)
    import torch

    from models.vision_chat import LocalVisionChat

    chat = LocalVisionChat(config.model, config.device, getattr(torch, config.dtype))
    return PromptedStates(chat, Path(config.model).name, config.count)


def predictor_key(config: StatesConfig) -> str:
    """The `key` of the predictor, without opening it; "" for none."""
    if config.backend == "none":
        return ""
    from models.states import prompted_key

    if config.backend == "toyworld":
        return GrammarStates(config.count).key
    return prompted_key(Path(config.model).name if config.backend == "transformers" else config.model, config.count)

"""Which model prepare asks for captions: one behind an OpenAI-compatible endpoint, or in a local folder."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from infra.knobs import knob
from pipelines.states import StatesConfig, make_predictor
from preprocess.settings import ASKED, CaptionBackend

if TYPE_CHECKING:
    from preprocess.asked import Asker, Chat


@dataclass(kw_only=True)
class CaptionerConfig:
    """The model of `captions=endpoint` and `captions=transformers`, and how it is asked."""

    url: str = knob("", "endpoint: its address up to /v1")
    model: str = knob("", "endpoint: the name of the model; transformers: its folder, such as a Qwen2.5-VL's")
    api_key_env: str = knob(
        "", "endpoint: environment variable with its key, set where Ray's workers run; empty = none"
    )
    frames: int = knob(3, "pictures per shot, evenly from its first encoded frame to the last")
    words: int = knob(130, "of story and one prompt together at most; 226 tokens hold about 140 words")
    side_by_side: int = knob(16, "endpoint: questions under way at once, of each actor")
    timeout: float = knob(300.0, "endpoint: seconds for one attempt at a question")
    attempts: int = knob(6, "endpoint: attempts at a question where the server is busy, broken or slow")
    max_tokens: int = knob(4096, "of an answer")
    send_schema: bool = knob(True, "endpoint: send the JSON Schema (response_format); false for servers that refuse it")
    device: str = knob("cpu", "transformers: torch device")
    dtype: Literal["float32", "bfloat16"] = knob("float32", "transformers: of weights and activations")
    actors: int = knob(1, "workers that ask; with transformers each holds the model")
    cpus: float = knob(0.25, "CPUs counted for one of them")
    gpus: float = knob(0.0, "GPUs for one of them")

    def __post_init__(self) -> None:
        for name in ("frames", "words", "side_by_side", "attempts", "max_tokens", "actors"):
            if getattr(self, name) < 1:
                raise ValueError(f"captioner.{name}={getattr(self, name)} must be at least 1")
        if self.timeout <= 0:
            raise ValueError(f"captioner.timeout={self.timeout} must be positive seconds")
        if urlsplit(self.url).username is not None or urlsplit(self.url).query:
            raise ValueError("captioner.url holds a name, password or query, which would end in logs; give the key in "
                             "the environment variable that captioner.api_key_env names")  # fmt: skip

    def check(self, backend: CaptionBackend) -> None:
        """Raises ValueError where the backend lacks what it needs."""
        needs = {"endpoint": ("url", "model"), "transformers": ("model",)}.get(backend, ())
        if missing := [name for name in needs if not getattr(self, name)]:
            raise ValueError(f"captions={backend} needs {' and '.join(f'captioner.{name}' for name in missing)}")

    def at_once(self, backend: CaptionBackend, states: StatesConfig) -> int:
        """Questions that one actor has under way, and videos: a local model answers one after another."""
        return self.side_by_side if "endpoint" in (backend, states.backend) else 1


def asks(backend: CaptionBackend, states: StatesConfig) -> bool:
    """Whether captions or states are asked of somebody."""
    return backend in ASKED or states.backend != "none"


def make_asker(backend: CaptionBackend, config: CaptionerConfig, states: StatesConfig) -> Asker:
    """Whom a run asks. Raises ValueError or OSError for a model that cannot be opened or a key that is missing."""
    from preprocess.asked import Asker

    return Asker(_make_chat(backend, config), make_predictor(states), config.at_once(backend, states))


def _make_chat(backend: CaptionBackend, config: CaptionerConfig) -> Chat | None:
    if backend == "endpoint":
        from infra.chat import ChatEndpoint
        from preprocess.scene_question import answer_form

        return ChatEndpoint(
            config.url,
            config.model,
            api_key=api_key(config),
            timeout=config.timeout,
            attempts=config.attempts,
            max_tokens=config.max_tokens,
            pictures="JPEG",  # dozens of them in one request
            answer_form=answer_form() if config.send_schema else None,
        )
    if backend == "transformers":
        import torch

        from models.vision_chat import LocalVisionChat

        return LocalVisionChat(config.model, config.device, getattr(torch, config.dtype), config.max_tokens)
    return None


def api_key(config: CaptionerConfig) -> str:
    """The key of the endpoint; "" where none is named. Raises ValueError where it is named and not set."""
    if not config.api_key_env:
        return ""
    key = os.environ.get(config.api_key_env, "")
    if not key:
        raise ValueError(f"captioner.api_key_env={config.api_key_env}: this environment variable is not set here")
    return key


def captioner_name(backend: CaptionBackend, config: CaptionerConfig) -> str:
    """What records call the model: an endpoint's by its name, a folder by its name and a hash of what lies in it."""
    if backend == "endpoint":
        return config.model
    if backend != "transformers":
        return ""
    folder = Path(config.model)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"captioner.model={folder} is no transformers model folder: it has no config.json")
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        small = file.suffix in (".json", ".jinja", ".txt")  # of weights the size alone: they are many gigabytes
        what = hashlib.sha256(file.read_bytes()).hexdigest() if small else str(file.stat().st_size)
        digest.update(f"{file.relative_to(folder).as_posix()} {what} ".encode())
    return f"{folder.resolve().name}@{digest.hexdigest()[:12]}"

"""A whole run over an output folder in this process, without Ray, and what is counted and read of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load

from models.scene import Scene
from models.states import StatePredictor
from preprocess.asked import Asker, Chat
from preprocess.rows import CaptionRow, EncodeRow, caption_row, decode_row, probe_row
from preprocess.run import Work, plan_work
from preprocess.settings import PrepareSettings
from preprocess.shards import read_samples
from preprocess.sources import list_sources

SETTINGS = PrepareSettings(height=32, width=32)
SHARD_BYTES = 10**6


def run_here(
    videos: Path,
    output: Path,
    model: Path,
    settings: PrepareSettings = SETTINGS,
    retry_failed: bool = False,
    states: StatePredictor | None = None,
    frames_fps: float | None = None,
    chat: Chat | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> tuple[Work, int]:
    """The chain of `pipelines.prepare.run_stages` in this process; returns the work and how many videos it did."""
    work = plan_work(list_sources([videos], frames_fps=frames_fps).files, output, settings, model, retry_failed)
    todo = len(work.todo)
    encode = EncodeRow(work.place, str(model), "cpu", 1)
    caption = CaptionRow(work.place, lambda: Asker(chat, states, 2))
    with work.scratch():
        for manifest in work.rounds():
            for row in pq.read_table(manifest).to_pylist():
                row = decode_row(probe_row(row, work.place), work.place)
                work.take(encode(caption(row) if chat or states else caption_row(row, work.place)))
    if not work.unchanged(shard_bytes):
        work.compact(shard_bytes)
    work.clean()
    return work, todo


def records(output: Path) -> dict[str, tuple[Scene, dict]]:
    """The written scenes of a dataset by key, each with its tensors."""
    return {
        key: (Scene.from_json(files["json"]), load(files["safetensors"]))
        for path in sorted((output / "shards").glob("*.tar"))
        for key, files in read_samples(path)
    }


class Predictor:
    """Says `count` states, or fails as an endpoint that is down does."""

    def __init__(self, count: int, error: str = "") -> None:
        self.count, self.key, self.error, self.calls = count, f"{count} {error}", error, 0

    def __call__(self, frames: np.ndarray, instruction: str) -> list[str]:
        self.calls += 1
        if self.error:
            raise RuntimeError(self.error)
        return [f"{index} of {frames.mean():.0f}" for index in range(self.count)]


def count_calls(monkeypatch: pytest.MonkeyPatch, *functions: tuple[object, str]) -> Counter[str]:
    """How often functions, (module or class, name) each, are called from now on, by name."""
    counts: Counter[str] = Counter()
    for owner, name in functions:
        real = getattr(owner, name)

        def counted(*args, real=real, name=name, **kwargs):
            counts[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
    return counts

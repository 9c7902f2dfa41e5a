"""The model card of a pretrained ToyWorld model, written from what the run logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.toy_models.build import ToyModelsConfig


def last_figures(run_dir: Path) -> dict[str, Any]:
    """The last line of a run's metrics.jsonl, or {} if there is none."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1]) if lines else {}


def command(config: ToyModelsConfig) -> str:
    """The command line that this config stands for: what differs from the defaults, and the number of steps."""
    plain = type(config)(steps=config.steps)
    given = [f"{key}={value}" for key, value in vars(config).items() if value != getattr(plain, key) and key != "out"]
    return " ".join(["python -m pipelines.toy_models", f"steps={config.steps}", *given])


def model_card(config: ToyModelsConfig, scores: dict[str, dict[str, float]], run_dir: Path, texts_per_clip: int) -> str:
    """Markdown: what the model is, the command that made it, steps, time, loss and judge scores."""
    stages = {name: last_figures(run_dir / name) for name in ("vae", "text_encoder", "transformer")}
    rows = "\n".join(
        f"| {name} | {score['value']:.3f} | {score['count']:g} |" for name, score in sorted(scores.items())
    )
    figures = "\n".join(
        f"| {name} | " + ", ".join(f"{k} {v:.4g}" for k, v in line.items() if isinstance(v, int | float)) + " |"
        for name, line in stages.items()
    )
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---
# ToyWorld Wan, level `{config.level}`

A small single-shot text-to-video model in the real diffusers classes (`WanTransformer3DModel`, `AutoencoderKLWan`,
`T5EncoderModel` with the byte-level `ByT5Tokenizer`): {SHAPE}. It plays the part of a big pretrained model in
Shotloom's demo, tests and claims. It knows ToyWorld and nothing else.

Made by

    {command(config)}

on {config.clips} clips with {texts_per_clip} texts each; no held-out identity or (identity, action) pair among them.
Every stage is seeded and resumes where it stopped.

| stage | last logged figures |
|---|---|
{figures}

Judge scores on {config.prompts} held-out single-shot prompts (20 steps, guidance 3):

| metric | value | readings |
|---|---|---|
{rows}

Use it with Shotloom (`shotloom sample model=FOLDER ...`) or with plain diffusers
(`WanPipeline.from_pretrained(FOLDER)`, `max_sequence_length=256`, 64x64, 17 frames).
"""


SHAPE = "64x64 pixels, 17 frames at 8 fps"

"""The model card of a pretrained ToyWorld model, written from what its runs logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from models.families import FAMILIES
from pipelines.toy_models.parts import SMALL
from pipelines.toy_models.settings import ToyModelsConfig

STAGES = ("vae", "text_encoder", "transformer", "decoder")
FIRST = ("loss", "hours")  # of a stage's figures, after its step
SHAPE = "64x64 pixels, 17 frames at 8 fps"


def run_record(config: ToyModelsConfig) -> dict[str, Any]:
    """What one run of the command leaves behind of itself: how it was started, and its stages' last figures."""
    stages = {stage: _figures(config.folder / stage / "metrics.jsonl") for stage in STAGES}
    record = {"command": command(config), "stages": {stage: found for stage, found in stages.items() if found}}
    packs = SMALL[config.backbone].packs
    return record | ({"packs": list(packs)} if config.steps and max(packs) > 1 else {})


def command(config: ToyModelsConfig) -> str:
    """The command line that this config stands for: what differs from the defaults, and the number of steps."""
    plain = type(config)(backbone=config.backbone, start=config.start)
    given = [f"backbone={config.backbone}"] * (config.backbone != "wan") + [
        f"{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in vars(config).items()
        if (value != getattr(plain, key) or key == "start" and value) and key not in ("out", "steps")
    ]
    return " ".join(["python -m pipelines.toy_models", f"steps={config.steps}", *given])


def _figures(path: Path) -> dict[str, float]:
    """Last line of a metrics.jsonl without what only its reader at the time wanted, and the hours of all lines."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not lines:
        return {}
    rate = "step_s" if "step_s" in lines[-1] else "seconds_per_step"
    before = [0, *(line["step"] for line in lines)]
    hours = sum(line[rate] * (line["step"] - then) for line, then in zip(lines, before, strict=False)) / 3600
    kept = {
        key: value
        for key, value in lines[-1].items()
        if key in ("step", "loss", "accuracy", "l1", "kl") or key.startswith(("eval/loss", "eval/wrong_text"))
    }
    return {**kept, "hours": round(hours, 2)}


def model_card(config: ToyModelsConfig, scores: dict[str, dict[str, float]], runs: list[dict[str, Any]]) -> str:
    """Markdown: what the model is, the runs that made it with their steps, hours and losses, and its judge scores."""
    rows = "\n".join(
        f"| {name} | {score['value']:.3f} | {score['count']:g} |" for name, score in sorted(scores.items())
    )
    family, small = FAMILIES[config.backbone], SMALL[config.backbone]
    name = family.pipeline.removesuffix("Pipeline")
    task, reader, asked = "text", "`T5EncoderModel` with the byte-level `ByT5Tokenizer`", "single-shot prompts"
    if family.reads_images:
        task, reader = "image", "`CLIPVisionModelWithProjection` of random weights"
        asked = "clips, each asked for by its first frame alone: nothing says what will happen,"
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: {task}-to-video
---
# ToyWorld {name}, level `{config.level}`

A small single-shot {task}-to-video model in the real diffusers classes (`{family.model_class.__name__}`,
`{family.vae_class.__name__}`, {reader}): {SHAPE}. It plays the part of a
big pretrained model in Shotloom's demo, tests and claims. It knows ToyWorld and nothing else.

Use it with Shotloom (`shotloom sample model=FOLDER ...`) or with plain diffusers
(`{family.pipeline}.from_pretrained(FOLDER)`, {small.call}, 64x64, 17 frames).

## How well it obeys

The judge's reading of {config.prompts} held-out {asked} (20 steps, guidance 3), measured by the last
command below when it ended. No training clip shows a held-out identity, or a held-out identity doing what it does.

| metric | value | readings |
|---|---|---|
{rows}

## How it was made

On {config.clips + config.patterned} clips, each with up to three texts of at most {small.text_length}
bytes. Every stage is seeded and goes on where it stopped.
{"".join(_run_words(run) for run in runs)}"""


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _run_words(run: dict[str, Any]) -> str:
    rows = []
    for stage in (stage for stage in STAGES if stage in run["stages"]):
        line = run["stages"][stage]
        keys = sorted(line, key=lambda key: (key != "step", key not in FIRST, key))  # shotloom.json keeps no order
        rows.append(f"| {stage} | " + ", ".join(f"{key} {_short(line[key])}" for key in keys) + " |")
    figures = "\n".join(rows)
    note = f"\n{run['note']}\n" if "note" in run else ""
    if "packs" in run:
        packs = ", ".join(str(pack) for pack in run["packs"])
        note += (
            f"\nThe transformer's sequences held {packs} clips by turns: clips that have nothing to do with one\n"
            "another, each with its own text and noise level, so that a sequence longer than a shot is not new to it.\n"
        )
    return f"""
    {run["command"]}
{note}
| stage | last figures |
|---|---|
{figures}
"""

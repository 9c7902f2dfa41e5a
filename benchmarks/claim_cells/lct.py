"""LCT (2503.10589): shots made in one context keep who and where from shot to shot; so do shots made one after another.

Comparison: shots made alone by a model tuned on single shots; all shots together; one after another behind a cache,
their history at t_c of 0, 0.1, 0.3 and 0.5. The causal cells spend four fifths of their steps as the joint one does and
the rest under causal attention. t_c is chosen when sampling, so one training serves all four; a share of its samples
has clean shots, which t_c = 0 needs.
"""

from __future__ import annotations

from dataclasses import replace

from claim_cells.cell import Cell, Comparison, Judged, Metric, Paper, Stage, TableConfig
from claim_cells.make import NOISE_SEED
from models.folder import Model
from pipelines.demo_stages import LCT_PARAMS
from pipelines.evaluate import read_storyboard, toy_storyboard
from pipelines.toy_models.measure import PROMPT_SEED
from sample.generate import GenerateSettings, generate_scenes
from sample.storyboard import derive_seed
from toyworld.judge import SceneReading, score_scene_reading, unsaid_sums
from toyworld.world import sample_scene

CONTEXT_LEVELS = (0.0, 0.1, 0.3, 0.5)
RATE = {"learning_rate": 3e-4}
WINDOWS = RATE | {"shots_per_scene": 3, "single_shot_prob": 0.1}
THIRD = 1 / 3  # a sample holds three shots
KEPT = ("identity_said", "identity_said_return", "place_agreement", "attributes", "action", "legibility")
CAUSAL = (
    Stage("lct", LCT_PARAMS | {"clean_prob": 0.1}, WINDOWS, share=0.8, batch_share=THIRD),
    Stage("lct", LCT_PARAMS | {"clean_prob": 0.1, "attention_rule": "group_causal"}, WINDOWS, 0.2, THIRD),
)


def judge(model: Model, cell: Cell, config: TableConfig) -> Judged:
    """Held-out scenes of `scene_lengths` shots, in turn, half of them with two characters, who come and go."""
    lengths = config.scene_lengths
    boards = [
        toy_storyboard(
            sample_scene(
                "small", seed=PROMPT_SEED, index=n, split="test", num_shots=lengths[n % len(lengths)],
                num_characters=1 + n // len(lengths) % 2,
            ),
            f"p{n}",
        )
        for n in range(config.prompts)
    ]  # fmt: skip
    level = cell.judged.get("context_level")
    if level is not None:
        boards = [replace(board, plan={"context_level": level}) for board in boards]
    settings = GenerateSettings(config.sample_steps, config.guidance, task=cell.judged.get("task", "auto"))
    readings: list[SceneReading | None] = [None] * len(boards)
    for turn, length in enumerate(lengths):
        members = list(range(turn, len(boards), len(lengths)))
        together = not cell.judged  # all shots of a scene in one context
        at_once = max(4, config.generate_at_once // length) if together else config.generate_at_once
        for begin in range(0, len(members), at_once):
            group = members[begin : begin + at_once]
            chosen = [boards[n] for n in group]
            seeds = [derive_seed(NOISE_SEED, n) for n in group]
            clips = generate_scenes(model, chosen, settings, seeds, independent=cell.judged.get("independent", False))
            for n, clip in zip(group, clips, strict=True):
                readings[n] = read_storyboard(clip.frames, clip.cuts, boards[n])
    return _judged([reading for reading in readings if reading is not None], max(lengths))


def _judged(readings: list[SceneReading], longest: int) -> Judged:
    judged = Judged()
    for reading in readings:
        scores = score_scene_reading(reading)
        judged.add("scene", {name: scores[name] for name in KEPT})
        if len(reading.readings) == longest:
            judged.add("longest", {name: scores[name] for name in KEPT})
    judged.scores["scene.identity_unsaid"] = unsaid_sums(readings).round(5).tolist()
    return judged


CLAIMED = {
    "scene.identity_said": "better",
    "scene.identity_said_return": "better",
    "scene.identity_unsaid": "better",
    "scene.place_agreement": "not worse",
    "scene.attributes": "not worse",
}

PAPER = Paper(
    name="lct",
    title="LCT: shots alone, together, and one after another, in scenes of 1 to 9 shots",
    cells=(
        Cell(
            "independent",
            "scenes",
            (Stage("fvdm", {"p": 0.0, "clean_prob": 0.0}, RATE | {"shots_per_scene": 1, "single_shot_prob": 0.0}),),
            {"independent": True},
        ),
        Cell("joint", "scenes", (Stage("lct", LCT_PARAMS, WINDOWS, batch_share=THIRD),)),
        *(
            Cell(f"causal-tc{level:g}", "scenes", CAUSAL, {"task": "autoregressive", "context_level": level})
            for level in CONTEXT_LEVELS
        ),
    ),
    metrics=(
        Metric("scene.identity_said"),
        Metric("scene.identity_said_return"),
        Metric("scene.identity_unsaid", -1),
        Metric("scene.place_agreement"),
        Metric("scene.attributes"),
        Metric("scene.action"),
        Metric("longest.identity_said"),
        Metric("longest.place_agreement"),
        Metric("longest.attributes"),
        Metric("longest.legibility"),
    ),
    comparisons=tuple(
        Comparison(cell, "independent", CLAIMED)  # type: ignore[arg-type]
        for cell in ("joint", *(f"causal-tc{level:g}" for level in CONTEXT_LEVELS))
    ),
    judge=judge,
)

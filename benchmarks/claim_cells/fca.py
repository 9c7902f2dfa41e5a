"""FCA (TMLR 2025): modules that read the given frame and text for every frame predict better than a LoRA.

Comparison: LoRA, which sees the given frame held clean in the clip; FCA without frame-wise text; all of FCA.
"""

from __future__ import annotations

from claim_cells.cell import Cell, Comparison, Paper, Stage
from claim_cells.tvp import METRICS, judge

SIZES = {"density": "uniform", "frame_queries": 4, "text_width": 96, "text_heads": 4, "max_frames": 8}
SINGLE = {"shots_per_scene": 1, "single_shot_prob": 1.0, "learning_rate": 3e-4}
LORA = {"lora": {"rank": 16, "alpha": 16}}

PAPER = Paper(
    name="fca",
    title="FCA: frame-wise conditioning against a LoRA, first frame and a sentence given",
    cells=(
        Cell("lora", "clips", (Stage("fca", SIZES | {"adapter": "none"}, SINGLE | LORA),)),
        Cell("no-frame-text", "clips", (Stage("fca", SIZES | {"adapter": "no_frame_text"}, SINGLE),)),
        Cell("full", "clips", (Stage("fca", SIZES | {"adapter": "full"}, SINGLE),)),
    ),
    metrics=METRICS,
    comparisons=tuple(
        Comparison("full", baseline, {"tvp.action": "better", "tvp.frechet": "better"})
        for baseline in ("lora", "no-frame-text")
    ),
    judge=judge,
)

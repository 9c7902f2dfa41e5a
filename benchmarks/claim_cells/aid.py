"""AID (2406.06465): states said by a predictor, both branches of the condition and every adapter help prediction.

Comparison: the condition none, multimodal only, decomposed only, without states, full; and each adapter removed.
"""

from __future__ import annotations

from claim_cells.cell import Cell, Comparison, Paper, Stage
from claim_cells.data import STATES
from claim_cells.tvp import METRICS, judge

SIZES = {"query_tokens": 4, "width": 192, "heads": 4, "max_frames": 8, "num_states": STATES}
TRAIN = {
    "shots_per_scene": 1,
    "single_shot_prob": 1.0,
    "learning_rate": 1e-3,
    "text_drop": {"everything": 0.05, "given": 0.05, "both": 0.05},
}
ABLATIONS = {
    "none": {"condition": "none"},
    "multimodal": {"condition": "multimodal"},
    "decomposed": {"condition": "decomposed"},
    "no-states": {"states": False},
    "no-spatial": {"spatial_adapter": False},
    "no-short-term": {"short_term_adapter": False},
    "no-long-term": {"long_term_adapter": False},
}

PAPER = Paper(
    name="aid",
    title="AID: what each part of the condition and each adapter adds, first frame and a sentence given",
    cells=tuple(
        Cell(name, "clips", (Stage("aid", SIZES | changes, TRAIN),))
        for name, changes in ({"full": {}} | ABLATIONS).items()
    ),
    metrics=METRICS,
    comparisons=tuple(
        Comparison("full", baseline, {"tvp.state_order": "better", "tvp.action": "better", "tvp.frechet": "better"})
        for baseline in ABLATIONS
    ),
    judge=judge,
)

"""The table of claims: its cells, its arithmetic against independent computations, its verdicts."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from typing import Any

import _common
import numpy as np
import pytest
from _bootstrap import paired_bootstrap_of
from claim_cells.cell import Cell, Comparison, Metric, Paper, TableConfig
from claim_cells.table import Difference, Scores, compile_paper, goals, mean_and_error, text_of, verdict
from claims import PAPERS, main

from toyworld.frechet import sample_distance

ISSUE = {  # the comparisons of the issue's table
    "fvdm": ["scalar", "p0.05", "p0.2", "p0.5", "p1"],
    "tic_ft": [
        *(f"{task}-{kind}" for task in ("i2v", "v2v") for kind in ("buffer0", "buffer1", "buffer3")),
        "i2v-buffer3-per-frame-time", "v2v-buffer3-per-frame-time", "i2v-channel-concat",
    ],
    "lct": ["independent", "joint", "causal-tc0", "causal-tc0.1", "causal-tc0.3", "causal-tc0.5"],
    "aid": [
        "none", "multimodal", "decomposed", "no-states", "full", "no-spatial", "no-short-term", "no-long-term",
    ],
    "fca": ["lora", "no-frame-text", "full"],
}  # fmt: skip
METRICS = {
    "fvdm": ["given_psnr", "seam", "frechet", "attributes"],
    "tic_ft": ["condition_fidelity", "identity", "style_error"],
    "lct": ["identity_said", "identity_said_return", "identity_unsaid", "place_agreement", "attributes"],
    "aid": ["state_order", "action", "frechet"],
    "fca": ["action", "frechet"],
}


def test_every_cell_of_the_issues_table_is_listed() -> None:
    assert {name: sorted(cell.name for cell in paper.cells) for name, paper in PAPERS.items()} == {
        name: sorted(cells) for name, cells in ISSUE.items()
    }


@pytest.mark.parametrize("name", ISSUE)
def test_every_metric_of_the_issues_table_is_judged_and_every_cell_compared(name: str) -> None:
    paper = PAPERS[name]
    assert set(METRICS[name]) <= {metric.name.split(".")[-1] for metric in paper.metrics}
    assert {cell.name for cell in paper.cells} == {c for one in paper.comparisons for c in (one.cell, one.baseline)}


@pytest.mark.parametrize("name", ISSUE)
def test_cells_of_a_paper_spend_the_same(name: str) -> None:
    """All of the steps, and the same number of shots per step, are left to no cell to choose."""
    for cell in PAPERS[name].cells:
        assert sum(stage.share for stage in cell.stages) == pytest.approx(1.0)
        for stage in cell.stages:
            shots = stage.train["shots_per_scene"]
            assert stage.batch_share * shots == pytest.approx(1.0)
            assert not {"steps", "batch_size", "accumulate"} & set(stage.train)


def test_defaults_are_what_the_issue_asks_for() -> None:
    config = TableConfig()
    assert config.steps == 500 and config.prompts >= 64 and len(config.seeds) >= 2 and config.pairs == 20
    assert min(config.scene_lengths) == 1 and max(config.scene_lengths) == 9
    assert config.batch_size % 3 == 0  # scenes of three shots come out even


def test_mean_and_standard_error() -> None:
    values = [0.4, 0.7, 0.6]
    assert mean_and_error(values)["mean"] == pytest.approx(statistics.fmean(values))
    assert mean_and_error(values)["error"] == pytest.approx(statistics.stdev(values) / math.sqrt(3))
    assert mean_and_error([0.5]) == {"mean": 0.5, "error": None}


def records(rng: np.random.Generator, gain: float, prompts: int = 12) -> dict[str, dict[int, dict[str, Any]]]:
    """Two cells with two seeds: a score with uneven numbers of readings, and features."""
    hard = rng.random(prompts)
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for cell, extra in (("old", 0.0), ("new", gain)):
        for seed in (0, 1):
            counts = rng.integers(1, 4, prompts) if (cell, seed) == ("old", 0) else found["old"][0]["counts"]
            values = hard + extra + 0.02 * rng.standard_normal(prompts)
            sums = np.stack([values * counts, counts], axis=-1)[:, None]
            features = rng.standard_normal((prompts, 3)) * 0.1 + extra
            found.setdefault(cell, {})[seed] = {
                "counts": counts,
                "scores": {"s.score": sums.tolist()},
                "features": {"s": features.tolist()},
            }
    return found


def weighted(record: dict[str, Any], rows: list[int]) -> float:
    picked = [record["scores"]["s.score"][row][0] for row in rows]
    return sum(total for total, _ in picked) / sum(count for _, count in picked)


def naive_interval(statistic: Callable[[list[int]], float], prompts: int, resamples: int) -> tuple[float, float]:
    """Percentiles of a plain loop over resamples, drawn as the bootstrap's seed 0 draws them."""
    rng = np.random.Generator(np.random.PCG64(0))
    draws = rng.integers(prompts, size=(resamples, prompts))
    values = [statistic(rows.tolist()) for rows in draws]
    return float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))


def test_scores_and_paired_difference_equal_an_independent_computation() -> None:
    found = records(np.random.default_rng(3), gain=0.1)
    metric, everything = Metric("s.score"), list(range(12))
    scores = Scores(found, {})
    new = [weighted(found["new"][seed], everything) for seed in (0, 1)]
    old = [weighted(found["old"][seed], everything) for seed in (0, 1)]
    summary = scores.summary(metric, "new")
    assert summary is not None
    assert summary["mean"] == pytest.approx(sum(new) / 2)
    assert summary["error"] == pytest.approx(abs(new[0] - new[1]) / 2)  # s / sqrt(2) of two values
    difference = scores.difference(metric, "new", "old")
    assert difference is not None
    assert difference.difference == pytest.approx((sum(new) - sum(old)) / 2)
    assert difference.per_seed == pytest.approx([a - b for a, b in zip(new, old, strict=True)])

    def mean_gap(rows: list[int]) -> float:
        return sum(weighted(found["new"][s], rows) - weighted(found["old"][s], rows) for s in (0, 1)) / 2

    low, high = naive_interval(mean_gap, 12, 10_000)
    assert (difference.low, difference.high) == (pytest.approx(low), pytest.approx(high))
    assert difference.low < difference.difference < difference.high


def test_frechet_difference_equals_an_independent_computation() -> None:
    found, reference = records(np.random.default_rng(4), gain=0.3), np.random.default_rng(5).standard_normal((40, 3))
    metric = Metric("s.frechet", -1)
    scores = Scores(found, {"s": reference})
    gap = [
        sample_distance(np.array(found["new"][s]["features"]["s"]), reference)
        - sample_distance(np.array(found["old"][s]["features"]["s"]), reference)
        for s in (0, 1)
    ]
    difference = scores.difference(metric, "new", "old")
    assert difference is not None and difference.per_seed == pytest.approx(gap)
    assert difference.difference == pytest.approx(sum(gap) / 2)
    assert difference.low < difference.difference < difference.high


def test_bootstrap_of_a_mean_is_the_bootstrap_of_its_sums() -> None:
    rng = np.random.default_rng(6)
    a, b = rng.random(20), rng.random(20)
    found = paired_bootstrap_of(lambda r: float(a[r].mean()), lambda r: float(b[r].mean()), 20, resamples=500)
    draws = np.random.Generator(np.random.PCG64(0)).integers(20, size=(500, 20))
    gaps = (b - a)[draws].mean(axis=1)
    shift = gaps.mean() - (b - a).mean()
    assert found.low == pytest.approx(np.quantile(gaps, 0.025) - shift)
    assert found.high == pytest.approx(np.quantile(gaps, 0.975) - shift)


def test_only_seeds_that_both_sides_have_are_compared() -> None:
    found = records(np.random.default_rng(7), gain=0.1)
    del found["old"][0]
    difference = Scores(found, {}).difference(Metric("s.score"), "new", "old")
    assert difference is not None and len(difference.per_seed) == 1
    del found["old"]
    assert Scores(found, {}).difference(Metric("s.score"), "new", "old") is None


@pytest.mark.parametrize(
    ("metric", "expect", "low", "high", "per_seed", "baseline", "wanted"),
    [
        (Metric("a.x"), "better", 0.1, 0.3, [0.1, 0.3], 0.5, "holds"),
        (Metric("a.x"), "better", 0.1, 0.3, [-0.1, 0.5], 0.5, "undecided"),  # one seed says otherwise
        (Metric("a.x"), "better", -0.1, 0.3, [0.1, 0.1], 0.5, "undecided"),
        (Metric("a.x"), "better", -0.3, -0.1, [-0.2, -0.2], 0.5, "fails"),
        (Metric("a.x", -1), "better", -0.3, -0.1, [-0.2, -0.2], 0.5, "holds"),  # lower is better
        (Metric("a.x"), "not worse", -0.04, 0.1, [0.0, 0.0], 0.5, "holds"),
        (Metric("a.x"), "not worse", -0.06, 0.1, [0.0, 0.0], 0.5, "undecided"),
        (Metric("a.x"), "not worse", -0.3, -0.06, [-0.2, -0.2], 0.5, "fails"),
        (Metric("a.frechet", -1, 0.1), "not worse", -0.2, 0.9, [0.1, 0.1], 10.0, "holds"),  # a tenth of 10
        (Metric("a.frechet", -1, 0.1), "not worse", -0.2, 1.1, [0.1, 0.1], 10.0, "undecided"),
    ],
)
def test_verdicts(metric, expect, low, high, per_seed, baseline, wanted) -> None:  # noqa: ANN001
    found = Difference(float(np.mean(per_seed)), low, high, per_seed)
    assert verdict(metric, expect, found, baseline) == wanted


def test_what_is_missing_is_called_missing(tmp_path) -> None:  # noqa: ANN001
    config = TableConfig(out=tmp_path / "out", results=tmp_path)
    figures = compile_paper(PAPERS["fca"], config)
    assert figures["missing"] == [
        f"{cell} seed {seed}" for cell in ("lora", "no-frame-text", "full") for seed in (0, 1)
    ]
    assert {row["verdict"] for row in figures["comparisons"]} == {"missing"}
    assert "i2v.identity" not in compile_paper(PAPERS["tic_ft"], config)["cells"]["v2v-buffer0"]["scores"]
    text = text_of({"fca": figures})
    assert "Missing: lora seed 0" in text and "| full" in text
    assert goals("fca", figures, True) == []
    json.dumps(figures, allow_nan=False)


def test_goals_follow_the_direction_of_the_metric() -> None:
    row = {"cell": "a", "baseline": "b", "expects": "better", "low": -0.2, "high": -0.1}
    rows = [
        row | {"metric": "x.err", "better": "low"},
        row | {"metric": "x.acc", "better": "high"},
        row | {"metric": "x.acc", "better": "high", "expects": "not worse"},
    ]
    found = goals("fca", {"comparisons": rows}, True)
    assert [goal.met for goal in found] == [True, False] and isinstance(found[0], _common.Goal)


def test_a_comparison_of_unknown_cells_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\['other'\]"):
        Paper("x", "", (Cell("a", "clips", ()),), (), (Comparison("a", "other", {}),), lambda *_: None)  # type: ignore[arg-type, return-value]


def test_unknown_cells_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--only", "fca", "cells=[p1]"])
    assert "there is no p1; choose among ['full', 'lora', 'no-frame-text']" in capsys.readouterr().err

"""From cell files to the table: mean and standard error over seeds, paired bootstrap over prompts, verdicts.

A score of a cell with one seed pools its prompts. A cell's score is the mean over seeds, with the standard error
s / sqrt(S), s the sample deviation over S seeds. A difference is of cell and baseline with the same seeds and prompts;
its interval resamples prompts, the same in all seeds and on both sides. It holds for these seeds: what another training
would give, only the differences of each seed tell. Missing cells are reported as missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import _common
import numpy as np
from _bootstrap import paired_bootstrap, paired_bootstrap_of, pooled

from claim_cells.cell import Comparison, Expect, Metric, Paper, TableConfig
from claim_cells.runner import finished, reference_features
from toyworld.frechet import sample_distance

RESAMPLES_OF_DISTANCE = 400
Records = dict[str, dict[int, dict[str, Any]]]  # cell -> seed -> record


@dataclass(frozen=True)
class Difference:
    """Cell minus baseline; `low`, `high`: 95 %; `per_seed` in the order of the seeds that both have."""

    difference: float
    low: float
    high: float
    per_seed: list[float]


class Scores:
    """Scores of one paper's finished cells."""

    def __init__(self, records: Records, reference: Mapping[str, np.ndarray]) -> None:
        self.records, self.reference = records, reference

    def of(self, metric: Metric, cell: str, seed: int) -> float | None:
        """The score of a cell with one seed; None where nothing was read."""
        record = self.records[cell][seed]
        name = metric.feature_set
        if name is not None:
            features = record["features"].get(name)
            return None if features is None else self._distance(name, np.array(features))
        if metric.name not in record["scores"]:
            return None
        sums = np.array(record["scores"][metric.name], dtype=np.float64)
        return float(pooled(sums)) if sums[..., 1].any() else None

    def _distance(self, name: str, features: np.ndarray) -> float:
        return sample_distance(features, self.reference[name])

    def summary(self, metric: Metric, cell: str) -> dict[str, Any] | None:
        """{"mean", "error", "seeds"}; the error is None with one seed."""
        values = {seed: self.of(metric, cell, seed) for seed in sorted(self.records.get(cell, {}))}
        found = {seed: value for seed, value in values.items() if value is not None}
        if not found:
            return None
        return {**mean_and_error(list(found.values())), "seeds": found}

    def difference(self, metric: Metric, cell: str, baseline: str) -> Difference | None:
        """None where no seed has both, or nothing was read."""
        both = sorted(set(self.records.get(cell, {})) & set(self.records.get(baseline, {})))
        pairs = [(self.of(metric, cell, seed), self.of(metric, baseline, seed)) for seed in both]
        seeds = [seed for seed, pair in zip(both, pairs, strict=True) if None not in pair]
        if not seeds:
            return None
        per_seed = [a - b for a, b in pairs if a is not None and b is not None]
        name = metric.feature_set
        if name is None:
            # seeds become parts of the score: pooled() is then the mean over seeds, and prompts are shared by them
            after, before = (
                np.concatenate(
                    [np.array(self.records[c][s]["scores"][metric.name], dtype=np.float64) for s in seeds], axis=1
                )
                for c in (cell, baseline)
            )
            found = paired_bootstrap(before, after)
        else:
            sides = [[np.array(self.records[c][s]["features"][name]) for s in seeds] for c in (baseline, cell)]

            def distance(side: list[np.ndarray], rows: np.ndarray) -> float:
                return float(np.mean([self._distance(name, one[rows]) for one in side]))

            found = paired_bootstrap_of(
                lambda rows: distance(sides[0], rows),
                lambda rows: distance(sides[1], rows),
                len(sides[0][0]),
                resamples=RESAMPLES_OF_DISTANCE,
            )
        return Difference(float(np.mean(per_seed)), found.low, found.high, per_seed)


def mean_and_error(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard error s / sqrt(S) of S values, s with S - 1; None from one value."""
    error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "error": error}


def verdict(metric: Metric, expect: Expect, found: Difference | None, baseline: float | None) -> str:
    """holds: the whole interval, and every seed, is on the side that the claim says; fails: the whole interval is on
    the other; undecided: neither. "not worse" allows for the metric's margin."""
    if found is None or baseline is None:
        return "missing"
    margin = 0.0
    if expect == "not worse":
        margin = metric.margin * (abs(baseline) if metric.feature_set else 1.0)
    low, high = sorted((metric.better * found.low, metric.better * found.high))
    gains = [metric.better * one for one in found.per_seed]
    if expect == "not worse":
        return "holds" if low > -margin else "fails" if high < -margin else "undecided"
    if low > 0 and min(gains) > 0:
        return "holds"
    return "fails" if high < 0 else "undecided"


def load_records(paper: Paper, config: TableConfig) -> Records:
    """Finished cells of the settings asked for."""
    found: Records = {}
    for cell in paper.cells:
        for seed in config.seeds:
            if (record := finished(paper, cell, seed, config)) is not None:
                found.setdefault(cell.name, {})[seed] = record
    return found


def compile_paper(paper: Paper, config: TableConfig) -> dict[str, Any]:
    """Figures of one paper: scores of every cell, comparisons with verdicts, and what is missing."""
    records = load_records(paper, config)
    sets = {m.feature_set for m in paper.metrics if m.feature_set} if records else set()
    scores = Scores(records, {name: reference_features(paper, name, config) for name in sorted(sets)})
    cells = {
        cell.name: {
            "seeds": sorted(records.get(cell.name, {})),
            "missing_seeds": [s for s in config.seeds if s not in records.get(cell.name, {})],
            "commands": {str(s): r["command"] for s, r in sorted(records.get(cell.name, {}).items())},
            "seconds": {str(s): r["seconds"] for s, r in sorted(records.get(cell.name, {}).items())},
            "scores": {m.name: _rounded(scores.summary(m, cell.name)) for m in paper.metrics if cell.has(m)},
        }
        for cell in paper.cells
    }
    return {
        "title": paper.title,
        "steps": config.steps,
        "prompts": config.prompts,
        "cells": cells,
        "comparisons": [row for one in paper.comparisons for row in _compare(one, paper, scores)],
        "missing": [f"{name} seed {seed}" for name, cell in cells.items() for seed in cell["missing_seeds"]],
    }


def _compare(one: Comparison, paper: Paper, scores: Scores) -> list[dict[str, Any]]:
    rows = []
    for name, expect in one.expects.items():
        metric = paper.metric(name)
        found = scores.difference(metric, one.cell, one.baseline)
        baseline = scores.summary(metric, one.baseline)
        row: dict[str, Any] = {"cell": one.cell, "baseline": one.baseline, "metric": name, "expects": expect}
        row["better"] = "high" if metric.better > 0 else "low"
        row["verdict"] = verdict(metric, expect, found, baseline and baseline["mean"])
        if found is not None:
            row |= {k: _rounded(getattr(found, k)) for k in ("difference", "low", "high", "per_seed")}
        rows.append(row)
    return rows


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return round(value, 4) if isinstance(value, float) else value


def goals(name: str, figures: Mapping[str, Any], judged: bool) -> list[_common.Goal]:
    """A goal for every comparison that claims an improvement and has both sides."""
    found = []
    for row in figures["comparisons"]:
        if row["expects"] != "better" or "low" not in row:
            continue
        high_is_better = row["better"] == "high"
        words = f"{name}: {row['metric']}, {row['cell']} minus {row['baseline']}, "
        words += f"{'lower' if high_is_better else 'upper'} end of the 95 % interval"
        end, relation = (row["low"], ">") if high_is_better else (row["high"], "<")
        found.append(_common.Goal(words, end, relation, 0.0, judged))
    return found


def text_of(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """The tables as Markdown."""
    parts = [HEAD]
    for paper in figures.values():
        differences = [
            [row["cell"], row["baseline"], row["metric"], f"{row['expects']} ({row['better']})", *_row_words(row)]
            for row in paper["comparisons"]
        ]
        parts.append(f"## {paper['title']}\n\n{paper['steps']} steps a cell, {paper['prompts']} held-out prompts.\n")
        parts += [table + "\n" for table in _score_tables(paper["cells"])]
        header = ["cell", "baseline", "metric", "expected", "difference", "95 % interval", "per seed", "verdict"]
        parts.append(_common.table(header, differences) + "\n")
        if paper["missing"]:
            parts.append(f"Missing: {', '.join(paper['missing'])}.\n")
        commands = sorted({c for one in paper["cells"].values() for c in one["commands"].values()})
        if commands:
            parts.append("\n".join(["Made by", "", *(f"    {command}" for command in commands)]) + "\n")
    return "\n".join(parts)


HEAD = """# The papers' claims on ToyWorld

Every cell fine-tunes the shipped model for the same number of steps and samples, then makes the same held-out prompts
from the same start noise; the judge reads them. Scores: mean over training seeds +- standard error over them.
Differences: cell minus baseline, with a paired bootstrap over prompts (95 %), which holds for these seeds, and the
difference of each seed. A verdict "holds" needs the whole interval and every seed on the expected side; "fails" is the
whole interval on the other side; "not worse" allows a margin (0.05 of a share, 0.5 dB, a tenth of a Frechet distance).
Frechet distances are of the judge's clip features (`toyworld/frechet.py`); their level depends on how many there are.
"""


def _score_tables(cells: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One per set of prompts, of the cells that are judged on it."""
    names = list(dict.fromkeys(name for one in cells.values() for name in one["scores"]))
    tables = []
    for prompts in dict.fromkeys(name.split(".")[0] for name in names):
        own = [name for name in names if name.startswith(f"{prompts}.")]
        rows = [
            [cell, str(len(one["seeds"])), *(_words(one["scores"][name]) for name in own)]
            for cell, one in cells.items()
            if own[0] in one["scores"]
        ]
        tables.append(_common.table([prompts, "seeds", *(name.split(".", 1)[1] for name in own)], rows))
    return tables


def _words(summary: dict[str, Any] | None) -> str:
    if summary is None:
        return "missing"
    return f"{summary['mean']:.3f}" + ("" if summary["error"] is None else f" +- {summary['error']:.3f}")


def _row_words(row: Mapping[str, Any]) -> list[str]:
    if "low" not in row:
        return ["", "", "", "missing"]
    each = ", ".join(f"{value:+.3f}" for value in row["per_seed"])
    return [f"{row['difference']:+.3f}", f"[{row['low']:+.3f}, {row['high']:+.3f}]", each, row["verdict"]]

"""What a cell of the table of claims is: a way to fine-tune the shipped model, trained with a seed and judged.

N prompts, M parts of a score, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from infra.config import knob
from models.folder import Model
from pipelines.shipped import SHIPPED_WAN
from pipelines.toy_models.measure import held_out_scenes
from toyworld.judge import Score
from toyworld.world import ToyScene

Expect = Literal["better", "not worse"]


@dataclass(kw_only=True)
class TableConfig:
    """Keys of the table of claims. The first three and the last five say what is made, where and how fast; the others
    decide figures."""

    cells: list[str] = knob([], "only these cells of the paper; empty = all")
    seeds: list[int] = knob([0, 1], "of training: data order, noise, new weights")
    run: bool = knob(True, "false = only compile the table of the cells that are finished")
    model: Path = knob(SHIPPED_WAN, "model that every cell starts from")
    steps: int = knob(500, "optimizer steps of every cell")
    batch_size: int = knob(6, "samples per step; scenes of three shots count as three")
    clips: int = knob(800, "single training shots (fvdm, aid, fca)")
    scenes: int = knob(160, "training scenes of 3 to 6 shots (lct)")
    pairs: int = knob(20, "training pairs (tic_ft)")
    prompts: int = knob(64, "held-out prompts per cell")
    reference: int = knob(256, "held-out rendered clips that the Frechet distance is taken from")
    scene_lengths: list[int] = knob([1, 3, 5, 9], "shots of the held-out scenes (lct), in turn")
    sample_steps: int = knob(10, "denoising steps")
    guidance: float = knob(3.0, "guidance scale of the text")
    image_guidance: float = knob(1.5, "guidance scale of the given frame (aid)")
    generate_at_once: int = knob(16, "shots made as one batch; changes rounding only")
    compile: bool = knob(False, "torch.compile the blocks in training; changes rounding only, needs a C++ compiler")
    device: Literal["auto", "cpu", "cuda"] = knob("auto", "where prompts are generated; training takes a GPU if any")
    out: Path = knob(Path("runs/claims/table"), "training data, runs and models; can be removed at any time")
    results: Path = knob(Path(__file__).resolve().parents[1] / "results", "folder for claims/, claims.json, claims.md")

    def __post_init__(self) -> None:
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise ValueError(f"seeds={self.seeds}: give at least one, each once")
        for name in ("steps", "batch_size", "clips", "scenes", "pairs", "generate_at_once", "sample_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1")
        if self.prompts < 2 or self.reference < 2:
            raise ValueError(f"prompts={self.prompts}, reference={self.reference}: a comparison needs at least 2")


@dataclass(frozen=True)
class Stage:
    """One run of training; `train` holds further keys of `pipelines.train.TrainConfig`."""

    method: str
    params: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0  # of the cell's steps
    batch_share: float = 1.0  # of the batch size: samples of three shots are a third as many


@dataclass(frozen=True)
class Cell:
    """`data` names the training set (data.py); `judged` says how prompts are made, as the paper's judge reads it.

    `prompts` names the sets of prompts that it is judged on, the first part of a metric's name; empty = all.
    """

    name: str
    data: str
    stages: tuple[Stage, ...]
    judged: Mapping[str, Any] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()

    def has(self, metric: Metric) -> bool:
        """Whether the metric is read of it."""
        return not self.prompts or metric.prompts in self.prompts


@dataclass(frozen=True)
class Metric:
    """`PROMPTS.SCORE`; `better` is 1 where high is better, -1 where low is. `PROMPTS.frechet` is of features PROMPTS.

    `margin` is how much worse still counts as not worse; of a Frechet distance it is a share of the baseline's.
    """

    name: str
    better: Literal[1, -1] = 1
    margin: float = 0.05

    @property
    def prompts(self) -> str:
        return self.name.split(".")[0]

    @property
    def feature_set(self) -> str | None:
        return self.prompts if self.name.endswith(".frechet") else None


@dataclass(frozen=True)
class Comparison:
    """What the paper says of a cell against its baseline."""

    cell: str
    baseline: str
    expects: Mapping[str, Expect]  # by metric


@dataclass
class Judged:
    """Scores as sums [N,M,2] = (sum of readings, number of them) per prompt, and features [N,D] of what was made."""

    scores: dict[str, list[list[list[float]]]] = field(default_factory=dict)
    features: dict[str, list[list[float]]] = field(default_factory=dict)

    def add(self, prefix: str, scores: Mapping[str, Score]) -> None:
        """The next prompt's scores; every prompt of a set brings the same names."""
        for name, score in scores.items():
            self.scores.setdefault(f"{prefix}.{name}", []).append(
                [[round(score.value * score.count, 5), score.count]],
            )

    def add_features(self, name: str, features: np.ndarray) -> None:
        self.features.setdefault(name, []).append([round(float(value), 4) for value in features])


@dataclass(frozen=True)
class Paper:
    """A paper's part of the table. `judge` makes the prompts with a cell's model and reads what came of them."""

    name: str
    title: str
    cells: tuple[Cell, ...]
    metrics: tuple[Metric, ...]
    comparisons: tuple[Comparison, ...]
    judge: Callable[[Model, Cell, TableConfig], Judged]
    # of a feature set
    reference: Callable[[str, int], list[ToyScene]] = lambda _, count: held_out_scenes("small", count)

    def __post_init__(self) -> None:
        cells, metrics = {cell.name for cell in self.cells}, {metric.name for metric in self.metrics}
        for one in self.comparisons:
            unknown = sorted({one.cell, one.baseline} - cells) + sorted(set(one.expects) - metrics)
            if unknown:
                raise ValueError(f"{self.name}: a comparison names {unknown}, which the paper has not")

    def metric(self, name: str) -> Metric:
        return next(metric for metric in self.metrics if metric.name == name)

    def cell(self, name: str) -> Cell:
        return next(cell for cell in self.cells if cell.name == name)

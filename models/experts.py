"""One of two models that share the noise levels between them (Wan 2.2 A14B)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

ExpertName = Literal["high", "low"]
EXPERT_FOLDERS: dict[ExpertName, str] = {"high": "transformer", "low": "transformer_2"}


@dataclass(frozen=True)
class Expert:
    """`high` works where the clock is at or above the boundary, `low` below it.

    The clock of a sample is the highest level of its frames; `boundary` is diffusers' boundary_ratio, in (0, 1).
    """

    name: ExpertName
    boundary: float

    def covers(self, times: Tensor) -> Tensor:
        """bool, in the shape of `times`: whether clocks, as model times (1000 level, float32), are this expert's."""
        above = times >= 1000 * self.boundary  # diffusers' own comparison, to its rounding
        return above if self.name == "high" else ~above

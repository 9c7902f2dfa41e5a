"""Classifier-free guidance over an ordered list of conditions, each nested in the one before (AID 2406.06465, eq. 9).

e_0 has every condition dropped, e_i keeps the first i:  e = e_0 + sum_i s_i (e_i - e_{i-1}).
Collected by branch, e_i carries the weight s_i - s_{i+1} (with s_0 = 1 and s_{n+1} = 0), and a branch of weight zero
need not run at all: with every scale 1 only the fully conditional branch remains, with every scale 0 only e_0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


def check_guidance(scale: float, distilled: bool) -> None:
    """Raises ValueError for a scale other than 1 of a model that was distilled to take its guidance as an input."""
    if distilled and scale != 1:
        raise ValueError(
            f"guidance={scale:g}: this model was distilled to take its guidance as an input (guidance_embeds in "
            "transformer/config.json), so one pass a step is guided already; classifier-free guidance on top would "
            "guide it twice, at twice the time: set guidance=1"
        )


@dataclass(frozen=True)
class Branch:
    """One forward pass: the conditions it goes without, and the weight of its prediction (weights sum to 1)."""

    dropped: frozenset[str]
    weight: float


class Guidance:
    """Scales per condition, in nesting order; `Guidance()` is one plain conditional pass.

    `Guidance([("text", 5.0)])` is ordinary classifier-free guidance (Ho & Salimans, 2207.12598).
    `Guidance([("image", 2.0), ("text", 5.0)], {"image": ("given",), "text": ("text", "states")})` is AID's; the second
    argument names what is kept and dropped together under each scale, a condition alone where it does not.
    Raises ValueError for a repeated condition or a scale that is not finite.
    """

    def __init__(
        self, scales: Sequence[tuple[str, float]] = (), together: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        self.scales = tuple((name, float(scale)) for name, scale in scales)
        names = [name for name, _ in self.scales]
        if len(set(names)) != len(names):
            raise ValueError(f"guidance names a condition twice: {names}; give each condition one scale")
        for name, scale in self.scales:
            if not math.isfinite(scale):
                raise ValueError(f"guidance scale of {name!r} is {scale}; give a finite number")
        members = [tuple((together or {}).get(name, (name,))) for name in names]
        self.together = dict(zip(names, members, strict=True))
        self.conditions = frozenset(one for group in members for one in group)  # all that some branch may drop
        if len(self.conditions) != sum(len(group) for group in members):
            raise ValueError(f"guidance drops a condition under two scales: {self.together}")
        weights = [1.0, *(scale for _, scale in self.scales), 0.0]
        self.branches = tuple(
            Branch(
                dropped=frozenset(one for group in members[kept:] for one in group),
                weight=weights[kept] - weights[kept + 1],
            )
            for kept in range(len(names) + 1)
            if weights[kept] != weights[kept + 1]
        )

    def without(self, condition: str) -> Guidance:
        """This guidance with no scale for `condition`, which every pass keeps."""
        return Guidance([(name, scale) for name, scale in self.scales if name != condition], self.together)

    def combine(self, predictions: Sequence[Tensor]) -> Tensor:
        """The guided prediction from one prediction per branch, in the order of `self.branches`."""
        if len(predictions) != len(self.branches):
            raise ValueError(f"{len(predictions)} predictions for {len(self.branches)} guidance branches")
        if len(predictions) == 1:  # its weight is 1: hand it on untouched, bit for bit
            return predictions[0]
        total = predictions[0] * self.branches[0].weight
        for branch, prediction in zip(self.branches[1:], predictions[1:], strict=True):
            total = total + prediction * branch.weight
        return total

    def __repr__(self) -> str:
        return f"Guidance({list(self.scales)!r})"

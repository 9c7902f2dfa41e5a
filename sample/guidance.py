"""Classifier-free guidance over an ordered list of conditions, each nested in the one before (AID 2406.06465, eq. 9).

e_0 has every condition dropped, e_i keeps the first i:  e = e_0 + sum_i s_i (e_i - e_{i-1}).
Collected by branch, e_i carries the weight s_i - s_{i+1} (with s_0 = 1 and s_{n+1} = 0), and a branch of weight zero
need not run at all: with every scale 1 only the fully conditional branch remains, with every scale 0 only e_0.

A scale may be two: that of the first and that of the last latent frame, with a straight line between them, as Stable
Video Diffusion's pipeline has it (1 to 3). A weight then is two as well, since differences of straight lines are lines.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Scale = float | Sequence[float]  # of all frames, or that of the first and that of the last
Line = float | tuple[float, float]  # likewise; two only where they differ


def read_scale(name: str, scale: Scale) -> Line:
    """The scale as a number, or as two where first and last frame differ. ValueError, naming it, if it is neither."""
    ends = (scale, scale) if isinstance(scale, int | float) else scale
    numbers = [one for one in ends if isinstance(one, int | float) and math.isfinite(one)]
    if len(ends) != 2 or len(numbers) != 2:
        raise ValueError(
            f"{name} is {scale!r}; give a finite number, or two: that of the first and that of the last frame"
        )
    return _line(float(numbers[0]), float(numbers[1]))


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
    weight: Line


class Guidance:
    """Scales per condition, in nesting order; `Guidance()` is one plain conditional pass.

    A scale is a number, or two: those of the first and of the last frame.

    `Guidance([("text", 5.0)])` is ordinary classifier-free guidance (Ho & Salimans, 2207.12598).
    `Guidance([("image", 2.0), ("text", 5.0)], {"image": ("given",), "text": ("text", "states")})` is AID's; the second
    argument names what is kept and dropped together under each scale, a condition alone where it does not.
    Raises ValueError for a repeated condition or a scale that is not finite.
    """

    def __init__(
        self, scales: Sequence[tuple[str, Scale]] = (), together: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        self.scales = tuple((name, read_scale(f"guidance scale of {name!r}", scale)) for name, scale in scales)
        names = [name for name, _ in self.scales]
        if len(set(names)) != len(names):
            raise ValueError(f"guidance names a condition twice: {names}; give each condition one scale")
        members = [tuple((together or {}).get(name, (name,))) for name in names]
        self.together = dict(zip(names, members, strict=True))
        self.conditions = frozenset(one for group in members for one in group)  # all that some branch may drop
        if len(self.conditions) != sum(len(group) for group in members):
            raise ValueError(f"guidance drops a condition under two scales: {self.together}")
        lines: list[Line] = [1.0, *(scale for _, scale in self.scales), 0.0]
        self.branches = tuple(
            Branch(
                dropped=frozenset(one for group in members[kept:] for one in group),
                weight=_difference(lines[kept], lines[kept + 1]),
            )
            for kept in range(len(names) + 1)
            if lines[kept] != lines[kept + 1]
        )

    def without(self, condition: str) -> Guidance:
        """This guidance with no scale for `condition`, which every pass keeps."""
        return Guidance([(name, scale) for name, scale in self.scales if name != condition], self.together)

    def combine(self, predictions: Sequence[Tensor]) -> Tensor:
        """The guided prediction from one prediction [B,C,F,H,W] per branch, in the order of `self.branches`."""
        if len(predictions) != len(self.branches):
            raise ValueError(f"{len(predictions)} predictions for {len(self.branches)} guidance branches")
        if len(predictions) == 1:  # its weight is 1: hand it on untouched, bit for bit
            return predictions[0]
        total = predictions[0] * _along(self.branches[0].weight, predictions[0])
        for branch, prediction in zip(self.branches[1:], predictions[1:], strict=True):
            total = total + prediction * _along(branch.weight, prediction)
        return total

    def __repr__(self) -> str:
        return f"Guidance({list(self.scales)!r})"


def _line(first: float, last: float) -> Line:
    return first if first == last else (first, last)


def _ends(line: Line) -> tuple[float, float]:
    return line if isinstance(line, tuple) else (line, line)


def _difference(line: Line, other: Line) -> Line:
    (first, last), (other_first, other_last) = _ends(line), _ends(other)
    return _line(first - other_first, last - other_last)


def _along(weight: Line, prediction: Tensor) -> float | Tensor:
    """A weight as what multiplies a prediction [B,C,F,H,W]: itself, or one per frame, [F,1,1]."""
    if not isinstance(weight, tuple):
        return weight
    first, last = weight
    frames = torch.linspace(first, last, prediction.shape[2], dtype=prediction.dtype, device=prediction.device)
    return frames.view(-1, 1, 1)

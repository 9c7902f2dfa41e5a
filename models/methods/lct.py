"""LCT: the shots of a scene in one context, each at a noise level of its own.

Guo et al., "Long Context Tuning for Video Generation", 2503.10589. All tokens of all shots attend to one another;
positions tell the shots apart; every shot draws its own training level (asynchronous timesteps), so that one model
makes all shots together, or some given the others. The Wan form: text reaches a shot through cross-attention to
[story ; its own prompt], and a gap in time separates the shots ("diagonal" is the paper's layout, which a base model
without text positions needs more tuning for). Departures: a share of samples gets one level for all shots, because
joint sampling has equal levels, which independent draws never hit.

F latent frames, S shots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.layout import ClipLayout, Segment, shots_layout
from models.methods.base import Method, check_indices
from models.noise import Density, loss_weights, noise_plan, sample_levels
from models.positions import PositionMode


@dataclass(frozen=True)
class LCT(Method):
    name: ClassVar[str] = "lct"
    tasks: ClassVar[tuple[str, ...]] = ("joint", "shot_conditioned")
    per_frame_levels: ClassVar[bool] = False
    text_per_shot: ClassVar[bool] = True

    density: Density = "logit_normal"
    shared_prob: float = 0.25  # share of samples with one level for all shots
    clean_prob: float = 0.0  # share of samples with some shots exactly clean
    context_level: float = 0.1  # t_c: level at which given shots are seen; the paper uses 0.1 to 0.5
    position_mode: PositionMode = "time_gap"
    position_gap: int = 4  # empty time steps between shots, in latent frames

    def __post_init__(self) -> None:
        if self.context_level == 0 and self.clean_prob == 0:
            raise ValueError(
                "lct: context_level is 0 but clean_prob is 0, so clean shots are never trained; raise one of them"
            )

    def layout_for_training(self, shot_frames: list[int]) -> ClipLayout:
        return shots_layout(shot_frames)

    def layout_for_task(  # type: ignore[override]  # each method names its own givens
        self, task: str, shot_frames: list[int], *, given_shots: Sequence[int] = ()
    ) -> ClipLayout:
        """joint: all shots are made. shot_conditioned: those in `given_shots` are known (a shot may be one image)."""
        self.check_task(task)
        if (task == "shot_conditioned") != bool(given_shots):
            raise ValueError(
                f"task {task!r} with given_shots={list(given_shots)}: shot_conditioned needs some, joint takes none"
            )
        given = check_indices("given_shots", given_shots, len(shot_frames), "shots")
        return ClipLayout(
            tuple(Segment("history" if i in given else "target", frames, i, i) for i, frames in enumerate(shot_frames))
        )

    def sample_levels(self, layout: ClipLayout, batch: int, generator: torch.Generator) -> Tensor:
        return sample_levels(
            layout, batch, "per_shot", generator=generator, shift=self.shift, density=self.density,
            clean_prob=self.clean_prob, shared_prob=self.shared_prob,
        )  # fmt: skip

    def plan(self, layout: ClipLayout, levels: Tensor, task: str) -> Tensor:
        self.check_task(task)
        return noise_plan(layout, levels, "hold", context_level=self.context_level)

    def loss_weights(self, layout: ClipLayout) -> Tensor:
        return loss_weights(layout, "shot")

    def backbone_kwargs(self, layout: ClipLayout) -> dict[str, Any]:
        return {
            "layout": layout,
            "position_mode": self.position_mode,
            "position_gap": self.position_gap,
            "attention_rule": "full",
        }

"""FVDM: one noise level per latent frame, one model for every task in which some frames are given.

Liu et al., "Redefining Temporal Modeling in Video Diffusion: The Vectorized Timestep Approach", 2410.03160. Training
draws levels by PTSS (section 3.3): independent per frame with probability p, else one for the clip. Sampling holds the
given frames at level 0 and lets the others follow the clock. Where this departs from the authors' code: the coin of
PTSS is tossed per sample, not per batch; given frames are held exactly clean; and `clean_prob` of the training samples
have frames at exactly 0, which continuous draws never hit.

F latent frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.layout import ClipLayout, Segment, shots_layout
from models.methods.base import Method, check_indices
from models.noise import loss_weights, noise_plan, sample_levels


@dataclass(frozen=True)
class FVDM(Method):
    """p = 0 and clean_prob = 0 is plain text-to-video training."""

    name: ClassVar[str] = "fvdm"
    tasks: ClassVar[tuple[str, ...]] = (
        "t2v", "i2v", "interpolation", "extension", "transition", "next_frame", "any_frame",
    )  # fmt: skip

    p: float = 0.2
    clean_prob: float = 0.1

    def layout_for_training(self, shot_frames: list[int]) -> ClipLayout:
        return shots_layout(shot_frames)

    def layout_for_task(  # type: ignore[override]  # each method names its own givens
        self,
        task: str,
        shot_frames: list[int],
        *,
        frames: Sequence[int] = (),
        head: int | None = None,
        tail: int | None = None,
    ) -> ClipLayout:
        """Latent frames are counted over the whole clip.

        t2v: none given. i2v: the first. interpolation: first and last. extension: the first `head`. transition: the
        first `head` and the last `tail`. next_frame: all but the last. any_frame: those in `frames`.
        """
        self.check_task(task)
        count = sum(shot_frames)
        takes = {"any_frame": {"frames"}, "extension": {"head"}, "transition": {"head", "tail"}}.get(task, set())
        passed = {name for name, value in (("frames", frames), ("head", head), ("tail", tail)) if value}
        if passed != takes:
            raise ValueError(f"task {task!r} takes {sorted(takes) or 'no givens'}, got {sorted(passed) or 'none'}")
        given: Sequence[int]
        if task in ("i2v", "interpolation"):
            given = [0] if task == "i2v" else [0, count - 1]
        elif task == "next_frame":
            given = range(count - 1)
        elif task == "any_frame":
            given = frames
        else:
            given = [*range(head or 0), *range(count - (tail or 0), count)]
        return mark_given(shots_layout(shot_frames), check_indices("the given frames", given, count, "latent frames"))

    def sample_levels(self, layout: ClipLayout, batch: int, generator: torch.Generator) -> Tensor:
        return sample_levels(
            layout, batch, "mixed", generator=generator, p=self.p, shift=self.shift, density=self.density,
            clean_prob=self.clean_prob,
        )  # fmt: skip

    def plan(self, layout: ClipLayout, levels: Tensor, task: str) -> Tensor:
        self.check_task(task)
        return noise_plan(layout, levels, "hold")

    def loss_weights(self, layout: ClipLayout) -> Tensor:
        return loss_weights(layout, "frame")

    def backbone_kwargs(self, layout: ClipLayout) -> dict[str, Any]:
        return {"layout": layout, "position_mode": "contiguous", "attention_rule": "full"}


def mark_given(layout: ClipLayout, given: Sequence[int]) -> ClipLayout:
    """The layout with the frames in `given` turned into conditions; neighbours alike stay one segment."""
    segments: list[Segment] = []
    for segment, frames in zip(layout.segments, layout.frame_slices, strict=True):
        for frame in range(frames.start, frames.stop):
            role = "condition" if frame in given else segment.role
            last = segments[-1] if segments and frame > frames.start else None
            if last is not None and last.role == role:
                segments[-1] = Segment(role, last.num_frames + 1, segment.shot_id, segment.text_id)
            else:
                segments.append(Segment(role, 1, segment.shot_id, segment.text_id))
    return ClipLayout(tuple(segments))

"""Text-guided video prediction (TVP): what FCA and AID share, the frames that follow given ones in one shot.

F latent frames, K given ones.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.layout import ClipLayout, Segment
from models.methods.base import Method
from models.noise import noise_plan, sample_levels


@dataclass(frozen=True)
class Prediction(Method):
    """One level per clip. Given frames are held clean in it, or all frames are made and modules are told the given."""

    tasks: ClassVar[tuple[str, ...]] = ("tvp",)

    given_frames: int = 1  # K, latent frames from the first; with a stride-4 VAE they are 4K-3 video frames

    @property
    @abstractmethod
    def holds_given(self) -> bool:
        """Whether the given frames are a clean condition, neither made nor learned."""

    @property
    def first_frames(self) -> int:
        return self.given_frames

    def layout_for_training(self, shot_frames: list[int]) -> ClipLayout:
        """One shot; held frames are its condition, else all of it is made."""
        frames = self.one_shot(shot_frames)
        if frames <= self.given_frames:
            raise ValueError(
                f"{self.name}: {self.given_frames} of {frames} latent frames are given: nothing is left to make"
            )
        if self.holds_given:
            return ClipLayout((Segment("condition", self.given_frames), Segment("target", frames - self.given_frames)))
        return ClipLayout((Segment("target", frames),))

    def layout_for_task(self, task: str, shot_frames: list[int], **givens: Any) -> ClipLayout:
        self.check_task(task)
        if givens:
            raise ValueError(f"task {task!r} takes no givens, got {sorted(givens)}; given_frames is the method's")
        return self.layout_for_training(shot_frames)

    def check_tokens(self, frames_per_token: int) -> None:
        """Held frames must end where a token does; the first frame of a shot has one of its own (`models.patches`)."""
        if self.holds_given and (self.given_frames - 1) % frames_per_token:
            raise ValueError(
                f"{self.name}: given_frames is {self.given_frames}, but this model joins {frames_per_token} latent "
                f"frames after the first into one token, which has one noise level: give 1, {1 + frames_per_token}, "
                f"{1 + 2 * frames_per_token}, ..."
            )

    def sample_levels(self, layout: ClipLayout, batch: int, generator: torch.Generator) -> Tensor:
        """One level per sample; held frames are at 0."""
        return sample_levels(
            layout, batch, "capped", generator=generator, caps=(~layout.is_given).float(), **self.drawn_with()
        )

    def plan(self, layout: ClipLayout, levels: Tensor, task: str) -> Tensor:
        self.check_task(task)
        return noise_plan(layout, levels, "hold")

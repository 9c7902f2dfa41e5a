"""What a method is: a few answers about a clip, which training and sampling ask for without knowing it by name.

B batch, F latent frames, K steps, S shots.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.layout import ClipLayout
from models.noise import Density


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods; its fields are the method's parameters and are stored with the model."""

    name: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]]  # what a trained model can be asked to do

    shift: float = 3.0  # timestep shift of the training levels; Wan 2.1 uses 3 at 480p, 5 at 720p
    density: Density = "uniform"  # of the training levels, before the shift

    @abstractmethod
    def layout_for_training(self, shot_frames: list[int]) -> ClipLayout:
        """The layout of a training clip whose shots have `shot_frames` latent frames."""

    @abstractmethod
    def layout_for_task(self, task: str, shot_frames: list[int], **givens: Any) -> ClipLayout:
        """The layout of a clip to sample; `givens` say what of it is known, per task. ValueError if they do not fit."""

    @abstractmethod
    def sample_levels(self, layout: ClipLayout, batch: int, generator: torch.Generator) -> Tensor:
        """Training noise levels [B,F]."""

    @abstractmethod
    def plan(self, layout: ClipLayout, levels: Tensor, task: str) -> Tensor:
        """The sampling plan [K+1,F] from base levels [K+1]."""

    @abstractmethod
    def loss_weights(self, layout: ClipLayout) -> Tensor:
        """Weight of each frame in the loss, [F], summing to 1."""

    @abstractmethod
    def backbone_kwargs(self, layout: ClipLayout) -> dict[str, Any]:
        """How the backbone sees the clip: layout, positions, attention rule."""

    def config(self) -> dict[str, Any]:
        """The parameters, such that `get_method(name, **config)` is this method again."""
        return asdict(self)

    def check_task(self, task: str) -> None:
        if task not in self.tasks:
            raise ValueError(f"method {self.name!r} has no task {task!r}; it has {', '.join(self.tasks)}")


def check_indices(name: str, indices: Sequence[int], count: int, of: str) -> tuple[int, ...]:
    """`indices` sorted, each once; ValueError unless all lie in 0..count-1 and some of the `count` are left over."""
    chosen = tuple(sorted(set(indices)))
    if chosen and not (0 <= chosen[0] and chosen[-1] < count):
        raise ValueError(f"{name} is {list(indices)}, but there are {of} 0..{count - 1}")
    if len(chosen) == count:
        raise ValueError(f"{name} names all {count} {of}: nothing is left to generate")
    return chosen

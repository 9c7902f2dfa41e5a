"""Image to video as Stable Video Diffusion was trained: all frames at one level, the first image beside each of them.

Blattmann et al., "Stable Video Diffusion", 2311.15127. The latents of the first frame are joined to those of every
noisy frame, and the frame's image embedding, one token, stands in the place of a text. Both are lost together, as
zeros, which is what guidance is against. Levels follow ln(sigma) ~ N(log_mean, log_std^2). Departure: in training no
noise is put on the image, whose latents come ready-made, and the model is told so; noise on latents would not be what
it knows, which is noise on pixels, encoded with them. Sampling can put that on, and tells the model ("noise_aug").

B batch, F latent frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from models.backbones.base import Backbone, Capabilities, require
from models.backbones.svd import ImageCondition
from models.layout import ClipLayout, shots_layout
from models.methods.base import Method
from models.noise import loss_weights, noise_plan
from models.process import EDM
from models.text import TextContext


@dataclass(frozen=True)
class SVD(Method):
    name: ClassVar[str] = "svd"
    tasks: ClassVar[tuple[str, ...]] = ("i2v",)
    per_frame_levels: ClassVar[bool] = False
    reads_image: ClassVar[Literal["no", "alone", "with_text"]] = "alone"
    tells_noise: ClassVar[bool] = True

    shift: float = 1.0
    log_mean: float = 0.7  # of sigma, the published model's
    log_std: float = 1.6
    sigma_min: float = 0.002  # of the model's scheduler
    sigma_max: float = 700.0
    latent_scale: float = 0.18215  # the VAE's scaling factor: the image's latents are told without it
    fps: float = 7.0  # what the model is told of the clip
    motion_bucket: float = 127.0

    def __post_init__(self) -> None:
        for field in ("log_std", "latent_scale", "fps"):
            if getattr(self, field) <= 0:
                raise ValueError(f"svd: {field} is {getattr(self, field)}; give a positive number")

    @property
    def guided(self) -> Mapping[str, tuple[str, ...]]:
        return {"image": ("text", "given")}

    def layout_for_training(self, shot_frames: list[int]) -> ClipLayout:
        """One shot, all of it made: the first frame, too, is made from its image."""
        return shots_layout([self.one_shot(shot_frames)])

    def layout_for_task(self, task: str, shot_frames: list[int], **givens: Any) -> ClipLayout:
        self.check_task(task)
        if givens:
            raise ValueError(f"task {task!r} takes no givens, got {sorted(givens)}; the first frame is given")
        return self.layout_for_training(shot_frames)

    def sample_levels(self, layout: ClipLayout, batch: int, generator: torch.Generator) -> Tensor:
        sigma = (self.log_mean + self.log_std * torch.randn(batch, 1, generator=generator)).exp()
        return EDM(self.sigma_min, self.sigma_max).to_level(sigma).expand(-1, layout.num_frames)

    def plan(self, layout: ClipLayout, levels: Tensor, task: str) -> Tensor:
        self.check_task(task)
        return noise_plan(layout, levels, "uniform")

    def model_levels(self, levels: Tensor) -> Tensor:
        """One per sample."""
        return levels.amax(dim=1)

    def conditions(self, clean: Tensor, layout: ClipLayout, labels: Tensor | None = None) -> dict[str, Tensor]:
        """given [B,C,1,H,W]: the latents of the first frame."""
        return {"given": clean[:, :, :1]}

    def prepare(
        self,
        backbone: Backbone,
        layout: ClipLayout,
        text: TextContext | Tensor,
        conditions: Mapping[str, Tensor],
    ) -> dict[str, Any]:
        """The image of every sample; none where the image embedding, read as text, is lost."""
        embedding = text if isinstance(text, Tensor) else text.embeddings
        kept = (embedding != 0).flatten(1).any(dim=1).view(-1, 1, 1, 1, 1)
        latents = conditions["given"] / self.latent_scale * kept
        noise_aug = conditions.get("noise_aug", 0.0)
        return {"image": ImageCondition(latents, self.fps, self.motion_bucket, noise_aug)}

    def loss_weights(self, layout: ClipLayout) -> Tensor:
        return loss_weights(layout, "frame")

    def check_backbone(self, capabilities: Capabilities) -> None:
        require(capabilities, image_beside=True, position_mode="contiguous", attention_rule="full")

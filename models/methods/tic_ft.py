"""TIC-FT: what is given and what is made lie on one time axis, with buffer frames between them that bridge the noise.

Kim et al., "Temporal In-Context Fine-Tuning for Versatile Control of Video Diffusion Models", 2506.00996. A clip is
condition | buffer | target. With global level u, condition frames are at 0, buffer frame b of B at min(u, b/(B+1)),
targets at u; the loss is on targets only; there are no new layers, so a LoRA on 10 to 30 pairs will do. What the
conditions are makes the task:

    i2v_in_context    one image; the target need not begin with it
    multi_image       several images, back to back
    keyframes         images the target passes through, in order
    v2v_style         a source clip; the target is the same in another style
    action_transfer   a clip of an action, then the first frame of the new scene

The buffer's content is the tail of the last condition: a clip gives its last B latent frames, an image is repeated.
As the authors' code does (and their page's vector of times does not say), the network is told one time for all frames,
the targets'. Departures: caps are levels in training and in sampling (the authors sample with quantiles of steps,
0.514 where training had 0.25); buffers are noised in closed form; frames are held by equal levels, not by a zeroed
prediction; conditions and target are each encoded alone, so that no latent of one depends on the other, and only the
target is decoded (the authors encode and decode across the hard cut).

F latent frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from models.backbones.base import Capabilities
from models.layout import ClipLayout, Segment
from models.methods.base import Method
from models.noise import Density, loss_weights, noise_plan, sample_levels
from models.scene import IMAGE_ROLES

ModelTime = Literal["scalar", "per_frame"]


@dataclass(frozen=True)
class TICFT(Method):
    name: ClassVar[str] = "tic_ft"
    tasks: ClassVar[tuple[str, ...]] = ("i2v_in_context", "multi_image", "keyframes", "v2v_style", "action_transfer")
    reads_references: ClassVar[bool] = True

    shift: float = 1.0  # the authors do not shift training levels
    density: Density | None = None  # as the authors: logit_normal for Wan, uniform for CogVideoX
    buffer_frames: int = 3  # B; 0 = targets border on clean frames
    image_frames: int = 1  # latent frames that show a condition image, besides its repeats in the buffer
    model_time: ModelTime = "scalar"  # models trained with one are not models of the other

    def __post_init__(self) -> None:
        if self.buffer_frames < 0 or self.image_frames < 1:
            raise ValueError(
                f"tic_ft: buffer_frames is {self.buffer_frames}, image_frames is {self.image_frames}; "
                "give at least 0 and 1"
            )
        if self.model_time not in get_args(ModelTime):
            raise ValueError(
                f"tic_ft: model_time is {self.model_time!r}; choose one of {', '.join(get_args(ModelTime))}"
            )

    def task_of(self, roles: Sequence[str]) -> str:
        if list(roles) == ["source"]:
            return "v2v_style"
        if list(roles) == ["action", "first_frame"]:
            return "action_transfer"
        if roles and set(roles) == {"keyframe"}:
            return "keyframes"
        if roles and set(roles) <= {"image", "portrait", "place"}:
            return "i2v_in_context" if len(roles) == 1 else "multi_image"
        raise ValueError(
            f"tic_ft has no task for references {list(roles)}; it takes one or more of image, portrait and place, "
            "or keyframes, or a source, or an action and then a first_frame"
        )

    def condition_frames(self, roles: Sequence[str], lengths: Sequence[int | None]) -> list[int]:
        """An image is shown `image_frames` long, the last also in the buffer; a clip is taken whole."""
        self.task_of(roles)
        frames = []
        for index, (role, length) in enumerate(zip(roles, lengths, strict=True)):
            image, tail = role in IMAGE_ROLES, self.buffer_frames if index == len(roles) - 1 else 0
            wanted = self.image_frames + tail if image else length or 0
            needed = wanted if image else 1 + tail
            if (wanted if length is None else length) < needed:
                raise ValueError(
                    f"reference {index} ({role}) has {length or 0} latent frames, but tic_ft needs {needed} of it "
                    f"(image_frames={self.image_frames}, buffer_frames={self.buffer_frames})"
                )
            frames.append(wanted)
        return frames

    def layout_for_training(self, shot_frames: list[int], condition_frames: Sequence[int] = ()) -> ClipLayout:
        """condition | buffer | target, one shot with one text; without conditions a plain clip."""
        frames = self.one_shot(shot_frames)
        given, buffer = sum(condition_frames), self.buffer_frames if condition_frames else 0
        if given and given <= buffer:
            raise ValueError(
                f"conditions of {list(condition_frames)} latent frames leave none clean beside a buffer of {buffer}"
            )
        parts: list[Segment] = []
        if given:
            parts.append(Segment("condition", given - buffer))
        if buffer:
            parts.append(Segment("buffer", buffer))
        return ClipLayout((*parts, Segment("target", frames)))

    def layout_for_task(  # type: ignore[override]  # each method names its own givens
        self, task: str, shot_frames: list[int], *, condition_frames: Sequence[int] = ()
    ) -> ClipLayout:
        """`condition_frames`: latent frames of each condition, the buffer's among them (see `condition_frames`)."""
        self.check_task(task)
        if not condition_frames:
            raise ValueError(f"task {task!r} needs condition_frames, the latent frames of each of its conditions")
        return self.layout_for_training(shot_frames, condition_frames)

    def caps(self, layout: ClipLayout) -> Tensor:
        """Highest level of each frame, [F]: 0 condition, b/(B+1) buffer b = 1..B, 1 target."""
        roles = layout.roles
        count = roles.count("buffer")
        ramp = iter([b / (count + 1) for b in range(1, count + 1)])
        return torch.tensor([next(ramp) if role == "buffer" else float(role == "target") for role in roles])

    def sample_levels(self, layout: ClipLayout, batch: int, generator: torch.Generator) -> Tensor:
        return sample_levels(layout, batch, "capped", generator=generator, caps=self.caps(layout), **self.drawn_with())

    def plan(self, layout: ClipLayout, levels: Tensor, task: str) -> Tensor:
        self.check_task(task)
        return noise_plan(layout, levels, "min", caps=self.caps(layout))

    def model_levels(self, levels: Tensor) -> Tensor:
        """scalar: the highest level of each sample, which is that of its targets."""
        return levels.amax(dim=1) if self.model_time == "scalar" else levels

    def check_backbone(self, capabilities: Capabilities) -> None:
        if capabilities.image_beside:
            raise ValueError(
                "tic_ft puts what is given on one time axis with what is made and tells its text, but this model, a "
                "Stable Video Diffusion, reads no text and takes the image that a clip begins with beside every noisy "
                "frame, where the condition is no part of the target; use a text-to-video model, or method fvdm"
            )
        super().check_backbone(capabilities)

    def check_tokens(self, frames_per_token: int) -> None:
        if frames_per_token > 1:
            raise ValueError(
                f"this model joins {frames_per_token} latent frames into one token, which has one noise level, but "
                "tic_ft steps up the levels of its buffer frame by frame, and a target of 2k+1 latent frames begins "
                "inside a token; use a model of one latent frame per token, such as CogVideoX 5B or Wan"
            )

    def loss_weights(self, layout: ClipLayout) -> Tensor:
        return loss_weights(layout, "frame")

"""What a method is: a few answers about a clip, which training and sampling ask for without knowing it by name.

B batch, F latent frames, K steps, S shots.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from models.backbones.base import Backbone, Capabilities, require
from models.layout import ClipLayout, Segment
from models.noise import Density
from models.patches import padded_frames, take_frames, token_layout
from models.process import EDM, FlowMatching, Process
from models.text import TextContext


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods; its fields are the method's parameters and are stored with the model."""

    name: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]]  # what a trained model can be asked to do
    reads_references: ClassVar[bool] = False  # what a scene refers to stands before its shot, in training, too
    per_frame_levels: ClassVar[bool] = True  # the frames of a shot differ in level
    text_per_shot: ClassVar[bool] = False  # the shots of a clip read texts of their own
    # whether it tells a model that has an image encoder the first frame: not, in the place of text, or beside it
    reads_image: ClassVar[Literal["no", "alone", "with_text"]] = "no"
    before: ClassVar[Mapping[str, Any]] = {}  # parameters that came later, and how models were trained until then
    image_guidance: ClassVar[float] = 1.5  # scale of what `guided` names "image" where nothing is said; 1: none
    # whether a model that can be told of noise on its image is: condition "noise_aug" [B], in standard deviations
    tells_noise: ClassVar[bool] = False

    # timestep shift of the training levels; None: as the model's levels in sampling are shifted (Wan 2.1 at 480p: 3)
    shift: float | None = None
    # of the training levels, before the shift; None: logit_normal for a flow, else uniform
    density: Density | None = "uniform"

    def for_model(self, process: Process, level_shift: float, *, causal_vae: bool = True) -> Self:
        """The method with all that it leaves to the model to train; what was asked for stays.

        Called once, before training, so that checkpoints and the folder that is left say what was done.

        Args:
            level_shift: timestep shift of the model's sampling levels (`ModelSettings.level_shift`).
            causal_vae: whether the latents of a clip's first frames are those that they have alone.
        """
        density = self.density or ("logit_normal" if isinstance(process, FlowMatching) else "uniform")
        shift = self.shift
        if shift is None:
            shift = 1.0 if density == "edm" else level_shift  # density edm says the sigmas themselves
        return replace(self, shift=shift, density=density)

    def drawn_with(self) -> dict[str, Any]:
        """Shift and density of `models.noise.sample_levels`; ValueError where one is still left to the model."""
        for name in ("shift", "density"):
            if getattr(self, name) is None:
                raise ValueError(
                    f"{self.name}: {name} is left to the model, and no model was named: give {name}, or take "
                    "method.for_model(backbone.process, settings.level_shift)"
                )
        return {"shift": self.shift, "density": self.density}

    @abstractmethod
    def layout_for_training(self, shot_frames: list[int]) -> ClipLayout:
        """The layout of a training clip whose shots have `shot_frames` latent frames.

        A method that reads references takes `condition_frames` as well, and puts that many frames in front.
        """

    @abstractmethod
    def layout_for_task(self, task: str, shot_frames: list[int], **givens: Any) -> ClipLayout:
        """The layout of a clip to sample; `givens` say what of it is known, per task. ValueError if they do not fit."""

    def task_of(self, roles: Sequence[str]) -> str:
        """The task that references of these roles (`models.scene.ReferenceRole`) ask for; ValueError if none."""
        raise ValueError(f"method {self.name!r} reads no references, got {list(roles)}")

    def condition_frames(self, roles: Sequence[str], lengths: Sequence[int | None]) -> list[int]:
        """How many latent frames of each reference, from its first, stand before the shot.

        `lengths` are the latent frames to be had, None for an image that can be shown at any length. ValueError where
        roles or lengths do not fit a task.
        """
        raise ValueError(f"method {self.name!r} reads no references, got {list(roles)}")

    def single_frame_share(self) -> float:
        """Share of a training clip's shots that are replaced by one of their frames."""
        return 0.0

    @abstractmethod
    def sample_levels(self, layout: ClipLayout, batch: int, generator: torch.Generator) -> Tensor:
        """Training noise levels [B,F]."""

    @abstractmethod
    def plan(self, layout: ClipLayout, levels: Tensor, task: str) -> Tensor:
        """The sampling plan [K+1,F] from base levels [K+1]; a method may take further options, named per task."""

    def model_levels(self, levels: Tensor) -> Tensor:
        """The levels [B] or [B,F] that the backbone is told, which become its model time, for frames at [B,F]."""
        return levels

    def attach(self, backbone: Backbone, seed: int = 0) -> None:
        """Before training and loading: give the backbone the method's own modules as `backbone.conditioner`, which
        change nothing at the start, and freeze what is not to be trained. Most methods have none."""
        if backbone.conditioner is not None:
            raise ValueError(
                f"method {self.name!r} has no conditioning modules, but the model has some: start from one without"
            )

    @property
    def first_frames(self) -> int:
        """Latent frames of what a shot is told to start from."""
        return 1

    @property
    def most_states(self) -> int:
        """States of a shot, said in order of time, that the model reads; 0 = it reads none."""
        return 0

    @property
    def reads_text(self) -> bool:
        """Whether any text reaches the model."""
        return True

    @property
    def classes(self) -> int | None:
        """Of how many classes the model is told one in the place of text, 0: nothing at all; None: it reads text."""
        return None

    @property
    def guided(self) -> Mapping[str, tuple[str, ...]]:
        """The conditions that guidance has scales for, in the order in which they nest, and what goes with each."""
        return {"text": ("text",)}

    @property
    def puts_given_back(self) -> bool:
        """Whether given frames that are made anew with the rest are shown as they were given."""
        return False

    def rate_scale(self, parameter: str) -> float:
        """Learning rate of a parameter of the backbone, times that of the run."""
        return 1.0

    @property
    def drops(self) -> Mapping[str, float]:
        """Share of the training samples that lose each of the `conditions`."""
        return {}

    def conditions(self, clean: Tensor, layout: ClipLayout, labels: Tensor | None = None) -> dict[str, Tensor]:
        """What the model is told beside the noisy clip and its text, [B,...] by name; a lost one is all zeros.

        `clean` [B,C,F,H,W] holds the latents, in sampling those of given frames only; `labels` [B] classes, if any.
        """
        return {}

    def prepare(
        self,
        backbone: Backbone,
        layout: ClipLayout,
        text: TextContext | Tensor,
        conditions: Mapping[str, Tensor],
    ) -> dict[str, Any]:
        """Further arguments of the backbone, from text and conditions: made once per sample, not in every step.

        A "text" among them is read in the place of `text`.
        """
        return {}

    @abstractmethod
    def loss_weights(self, layout: ClipLayout) -> Tensor:
        """Weight of each frame in the loss, [F], summing to 1."""

    def learns(self, levels: Tensor) -> Tensor:
        """Which frames of training clips at these levels [B,F] are learnt from, bool: at level 0 is none to learn."""
        return levels > 0

    @property
    def story_group(self) -> bool:
        """Whether a scene's story is a text group of its own, in front of its shots (`models.layout.with_story`)."""
        return False

    def backbone_kwargs(self, layout: ClipLayout) -> dict[str, Any]:
        """How the backbone sees the clip: layout, positions, attention rule."""
        return {"layout": layout, "position_mode": "contiguous", "attention_rule": "full"}

    def check_backbone(self, capabilities: Capabilities) -> None:
        """Raises ValueError, with the reason, when a backbone cannot do what the method asks of it."""
        seen = self.backbone_kwargs(self.layout_for_training([2]))  # of any clip: mode and rule are the method's
        require(
            capabilities,
            per_frame_levels=self.per_frame_levels,
            position_mode=seen["position_mode"],
            attention_rule=seen["attention_rule"],
            text_per_shot=self.text_per_shot,
        )
        if capabilities.image_beside and self.reads_image == "no":
            raise ValueError(
                f"this model, a Stable Video Diffusion, takes an image beside every noisy frame, of which method "
                f"{self.name!r} tells it nothing: use a text-to-video model, or method fvdm with "
                "method_params.image_beside=true"
            )
        self.check_tokens(capabilities.frames_per_token)
        if (gap := seen.get("position_gap", 0)) % capabilities.frames_per_token:
            raise ValueError(
                f"position_gap is {gap} latent frames, but this model joins {capabilities.frames_per_token} into one "
                f"token: give a multiple of {capabilities.frames_per_token}"
            )

    def check_process(self, process: Process) -> None:
        """Raises ValueError where training would draw levels that mean something else to a model of this process."""
        if self.density == "edm" and not isinstance(process, EDM):
            raise ValueError(
                f"{self.name}: density is 'edm', but this model is no EDM: leave method_params.density out"
            )

    def check_tokens(self, frames_per_token: int) -> None:
        """Raises ValueError where latent frames that a token joins would be different things in training.

        Levels drawn per frame are no such case: they are drawn per token (`train.loop.draw`).
        """
        layout = self.layout_for_training([frames_per_token + 1])
        token_layout(take_frames(layout, padded_frames(layout, frames_per_token)), frames_per_token)

    def places_text(self, capabilities: Capabilities) -> bool:
        """Whether the text of such a backbone gets positions, which few models have from pretraining."""
        seen = self.backbone_kwargs(ClipLayout((Segment("target", 1),)))
        return capabilities.joint_text and seen["position_mode"] == "diagonal"

    def config(self) -> dict[str, Any]:
        """The parameters, such that `get_method(name, **config)` is this method again."""
        return asdict(self)

    def one_shot(self, shot_frames: Sequence[int]) -> int:
        """The latent frames of a clip's only shot; ValueError if there are more shots."""
        if len(shot_frames) != 1:
            raise ValueError(
                f"{self.name} makes one shot at a time, got shots of {list(shot_frames)} latent frames; set "
                "shots_per_scene=1"
            )
        return shot_frames[0]

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

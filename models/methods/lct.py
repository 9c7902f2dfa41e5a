"""LCT: the shots of a scene in one context, each at a noise level of its own.

Guo et al., "Long Context Tuning for Video Generation", 2503.10589. All tokens of all shots attend to one another;
positions tell the shots apart; every shot draws its own training level (asynchronous timesteps), so that one model
makes all shots together, or some given the others. A short second stage (`attention_rule="group_causal"`, started from
such a model) lets a shot see itself and earlier shots only: shots are then made one after another, their history at a
low level behind a KV cache.

The Wan form (`global_prompt="prefix"`, `position_mode="time_gap"`): text reaches a shot through cross-attention to
[story ; its own prompt], so that no group of the global prompt's own is needed, and a gap in time separates the shots.
The paper's form (`"group"`, `"diagonal"`), for backbones whose text stands in the attention: the global prompt is a
text-video pair in front of the shots, [story][dummy][text 1][video 1]...; its dummy video is one token of a zero latent
at level 0, without loss, dropped from what is made. The diagonal layout gives positions to text, which a base without
them first learns on single shots (`Method.places_text`).

Departures: a share of samples gets one level for all shots, because joint sampling has equal levels, which independent
draws never hit; a share has shots at the context level, as given ones are in sampling, without loss, because the
shifted logit-normal has 1 draw in 440 between 0.05 and 0.15.

F latent frames, S shots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from models.backbones.base import Capabilities, require
from models.layout import ClipLayout, Segment, shots_layout
from models.methods.base import Method, check_indices
from models.noise import Density, loss_weights, noise_plan, sample_levels
from models.positions import PositionMode
from models.scene import MAX_HISTORY

SEQUENTIAL_TASKS = ("autoregressive", "extension")  # one shot after another
IMAGES_OF = ("portrait", "place")  # what a composition is made of: who, and where
CONTEXT_PROB = 0.1
GlobalPrompt = Literal["prefix", "group"]


@dataclass(frozen=True)
class LCT(Method):
    name: ClassVar[str] = "lct"
    tasks: ClassVar[tuple[str, ...]] = ("joint", "shot_conditioned", "composition", *SEQUENTIAL_TASKS)
    per_frame_levels: ClassVar[bool] = False
    text_per_shot: ClassVar[bool] = True

    density: Density = "logit_normal"
    shared_prob: float = 0.25  # share of samples with one level for all shots
    clean_prob: float = 0.0  # share of samples with some shots exactly clean
    # share of samples with some shots at context_level, the first ones under group_causal; None: 0.1 with logit_normal,
    # 0 with uniform, which comes by any level often enough
    context_prob: float | None = None
    context_level: float = 0.1  # t_c: level at which given shots are seen; the paper uses 0.1 to 0.5
    position_mode: PositionMode = "time_gap"
    position_gap: int = 4  # empty time steps between shots, in latent frames
    global_prompt: GlobalPrompt = "prefix"  # the story: before each shot's prompt, or a text-video group of its own
    attention_rule: Literal["full", "group_causal"] = "full"  # group_causal: a shot sees itself and earlier ones
    single_frame_prob: float = 0.0  # share of training shots that become one of their frames: images as shots

    def __post_init__(self) -> None:
        if self.context_prob is None:  # resolved, so that the checkpoint says what was done
            object.__setattr__(self, "context_prob", CONTEXT_PROB if self.density == "logit_normal" else 0.0)
        if self.context_level == 0 and self.clean_prob == 0 and self.context_prob == 0:
            raise ValueError(
                "lct: context_level, clean_prob and context_prob are 0, so clean shots are never trained; raise one of "
                "them"
            )
        if self.global_prompt not in get_args(GlobalPrompt):
            raise ValueError(f"lct: global_prompt is {self.global_prompt!r}; choose prefix or group")
        if self.global_prompt == "group" and self.position_mode != "diagonal":
            raise ValueError(
                f"lct: global_prompt is 'group', position_mode {self.position_mode!r}: a shot sees texts besides its "
                "own only where texts have positions; set position_mode=diagonal, or global_prompt=prefix"
            )
        if self.attention_rule not in ("full", "group_causal"):
            raise ValueError(f"lct: attention_rule is {self.attention_rule!r}; choose full or group_causal")
        for name in ("shared_prob", "clean_prob", "context_prob", "context_level", "single_frame_prob"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"lct: {name} is {value}, expected 0 to 1")

    def layout_for_training(self, shot_frames: list[int]) -> ClipLayout:
        return shots_layout(shot_frames)

    def layout_for_task(  # type: ignore[override]  # each method names its own givens
        self,
        task: str,
        shot_frames: list[int],
        *,
        given_shots: Sequence[int] = (),
        condition_frames: Sequence[int] = (),
    ) -> ClipLayout:
        """What of a clip is made.

        joint: all shots. shot_conditioned: those not in `given_shots` (a shot may be one image).
        autoregressive: the last shot; all before it are its history, at most 8. extension: the same; the last shot
        goes on where the one before ends, which its text says.
        composition: one shot behind images of who and where, single-frame groups of `condition_frames` latent frames,
        each with a text of its own, as a shot that training replaced by one of its frames.
        """
        self.check_task(task)
        if (task == "shot_conditioned") != bool(given_shots):
            raise ValueError(
                f"task {task!r} with given_shots={list(given_shots)}: shot_conditioned needs some, the others take none"
            )
        if (task == "composition") != bool(condition_frames):
            raise ValueError(
                f"task {task!r} with condition_frames={list(condition_frames)}: composition needs some, the others "
                "take none"
            )
        if task == "composition":
            return _composition(shot_frames, condition_frames)
        if task in SEQUENTIAL_TASKS:
            self._check_sequence(task, len(shot_frames) - 1)
            given = tuple(range(len(shot_frames) - 1))
        else:
            given = check_indices("given_shots", given_shots, len(shot_frames), "shots")
        if self.attention_rule == "group_causal" and given and given[-1] == len(shot_frames) - 1:
            raise ValueError(
                f"given_shots is {list(given)}: the last one comes after all that is made, and this model's shots see "
                "earlier ones only (attention_rule group_causal)"
            )
        return ClipLayout(
            tuple(Segment("history" if i in given else "target", frames, i, i) for i, frames in enumerate(shot_frames))
        )

    def _check_sequence(self, task: str, history: int) -> None:
        if self.attention_rule != "group_causal":
            raise ValueError(
                f"task {task!r} needs a model of attention_rule group_causal, this one's is {self.attention_rule}: in "
                "it, earlier shots depend on later ones; train it on with method_params.attention_rule=group_causal"
            )
        if history > MAX_HISTORY:
            raise ValueError(f"a history of {history} shots; a shot sees at most {MAX_HISTORY}")

    def task_of(self, roles: Sequence[str]) -> str:
        if not roles or (other := [role for role in roles if role not in IMAGES_OF]):
            raise ValueError(
                f"method 'lct' composes a shot of images with roles {' and '.join(IMAGES_OF)}, got {other or 'none'}"
            )
        return "composition"

    def condition_frames(self, roles: Sequence[str], lengths: Sequence[int | None]) -> list[int]:
        self.task_of(roles)
        if len(roles) > MAX_HISTORY:
            raise ValueError(f"{len(roles)} images; a shot sees at most {MAX_HISTORY}")
        return [1] * len(roles)

    def single_frame_share(self) -> float:
        return self.single_frame_prob

    def sample_levels(self, layout: ClipLayout, batch: int, generator: torch.Generator) -> Tensor:
        return sample_levels(
            layout, batch, "per_shot", generator=generator, clean_prob=self.clean_prob, shared_prob=self.shared_prob,
            context_prob=self.context_prob or 0.0, context_level=self.context_level,
            context_first=self.attention_rule == "group_causal", **self.drawn_with(),
        )  # fmt: skip

    def learns(self, levels: Tensor) -> Tensor:
        """Not from shots that stand at the context level for given ones, beside others (specification, mode B)."""
        if not self.context_prob:
            return super().learns(levels)
        given = levels == self.context_level
        moving = (levels > 0) & ~given
        return moving | ((levels > 0) & ~moving.any(dim=1, keepdim=True))

    @property
    def story_group(self) -> bool:
        return self.global_prompt == "group"

    def plan(self, layout: ClipLayout, levels: Tensor, task: str, *, context_level: float | None = None) -> Tensor:
        """The sampling plan [K+1,F] from base levels [K+1]; given shots, history and images are held at t_c.

        `context_level` is that level, of any task but joint; None: the model's. The paper takes 0.1 to 0.5, lower for
        the images of a composition. ValueError where it is no level, or one that training never comes near.
        """
        self.check_task(task)
        if context_level is None:
            return noise_plan(layout, levels, "hold", context_level=self.context_level)
        if task == "joint":
            raise ValueError("the plan of task 'joint' takes no context_level: nothing is given")
        if context_level == 0 and not (self.clean_prob or (self.context_prob and self.context_level == 0)):
            raise ValueError(
                "context_level is 0, but this model met no clean shot in training (its context_level "
                f"{self.context_level:g}, clean_prob 0): give a low level such as 0.02, or train with "
                "method_params.clean_prob=0.1"
            )
        return noise_plan(layout, levels, "hold", context_level=context_level)

    def loss_weights(self, layout: ClipLayout) -> Tensor:
        return loss_weights(layout, "shot")

    def backbone_kwargs(self, layout: ClipLayout) -> dict[str, Any]:
        return {
            "layout": layout,
            "position_mode": self.position_mode,
            "position_gap": self.position_gap,
            "attention_rule": self.attention_rule,
        }

    def check_backbone(self, capabilities: Capabilities) -> None:
        super().check_backbone(capabilities)
        if self.attention_rule == "group_causal":  # which is there for the cache
            require(capabilities, kv_cache=True)
        if self.story_group:  # the dummy is one frame, at a level of its own
            require(capabilities, joint_text=True, per_frame_levels=True)
        require(capabilities, joint_space_time=True)


def _composition(shot_frames: Sequence[int], condition_frames: Sequence[int]) -> ClipLayout:
    """Images, each a group with a text of its own, before one shot, which is number 0, with or without images.

    A text that groups shared would stand in one of them only, so the others' offsets between text and frames would be
    none that training knows (LCT: the same in all groups).
    """
    if len(shot_frames) != 1:
        raise ValueError(f"composition makes one shot at a time, got {len(shot_frames)}")
    if set(condition_frames) != {1}:
        raise ValueError(f"condition_frames is {list(condition_frames)}: a composition has images of one frame each")
    images = [Segment("history", 1, 1 + i, 1 + i) for i in range(len(condition_frames))]
    return ClipLayout((*images, Segment("target", shot_frames[0], shot_id=0)))

"""The tasks of one shot whose latent frames differ in level (FVDM), as a storyboard asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from models.layout import ClipLayout
from models.patches import split_token
from models.text import TextContext
from sample.extension import sample_extended
from sample.given_frames import PlacedClip
from sample.storyboard import FROM_IMAGE, Storyboard, StoryboardError

if TYPE_CHECKING:
    from models.folder import Model
    from models.methods import Method


def layout_of_frame_task(
    method: Method, storyboard: Storyboard, pixels: np.ndarray | None, placed: Sequence[PlacedClip], model: Model
) -> ClipLayout:
    """The layout of a `FrameTask`; `pixels` are those of first_frame, `placed` of given_frames."""
    task, codec = storyboard.task or "", model.codec
    length = storyboard.shots[0].frames or model.settings.frames_per_shot
    if task == "edit" and pixels is not None:
        length = len(pixels)
    given = sorted(frame for clip in placed for frame in clip.frames)
    if pixels is not None and task not in FROM_IMAGE:
        given = list(range(codec.num_latent_frames(len(pixels))))
    givens: dict[str, Any] = {"frames": given} if given else {}
    try:
        method.check_task(task)
        if task == "diagonal" and given:
            if given != list(range(len(given))):
                raise ValueError("frames follow one another after those given, so give the first ones only (at: 0)")
            givens = {"head": len(given)}
        if task == "long_video" and length <= model.settings.frames_per_shot:
            raise ValueError(
                f"the shot has {length} frames, this model's clips have {model.settings.frames_per_shot}; ask for more "
                "frames, or leave the task out"
            )
        return method.layout_for_task(task, [codec.num_latent_frames(length)], **givens)
    except ValueError as error:
        raise StoryboardError(f"storyboard {storyboard.name!r}: task={task}: {error}", "task") from error


def layout_of_given_frames(
    method: Method, storyboard: Storyboard, placed: Sequence[PlacedClip], model: Model
) -> ClipLayout:
    """The layout of a shot with given_frames and no task of its own: they are held, the rest is made."""
    try:
        if len(storyboard.shots) > 1:
            raise ValueError("a shot with given frames is made alone; independent=true makes every shot by itself")
        frames = model.codec.num_latent_frames(storyboard.shots[0].frames or model.settings.frames_per_shot)
        return method.layout_for_task("any_frame", [frames], frames=[f for clip in placed for f in clip.frames])
    except ValueError as error:
        index = next(i for i, shot in enumerate(storyboard.shots) if shot.given_frames)
        raise StoryboardError(
            f"{storyboard.where(index)}: given_frames: {error}", f"shots.{index}.given_frames"
        ) from error


def check_given_frames(method: Method, storyboard: Storyboard) -> None:
    """Raises StoryboardError, with the reason, where a shot has given_frames and the method holds no such frames."""
    index = next((i for i, shot in enumerate(storyboard.shots) if shot.given_frames), None)
    if index is None or "any_frame" in method.tasks:
        return
    if method.model_levels(torch.tensor([[0.0, 1.0]])).ndim == 1:
        reason = "its model is told one noise level for a whole clip, so no frame can be clean among noisy ones"
    elif not method.per_frame_levels:
        reason = "the frames of a shot share their noise level; give a whole shot (given)"
    else:
        reason = f"it was trained for {', '.join(method.tasks)} alone"
    raise StoryboardError(
        f"{storyboard.where(index)}: given_frames: a model of method {method.name!r} holds no frames inside a shot: "
        f"{reason}; models of method 'fvdm' do",
        f"shots.{index}.given_frames",
    )


def plan_of(method: Method, layout: ClipLayout, levels: Tensor, task: str, storyboard: Storyboard) -> Tensor:
    """The plan of a task with the storyboard's options for it."""
    if not storyboard.plan:
        return method.plan(layout, levels, task)
    try:
        return method.plan(layout, levels, task, **storyboard.plan)
    except (ValueError, TypeError) as error:  # an option of another task, of no task, or of a wrong type
        raise StoryboardError(f"storyboard {storyboard.name!r}: plan={storyboard.plan}: {error}", "plan") from error


def check_tokens(plan: Tensor | None, storyboard: Storyboard, model: Model) -> None:
    """Raises StoryboardError where frames that a token of the model joins differ in level in `plan` [K+1,F], of whole
    tokens (`models.patches`); None is the plan of long_video, whose clips begin anywhere."""
    patch, stride = model.backbone.capabilities.frames_per_token, model.codec.temporal_stride
    if patch == 1 or (plan is not None and split_token(plan, patch) is None):
        return
    unit = stride * patch
    raise StoryboardError(
        f"storyboard {storyboard.name!r}: task={storyboard.task or 'auto'}: this model joins {patch} latent frames "
        "into one token, which has one noise level, but here it would have two; what is given has to be whole tokens "
        f"(video frame 0, then {unit} frames at a time), and what gives every frame a level of its own needs a model "
        "of one latent frame per token, such as CogVideoX 5B or Wan",
        "task",
    )


def sample_long_video(
    method: Method,
    layout: ClipLayout,
    levels: Tensor,  # [K+1] base levels
    text: TextContext,
    storyboard: Storyboard,
    model: Model,
    options: dict[str, Any],  # of `sample.sampler.sample`
) -> Tensor:
    """Latents [B, C, N, H, W] of a shot of more frames than the clips that the model was trained on."""
    plan = {"clip": model.codec.num_latent_frames(model.settings.frames_per_shot)} | storyboard.plan
    plan_of(method, layout, levels, "long_video", replace(storyboard, plan=plan))  # refuses what does not fit
    return sample_extended(
        model.backbone,
        method,
        levels.to(text.embeddings.device),
        text,
        known=layout.is_given.nonzero().flatten().tolist(),
        **options | plan,
    )

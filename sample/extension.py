"""Longer than a clip: every next clip takes the last frames of the one before and goes on (FVDM 2410.03160).

B batch, C channels, N latent frames of the video, H W latent size, K steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from models.backbones.base import Backbone
from models.methods.base import Method
from models.windows import clip_starts, default_overlap
from sample.sampler import Callback, Text, sample


def sample_extended(
    backbone: Backbone,
    method: Method,
    levels: Tensor,  # [K+1], base levels
    text: Text,  # as the frames of one clip read it
    *,
    shape: tuple[int, int, int, int, int],  # of the video, (B, C, N, H, W)
    clip: int,  # latent frames of a clip
    overlap: int | None = None,  # how many of them are taken over, at least; None: half
    context_level: float = 0.0,  # at which frames are seen that are given or made before
    given: Tensor | None = None,  # [B, C, N, H, W], read at `known`
    known: Sequence[int] = (),  # given frames: a beginning to go on from, an end to arrive at, any
    callback: Callback | None = None,  # steps over all clips
    **options: Any,  # of `sample`, such as generator, guidance, null and conditions
) -> Tensor:
    """Normalised latents [B, C, N, H, W] of the video; known frames and what a clip takes over stay bit for bit.

    Which frames a clip makes is `models.windows.clip_starts`; positions start at 0 in every clip. Raises ValueError
    for a method without the task long_video, and for clips, an overlap or known frames that do not fit.
    """
    method.check_task("long_video")
    method.layout_for_task("long_video", [shape[2]], frames=list(known))
    if known and (given is None or tuple(given.shape) != tuple(shape)):
        found = None if given is None else tuple(given.shape)
        raise ValueError(f"latent frames {list(known)} are known, so `given` must be {tuple(shape)}, is {found}")
    video = torch.zeros(shape, device=levels.device)
    if known:
        video[:, :, list(known)] = given[:, :, list(known)].to(video)  # type: ignore[index]  # is given, see above
    done = torch.zeros(shape[2], dtype=torch.bool)
    done[list(known)] = True
    starts = clip_starts(done.tolist(), clip, default_overlap(clip) if overlap is None else overlap)
    steps = len(levels) - 1
    for number, start in enumerate(starts):
        window = slice(start, start + clip)
        frames = done[window].nonzero().flatten().tolist()
        task = "any_frame" if frames else "t2v"
        layout = method.layout_for_task(task, [clip], **({"frames": frames} if frames else {}))
        plan = method.plan(layout, levels, task, **({"context_level": context_level} if frames else {}))
        video[:, :, window] = sample(
            backbone,
            layout,
            plan,
            text,
            shape=(*shape[:2], clip, *shape[3:]),
            given=video[:, :, window] if frames else None,
            model_levels=method.model_levels,
            prepare=partial(method.prepare, backbone, layout),
            callback=None if callback is None else _after(callback, number * steps, len(starts) * steps),
            **method.backbone_kwargs(layout),
            **options,
        )
        done[window] = True
    return video


def _after(callback: Callback, before: int, total: int) -> Callback:
    return lambda step, _: callback(before + step, total)

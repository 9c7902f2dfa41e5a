"""Longer than a clip: every next clip takes the last frames of the one before and goes on (FVDM 2410.03160).

B batch, C channels, N latent frames of the video, H W latent size, K steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from models.backbones.base import Backbone
from models.methods.base import Method
from models.windows import clip_windows, default_overlap
from sample.sampler import Callback, Text, sample


def sample_extended(
    backbone: Backbone,
    method: Method,
    levels: Tensor,  # [K+1], base levels
    text: Text,
    *,
    shape: tuple[int, int, int, int, int],  # of the video, (B, C, N, H, W)
    clip: int,  # latent frames of a clip
    overlap: int | None = None,  # how many of them are taken over, at least; None: half
    context_level: float = 0.0,  # at which frames are seen that are given or made before
    given: Tensor | None = None,  # [B, C, N, H, W], read at `known`
    known: Sequence[int] = (),  # given frames: a beginning to go on from, an end to arrive at, any
    null: Mapping[str, Text] | None = None,
    callback: Callback | None = None,  # steps over all clips
    **options: Any,  # of `sample`, such as generator, guidance and conditions
) -> Tensor:
    """Normalised latents [B, C, N, H, W] of the video; known frames and what a clip takes over stay bit for bit.

    Which frames a clip makes is `models.windows.clip_windows`; positions start at 0 in every clip. Raises ValueError
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
    windows = clip_windows(done.tolist(), clip, default_overlap(clip) if overlap is None else overlap)
    steps = len(levels) - 1
    for number, window in enumerate(windows):
        own = slice(window.start, window.stop)
        frames = done[own].nonzero().flatten().tolist()
        task = "any_frame" if frames else "t2v"
        layout = method.layout_for_task(task, [len(window)], **({"frames": frames} if frames else {}))
        plan = method.plan(layout, levels, task, **({"context_level": context_level} if frames else {}))
        video[:, :, own] = sample(
            backbone,
            layout,
            plan,
            _cut(text, own),
            shape=(*shape[:2], len(window), *shape[3:]),
            given=video[:, :, own] if frames else None,
            null={name: _cut(value, own) for name, value in (null or {}).items()},
            model_levels=method.model_levels,
            prepare=partial(method.prepare, backbone, layout),
            callback=None if callback is None else _after(callback, number * steps, len(windows) * steps),
            **method.backbone_kwargs(layout),
            **options,
        )
        done[own] = True
    return video


def _cut(text: Text, frames: slice) -> Text:
    """The text as some of the video's frames read it."""
    return text if isinstance(text, Tensor) else replace(text, frame_text=text.frame_text[frames])


def _after(callback: Callback, before: int, total: int) -> Callback:
    return lambda step, _: callback(before + step, total)

"""Longer than a clip: every next clip takes the last frames of the one before and goes on (FVDM 2410.03160).

With M of F latent frames taken over, J clips make F + (J-1)(F-M) frames; M = F-1 is next-frame prediction, sliding by
one. B batch, C channels, H W latent size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.backbones.base import Backbone
from models.methods.base import Method
from sample.sampler import Text, sample


def sample_extended(
    backbone: Backbone,
    method: Method,
    levels: Tensor,  # [K+1], base levels
    text: Text,
    *,
    shape: tuple[int, int, int, int, int],  # of one clip, (B, C, F, H, W)
    overlap: int,  # M
    clips: int,  # J, one of which is `start` if that is given
    start: Tensor | None = None,  # [B, C, T, H, W], T >= M: a known video to go on from
    **options: Any,  # of `sample`, such as generator, guidance and null
) -> Tensor:
    """Normalised latents of the whole video; what a clip takes over is in it once, bit for bit.

    Positions start at 0 in every clip. Raises ValueError for a method without the tasks t2v and extension, and for an
    overlap or a start that does not fit.
    """
    frames = shape[2]
    for task in ("t2v", "extension"):
        method.check_task(task)
    if not 1 <= overlap < frames:
        raise ValueError(f"overlap is {overlap}, expected 1 to {frames - 1} of the clip's {frames} latent frames")
    if start is not None and start.shape[2] < overlap:
        raise ValueError(f"start has {start.shape[2]} latent frames, but {overlap} are to be taken over")
    video = start
    for _ in range(clips if start is None else clips - 1):
        task, givens, given = "t2v", {}, None
        if video is not None:
            task, givens = "extension", {"head": overlap}
            given = video.new_zeros(shape)
            given[:, :, :overlap] = video[:, :, -overlap:]
        layout = method.layout_for_task(task, [frames], **givens)
        clip = sample(
            backbone,
            layout,
            method.plan(layout, levels, task),
            text,
            shape=shape,
            given=given,
            model_levels=method.model_levels,
            **method.backbone_kwargs(layout),
            **options,
        )
        video = clip if video is None else torch.cat([video, clip[:, :, overlap:]], dim=2)
    if video is None:
        raise ValueError(f"clips is {clips}, expected at least 1")
    return video

"""The pass of guidance in which no shot sees another: each as a clip of its own.

Where all passes see the other shots, what those tell cancels out in the difference that guidance amplifies: only the
text is followed harder. With the condition `OTHER_SHOTS` dropped in a pass, guidance amplifies what the other shots of
a scene add, as classifier-free guidance (2207.12598) does for text. Not in LCT (2503.10589).

B batch, F latent frames, C channels, H W latent size, G texts, S shots of one length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models.backbones.base import Backbone
from models.layout import ClipLayout, Segment
from models.text import TextContext, stack_samples

OTHER_SHOTS = "shots"  # the condition's name in `Guidance`
SeenAs = Callable[[ClipLayout], Mapping[str, Any]]  # `Method.backbone_kwargs`


class ShotsApart:
    """What a backbone predicts of each shot of a clip if there were no other.

    Args:
        layout: of the whole clip. Dummy frames (the story's group) stay with every shot; shots of which all is given
            are not asked for.
        text: contexts [B,G,L,D] of the whole clip.
        seen_as: the backbone's arguments for a layout.
        model_levels: what the backbone is told of levels [B,F].
    """

    def __init__(
        self,
        backbone: Backbone,
        layout: ClipLayout,
        text: TextContext,
        seen_as: SeenAs,
        model_levels: Callable[[Tensor], Tensor],
    ) -> None:
        self.backbone, self.model_levels = backbone, model_levels
        alike: dict[ClipLayout, list[tuple[list[int], list[int]]]] = {}  # shots of one layout: frames and texts of each
        for frames in layout.shot_slices:
            if bool(layout.is_target[frames].any()):
                own, places, texts = _by_itself(layout, frames)
                alike.setdefault(own, []).append((places, texts))
        self.passes = [
            (
                [places for places, _ in shots],
                {"text": stack_samples([_texts(text, texts, own) for _, texts in shots]), **seen_as(own)},
            )
            for own, shots in alike.items()
        ]

    def __call__(self, x: Tensor, levels: Tensor) -> Tensor:
        """Predictions [B,C,F,H,W] for `x` at `levels` [B,F]; zeros for frames that were not asked for."""
        made = torch.zeros_like(x)
        for shots, seen in self.passes:
            rows = torch.cat([x[:, :, places] for places in shots])  # [S*B,C,F of a shot,H,W]
            told = self.model_levels(torch.cat([levels[:, places] for places in shots]))
            for places, one in zip(shots, self.backbone(rows, told, **seen).to(made).chunk(len(shots)), strict=True):
                made[:, :, places] = one
        return made


def _by_itself(layout: ClipLayout, shot: slice) -> tuple[ClipLayout, list[int], list[int]]:
    """The layout of one shot with the clip's dummy frames, and which frames and texts of the clip it has."""
    segments: list[Segment] = []
    places: list[int] = []
    for segment, frames in zip(layout.segments, layout.frame_slices, strict=True):
        if segment.role == "dummy" or shot.start <= frames.start < shot.stop:
            segments.append(segment)
            places += range(frames.start, frames.stop)
    shots = sorted({segment.shot_id for segment in segments})
    texts = sorted({segment.text_id for segment in segments})
    numbered = [replace(s, shot_id=shots.index(s.shot_id), text_id=texts.index(s.text_id)) for s in segments]
    return ClipLayout(tuple(numbered)), places, texts


def _texts(text: TextContext, groups: list[int], own: ClipLayout) -> TextContext:
    return replace(
        text,
        embeddings=text.embeddings[:, groups],
        frame_text=own.text_ids,
        lengths=None if text.lengths is None else text.lengths[:, groups],
        pooled=None if text.pooled is None else text.pooled[:, groups],
    )

"""What every backbone does with its arguments before its model runs: fit them together, or say why they do not.

B batch, F latent frames, C channels, H W latent size, G text groups, L text tokens, D width of the text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.layout import ClipLayout
from models.text import TextContext


def as_context(text: TextContext | Tensor, frames: int) -> TextContext:
    """A plain tensor [B,L,D] is one context that every frame reads."""
    if isinstance(text, TextContext):
        return text
    return TextContext(text[:, None], torch.zeros(frames, dtype=torch.long))


def frame_groups(text: TextContext) -> tuple[tuple[int, ...], ...]:
    """The frames that read each text group."""
    reads = text.frame_text.tolist()
    return tuple(tuple(f for f, g in enumerate(reads) if g == group) for group in range(text.embeddings.shape[1]))


def shared_levels(levels: Tensor) -> Tensor:
    """Levels [B] where all frames of every sample have the same, else as they are: one time per sample is the plain
    model's own arithmetic."""
    return levels[:, 0] if levels.ndim == 2 and bool((levels == levels[:, :1]).all()) else levels


def check_inputs(
    x: Tensor,  # [B,C,F,H,W]
    levels: Tensor,
    text: TextContext,
    layout: ClipLayout,
    multiple: int,  # of which height and width must be
) -> None:
    """Raises ValueError where levels, text or layout are not those of x."""
    batch, _, frames, height, width = x.shape
    if tuple(levels.shape) not in ((batch,), (batch, frames)):
        raise ValueError(f"levels have shape {tuple(levels.shape)}, expected [{batch}] or [{batch},{frames}]")
    if layout.num_frames != frames:
        raise ValueError(f"the layout has {layout.num_frames} latent frames, x has {frames}")
    if height % multiple or width % multiple:
        raise ValueError(f"latent size {height}x{width} is not a multiple of the model's patch or stride, {multiple}")
    groups = text.embeddings.shape[1]
    if text.embeddings.shape[0] != batch or len(text.frame_text) != frames:
        raise ValueError(
            f"text is for {text.embeddings.shape[0]} samples of {len(text.frame_text)} frames, x is {batch} of {frames}"
        )
    if int(text.frame_text.min()) < 0 or int(text.frame_text.max()) >= groups:
        raise ValueError(f"frame_text is {text.frame_text.tolist()}, but the text has groups 0..{groups - 1}")

"""Where each video token stands: integer (t, y, x) per token, and the rotary tables made from it.

F latent frames, H' W' patch grid, N = F*H'*W' tokens in frame, row, column order, d width of an attention head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, get_args

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor

from models.layout import ClipLayout

PositionMode = Literal["contiguous", "time_gap", "diagonal"]


def position_ids(
    layout: ClipLayout,
    grid: tuple[int, int],  # (H', W')
    mode: PositionMode = "contiguous",
    gap: int = 4,
    text_lengths: Sequence[int] | None = None,
) -> Tensor:
    """Positions of all video tokens, long [N,3].

    contiguous: t counts the frames of the clip, y and x the patch grid: the pretrained layout.
    time_gap:   as contiguous, with `gap` empty time steps between shots; space stays in the pretrained range.
    diagonal:   every shot starts on the space-time diagonal after the one before (LCT 2503.10589, figure 3, with the
                M-RoPE step): a video token of shot g is at (o+f, o+y, o+x), o = o_g + L_g, and
                o_{g+1} = o_g + L_g + max(F_g, H', W'). `text_lengths` L_g makes room for text tokens, one number per
                shot, for backbones whose text has positions; Wan's has none.
    """
    rows, columns = grid
    shots = layout.shot_slices
    lengths = list(text_lengths) if text_lengths is not None else [0] * len(shots)
    if len(lengths) != len(shots):
        raise ValueError(f"text_lengths has {len(lengths)} entries, the layout {len(shots)} shots; give one per shot")
    if mode not in get_args(PositionMode):
        raise ValueError(f"unknown position mode {mode!r}; choose one of {', '.join(get_args(PositionMode))}")
    parts = []
    origin = 0
    for frames, text_length in zip(shots, lengths, strict=True):
        count = frames.stop - frames.start
        t, y, x = torch.meshgrid(*(torch.arange(n) for n in (count, rows, columns)), indexing="ij")
        ids = torch.stack([t, y, x], dim=-1).flatten(0, 2)
        if mode == "diagonal":
            origin += text_length
            parts.append(ids + origin)
            origin += max(count, rows, columns)
        else:
            parts.append(ids + torch.tensor([origin, 0, 0]))
            origin += count + (gap if mode == "time_gap" else 0)
    return torch.cat(parts)


def rope_tables(positions: Tensor, dims: tuple[int, int, int], theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """(cos, sin), float32 [N,d], for positions [N,3]; d = sum(dims), the head width split over t, y, x.

    Made by diffusers' own function, so contiguous positions give the tables of `WanRotaryPosEmbed` bit for bit.
    """
    columns = [
        _axis_table(dim, int(positions[:, axis].max()) + 1, theta)[:, positions[:, axis]]
        for axis, dim in enumerate(dims)
    ]
    cos, sin = torch.cat(columns, dim=-1)
    return cos, sin


@lru_cache(maxsize=32)
def _axis_table(dim: int, length: int, theta: float) -> Tensor:
    """[2, length, dim]: cos and sin of positions 0..length-1 of one axis."""
    return torch.stack(
        get_1d_rotary_pos_embed(
            dim, length, theta, use_real=True, repeat_interleave_real=True, freqs_dtype=torch.float64
        )
    )

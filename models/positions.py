"""Where each video token stands: integer (t, y, x) per token, and the rotary tables made from it.

F latent frames, H' W' patch grid, N = F*H'*W' tokens in frame, row, column order, d width of an attention head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, get_args

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
    extent: tuple[int, int] | None = None,
) -> Tensor:
    """Positions of all video tokens, long [N,3].

    contiguous: t counts the frames of the clip, y and x the patch grid: the pretrained layout.
    time_gap:   as contiguous, with `gap` empty time steps between shots; space stays in the pretrained range.
    diagonal:   every shot starts on the space-time diagonal after the one before (LCT 2503.10589, figure 3, with the
                M-RoPE step): a video token of shot g is at (o+f, o+y, o+x), o = o_g + L_g, and
                o_{g+1} = o_g + L_g + max(F_g, H', W'). `text_lengths` L_g makes room for text tokens, one number per
                shot, for backbones whose text has positions; Wan's has none. `extent` replaces (H', W') in the step
                where a backbone stretches the patch grid over a larger one. A dummy frame stands for one token
                (`models.joint_attention`): all of it is at (o+f, o, o), and the step is the number of its frames.
    """
    rows, columns = grid
    shots = layout.shot_slices
    lengths = list(text_lengths) if text_lengths is not None else [0] * len(shots)
    if len(lengths) != len(shots):
        raise ValueError(f"text_lengths has {len(lengths)} entries, the layout {len(shots)} shots; give one per shot")
    if mode not in get_args(PositionMode):
        raise ValueError(f"unknown position mode {mode!r}; choose one of {', '.join(get_args(PositionMode))}")
    dummies = layout.is_dummy
    parts = []
    origin = 0
    for frames, text_length in zip(shots, lengths, strict=True):
        count = frames.stop - frames.start
        t, y, x = torch.meshgrid(*(torch.arange(n) for n in (count, rows, columns)), indexing="ij")
        ids = torch.stack([t, y, x], dim=-1).flatten(0, 2)
        if mode == "diagonal":
            origin += text_length
            dummy = bool(dummies[frames].all())
            parts.append(ids * torch.tensor([1, 0, 0]) + origin if dummy else ids + origin)
            origin += count if dummy else max(count, *(extent or grid))
        else:
            parts.append(ids + torch.tensor([origin, 0, 0]))
            origin += count + (gap if mode == "time_gap" else 0)
    return torch.cat(parts)


def interleaved_positions(
    layout: ClipLayout,
    grid: tuple[int, int],
    texts: Sequence[tuple[int, int]],  # shot and text group of each copy
    lengths: Sequence[int],  # its valid tokens
    tokens: int,  # with padding
    extent: tuple[int, int] | None = None,
) -> Tensor:
    """Positions of T text copies of `tokens` tokens each, then of the video, in the diagonal mode: long [T*L+N,3].

    The texts of a shot stand one after another on its diagonal, its frames after them; copies of one text in one shot
    share their place. Padding runs on past the end of its text: nobody attends to it. `extent` as in `position_ids`.
    """
    starts: list[dict[int, int]] = [{} for _ in layout.shot_slices]  # per shot: text group -> its first token
    shot_lengths = [0] * len(starts)
    for (shot, group), length in zip(texts, lengths, strict=True):
        if group not in starts[shot]:
            starts[shot][group] = shot_lengths[shot]
            shot_lengths[shot] += length
    video = position_ids(layout, grid, "diagonal", text_lengths=shot_lengths, extent=extent)
    first = [int(video[frames.start * grid[0] * grid[1], 0]) for frames in layout.shot_slices]
    text = [first[shot] - shot_lengths[shot] + starts[shot][group] + torch.arange(tokens) for shot, group in texts]
    return torch.cat([torch.cat(text)[:, None].expand(-1, 3), video])


def rope_tables(
    positions: Tensor,
    dims: tuple[int, int, int],
    theta: float = 10000.0,
    frequencies: torch.dtype = torch.float64,  # what they are computed in
) -> tuple[Tensor, Tensor]:
    """(cos, sin), float32 [N,d], for positions [N,3]; d = sum(dims), the head width split over t, y, x.

    Made by diffusers' own function on the device of `positions`, so contiguous positions give the tables of diffusers
    bit for bit: of `WanRotaryPosEmbed` by default, of `HunyuanVideoRotaryPosEmbed` with theta 256 in float32.
    """
    columns = [
        _axis_table(dim, int(positions[:, axis].max()) + 1, theta, frequencies, positions.device)[:, positions[:, axis]]
        for axis, dim in enumerate(dims)
    ]
    cos, sin = torch.cat(columns, dim=-1)
    return cos, sin


@lru_cache(maxsize=32)
def _axis_table(dim: int, length: int, theta: float, frequencies: torch.dtype, device: torch.device) -> Tensor:
    """[2, length, dim]: cos and sin of positions 0..length-1 of one axis."""
    steps: Any = torch.arange(length, device=device)
    return torch.stack(
        get_1d_rotary_pos_embed(dim, steps, theta, use_real=True, repeat_interleave_real=True, freqs_dtype=frequencies)
    )

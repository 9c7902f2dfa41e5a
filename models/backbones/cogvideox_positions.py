"""Where the tokens of CogVideoX stand: rotary tables (5B, 1.5) and the sine table added to its tokens (2B).

F token frames, H' W' patch grid, N = F*H'*W' video tokens, L tokens of a text, T texts, d width of an attention head, D
width. All is made by diffusers' own functions, so that one contiguous shot has the pretrained positions bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed, get_1d_sincos_pos_embed_from_grid
from torch import Tensor

from models.attention import group_sizes
from models.layout import ClipLayout
from models.positions import PositionMode, interleaved_positions, position_ids


@dataclass(frozen=True)
class TextPlaces:
    """The texts that have positions (diagonal layout): tokens of each, and per copy its shot and its text group."""

    length: int = 0
    shots: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()


@lru_cache(maxsize=4)  # the layout of a run rarely changes, and the tables of a long scene are large
@torch.inference_mode(False)  # tables first made while sampling must serve training, too
def rotary_tables(
    layout: ClipLayout,  # of token frames
    grid: tuple[int, int],
    mode: PositionMode,
    gap: int,
    places: TextPlaces,
    head_dim: int,
    base_grid: tuple[int, int] | None,  # stretch the grid over this one (5B); None: whole steps (1.5)
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """(cos, sin), float32: [N,d], or [T*L+N,d] in the diagonal layout, where the text has positions, too.

    Text without positions is not rotated, as in the pretrained model. Text copies of one group in one shot share a
    place; different groups of a shot stand one after the other, all before its frames. Computed on `device`, as the
    pipeline does.
    """
    if mode == "diagonal":
        copies = list(zip(places.shots, places.groups, strict=True))
        lengths = [places.length] * len(copies)
        ids = interleaved_positions(layout, grid, copies, lengths, places.length, base_grid)
        text, video = ids.to(device).tensor_split([sum(lengths)])
    else:
        video = position_ids(layout, grid, mode, gap).to(device)
        text = video[:0]
    coordinates = video.float()
    if base_grid is not None:
        # the place of a token in its shot's grid, and where the stretched grid has it
        tokens = torch.tensor(group_sizes(layout), device=device) * grid[0] * grid[1]
        first = video[tokens.cumsum(0) - tokens].repeat_interleave(tokens, dim=0)
        rows, columns = _stretched(grid, base_grid, device)
        grown = mode != "diagonal" or ~layout.is_dummy.to(device).repeat_interleave(grid[0] * grid[1])
        coordinates[:, 1] = first[:, 1] + rows[video[:, 1] - first[:, 1]] * grown  # one token has no grid to fit
        coordinates[:, 2] = first[:, 2] + columns[video[:, 2] - first[:, 2]] * grown
    coordinates = torch.cat([text.float(), coordinates])
    make_table: Any = get_1d_rotary_pos_embed
    axes = [
        make_table(dim, coordinates[:, axis].contiguous(), use_real=True)
        for axis, dim in enumerate((head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3))
    ]
    cos, sin = (torch.cat(parts, dim=-1) for parts in zip(*axes, strict=True))
    return cos, sin


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def sine_table(
    layout: ClipLayout,  # of token frames
    grid: tuple[int, int],
    mode: PositionMode,
    gap: int,
    width: int,
    spatial_scale: float,
    temporal_scale: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Absolute positions [N,D] to add to the video tokens: a quarter of the width is time, then column, then row."""
    ids = position_ids(layout, grid, mode, gap)
    axes = ((0, width // 4, temporal_scale), (2, width * 3 // 8, spatial_scale), (1, width * 3 // 8, spatial_scale))
    parts = []
    for axis, dim, scale in axes:
        steps = torch.arange(int(ids[:, axis].max()) + 1, dtype=torch.float32) / scale
        parts.append(get_1d_sincos_pos_embed_from_grid(dim, steps).to(dtype)[ids[:, axis]])
    return torch.cat(parts, dim=-1).to(device)


def _stretched(grid: tuple[int, int], base_grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows [H'] and columns [W'] of a grid fitted into the pretrained one, as CogVideoXPipeline fits it; float32."""
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    start, stop = get_resize_crop_region_for_grid(grid, base_grid[1], base_grid[0])
    rows, columns = (
        torch.linspace(start[axis], stop[axis] * (size - 1) / size, size, dtype=torch.float32, device=device)
        for axis, size in enumerate(grid)
    )
    return rows, columns

"""AID's adapters (2406.06465, section 3.4): small branches beside a frozen attention that move it to a new domain.

Each is down-projection, one operation, up-projection; the up-projection starts at zero, weight and bias, so that the
frozen model is unchanged at first, and the down-projection does not, or neither would ever move. They give the branch
alone, to be added to what the attention gives: adding their input as well would double the block's own skip.

B batch, F latent frames, h w size of a frame in tokens, D width of the model, d = D / ratio.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.modules.dual_query import zero_linear

ShortTermKernel = Literal["temporal", "spatiotemporal"]
KERNELS: dict[str, tuple[int, int, int]] = {"temporal": (3, 1, 1), "spatiotemporal": (3, 3, 3)}


class SpatialAdapter(nn.Module):
    """W_up GELU(W_down x), token by token."""

    def __init__(self, dim: int, ratio: int = 4) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, dim // ratio), zero_linear(dim // ratio, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B,F,h,w,D] in and out; a frame's output depends on that frame only."""
        return self.up(F.gelu(self.down(x)))


class ShortTermTemporalAdapter(nn.Module):
    """W_up DWConv(W_down x), a depthwise convolution over a frame and its two neighbours (ST-Adapter, 2206.13559).

    `kernel` "temporal" is 3x1x1, each place by itself; "spatiotemporal" is 3x3x3.
    """

    def __init__(self, dim: int, ratio: int = 4, kernel: ShortTermKernel = "temporal") -> None:
        super().__init__()
        if kernel not in KERNELS:
            raise ValueError(f"short-term kernel is {kernel!r}; choose one of {', '.join(get_args(ShortTermKernel))}")
        inner, size = dim // ratio, KERNELS[kernel]
        self.down, self.up = nn.Linear(dim, inner), zero_linear(inner, dim)
        self.conv = nn.Conv3d(inner, inner, size, padding="same", groups=inner)

    def forward(self, x: Tensor) -> Tensor:
        """[B,F,h,w,D] in and out; a frame's output depends on frames f-1, f and f+1."""
        hidden = self.conv(self.down(x).permute(0, 4, 1, 2, 3))
        return self.up(hidden.permute(0, 2, 3, 4, 1))


class LongTermTemporalAdapter(nn.Module):
    """W_up SelfAttn(W_down x) over all frames of one place, with learned positions in time.

    `max_frames` is the length of the longest clip. Raises ValueError unless d is a multiple of `heads`.
    """

    def __init__(self, dim: int, max_frames: int, ratio: int = 4, heads: int = 4) -> None:
        super().__init__()
        inner = dim // ratio
        if inner % heads:
            raise ValueError(
                f"width {dim} / {ratio} = {inner} is not a multiple of {heads} heads; change adapter_ratio"
            )
        self.heads = heads
        self.down, self.up = nn.Linear(dim, inner), zero_linear(inner, dim)
        self.position = nn.Parameter(0.02 * torch.randn(max_frames, inner))
        self.to_qkv = nn.Linear(inner, 3 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """[B,F,h,w,D] in and out; a frame's output depends on the same place in all frames."""
        batch, frames, height, width, _ = x.shape
        if frames > len(self.position):
            raise ValueError(f"a clip of {frames} latent frames; this model was made for {len(self.position)}")
        places = self.down(x).permute(0, 2, 3, 1, 4).flatten(0, 2) + self.position[:frames]  # [B*h*w,F,d]
        q, k, v = self.to_qkv(places).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B*h*w,heads,F,d']
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.up(out.unflatten(0, (batch, height, width)).permute(0, 3, 1, 2, 4))

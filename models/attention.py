"""Attention over a clip whose tokens belong to groups (shots), without ever building an N x N mask.

B batch, F latent frames, N tokens, d width of a head. The groups are the shots of the layout, in order, each an
unbroken run of frames.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layout import ClipLayout

AttentionRule = Literal["full", "group_causal", "same_frame"]
Attend = Callable[..., Tensor]  # q, k, v [B,N,heads,d] and, where keys are padding, a bool mask -> [B,N,heads,d]


def group_ids(layout: ClipLayout) -> Tensor:
    """Group of each frame, long [F]: shots numbered 0, 1, ... in order of appearance."""
    sizes = group_sizes(layout)
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


def group_sizes(layout: ClipLayout) -> tuple[int, ...]:
    """Latent frames of each group, in order."""
    return tuple(frames.stop - frames.start for frames in layout.shot_slices)


def block_mask(groups: Tensor, rule: AttentionRule) -> Tensor:
    """May token q attend to token k? Bool [N,N] for one id per token [N]; the slow reference of `grouped_attention`.

    full: always. group_causal: group(k) <= group(q). same_frame: equal ids, where the ids are frame numbers.
    """
    q, k = groups[:, None], groups[None, :]
    if rule == "full":
        return torch.ones_like(q == k)
    if rule == "group_causal":
        return k <= q
    if rule == "same_frame":
        return k == q
    raise ValueError(f"unknown attention rule {rule!r}; choose one of {', '.join(get_args(AttentionRule))}")


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Dense attention over [B,N,heads,d]; `mask` [B,1,1,N] is false on keys that are padding."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
    return out.transpose(1, 2)


def grouped_attention(
    q: Tensor,  # [B,N,heads,d]
    k: Tensor,  # [B,P+N,heads,d]: P tokens of earlier groups come first (group_causal)
    v: Tensor,
    sizes: tuple[int, ...],  # frames of each group, from `group_sizes`; plain numbers, so that compiling sees them
    rule: AttentionRule,
    attend: Attend = sdpa,
) -> Tensor:
    """Attention under a group rule, exact and mask-free; [B,N,heads,d].

    full: one dense call. group_causal: one dense call per group over the keys up to its end, so that nothing a later
    group holds enters the arithmetic of an earlier one (LCT 2503.10589, context-causal attention). same_frame: the
    frames as a batch.
    """
    batch, tokens, frames = q.shape[0], q.shape[1], sum(sizes)
    if tokens % frames:
        raise ValueError(f"{tokens} tokens do not divide evenly over {frames} frames (groups of {list(sizes)})")
    past = k.shape[1] - tokens
    if past and rule != "group_causal":
        raise ValueError(f"attention rule {rule!r} with {past} tokens of earlier groups: use group_causal")
    if rule == "full":
        return attend(q, k, v)
    if rule == "same_frame":
        out = attend(*(x.unflatten(1, (frames, -1)).flatten(0, 1) for x in (q, k, v)))
        return out.unflatten(0, (batch, frames)).flatten(1, 2)
    if rule != "group_causal":
        raise ValueError(f"unknown attention rule {rule!r}; choose one of {', '.join(get_args(AttentionRule))}")
    per_frame = tokens // frames
    outs, start = [], 0
    for size in sizes:
        end = start + size * per_frame
        outs.append(attend(q[:, start:end], k[:, : past + end], v[:, : past + end]))
        start = end
    return torch.cat(outs, dim=1)

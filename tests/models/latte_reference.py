"""FVDM's factorised attention in Latte written out, one row at a time, with tiny models and inputs to compare on."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from diffusers import LatteTransformer3DModel
from torch import Tensor, nn

from models.backbones.latte import LatteBackbone
from models.layout import shots_layout
from models.tiny_latte import tiny_latte
from tests.draw import randn

B, FRAMES, L = 2, 6, 7
SCENE = shots_layout([3, 1, 2])


class Process:
    """Stands in for VPDiffusion: indices 0 to 999."""

    def to_model_time(self, level: Tensor) -> Tensor:
        return 999 * level.float()


def make(dtype: torch.dtype = torch.float64, **changes) -> tuple[LatteBackbone, LatteTransformer3DModel]:
    """A backbone, and an untouched diffusers model with the same weights."""
    plain = nn.Module.to(tiny_latte(3, **changes), dtype).eval()
    return LatteBackbone(copy.deepcopy(plain), Process()).eval(), plain


def inputs(dtype: torch.dtype = torch.float64, groups: int = 3, size: tuple[int, int] = (4, 4)):
    levels = torch.rand(B, FRAMES, generator=torch.Generator().manual_seed(5))
    return randn(B, 4, FRAMES, *size, seed=1, dtype=dtype), levels, randn(B, groups, L, 32, seed=2, dtype=dtype)


# --- FVDM's factorised attention, one row at a time -----------------------------------------------------------------


def attention(module, hidden: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
    """[N,D] reads [M,D]; softmax written out."""
    heads = module.heads
    q, k, v = module.to_q(hidden), module.to_k(context), module.to_v(context)
    q, k, v = (t.reshape(len(t), heads, -1).permute(1, 0, 2) for t in (q, k, v))  # [heads,N,d]
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return module.to_out[0]((scores.softmax(dim=-1) @ v).permute(1, 0, 2).flatten(1))


def adaptive_block(
    block,
    hidden: Tensor,
    modulation: Tensor,
    context: Tensor | None,
    mask: Tensor | None,
    added: Tensor | None = None,
    seen: list[Tensor] | None = None,
) -> Tensor:
    """A block on [N,D] whose modulation [N,6,D] is that of each token's own frame.

    `added` [N,D] is added beside the attention; `seen` gets what that reads, [N,D].
    """

    def norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)

    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (block.scale_shift_table + modulation).unbind(dim=1)
    normed = norm(hidden) * (1 + scale) + shift
    hidden = hidden + gate * attention(block.attn1, normed, normed, mask)
    if seen is not None:
        seen.append(normed)
    if context is not None:
        hidden = hidden + attention(block.attn2, hidden, context)
    hidden = hidden if added is None else hidden + added
    return hidden + gate_mlp * block.ff(norm(hidden) * (1 + scale_mlp) + shift_mlp)


def factorised_loop(
    plain: LatteTransformer3DModel,
    x: Tensor,  # [B,C,F,H,W]
    levels: Tensor,  # [B,F]
    contexts: Tensor,  # [B,F,L,D]
    positions: Tensor | None = None,  # [F]
    mask: Tensor | None = None,  # [F,F]
    added: list[Tensor] | None = None,  # [B,F,n,D] per layer, beside its spatial attention
    seen: list[Tensor] | None = None,  # gets what those attentions read, [B,F,n,D]
) -> Tensor:
    """FVDM: e[b,f] modulates frame f of sample b in spatial and in temporal blocks; every sequence on its own."""
    batch, channels, frames, height, width = x.shape
    dim = plain.config.num_attention_heads * plain.config.attention_head_dim
    positions = torch.arange(frames) if positions is None else positions
    omega = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    table = torch.cat([(positions[:, None] * omega).sin(), (positions[:, None] * omega).cos()], dim=1).float()
    samples = []
    reads: list[list[Tensor]] = [[] for _ in plain.transformer_blocks]
    for b in range(batch):
        times = [plain.adaln_single(999 * levels[b, f, None], hidden_dtype=x.dtype) for f in range(frames)]
        modulation = torch.cat([t[0] for t in times]).reshape(frames, 6, dim)
        hidden = torch.stack([plain.pos_embed(x[b, None, :, f])[0] for f in range(frames)])  # [F,n,D]
        tokens = hidden.shape[1]
        for i, (spatial, temporal) in enumerate(
            zip(plain.transformer_blocks, plain.temporal_transformer_blocks, strict=True)
        ):
            rows = []
            for f in range(frames):
                context = plain.caption_projection(contexts[b, f])
                own = None if added is None else added[i][b, f]
                own_modulation = modulation[f].expand(tokens, -1, -1)
                rows.append(adaptive_block(spatial, hidden[f], own_modulation, context, None, own, reads[i]))
            hidden = torch.stack(rows)
            if i == 0:
                hidden = hidden + table[:, None].to(x.dtype)
            columns = [adaptive_block(temporal, hidden[:, p], modulation, None, mask) for p in range(tokens)]
            hidden = torch.stack(columns, dim=1)
        out = []
        for f in range(frames):
            shift, scale = plain.scale_shift_table + times[f][1]
            patches = plain.proj_out(plain.norm_out(hidden[f]) * (1 + scale) + shift)
            patches = patches.reshape(height // 2, width // 2, 2, 2, -1)
            out.append(patches.permute(4, 0, 2, 1, 3).reshape(-1, height, width)[:channels])
        samples.append(torch.stack(out, dim=1))
    if seen is not None:
        seen += [torch.stack(layer).unflatten(0, (batch, frames)) for layer in reads]
    return torch.stack(samples)

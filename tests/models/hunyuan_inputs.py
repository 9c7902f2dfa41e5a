"""A tiny HunyuanVideo, the model it wraps, and a clip of three shots with texts of different lengths."""

from __future__ import annotations

import copy

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import nn

from models.backbones.hunyuan import HunyuanVideoBackbone, TextContext
from models.layout import shots_layout
from models.tiny import TEXT_DIM
from models.tiny_hunyuan import POOLED_DIM, tiny_hunyuan
from tests.draw import randn

B, F, N_PER_FRAME, L = 2, 6, 4, 7
AXES = (4, 4, 4)
SCENE = shots_layout([3, 1, 2])
LENGTHS = torch.tensor([[7, 4, 5], [3, 6, 7]])
MODES, RULES = ("contiguous", "time_gap", "diagonal"), ("full", "group_causal", "same_frame")


def make(dtype: torch.dtype = torch.float64, **changes) -> tuple[HunyuanVideoBackbone, HunyuanVideoTransformer3DModel]:
    """A backbone, and an untouched diffusers model with the same weights."""
    plain = nn.Module.to(tiny_hunyuan(3, **changes), dtype).eval()
    return HunyuanVideoBackbone(copy.deepcopy(plain)).eval(), plain


def inputs(dtype: torch.dtype = torch.float64, lengths: torch.Tensor | None = LENGTHS):
    levels = torch.rand(B, F, generator=torch.Generator().manual_seed(5))
    text, pooled = randn(B, 3, L, TEXT_DIM, seed=2, dtype=dtype), randn(B, 3, POOLED_DIM, seed=4, dtype=dtype)
    context = TextContext(text, SCENE.text_ids, lengths, pooled)
    return randn(B, 4, F, 4, 4, seed=1, dtype=dtype), levels, context


def one_text(text: TextContext, frames: int = F) -> TextContext:
    lengths = None if text.lengths is None else text.lengths[:, :1]
    return TextContext(text.embeddings[:, :1], torch.zeros(frames, dtype=torch.long), lengths, text.pooled[:, :1])


def replace(text: TextContext, **changes) -> TextContext:
    fields = {name: getattr(text, name) for name in ("embeddings", "frame_text", "lengths", "pooled")}
    return TextContext(**fields | changes)

"""Small CogVideoX models and inputs for tests: latents are 4 x 6, patches 2 x 2, so 6 tokens per frame."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
from diffusers import CogVideoXPipeline
from torch import nn

from models.backbones.cogvideox import CogVideoXBackbone
from models.layout import shots_layout
from models.tiny import TEXT_DIM
from models.tiny_cogvideox import tiny_cogvideox
from tests.draw import randn

B, F, GRID, L = 2, 6, (2, 3), 7
N_PER_FRAME = 6
SCENE, PAIRS = shots_layout([3, 1, 2]), shots_layout([2, 4])
CPU = torch.device("cpu")


class Process:
    """Stands in for the VP process: a level is a share of the last training index."""

    def to_model_time(self, level: torch.Tensor) -> torch.Tensor:
        return 999.0 * level.float()


def make(version: str = "5b", dtype: torch.dtype = torch.float64, **changes):
    """A backbone, and an untouched diffusers model with the same weights."""
    plain = nn.Module.to(tiny_cogvideox(3, version, **changes), dtype).eval()
    return CogVideoXBackbone(copy.deepcopy(plain), Process()).eval(), plain


def inputs(dtype: torch.dtype = torch.float64, groups: int = 3, pairs: bool = False):
    levels = torch.rand(B, F, generator=torch.Generator().manual_seed(5))
    if pairs:
        levels[:, 1::2] = levels[:, ::2]
    return randn(B, 4, F, 4, 6, seed=1, dtype=dtype), levels, randn(B, groups, L, TEXT_DIM, seed=2, dtype=dtype)


def pipeline_rotary(plain, frames: int, height: int, width: int):
    """The tables that CogVideoXPipeline makes for latents of this size."""
    if not plain.config.use_rotary_positional_embeddings:
        return None
    pipeline = SimpleNamespace(vae_scale_factor_spatial=8, transformer=plain)
    prepare = CogVideoXPipeline._prepare_rotary_positional_embeddings
    return prepare(pipeline, 8 * height, 8 * width, frames, CPU)


def run_plain(plain, x, times, text, rotary="pipeline"):
    if rotary == "pipeline":
        rotary = pipeline_rotary(plain, x.shape[2], *x.shape[3:])
    out = plain(x.transpose(1, 2).contiguous(), text, times, image_rotary_emb=rotary).sample
    return out.transpose(1, 2)

"""HunyuanVideo's real transformer class, a few thousand random weights. For tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel

from models.tiny import LATENT_CHANNELS, TEXT_DIM

POOLED_DIM = 16


def tiny_hunyuan(seed: int = 0, **changes: Any) -> HunyuanVideoTransformer3DModel:
    """2 double-stream, 2 single-stream and 1 refiner block of width 24; rotary dimensions 4, 4, 4."""
    config: dict[str, Any] = {
        "in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS, "num_attention_heads": 2,
        "attention_head_dim": 12, "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1, "mlp_ratio": 2.0,
        "text_embed_dim": TEXT_DIM, "pooled_projection_dim": POOLED_DIM, "rope_axes_dim": (4, 4, 4),
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HunyuanVideoTransformer3DModel(**config | changes)

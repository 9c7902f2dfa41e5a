"""A Latte of a few hundred kilobytes with random weights: every part real, nothing learned. For tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import LatteTransformer3DModel


def tiny_latte(seed: int = 0, **changes: Any) -> LatteTransformer3DModel:
    """2 spatial and 2 temporal blocks of width 48, patches 2 x 2, 4 latent channels, 6 frames, text of width 32."""
    config: dict[str, Any] = {
        "num_attention_heads": 4, "attention_head_dim": 12, "in_channels": 4, "out_channels": 8, "num_layers": 2,
        "cross_attention_dim": 48, "attention_bias": True, "sample_size": 8, "patch_size": 2,
        "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False, "norm_eps": 1e-6, "caption_channels": 32, "video_length": 6,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LatteTransformer3DModel(**config | changes)

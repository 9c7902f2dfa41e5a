"""A Stable Video Diffusion U-Net of two megabytes with random weights: every part real, nothing learned. For tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNetSpatioTemporalConditionModel


def tiny_svd(seed: int = 0, **changes: Any) -> UNetSpatioTemporalConditionModel:
    """Two levels of 32 and 64 channels, 4 latent and 4 image channels, contexts of width 16."""
    config: dict[str, Any] = {
        "in_channels": 8, "out_channels": 4, "block_out_channels": (32, 64), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24, "cross_attention_dim": 16,
        "num_attention_heads": (2, 4), "num_frames": 6,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNetSpatioTemporalConditionModel(**config | changes)

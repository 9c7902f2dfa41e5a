"""Wan 2.2 in a few hundred kilobytes with random weights: T2V-A14B's two experts, TI2V-5B's VAE. For tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import torch
from diffusers import AutoencoderKLWan

from models.backbones.experts import WanExperts
from models.backbones.wan import WanBackbone
from models.codecs import VideoCodec
from models.experts import Expert, ExpertName
from models.folder import Model, ModelSettings, save_model
from models.tiny import tiny_text_encoder, tiny_transformer, tiny_vae

TI2V_CHANNELS = 48


def tiny_experts(seed: int = 0, boundary: float = 0.875, **changes: Any) -> WanExperts:
    """Two tiny Wans of different weights."""
    high, low = (
        WanBackbone(tiny_transformer(seed + i, **changes), Expert(name, boundary))
        for i, name in enumerate(get_args(ExpertName))
    )
    return WanExperts(high, low)


def tiny_residual_vae(seed: int = 0) -> AutoencoderKLWan:
    """Strides 4 in time and 16 in space, 48 latent channels: residual blocks around patches of 2 x 2 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKLWan(
            base_dim=8, decoder_base_dim=8, z_dim=TI2V_CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16,
            latents_mean=[0.01 * i for i in range(TI2V_CHANNELS)], latents_std=[0.5] * TI2V_CHANNELS,
        )  # fmt: skip


def build_tiny_a14b_folder(
    path: Path | str, seed: int = 0, *, boundary: float = 0.875, text_length: int = 32, **settings: Any
) -> Model:
    """Write a folder of two experts to `path` and return its model; `settings` are those of ModelSettings."""
    given: dict[str, Any] = {"method": "lct", "frames_per_shot": 5, "height": 32, "width": 32, "fps": 8.0} | settings
    described = ModelSettings(text_length=text_length, **given)
    model = Model(
        tiny_experts(seed, boundary).eval(),
        VideoCodec(tiny_vae(seed)),
        tiny_text_encoder(seed, text_length),
        described,
        index={"boundary_ratio": boundary},
    )
    save_model(path, model, described)
    return model


def build_tiny_ti2v_folder(path: Path | str, seed: int = 0, *, text_length: int = 32, **settings: Any) -> Model:
    """Write a folder like that of TI2V-5B to `path` and return its model."""
    given: dict[str, Any] = {
        "method": "fvdm",
        "frames_per_shot": 5,
        "height": 64,
        "width": 64,
        "fps": 8.0,
        "level_shift": 5.0,
    }
    described = ModelSettings(text_length=text_length, **(given | settings))
    model = Model(
        WanBackbone(tiny_transformer(seed, in_channels=TI2V_CHANNELS, out_channels=TI2V_CHANNELS)).eval(),
        VideoCodec(tiny_residual_vae(seed)),
        tiny_text_encoder(seed, text_length),
        described,
        index={"expand_timesteps": True},
    )
    save_model(path, model, described)
    return model

"""A whole model folder of a few hundred kilobytes with random weights: every part real, nothing learned. For tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from models.backbones.wan import WanBackbone
from models.codecs import VideoCodec
from models.folder import Model, ModelSettings, save_model
from models.text import TextEncoder, TextStyle

TEXT_DIM = 32
LATENT_CHANNELS = 4


def tiny_transformer(seed: int = 0, **changes: Any) -> WanTransformer3DModel:
    """2 blocks of width 48; rotary dimensions 4, 4, 4."""
    config: dict[str, Any] = {
        "patch_size": (1, 2, 2), "num_attention_heads": 4, "attention_head_dim": 12, "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS, "text_dim": TEXT_DIM, "freq_dim": 32, "ffn_dim": 96, "num_layers": 2,
        "rope_max_seq_len": 64,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WanTransformer3DModel(**config | changes)


def tiny_vae(seed: int = 0) -> AutoencoderKLWan:
    """Strides 4 in time and 8 in space, 4 latent channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKLWan(
            base_dim=8, z_dim=LATENT_CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            latents_mean=[0.1, -0.1, 0.05, 0.0], latents_std=[0.5, 0.6, 0.4, 0.7],
        )  # fmt: skip


def tiny_text_encoder(seed: int = 0, max_length: int = 512, style: TextStyle | None = None) -> TextEncoder:
    """Byte tokens, one layer of width 32."""
    tokenizer = ByT5Tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5EncoderModel(
            T5Config(vocab_size=384, d_model=TEXT_DIM, d_kv=8, num_heads=4, d_ff=64, num_layers=1, dropout_rate=0.0)
        )
    return TextEncoder(tokenizer, model, max_length, style=style)


def build_tiny_folder(
    path: Path | str,
    seed: int = 0,
    *,
    method: str = "lct",
    method_params: dict[str, Any] | None = None,
    text_length: int = 512,
    frames_per_shot: int = 5,
    height: int = 32,
    width: int = 32,
    fps: float = 8.0,
) -> Model:
    """Write a tiny random model folder to `path` and return its model."""
    settings = ModelSettings(
        method=method, method_params=method_params or {}, text_length=text_length, frames_per_shot=frames_per_shot,
        height=height, width=width, fps=fps,
    )  # fmt: skip
    model = Model(
        WanBackbone(tiny_transformer(seed)).eval(),
        VideoCodec(tiny_vae(seed)),
        tiny_text_encoder(seed, text_length),
        settings,
    )
    save_model(path, model, settings)
    return model

"""A Latte of a few hundred kilobytes with random weights: every part real, nothing learned. For tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, LatteTransformer3DModel

from models.backbones.latte import LatteBackbone
from models.codecs import VideoCodec
from models.families import FAMILIES
from models.folder import Model, ModelSettings, save_model
from models.schedules import process_of_scheduler
from models.tiny import LATENT_CHANNELS, tiny_text_encoder

SCHEDULER = {  # the published ones'
    "_class_name": "DDIMScheduler", "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02,
    "prediction_type": "epsilon", "clip_sample": False,
}  # fmt: skip


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


def tiny_image_vae(seed: int = 0) -> AutoencoderKL:
    """Stride 8, 4 latent channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(
            block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=LATENT_CHANNELS, norm_num_groups=4,
            sample_size=32, scaling_factor=0.7,
        )  # fmt: skip


def build_tiny_latte_folder(path: Path | str, seed: int = 0, *, text_length: int = 120, **settings: Any) -> Model:
    """Write a tiny random Latte folder to `path` and return its model; `settings` are those of ModelSettings."""
    given = {"frames_per_shot": 6, "height": 32, "width": 32, "fps": 8.0, "level_shift": 1.0} | settings
    described = ModelSettings(backbone="latte", text_length=text_length, **given)
    model = Model(
        LatteBackbone(tiny_latte(seed, sample_size=4), process_of_scheduler(SCHEDULER)).eval(),
        VideoCodec(tiny_image_vae(seed)),
        tiny_text_encoder(seed, text_length, FAMILIES["latte"].text_style),
        described,
        SCHEDULER,
    )
    save_model(path, model, described)
    return model

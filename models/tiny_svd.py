"""A Stable Video Diffusion of a few megabytes with random weights: every part real, nothing learned. For tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from models.backbones.svd import SVDBackbone
from models.codecs import VideoCodec
from models.folder import Model, ModelSettings, save_model
from models.image_encoder import ImageEncoder
from models.schedules import process_of_scheduler
from models.tiny import tiny_text_encoder

SCHEDULER = {  # the published model's
    "_class_name": "EulerDiscreteScheduler", "prediction_type": "v_prediction", "timestep_type": "continuous",
    "timestep_spacing": "leading", "use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0,
    "interpolation_type": "linear", "num_train_timesteps": 1000,
}  # fmt: skip


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


def tiny_temporal_vae(seed: int = 0) -> AutoencoderKLTemporalDecoder:
    """Stride 2, 4 latent channels; its norms want multiples of 32 channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, sample_size=32,
            scaling_factor=0.5,
        )  # fmt: skip


def tiny_image_encoder(seed: int = 0, width: int = 16, layers: int = 1) -> ImageEncoder:
    """A CLIP of patches of 32 pixels."""
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=2 * width, projection_dim=width, num_hidden_layers=layers,
        num_attention_heads=2, image_size=224, patch_size=32,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ImageEncoder(CLIPImageProcessor(), CLIPVisionModelWithProjection(config))


def build_tiny_svd_folder(path: Path | str, seed: int = 0, *, texts: bool = False, **settings: Any) -> Model:
    """Write a tiny random SVD folder to `path` and return its model; `settings` are those of ModelSettings.

    `texts`: a text encoder lies in it, too.
    """
    given = {"frames_per_shot": 6, "height": 8, "width": 8, "fps": 7.0, "level_shift": 1.0, "text_length": 1} | settings
    described = ModelSettings(backbone="svd", method="svd", method_params={"latent_scale": 0.5}, **given)
    text = tiny_text_encoder(seed, described.text_length) if texts else None
    width = None if text is None else text.dim
    model = Model(
        SVDBackbone(
            tiny_svd(seed), process_of_scheduler(SCHEDULER), text_width=width, latent_scale=0.5, fps=described.fps
        ).eval(),
        VideoCodec(tiny_temporal_vae(seed)),
        text,
        described,
        SCHEDULER,
        image=tiny_image_encoder(seed),
    )
    save_model(path, model, described)
    return model

"""CogVideoX's real classes, a few thousand random weights each, and a whole folder of them. For tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

from models.backbones.cogvideox import CogVideoXBackbone
from models.codecs import VideoCodec
from models.families import FAMILIES
from models.folder import Model, ModelSettings, save_model
from models.schedules import process_of_scheduler
from models.tiny import LATENT_CHANNELS, TEXT_DIM, tiny_text_encoder

SCHEDULER = {  # the published ones'
    "_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
    "snr_shift_scale": 1.0, "timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True,
}  # fmt: skip

CogVideoXVersion = Literal["2b", "5b", "1.5"]
VERSIONS: dict[CogVideoXVersion, dict[str, Any]] = {
    "2b": {},
    "5b": {"use_rotary_positional_embeddings": True},
    "1.5": {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False},
}


def tiny_cogvideox(seed: int = 0, version: CogVideoXVersion = "5b", **changes: Any) -> CogVideoXTransformer3DModel:
    """2 blocks of width 32 for 6 latent frames of 4x6 (patch grid 2x3) and texts of 7 tokens."""
    config: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS, "time_embed_dim": 16, "text_embed_dim": TEXT_DIM, "num_layers": 2,
        "sample_width": 6, "sample_height": 4, "sample_frames": 21, "max_text_seq_length": 7,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CogVideoXTransformer3DModel(**config | VERSIONS[version] | changes)


def tiny_cogvideox_vae(seed: int = 0) -> AutoencoderKLCogVideoX:
    """Strides 4 in time and 8 in space, 4 latent channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8), latent_channels=LATENT_CHANNELS, layers_per_block=1, norm_num_groups=4,
            sample_height=32, sample_width=32, scaling_factor=0.7,
        )  # fmt: skip


def build_tiny_cogvideox_folder(
    path: Path | str, seed: int = 0, *, version: CogVideoXVersion = "5b", text_length: int = 7, **settings: Any
) -> Model:
    """Write a tiny random CogVideoX folder to `path` and return its model; `settings` are those of ModelSettings."""
    given = {"frames_per_shot": 9, "height": 32, "width": 32, "fps": 8.0, "level_shift": 1.0} | settings
    described = ModelSettings(backbone="cogvideox", text_length=text_length, **given)
    transformer = tiny_cogvideox(seed, version, max_text_seq_length=text_length, sample_width=4)
    model = Model(
        CogVideoXBackbone(transformer, process_of_scheduler(SCHEDULER)).eval(),
        VideoCodec(tiny_cogvideox_vae(seed)),
        tiny_text_encoder(seed, text_length, FAMILIES["cogvideox"].text_style),
        described,
        SCHEDULER,
    )
    save_model(path, model, described)
    return model

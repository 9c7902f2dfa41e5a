"""The classes and sizes of the small models, one family each; weights are seeded and learn in `build.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    CogVideoXTransformer3DModel,
    LatteTransformer3DModel,
    UNetSpatioTemporalConditionModel,
    WanTransformer3DModel,
)
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from models.backbones.base import Backbone
from models.codecs import VAE
from models.families import FAMILIES, FamilyName
from models.image_encoder import ImageEncoder
from models.methods import Method, get_method
from models.schedules import process_of_scheduler
from pipelines.shipped import SHOT_GAP
from pipelines.toy_models.data import SIZE, TEXT_LENGTH
from toyworld.vocabulary import FPS, SHOT_FRAMES
from train.vae import scale_latents

LATENT_CHANNELS = 8
TEXT_WIDTH = 96
IMAGE_WIDTH = 32
LATENT_SIZE = SIZE // 8


@dataclass(frozen=True)
class Small:
    """How a small model of a family is made, and what differs in how it is trained."""

    make_vae: Callable[..., VAE]
    make_transformer: Callable[[int, int], Any]  # of a width and a number of layers
    scheduler: Mapping[str, Any]
    text_length: int  # tokens, which are bytes
    level_shift: float  # of training and sampling levels
    width: int
    layers: int
    images_for_vae: bool = False  # single frames are all that an image VAE sees
    method: str = "fvdm"
    method_params: Mapping[str, Any] = field(
        default_factory=lambda: {"p": 0.0, "clean_prob": 0.0, "density": "uniform"}
    )
    packs: tuple[int, ...] = (1,)  # clips in a sequence, by turns, so that a sequence longer than a shot is not new
    call: str = ""  # what to tell the family's diffusers pipeline besides

    def backbone(self, name: FamilyName, width: int, layers: int) -> Backbone:
        """Of random weights."""
        return FAMILIES[name].build(self.make_transformer(width, layers), process_of_scheduler(self.scheduler))

    def sampling(self) -> Method:
        """The method that it makes single shots with, from nothing or from their first frame."""
        return get_method(self.method, shift=self.level_shift, **self.method_params)

    def training(self) -> Method:
        """The method that it is pretrained with: where sequences hold several clips, each is at a level of its own."""
        if max(self.packs) == 1:
            return self.sampling()
        return get_method("lct", shift=self.level_shift, density="uniform", shared_prob=0.0, position_gap=SHOT_GAP)


def wan_vae(mean: list[float] | None = None, std: list[float] | None = None) -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=16, decoder_base_dim=24, z_dim=LATENT_CHANNELS, dim_mult=[1, 2, 2], num_res_blocks=1,
        temperal_downsample=[True, True], patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=8,
        scale_factor_temporal=4, latents_mean=mean or [0.0] * LATENT_CHANNELS,
        latents_std=std or [1.0] * LATENT_CHANNELS,
    )  # fmt: skip


def scaled(vae: VAE, mean: list[float], std: list[float]) -> VAE:
    """The VAE as its family knows the deviation of its latents: by its configuration (Wan) or its weights."""
    if not isinstance(vae, AutoencoderKLWan):
        scale_latents(vae, std)
        return vae
    measured = wan_vae(mean, std)
    measured.load_state_dict(vae.state_dict())
    return measured


def _wan(width: int, layers: int) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=width // 32, attention_head_dim=32, in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS, text_dim=TEXT_WIDTH, freq_dim=64, ffn_dim=4 * width, num_layers=layers,
        rope_max_seq_len=256,
    )  # fmt: skip


def _cogvideox_vae() -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX(
        block_out_channels=(12, 24, 24, 24), layers_per_block=1, latent_channels=LATENT_CHANNELS, norm_num_groups=4,
        sample_height=SIZE, sample_width=SIZE, scaling_factor=1.0,
    )  # fmt: skip


def _cogvideox(width: int, layers: int) -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel(
        num_attention_heads=width // 32, attention_head_dim=32, in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS, time_embed_dim=64, text_embed_dim=TEXT_WIDTH, num_layers=layers,
        sample_width=LATENT_SIZE, sample_height=LATENT_SIZE, sample_frames=SHOT_FRAMES, max_text_seq_length=128,
        use_rotary_positional_embeddings=True,
    )  # fmt: skip


def _latte_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, latent_channels=LATENT_CHANNELS,
        norm_num_groups=4, sample_size=SIZE, scaling_factor=1.0,
    )  # fmt: skip


def _latte(width: int, layers: int) -> LatteTransformer3DModel:
    return LatteTransformer3DModel(
        num_attention_heads=width // 32, attention_head_dim=32, in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS, num_layers=layers, cross_attention_dim=width, attention_bias=True,
        sample_size=LATENT_SIZE, patch_size=2, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, caption_channels=TEXT_WIDTH,
        video_length=SHOT_FRAMES,
    )  # fmt: skip


# The norms of SVD's classes have 32 groups. With 32 channels a group is a channel, whose mean is then lost: where
# latents or pixels come out, there are more.
def _svd_vae() -> AutoencoderKLTemporalDecoder:
    return AutoencoderKLTemporalDecoder(
        block_out_channels=(64, 32, 32, 64), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=1,
        latent_channels=LATENT_CHANNELS, sample_size=SIZE, scaling_factor=1.0,
    )  # fmt: skip


def _svd(width: int, layers: int) -> UNetSpatioTemporalConditionModel:
    return UNetSpatioTemporalConditionModel(
        in_channels=2 * LATENT_CHANNELS, out_channels=LATENT_CHANNELS, block_out_channels=(width, width // 2),
        layers_per_block=layers, addition_time_embed_dim=16, projection_class_embeddings_input_dim=48,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=IMAGE_WIDTH,
        num_attention_heads=(2, 2), sample_size=LATENT_SIZE, num_frames=SHOT_FRAMES,
    )  # fmt: skip


def image_encoder() -> ImageEncoder:
    """A CLIP that learns nothing: the image itself stands beside every frame, this only tells that there is one."""
    config = CLIPVisionConfig(
        hidden_size=IMAGE_WIDTH, intermediate_size=2 * IMAGE_WIDTH, projection_dim=IMAGE_WIDTH, num_hidden_layers=2,
        num_attention_heads=2, image_size=224, patch_size=32,
    )  # fmt: skip
    return ImageEncoder(CLIPImageProcessor(), CLIPVisionModelWithProjection(config))


SMALL: dict[FamilyName, Small] = {
    "wan": Small(
        wan_vae, _wan, {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, TEXT_LENGTH,
        level_shift=3.0,  # shape and motion are decided at high noise, which unshifted levels hardly visit
        width=192, layers=6, packs=(1, 2, 1, 4), call=f"`max_sequence_length={TEXT_LENGTH}`",
    ),
    "cogvideox": Small(
        _cogvideox_vae, _cogvideox,
        {
            "_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
            "snr_shift_scale": 1.0, "timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True,
        },
        text_length=128, level_shift=1.0, width=128, layers=6, call="`max_sequence_length=128`",
    ),
    "latte": Small(
        _latte_vae, _latte,
        {
            "_class_name": "DDIMScheduler", "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02,
            "prediction_type": "epsilon", "timestep_spacing": "trailing", "clip_sample": False,
        },
        text_length=120, level_shift=1.0, width=128, layers=4, images_for_vae=True, call="`video_length=17`",
    ),
    "svd": Small(
        _svd_vae, _svd,
        {
            "_class_name": "EulerDiscreteScheduler", "prediction_type": "v_prediction", "timestep_type": "continuous",
            "timestep_spacing": "leading", "use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0,
            "interpolation_type": "linear",
        },
        text_length=1, level_shift=1.0, width=64, layers=1, method="svd",
        method_params={"latent_scale": 1.0, "fps": float(FPS)}, call=f"`fps={FPS}`, `noise_aug_strength=0`",
    ),
}  # fmt: skip

"""Video to latents and back: causal video VAEs (Wan, CogVideoX, HunyuanVideo) and image VAEs, by frame (Latte, SVD).

B batch, C latent channels, F latent frames, T video frames, H W video size, h w latent size. A causal VAE of temporal
stride 4 makes F latents of T = 4(F-1)+1 frames, an image VAE one of each. Rule: what must be known without the future
is encoded alone: every shot by itself, a given frame by itself. For Wan, a prefix encoded alone has the latents that it
has in its clip. For CogVideoX it has not: it works in pieces of 9, then 8, video frames and its group norms average
over a piece, so that a latent changes with later frames of its piece, and cutting given frames out of an encoded clip
would leak what is to be generated. HunyuanVideo's group norms average over time, too, and above 16 video frames it
works in overlapping pieces.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
)
from torch import Tensor

from models.text import weights_hash
from models.tiles import check_tile, tiled

VideoVAE = AutoencoderKLWan | AutoencoderKLCogVideoX | AutoencoderKLHunyuanVideo
ImageVAE = AutoencoderKL | AutoencoderKLTemporalDecoder  # the latter's decoder sees all frames of a clip
VAE = VideoVAE | ImageVAE
CLASSES: dict[str, Any] = {c.__name__: c for c in get_args(VAE)}

DECODER_PARTS = ("decoder.", "post_quant_conv.")


def posterior(vae: VAE, video: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance, each [B,C,F,h,w] in raw VAE units, of video [B,3,T,H,W]."""
    model: Any = vae
    if not isinstance(vae, ImageVAE):
        found = model.encode(video).latent_dist
        return found.mean, found.logvar
    found = model.encode(video.transpose(1, 2).flatten(0, 1)).latent_dist
    mean, logvar = (x.unflatten(0, (len(video), -1)).transpose(1, 2) for x in (found.mean, found.logvar))
    return mean, logvar


def decode_latents(vae: VAE, latents: Tensor) -> Tensor:
    """Video [B,3,T,H,W] from raw latents [B,C,F,h,w]."""
    model: Any = vae
    if not isinstance(vae, ImageVAE):
        return model.decode(latents).sample
    frames = latents.transpose(1, 2).flatten(0, 1)
    options = {"num_frames": latents.shape[2]} if isinstance(vae, AutoencoderKLTemporalDecoder) else {}
    return model.decode(frames, **options).sample.unflatten(0, (len(latents), -1)).transpose(1, 2)


def to_video(clips: Sequence[np.ndarray]) -> Tensor:
    """uint8 clips [T,H,W,3] of one size -> video [B,3,T,H,W] in [-1,1]."""
    frames = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3)
    return frames.float().div_(127.5).sub_(1.0)


def to_frames(video: Tensor) -> np.ndarray:
    """Video [B,3,T,H,W] in [-1,1], cut where it goes beyond -> uint8 frames [B,T,H,W,3]."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy()


class VideoCodec:
    """Encodes and decodes one clip or a batch of equal ones. Holds caches while it runs: one thread at a time."""

    def __init__(self, vae: VAE) -> None:
        self.vae = cast(Any, vae)
        self.temporal_stride: int
        self.spatial_stride = _spatial_stride(type(vae).__name__, self.vae.config)
        self.latent_channels: int
        self.frame_step = _frame_step(type(vae).__name__, self.vae.config)  # a clip has frame_step * k + 1 video frames
        self.vae.eval().requires_grad_(False)
        config = self.vae.config
        if isinstance(vae, ImageVAE):
            self.temporal_stride = 1
            self.latent_channels = config.latent_channels
            mean, std = _scaling(config)
        elif isinstance(vae, AutoencoderKLCogVideoX):
            self.temporal_stride = int(config.temporal_compression_ratio)
            self.latent_channels = config.latent_channels
            mean, std = _scaling(config)
        elif isinstance(vae, AutoencoderKLHunyuanVideo):
            self.temporal_stride = int(config.temporal_compression_ratio)
            self.latent_channels = config.latent_channels
            mean, std = _scaling(config)
        else:
            self.temporal_stride = config.scale_factor_temporal
            self.latent_channels = config.z_dim
            mean, std = config.latents_mean, config.latents_std
        if {len(mean), len(std)} != {self.latent_channels}:
            raise ValueError(
                f"the VAE's latents_mean and latents_std have {len(mean)} and {len(std)} "
                f"entries for {self.latent_channels} latent channels; write one per channel into vae/config.json"
            )
        self._mean = torch.tensor(mean).view(-1, 1, 1, 1)
        self._std = torch.tensor(std).view(-1, 1, 1, 1)

    @property
    def causal(self) -> bool:
        """Whether the latents of a clip's first frames are those that the frames have alone, without the later ones."""
        return not isinstance(self.vae, AutoencoderKLCogVideoX | AutoencoderKLHunyuanVideo)

    @staticmethod
    def from_folder(path: Path | str, device: torch.device | str = "cpu") -> VideoCodec:
        """Reads `vae/` of a model folder, in float32 (diffusers' advice for Wan: bfloat16 shows in the pixels)."""
        kind = _read_config(path)["_class_name"]
        vae: Any = CLASSES[kind].from_pretrained(
            Path(path) / "vae", torch_dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
        return VideoCodec(vae.to(device))

    @staticmethod
    def frame_step_of(path: Path | str) -> int:
        """`frame_step` of the VAE of a model folder, without loading it."""
        config = _read_config(path)
        return _frame_step(config["_class_name"], config)

    @staticmethod
    def spatial_stride_of(path: Path | str) -> int:
        """`spatial_stride` of the VAE of a model folder, without loading it."""
        config = _read_config(path)
        return _spatial_stride(config["_class_name"], config)

    @staticmethod
    def check_tile_of(path: Path | str, tile: int) -> None:
        """ValueError unless the VAE of a model folder can encode in tiles of this side, without loading it."""
        check_tile(_read_config(path)["_class_name"], tile, VideoCodec.spatial_stride_of(path))

    @property
    def device(self) -> torch.device:
        return self.vae.device

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the encoder's weights and the config; latents made under equal hashes are interchangeable.

        The decoder's weights do not count: one that was trained further decodes the latents there are.
        """
        encoder = [(n, v) for n, v in sorted(self.vae.state_dict().items()) if not n.startswith(DECODER_PARTS)]
        return weights_hash(encoder, dict(self.vae.config))

    def num_latent_frames(self, num_frames: int) -> int:
        """F for T video frames; ValueError unless T = step*k + 1: 4 for Wan, HunyuanVideo, 8 for CogVideoX, else 1."""
        step = self.frame_step
        if num_frames < 1 or (num_frames - 1) % step:
            raise ValueError(
                f"{num_frames} frames: the VAE takes {step}k+1 frames (1, {step + 1}, {2 * step + 1}, ...)"
            )
        return (num_frames - 1) // self.temporal_stride + 1

    @torch.no_grad()
    def encode(self, video: Tensor, tile: int | None = None) -> tuple[Tensor, Tensor]:
        """Posterior (mean, logvar), each [B,C,F,h,w] in raw VAE units, of video [B,3,T,H,W] in [-1,1].

        Frames higher or wider than `tile` are encoded in overlapping tiles of at most that side (`models.tiles`).
        """
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"video has shape {tuple(video.shape)}, expected [B,3,T,H,W]")
        self.num_latent_frames(video.shape[2])
        height, width = video.shape[3:]
        if height % self.spatial_stride or width % self.spatial_stride:
            raise ValueError(f"video is {height}x{width}, the VAE needs multiples of {self.spatial_stride}")
        large = tile and max(height, width) > tile
        with tiled(self.vae, height, width, tile, self.spatial_stride) if tile and large else nullcontext():
            return posterior(self.vae, video.to(self.device, self.vae.dtype))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Video [B,3,T,H,W] in [-1,1] from normalised latents [B,C,F,h,w]."""
        self.num_latent_frames((latents.shape[2] - 1) * self.temporal_stride + 1)
        return decode_latents(self.vae, self.denormalize(latents.to(self.device)).to(self.vae.dtype))

    def normalize(self, mean: Tensor) -> Tensor:
        """Raw VAE latents [...,C,F,h,w] to the backbone's units: zero mean, unit deviation per channel."""
        return (mean - self._mean.to(mean)) / self._std.to(mean)

    def denormalize(self, z: Tensor) -> Tensor:
        """Inverse of `normalize`."""
        return z * self._std.to(z) + self._mean.to(z)


def _scaling(config: Any) -> tuple[list[float], list[float]]:
    """Mean and deviation per channel of a VAE whose latents are (raw - shift) * scale to its model."""
    shift = getattr(config, "shift_factor", None) or 0.0
    return [shift] * config.latent_channels, [1 / config.scaling_factor] * config.latent_channels


def _read_config(path: Path | str) -> dict[str, Any]:
    """The configuration of the VAE of a model folder; ValueError for one of an unknown class."""
    file = Path(path) / "vae" / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: a model folder keeps its VAE there")
    config = json.loads(file.read_text())
    if (kind := config.get("_class_name")) not in CLASSES:
        raise ValueError(f"{file}: _class_name is {kind!r}, supported are {', '.join(CLASSES)}")
    return config


def _frame_step(kind: str, config: Mapping[str, Any]) -> int:
    """A clip that comes back at its length has so many times k frames, and one."""
    if kind == AutoencoderKLCogVideoX.__name__:
        # it decodes latents in pairs after the first; of an even number it makes 4F frames, not 4(F-1)+1
        return 2 * int(config.get("temporal_compression_ratio", 4))
    if kind == AutoencoderKLHunyuanVideo.__name__:
        return int(config.get("temporal_compression_ratio", 4))
    return int(config.get("scale_factor_temporal", 4)) if kind == AutoencoderKLWan.__name__ else 1


def _spatial_stride(kind: str, config: Mapping[str, Any]) -> int:
    """Pixels of a frame along a side of one of its latents."""
    if kind == AutoencoderKLWan.__name__:
        return int(config.get("scale_factor_spatial", 8))
    if kind == AutoencoderKLHunyuanVideo.__name__:
        return int(config.get("spatial_compression_ratio", 8))
    return 2 ** (len(config["block_out_channels"]) - 1)

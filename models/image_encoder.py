"""The image embedding that Stable Video Diffusion reads in the place of a text."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.text import stored_weights, weights_hash


class ImageEncoder:
    """A CLIP vision model with its projection, and what prepares images for it."""

    def __init__(self, feature_extractor: Any, model: nn.Module, folder: Path | None = None) -> None:
        self.feature_extractor = feature_extractor
        self.model = model.eval().requires_grad_(False)
        self._folder = folder  # of the weights, when they were read from files

    @staticmethod
    def from_folder(
        path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> ImageEncoder:
        """Reads `feature_extractor/` and `image_encoder/` of a model folder."""
        from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

        path = Path(path)
        config = path / "image_encoder" / "config.json"
        if (kind := json.loads(config.read_text())["model_type"]) != "clip_vision_model":
            raise ValueError(f"{config}: model_type is {kind!r}, supported is clip_vision_model")
        extractor = CLIPImageProcessor.from_pretrained(path / "feature_extractor", local_files_only=True)
        model: Any = CLIPVisionModelWithProjection.from_pretrained(
            path / "image_encoder", local_files_only=True, dtype=dtype
        )
        return ImageEncoder(extractor, model.to(device), path / "image_encoder")

    @property
    def modules_by_folder(self) -> dict[str, Any]:
        """The encoder and what prepares images for it, by the folder of a model folder that each lies in."""
        return {"image_encoder": self.model, "feature_extractor": self.feature_extractor}

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the weights as they are on disk, whatever type they were loaded in."""
        weights = stored_weights(self._folder) if self._folder else sorted(self.model.state_dict().items())
        return weights_hash(weights, {"feature_extractor": type(self.feature_extractor).__name__})

    @property
    def width(self) -> int:
        """D of the embeddings."""
        model: Any = self.model
        return model.config.projection_dim

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Embeddings [B,1,D], float32 on the CPU, of images [B,3,H,W] in [-1,1]: StableVideoDiffusionPipeline's own."""
        from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import (
            _resize_with_antialiasing,
        )

        resized = (_resize_with_antialiasing(images.float(), (224, 224)) + 1) / 2
        pixels = self.feature_extractor(
            images=resized, do_normalize=True, do_center_crop=False, do_resize=False, do_rescale=False,
            return_tensors="pt",
        ).pixel_values  # fmt: skip
        weight = next(self.model.parameters())
        return self.model(pixels.to(weight)).image_embeds[:, None].float().cpu()

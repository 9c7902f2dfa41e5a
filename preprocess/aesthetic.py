"""Aesthetic score of a shot: a CLIP image embedding and a linear head on it, weights by path only. Off by default.

The head is a file with `weight` [1,D] and `bias` [1] (a torch state dict or safetensors), as those trained on
Simulacra and AVA ratings for ViT-B-32 and ViT-L-14 that are in use for image and video datasets. Scores run from about
1 to 10.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from infra.storage import sha256_file


@dataclass
class AestheticScorer:
    """An open_clip image tower, its preprocessing, and the head: weight [1,D], bias [1]."""

    model: Any
    preprocess: Any
    weight: Tensor
    bias: Tensor
    device: str = "cpu"

    @staticmethod
    def from_files(architecture: str, clip: Path, head: Path, device: str = "cpu") -> AestheticScorer:
        """Open an open_clip `architecture` (such as ViT-B-32) with its weights and a head; no file is downloaded.

        Raises ValueError or OSError naming the file that cannot be used.
        """
        import open_clip

        for name, path in (("clip", clip), ("head", head)):
            if not Path(path).is_file():
                raise OSError(f"aesthetic.{name}={path}: no such file")
        if architecture not in open_clip.list_models():
            raise ValueError(f"aesthetic.architecture={architecture}: open_clip has no such model")
        try:
            model, _, preprocess = open_clip.create_model_and_transforms(
                architecture, pretrained=str(clip), device=device, weights_only=True
            )
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"aesthetic.clip={clip} holds no weights of {architecture}: {error}") from error
        state = _load(head)
        if set(state) != {"weight", "bias"}:
            raise ValueError(f"aesthetic.head={head} holds {sorted(state)}, expected weight [1,D] and bias [1]")
        width = int(model.visual.output_dim)
        if tuple(state["weight"].shape) != (1, width):
            shape = list(state["weight"].shape)
            raise ValueError(f"aesthetic.head={head}: weight is {shape}, embeddings of {architecture} need [1,{width}]")
        weight, bias = state["weight"].float().to(device), state["bias"].float().to(device)
        return AestheticScorer(model.eval(), preprocess, weight, bias, device)

    @torch.no_grad()
    def __call__(self, frames: Sequence[np.ndarray]) -> float:
        """Mean score of frames uint8 [H,W,3]."""
        pictures = torch.stack([self.preprocess(Image.fromarray(frame)) for frame in frames]).to(self.device)
        embeddings = torch.nn.functional.normalize(self.model.encode_image(pictures).float(), dim=-1)
        return round(float((embeddings @ self.weight.T + self.bias).mean()), 4)


def aesthetic_key(architecture: str, clip: Path, head: Path) -> str:
    """Changes when the same pictures would get other scores."""
    return hashlib.sha256(f"{architecture} {sha256_file(clip)} {sha256_file(head)}".encode()).hexdigest()[:16]


def _load(path: Path) -> dict[str, Tensor]:
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"aesthetic.head={path} holds a {type(state).__name__}, expected a state dict")
    return state

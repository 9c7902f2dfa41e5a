"""The families of models whose diffusers folders open: the classes in the parts of a folder, and what they mean.

A folder's model_index.json names its pipeline, and the pipeline its family. A plain diffusers folder has no settings of
ours; what it was trained for stands in its configurations.

Stable Video Diffusion reads an image, no text. Its folders may hold a text encoder besides (`text_encoder/` and
`tokenizer/`), which its pipeline leaves alone, for methods whose modules read text (AID).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    CogVideoXTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    LatteTransformer3DModel,
    UNetSpatioTemporalConditionModel,
    WanTransformer3DModel,
)

from models.backbones.base import Backbone
from models.backbones.cogvideox import CogVideoXBackbone
from models.backbones.hunyuan import HunyuanVideoBackbone
from models.backbones.latte import LatteBackbone
from models.backbones.svd import SVDBackbone
from models.backbones.wan import WanBackbone
from models.experts import EXPERT_FOLDERS, Expert
from models.process import FlowMatching, Process
from models.text import TextStyle, text_width

FamilyName = Literal["wan", "cogvideox", "latte", "hunyuan", "svd"]
Part = Literal["backbone", "codec", "text", "image"]


@dataclass(frozen=True)
class Family:
    pipeline: str  # the diffusers class that opens the folder
    model_class: Any  # of `transformer/`, or `unet/`
    vae_class: Any  # of `vae/`
    build: Callable[..., Backbone]  # of the model, the process and, for one of two experts, which it is
    # of a plain folder, from the configs of its model and its scheduler
    settings: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
    patch: Callable[[Mapping[str, Any]], int]  # latents along a side that its model takes together, by its config
    text_style: TextStyle = TextStyle()
    # further entries of model_index.json
    index: Mapping[str, Any] = field(default_factory=dict)
    # the folders of each part, of its model first; those of text and backbone are called as what holds them calls it
    folders: Mapping[Part, tuple[str, ...]] = field(
        default_factory=lambda: {"backbone": ("transformer",), "codec": ("vae",), "text": ("text_encoder", "tokenizer")}
    )
    optional: frozenset[Part] = frozenset()  # parts that a folder may lack, and that model_index.json does not name
    # what `build` is told of the folder, and of the frames per second of its clips
    surroundings: Callable[[Path, float], dict[str, Any]] = lambda path, fps: {}

    @property
    def reads_images(self) -> bool:
        """Whether it reads an image's embedding (`models.image_encoder`) in the place of a text."""
        return "image" in self.folders


def _wan(transformer: WanTransformer3DModel, process: Process, expert: Expert | None = None) -> WanBackbone:
    if not isinstance(process, FlowMatching):
        raise ValueError(f"a Wan is a flow, but its scheduler is of {type(process).__name__}; check scheduler/")
    return WanBackbone(transformer, expert)


def _wan_settings(config: Mapping[str, Any], scheduler: Mapping[str, Any]) -> dict[str, Any]:
    shift = float(scheduler.get("flow_shift") or scheduler.get("shift") or 3.0)
    known: dict[str, Any] = {} if shift == 3.0 else {"level_shift": shift, "method_params": {"shift": shift}}
    if config["in_channels"] == 48:  # Wan 2.2 TI2V-5B
        known |= {"frames_per_shot": 121, "height": 704, "width": 1280, "fps": 24.0}
    return known


def _cogvideox(transformer: CogVideoXTransformer3DModel, process: Process) -> CogVideoXBackbone:
    return CogVideoXBackbone(transformer, process)


def _cogvideox_settings(config: Mapping[str, Any], scheduler: Mapping[str, Any]) -> dict[str, Any]:
    height, width, fps = 8 * config["sample_height"], 8 * config["sample_width"], 8.0
    if config.get("patch_size_t"):  # 1.5, whose sample_height and sample_width are the largest there are
        height, width, fps = 768, 1360, 16.0
    return {
        "frames_per_shot": config["sample_frames"], "height": height, "width": width, "fps": fps,
        "text_length": config["max_text_seq_length"], "level_shift": 1.0, "method_params": {"shift": 1.0},
    }  # fmt: skip


def _hunyuan(transformer: HunyuanVideoTransformer3DModel, process: Process) -> HunyuanVideoBackbone:
    if not isinstance(process, FlowMatching):
        raise ValueError(f"a HunyuanVideo is a flow, its scheduler is of {type(process).__name__}; check scheduler/")
    return HunyuanVideoBackbone(transformer, packed_text=True)


def _hunyuan_settings(config: Mapping[str, Any], scheduler: Mapping[str, Any]) -> dict[str, Any]:
    shift = float(scheduler.get("shift") or 7.0)
    return {
        "frames_per_shot": 129, "height": 720, "width": 1280, "fps": 24.0,
        "text_length": 257,  # the pooled text, then HunyuanVideoPipeline's 256 tokens
        "level_shift": shift, "method_params": {"shift": shift},
    }  # fmt: skip


def _latte_settings(config: Mapping[str, Any], scheduler: Mapping[str, Any]) -> dict[str, Any]:
    size = 8 * config["sample_size"]
    return {
        "frames_per_shot": config["video_length"], "height": size, "width": size, "fps": 8.0,
        "text_length": 120,  # LattePipeline's own constant
        "level_shift": 1.0, "method_params": {"shift": 1.0},
    }  # fmt: skip


def _svd_settings(config: Mapping[str, Any], scheduler: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "method": "svd", "frames_per_shot": config["num_frames"], "height": 576, "width": 1024, "fps": 7.0,
        "text_length": 77,  # CLIP's, of a text encoder beside the image encoder
        "level_shift": 1.0,
    }  # fmt: skip


def _svd_surroundings(path: Path, fps: float) -> dict[str, Any]:
    """The width of texts, where a text encoder lies in the folder, the VAE's scaling factor and the rate of clips."""
    text, vae = path / "text_encoder" / "config.json", path / "vae" / "config.json"
    found: dict[str, Any] = {"fps": fps}
    if text.is_file():
        found["text_width"] = text_width(json.loads(text.read_text()))
    if vae.is_file():
        found["latent_scale"] = float(json.loads(vae.read_text())["scaling_factor"])
    return found


def _square_patch(config: Mapping[str, Any]) -> int:
    return config["patch_size"]


FAMILIES: dict[FamilyName, Family] = {
    "wan": Family(
        "WanPipeline", WanTransformer3DModel, AutoencoderKLWan, _wan, _wan_settings,
        lambda config: config["patch_size"][1],
        index={"boundary_ratio": None, "expand_timesteps": False, "transformer_2": [None, None]},
    ),
    "cogvideox": Family(
        "CogVideoXPipeline", CogVideoXTransformer3DModel, AutoencoderKLCogVideoX, _cogvideox, _cogvideox_settings,
        _square_patch, text_style=TextStyle(padded=True),
    ),
    "latte": Family(
        "LattePipeline", LatteTransformer3DModel, AutoencoderKL, LatteBackbone, _latte_settings,
        _square_patch, text_style=TextStyle(lowercase=True),
    ),
    "hunyuan": Family(
        "HunyuanVideoPipeline", HunyuanVideoTransformer3DModel, AutoencoderKLHunyuanVideo, _hunyuan, _hunyuan_settings,
        _square_patch, text_style=TextStyle(pooled=True),
        folders={
            "backbone": ("transformer",), "codec": ("vae",),
            "text": ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        },
    ),
    "svd": Family(
        "StableVideoDiffusionPipeline", UNetSpatioTemporalConditionModel, AutoencoderKLTemporalDecoder, SVDBackbone,
        _svd_settings, lambda config: 2 ** (len(config["block_out_channels"]) - 1),  # halved so often, and brought back
        folders={
            "backbone": ("unet",), "codec": ("vae",), "text": ("text_encoder", "tokenizer"),
            "image": ("image_encoder", "feature_extractor"),
        },
        optional=frozenset({"text"}), surroundings=_svd_surroundings,
    ),
}  # fmt: skip

# pipelines whose classes Shotloom knows and whose folders it does not open: why, and what to use instead
REFUSED = {
    "HunyuanVideoImageToVideoPipeline": "it takes its image beside the noisy latents; use the text-to-video model, "
    "which learns image conditions as clean frames (method fvdm)",
    "CogVideoXImageToVideoPipeline": "it takes its image beside the noisy latents; use the text-to-video model, which "
    "learns image conditions as clean frames (method fvdm)",
    "WanImageToVideoPipeline": "it takes its image beside the noisy latents; use the text-to-video model, which learns "
    "image conditions as clean frames (method fvdm)",
}


def boundary_of(index: Mapping[str, Any]) -> float | None:
    """Where the two experts of a folder's model take turns, from its model_index.json; None for a single model.

    ValueError for half of what makes a pair: a second model without a boundary, or a boundary without a second model.
    """
    second = any(index.get(EXPERT_FOLDERS["low"]) or ())
    boundary = index.get("boundary_ratio")
    if not second and boundary is None:
        return None
    if not second or boundary is None or not 0 < boundary < 1:
        raise ValueError(
            f"boundary_ratio is {boundary} and transformer_2 {index.get('transformer_2')}: two experts need both, the "
            "boundary between 0 and 1 (Wan 2.2 T2V-A14B: 0.875), and a single model needs neither"
        )
    return float(boundary)


def folders_of(family: Family, part: Part, index: Mapping[str, Any]) -> tuple[str, ...]:
    """The folders of a part in a model folder with this model_index.json; none of a part that the family has not."""
    second = part == "backbone" and boundary_of(index) is not None
    found = family.folders.get(part, ())
    return (*found, EXPERT_FOLDERS["low"]) if second else found


def lies_in(path: Path, family: Family, part: Part) -> bool:
    """Whether a model folder is to hold this part: all that its family has, optional ones where there is any of it."""
    folders = family.folders.get(part, ())
    return bool(folders) and (part not in family.optional or any((path / name).is_dir() for name in folders))


def family_of_pipeline(name: str | None) -> FamilyName:
    """The family whose folders a diffusers pipeline opens; ValueError with the reason if there is none."""
    for family, found in FAMILIES.items():
        if found.pipeline == name:
            return family
    known = ", ".join(family.pipeline for family in FAMILIES.values())
    reason = f": {REFUSED[name]}" if name in REFUSED else ""
    raise ValueError(f"_class_name is {name!r}, supported are {known}{reason}")

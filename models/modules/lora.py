"""LoRA (Hu et al., 2106.09685) on a backbone's transformer, through peft, in files that diffusers reads and writes.

`load_lora_weights(folder)` of the model's diffusers pipeline opens what `save_lora` wrote, and `load_lora` opens what
diffusers wrote. So only models that diffusers itself reads a LoRA for can have one; Latte and SVD are not among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open

from models.backbones.base import Backbone

PREFIX = "transformer"


def inject_lora(
    backbone: Backbone, rank: int, alpha: int, targets: Sequence[str] | None = None, seed: int = 0
) -> list[str]:
    """Freeze the backbone and add trainable low-rank layers, W + alpha/rank * B A; returns their parameter names.

    B starts at zero, so the backbone computes what it did. `targets` are the backbone's `lora_targets` unless given.
    Raises ValueError when a target matches no layer, and for a model that diffusers reads no LoRA for.
    """
    transformer, targets = _transformer(backbone), backbone.lora_targets if targets is None else targets
    if rank < 1:
        raise ValueError(f"LoRA rank is {rank}, expected at least 1")
    layers = [name for name, _ in transformer.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            usual = ", ".join(backbone.lora_targets)
            raise ValueError(f"LoRA target {target!r} matches no layer; the usual ones are {usual}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)))
    return [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]


def save_lora(backbone: Backbone, folder: Path | str) -> Path:
    """Write `pytorch_lora_weights.safetensors` with rank and alpha to `folder`; returns the file."""
    from diffusers import WanPipeline

    transformer = _transformer(backbone)
    if not getattr(transformer, "peft_config", None):
        raise ValueError("the backbone has no LoRA layers to save")
    config = transformer.peft_config["default"].to_dict()
    WanPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata={k: sorted(v) if isinstance(v, set) else v for k, v in config.items()},
    )
    return Path(folder) / LORA_WEIGHT_NAME_SAFE


def load_lora(backbone: Backbone, file: Path | str) -> None:
    """Add the LoRA of a safetensors file (or of a folder that holds one) to a backbone that has none.

    The rest of the backbone is frozen, so that training goes on where it was.
    """
    transformer, file = _transformer(backbone), Path(file)
    file = file / LORA_WEIGHT_NAME_SAFE if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: a LoRA folder holds {LORA_WEIGHT_NAME_SAFE}")
    with safe_open(file, "pt") as tensors:
        names = list(tensors.keys())
    if not any(name.startswith(f"{PREFIX}.") for name in names):
        raise ValueError(f"{file}: holds no weights named {PREFIX}.*; its first is {names[:1]}")
    transformer.load_lora_adapter(file.parent, weight_name=file.name, prefix=PREFIX, local_files_only=True)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_("lora_" in name)


def merge_lora(backbone: Backbone, scale: float = 1.0) -> None:
    """Add `scale` times the low-rank weights to the frozen ones and remove the LoRA layers.

    It is a plain model again, all trainable. A scale below 1 samples nearer to the base (TIC-FT's authors: 0.75).
    """
    transformer = _transformer(backbone)
    transformer.fuse_lora(lora_scale=scale)
    transformer.unload_lora()
    backbone.requires_grad_(True)


def _transformer(backbone: Backbone) -> Any:
    if len(models := backbone.models_by_folder) > 1:
        raise ValueError(f"a LoRA is of one model, this backbone has {len(models)}: load_model(path, expert='high')")
    (transformer,) = models.values()
    if not isinstance(transformer, PeftAdapterMixin):
        raise ValueError(f"{type(backbone).__name__}: diffusers reads no LoRA for this model; train all its weights")
    return transformer

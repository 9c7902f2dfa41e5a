"""LoRA (Hu et al., 2106.09685) on a backbone's transformer, through peft, in files that diffusers reads and writes.

`WanPipeline.load_lora_weights(folder)` opens what `save_lora` wrote, and `load_lora` opens what diffusers wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open

from models.backbones.wan import WanBackbone

# all linear layers of a block's two attentions and its feed-forward, as in Pusa
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
PREFIX = "transformer"


def inject_lora(
    backbone: WanBackbone, rank: int, alpha: int, targets: Sequence[str] = TARGETS, seed: int = 0
) -> list[str]:
    """Freeze the backbone and add trainable low-rank layers, W + alpha/rank * B A; returns their parameter names.

    B starts at zero, so the backbone computes what it did. Raises ValueError when a target matches no layer.
    """
    if rank < 1:
        raise ValueError(f"LoRA rank is {rank}, expected at least 1")
    layers = [name for name, _ in backbone.transformer.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            raise ValueError(f"LoRA target {target!r} matches no layer; the usual ones are {', '.join(TARGETS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)))
    return [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]


def save_lora(backbone: WanBackbone, folder: Path | str) -> Path:
    """Write `pytorch_lora_weights.safetensors` with rank and alpha to `folder`; returns the file."""
    from diffusers import WanPipeline

    transformer = backbone.transformer
    if not getattr(transformer, "peft_config", None):
        raise ValueError("the backbone has no LoRA layers to save")
    config = transformer.peft_config["default"].to_dict()
    WanPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata={k: sorted(v) if isinstance(v, set) else v for k, v in config.items()},
    )
    return Path(folder) / LORA_WEIGHT_NAME_SAFE


def load_lora(backbone: WanBackbone, file: Path | str) -> None:
    """Add the LoRA of a safetensors file (or of a folder that holds one) to a backbone that has none.

    The rest of the backbone is frozen, so that training goes on where it was.
    """
    file = Path(file)
    file = file / LORA_WEIGHT_NAME_SAFE if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: a LoRA folder holds {LORA_WEIGHT_NAME_SAFE}")
    with safe_open(file, "pt") as tensors:
        names = list(tensors.keys())
    if not any(name.startswith(f"{PREFIX}.") for name in names):
        raise ValueError(f"{file}: holds no weights named {PREFIX}.*; its first is {names[:1]}")
    backbone.transformer.load_lora_adapter(file.parent, weight_name=file.name, prefix=PREFIX, local_files_only=True)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_("lora_" in name)


def merge_lora(backbone: WanBackbone) -> None:
    """Add the low-rank weights to the frozen ones and remove the LoRA layers: a plain model again, all trainable."""
    backbone.transformer.fuse_lora()
    backbone.transformer.unload_lora()
    backbone.requires_grad_(True)

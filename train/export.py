"""From trained weights to a model folder, and to a LoRA file that diffusers opens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.folder import load_model, save_model
from models.methods.base import Method
from models.modules.lora import inject_lora, merge_lora, save_lora
from train.job import TrainJob
from train.metrics import last_evaluation


def full_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU from this rank's shards; a collective that every rank must join."""
    return {name: (w.full_tensor() if isinstance(w, DTensor) else w).detach().cpu() for name, w in weights.items()}


def load_weights(backbone: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy `weights` into the parameters of the same names; ValueError if `backbone` lacks one."""
    parameters = dict(backbone.named_parameters())
    if missing := sorted(set(weights) - set(parameters)):
        raise ValueError(f"the model has no parameter {missing[0]!r} ({len(missing)} such names in all)")
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)


def export_model(job: TrainJob, weights: Mapping[str, Tensor], method: Method, step: int) -> None:
    """Write `run_dir/model`, a whole model folder, and for LoRA `run_dir/lora` as well (or alone, if not to be merged).

    The folder's settings are those of the model that training started from, with this job's method and a record of how
    the weights came about.
    """
    model = load_model(job.model, parts=("backbone",), device="cpu", dtype=torch.float32, expert=job.expert)
    if job.lora:
        inject_lora(model.backbone, job.lora.rank, job.lora.alpha, job.lora.targets)
    method.attach(model.backbone)
    load_weights(model.backbone, weights)
    if job.lora:
        save_lora(model.backbone, job.run_dir / "lora")
        if not job.lora.merge:
            return
        merge_lora(model.backbone, job.lora.merge_scale)
    settings = replace(
        model.settings,
        method=method.name,
        method_params=method.config(),
        text_positions=method.places_text(model.backbone.capabilities),
        train={"started_from": model.settings.train, "run": training_record(job, step)},
    )
    save_model(job.run_dir / "model", model, settings, copy_parts_from=job.model)


def training_record(job: TrainJob, step: int) -> dict[str, Any]:
    """What a reader of `shotloom.json` wants to know of the run; names of folders, not where they lie."""
    held_out = job.held_out
    return {
        "model": job.model.name,
        "dataset": job.dataset.name,
        "steps": step,
        "batch_size": job.batch_size * job.loop.accumulate,
        "learning_rate": job.loop.learning_rate,
        "seed": job.loop.seed,
        "shots_per_scene": job.shots_per_scene,
        "single_shot_prob": job.single_shot_prob,
        "lora_rank": job.lora.rank if job.lora else 0,
        "lora_scale": job.lora.merge_scale if job.lora else 0.0,
        **({"expert": job.expert} if job.expert else {}),
    } | (
        {
            "held_out_share": held_out.share,
            "held_out_dataset": held_out.dataset.name if held_out.dataset else "",
            "held_out": last_evaluation(job.run_dir / "metrics.jsonl"),
        }
        if held_out
        else {}
    )

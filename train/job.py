"""What a training job is: typed, picklable, the same in this process and in every Ray Train worker."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from models.experts import ExpertName
from train.loop import LoopSettings
from train.scenes import Latents
from train.text_drop import TextDrop


@dataclass(frozen=True)
class Lora:
    """Train rank-`rank` updates of the backbone's linear layers named `targets` instead of all weights."""

    rank: int
    alpha: int
    targets: tuple[str, ...]
    merge: bool = True  # export a whole model folder, too
    merge_scale: float = 1.0  # strength of the updates in that folder


@dataclass(frozen=True)
class HeldOut:
    """Scenes to measure the loss on: a `share` of the dataset's, by their ids, or those of another dataset."""

    share: float = 0.0
    dataset: Path | None = None
    batches: int = 4


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Everything a worker needs to know. `batch_size` is that of a micro-batch, over all workers."""

    model: Path
    dataset: Path
    run_dir: Path
    loop: LoopSettings
    null_text: Tensor  # [L,D], what a dropped text is replaced by (`models.text.null_text`)
    text_hash: str  # of the text encoder of `model`; the dataset must have been made with it
    method: str
    image_hash: str | None = None  # of the image encoder of `model`, alike; None: it has none
    method_params: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 8
    shots_per_scene: int = 3
    single_shot_prob: float = 0.0
    text_drop: TextDrop = field(default_factory=TextDrop)
    latents: Latents = "sample"
    lora: Lora | None = None
    expert: ExpertName | None = None  # which of a Wan 2.2 A14B's two models; None: the model is one
    parallel: Literal["one_device", "fsdp2"] = "one_device"
    activation_checkpointing: bool = False
    compile_blocks: bool = False
    held_out: HeldOut | None = None  # None: no held-out loss; how often is the loop's `evaluate_every`

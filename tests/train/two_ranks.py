"""What the two processes of test_parallel run; a module of its own, so that a spawned process can import it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from models.methods import get_method
from models.tiny import TEXT_DIM
from tests.train.tiny import TEXT_LENGTH, tiny_backbone
from train.batches import LatentCache
from train.checkpoint import Checkpoints
from train.export import full_weights
from train.job import TrainJob
from train.loop import LoopSettings, run_loop
from train.optim import local
from train.parallel import prepare, this_rank

SETTINGS = LoopSettings(
    steps=4, learning_rate=3e-3, warmup_steps=2, checkpoint_every=2, log_every=1, grad_clip=0.5, accumulate=2
)


def train(
    cache_file: Path,
    run_dir: Path,
    settings: LoopSettings,
    sharded: bool,
    checkpoints: Checkpoints | None = None,
    on_log: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Run the loop as this rank; returns the whole averaged weights."""
    torch.set_num_threads(1)
    parallel = this_rank(sharded)
    method = get_method("fvdm", shift=3.0)
    backbone = prepare(tiny_backbone(), parallel, precision=settings.precision, activation_checkpointing=sharded)
    whole = [p.shape for p in tiny_backbone().parameters()]
    held = [local(p).numel() for p in backbone.parameters()]
    assert not sharded or sum(held) < 0.6 * sum(shape.numel() for shape in whole), "the model is not sharded"
    source = LatentCache(
        [cache_file],
        batch_size=2,
        text_length=TEXT_LENGTH,
        null_text=torch.zeros(TEXT_LENGTH, TEXT_DIM),
        layout_for=method.layout_for_training,
    )
    result = run_loop(
        backbone, method, source, settings, run_dir, parallel=parallel, checkpoints=checkpoints, on_log=on_log
    )
    return full_weights(result.average)


def ray_worker(job: TrainJob, checkpoints: Checkpoints) -> None:
    """A Ray Train worker; rank 0 dies without a word at step 7 of the first attempt. `job.dataset` is a cache file."""
    first_attempt = not (job.run_dir / "died").exists()

    def die(line: dict[str, Any]) -> None:
        if first_attempt and line["step"] == 7:
            (job.run_dir / "died").touch()
            os._exit(1)

    weights = train(job.dataset, job.run_dir, job.loop, True, checkpoints, die)
    if dist.get_rank() == 0:
        torch.save(weights, job.run_dir / "weights.pt")


def rank_main(rank: int, port: int, cache_file: Path, folder: Path) -> None:
    """Three runs over two ranks: from the start, from a one-device checkpoint, and in bfloat16."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    runs = {"two": SETTINGS, "one-two": replace(SETTINGS, steps=8), "two-bf16": replace(SETTINGS, precision="bf16")}
    for name, settings in runs.items():
        weights = train(cache_file, folder / name, settings, sharded=True)
        if rank == 0:
            torch.save(weights, folder / f"{name}.pt")
    dist.destroy_process_group()

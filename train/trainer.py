"""One training job, in this process (`num_workers=0`) or in Ray Train workers: the same function, the same run folder.

Run folder (seen by every worker): `checkpoints/step-000100/`, `metrics.jsonl`, `tensorboard/`, `model/`. A run that was
stopped, however, goes on from its newest whole checkpoint when the job is started again, at any number of workers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from infra.machine import usable_cores
from models.folder import load_model
from models.methods import get_method
from models.modules.lora import inject_lora
from train.checkpoint import Checkpoints, latest, prune, step_name
from train.export import export_model, full_weights
from train.job import TrainJob
from train.loop import LoopResult, run_loop
from train.parallel import prepare, this_rank
from train.scenes import ShardDataset

WORKER_RESTARTS = 3
Worker = Callable[[TrainJob, Checkpoints], Any]


def fit(job: TrainJob, num_workers: int, worker: Worker | None = None) -> tuple[int, Path]:
    """Run the job to its last step; returns (step, newest checkpoint).

    Args:
        num_workers: 0 = in this process, without Ray (to debug); n = n Ray Train workers, which restart together from
            the newest checkpoint when one dies, three times at most.
        worker: what each worker runs; `train_worker` unless told.
    Raises:
        ray.train.TrainingFailedError: a worker failed more often than that; the cause is in its message.
    """
    worker, root = worker or train_worker, job.run_dir / "checkpoints"
    if num_workers == 0:
        worker(job, Checkpoints(root, job.loop.keep_checkpoints))
    else:
        _fit_with_ray(job, num_workers, worker)
        prune(root, job.loop.keep_checkpoints)
    found = latest(root)
    if found is None:
        raise RuntimeError(f"{root}: training ended without a checkpoint")
    return found


def train_worker(
    job: TrainJob, checkpoints: Checkpoints, on_log: Callable[[dict[str, Any]], None] | None = None
) -> LoopResult:
    """What each worker does: load, shard, train, and on rank 0 export the averaged weights to `run_dir/model`."""
    parallel = this_rank(sharded=job.parallel == "fsdp2")
    model = load_model(job.model, parts=("backbone", "codec"), device="cpu", dtype=torch.float32)
    backbone, codec = model.backbone, model.codec
    method = get_method(job.method, **job.method_params)
    source = ShardDataset(
        job.dataset,
        batch_size=job.batch_size,
        text_length=model.settings.text_length,
        null_text=job.null_text,
        layout_for=method.layout_for_training,
        normalize=codec.normalize,
        made_with=(codec.hash, job.text_hash),
        shots_per_scene=job.shots_per_scene,
        single_shot_prob=job.single_shot_prob,
        text_drop=job.text_drop,
        latents=job.latents,
        seed=job.loop.seed,
    )
    if job.lora:
        inject_lora(backbone, job.lora.rank, job.lora.alpha, job.lora.targets, seed=job.loop.seed)
    prepare(
        backbone,
        parallel,
        precision=job.loop.precision,
        activation_checkpointing=job.activation_checkpointing,
        compile_blocks=job.compile_blocks,
    )
    result = run_loop(
        backbone, method, source, job.loop, job.run_dir, parallel=parallel, checkpoints=checkpoints, on_log=on_log
    )
    weights = full_weights(result.average)
    if parallel.rank == 0:
        export_model(job, weights, method, result.step)
    return result


def _fit_with_ray(job: TrainJob, num_workers: int, worker: Worker) -> None:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    job.run_dir.mkdir(parents=True, exist_ok=True)
    # The checkpoints themselves are the record; Ray's list of them would be wrong after a run without Ray in between.
    (job.run_dir / "checkpoints" / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
    gpu = torch.cuda.is_available()
    TorchTrainer(
        _in_ray_worker,
        train_loop_config={"job": job, "worker": worker},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=gpu),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=str(job.run_dir.resolve()),
            failure_config=FailureConfig(max_failures=WORKER_RESTARTS),
            checkpoint_config=CheckpointConfig(num_to_keep=job.loop.keep_checkpoints),
        ),
    ).fit()


def _in_ray_worker(config: dict[str, Any]) -> None:
    """Hand checkpoints to Ray, which uploads, counts and prunes them; figures never go this way (2 s per report)."""
    from ray import train

    if torch.cuda.is_available():
        from ray.train.torch import get_device

        torch.cuda.set_device(get_device())
    else:  # Ray limits each worker to one thread
        torch.set_num_threads(max(usable_cores() // train.get_context().get_local_world_size(), 1))

    def report(folder: Path, step: int) -> None:
        train.report(
            {"step": step},
            checkpoint=train.Checkpoint.from_directory(str(folder)),
            checkpoint_dir_name=step_name(step),
            checkpoint_upload_mode=train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )

    job: TrainJob = config["job"]
    scratch = Path(tempfile.mkdtemp(prefix="shotloom-checkpoint-"))
    config["worker"](job, Checkpoints(job.run_dir / "checkpoints", job.loop.keep_checkpoints, report, scratch))

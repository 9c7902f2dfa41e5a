"""One training job, in this process (`num_workers=0`) or in Ray Train workers: the same function, the same run folder.

Run folder (seen by every worker): `checkpoints/step-000100/`, `metrics.jsonl`, `tensorboard/`, `model/`. A run that was
stopped, however, goes on from its newest whole checkpoint when the job is started again, at any number of workers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from infra.log import get_logger
from infra.machine import usable_cores
from models.backbones.base import Backbone
from models.folder import Model, check_expert, load_model
from models.methods import Method, get_method
from models.modules.lora import inject_lora
from train.checkpoint import Checkpoints, identity_of, latest, prune, remove_unfinished, step_name
from train.evaluate import HeldOutLoss
from train.export import export_model, full_weights
from train.job import TrainJob
from train.loop import LoopResult, run_loop
from train.parallel import prepare, this_rank
from train.scenes import ShardDataset, check_states_seen
from train.text_drop import TextDrop

WORKER_RESTARTS = 3
LEVELS = ("shift", "density")  # parameters that a method can leave to the model
ERROR_FILE = "error.txt"  # in the run folder; why the last start under Ray gave up
# what a restart would only repeat; a dead peer shows as RuntimeError, a full disk as OSError
HOPELESS = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError, FileNotFoundError)


class TrainingError(ValueError):
    """The job cannot go on; the message is the worker's error."""


Worker = Callable[[TrainJob, Checkpoints], Any]


def fit(job: TrainJob, num_workers: int, worker: Worker | None = None) -> tuple[int, Path]:
    """Run the job to its last step; returns (step, newest checkpoint).

    Args:
        num_workers: 0 = in this process, without Ray (to debug); n = n Ray Train workers, which restart together from
            the newest checkpoint when one dies, three times at most.
        worker: what each worker runs; `train_worker` unless told.
    Raises:
        TrainingError: the job cannot go on, whoever runs it: bad data, a loss that is not finite.
        ray.train.TrainingFailedError: workers died more often than that; the cause is in its message.
    """
    worker, root = worker or train_worker, job.run_dir / "checkpoints"
    if num_workers == 0:
        worker(job, Checkpoints(root, job.loop.keep_checkpoints))
    else:
        _fit_with_ray(job, num_workers, worker)
    found = latest(root)
    if found is None:
        raise RuntimeError(f"{root}: training ended without a checkpoint")
    remove_unfinished(root, found[0])
    prune(root, job.loop.keep_checkpoints)
    return found


def train_worker(job: TrainJob, checkpoints: Checkpoints) -> LoopResult:
    """What each worker does: load, shard, train, and on rank 0 export the averaged weights to `run_dir/model`."""
    parallel = this_rank(sharded=job.parallel == "fsdp2")
    check_expert(job.model, job.expert)
    model = load_model(job.model, ("backbone", "codec"), device="cpu", dtype=torch.float32, expert=job.expert)
    backbone, codec = model.backbone, model.codec
    method = method_of(job, model, checkpoints.root)
    method.check_backbone(backbone.capabilities)
    method.check_process(backbone.process)
    check_image(method, backbone)
    held_out = job.held_out
    if method.most_states:
        for folder in (job.dataset, *([held_out.dataset] if held_out and held_out.dataset else [])):
            check_states_seen(folder, codec.temporal_stride * (method.first_frames - 1) + 1)
    check_text_positions(job, method, model)
    if job.lora:
        inject_lora(backbone, job.lora.rank, job.lora.alpha, job.lora.targets, seed=job.loop.seed)
    method.attach(backbone, seed=job.loop.seed)
    if backbone.expert is not None and backbone.conditioner is not None:
        raise ValueError(
            f"method {method.name!r} ({job.method_params}) trains modules of its own, which belong to one model, and "
            f"{job.model} has two experts; use a model of one"
        )
    if job.lora and not job.lora.merge and backbone.conditioner is not None:
        raise ValueError(
            f"lora.merge=false leaves a LoRA file alone, but method {method.name!r} trains modules of its own, which "
            "only a model folder holds: set lora.merge=true"
        )
    open_dataset = partial(
        ShardDataset,
        batch_size=job.batch_size,
        text_length=model.settings.text_length,
        null_text=job.null_text,
        layout_for=method.layout_for_training,
        condition_frames=method.condition_frames if method.reads_references else None,
        normalize=codec.normalize,
        made_with=(codec.hash, job.text_hash),
        image_hash=job.image_hash,
        most_states=method.most_states,
        classes=method.classes,
        given_frames=method.first_frames if "tvp" in method.tasks or "image" in method.guided else 0,
        given_alone=not codec.causal,
        shots_per_scene=job.shots_per_scene,
        single_shot_prob=job.single_shot_prob,
        latents=job.latents,
        story_group=method.story_group,
        seed=job.loop.seed,
    )
    source = open_dataset(
        job.dataset,
        loses_given="image" in method.guided,
        needs_both=method.image_guidance != 1 and "given" not in method.drops,
        text_drop=job.text_drop,
        single_frame_prob=method.single_frame_share(),
        held_out_share=held_out.share if held_out else 0.0,
    )
    evaluate = None
    if held_out:  # no sample loses its text, no shot is replaced by a frame
        apart = open_dataset(
            held_out.dataset or job.dataset,
            text_drop=TextDrop(0.0),
            held_out_share=held_out.share,
            held_out=held_out.dataset is None,
        )
        if both := sorted({record.key for record in apart.records} & {record.key for record in source.records}):
            raise ValueError(
                f"held_out.dataset is {held_out.dataset}, but {len(both)} of its scenes are trained on, such as "
                f"{both[0]!r}: give a dataset of other scenes, or set held_out.share instead"
            )
        evaluate = HeldOutLoss(apart, method, batches=held_out.batches, parallel=parallel)
    prepare(
        backbone,
        parallel,
        precision=job.loop.precision,
        activation_checkpointing=job.activation_checkpointing,
        compile_blocks=job.compile_blocks,
    )
    result = run_loop(
        backbone, method, source, job.loop, job.run_dir, parallel=parallel, checkpoints=checkpoints, evaluate=evaluate
    )
    weights = full_weights(result.average)
    if parallel.rank == 0:
        export_model(job, weights, method, result.step)
    return result


def method_of(job: TrainJob, model: Model, checkpoints: Path) -> Method:
    """The method of a job with what it leaves to the model to train; a run that was begun keeps what it began with."""
    asked = get_method(job.method, **job.method_params)
    method = asked.for_model(model.backbone.process, model.settings.level_shift, causal_vae=model.codec.causal)
    begun = identity_of(checkpoints)
    known = begun.get("method_params", {}) if begun.get("method") == job.method else {}
    kept = {name: known[name] for name in LEVELS if getattr(asked, name) is None and known.get(name) is not None}
    for name, value in kept.items():
        if value != (own := getattr(method, name)):
            get_logger("train").warning(f"{name}={value}, as this run began; a new one on this model takes {own}")
    return replace(method, **kept)


def check_image(method: Method, backbone: Backbone) -> None:
    """Raises ValueError where a model starts from an image beside its frames, of which the method would not tell it.

    Method svd is told the image alone, which prepared datasets, made of texts, are not for.
    """
    if backbone.capabilities.image_beside and method.reads_image != "with_text":
        raise ValueError(
            f"method {method.name!r} does not train this model, a Stable Video Diffusion, on a prepared dataset: use "
            "method aid (method_params.image=concat) or fvdm (method_params.image_beside=true), or train it from "
            "Python (method svd)"
        )


def check_text_positions(job: TrainJob, method: Method, model: Model) -> None:
    """Raises ValueError where scenes would be the first to show this model positions on its text.

    Few models have text positions from pretraining; LCT (2503.10589) introduces them by a short tune on single shots.
    """
    if not method.places_text(model.backbone.capabilities) or model.settings.text_positions:
        return
    if job.single_shot_prob < 1 and (job.shots_per_scene > 1 or method.story_group):
        raise ValueError(
            f"position_mode is 'diagonal', which gives positions to text, but {job.model} was never trained with any: "
            "first train it for a short while on single shots alone (single_shot_prob=1, as in "
            "pipelines/configs/train_text_rope_cogvideox.yaml) and start from the model that leaves, or use "
            "method_params.position_mode=time_gap"
        )


def _fit_with_ray(job: TrainJob, num_workers: int, worker: Worker) -> None:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    root, error = job.run_dir / "checkpoints", job.run_dir / ERROR_FILE
    root.mkdir(parents=True, exist_ok=True)
    error.unlink(missing_ok=True)
    # The checkpoints themselves are the record; Ray's list of them would be wrong after a run without Ray in between.
    (root / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
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
    if error.exists():
        raise TrainingError(error.read_text())


def _in_ray_worker(config: dict[str, Any]) -> None:
    """Run the worker; an error that a restart would only repeat is left in a file, and restarted workers go home."""
    from ray import train

    job: TrainJob = config["job"]
    error_file, rank = job.run_dir / ERROR_FILE, train.get_context().get_world_rank()
    if error_file.exists():
        return
    if torch.cuda.is_available():
        from ray.train.torch import get_device

        torch.cuda.set_device(get_device())
    else:  # Ray limits each worker to one thread
        torch.set_num_threads(max(usable_cores() // train.get_context().get_local_world_size(), 1))

    root = job.run_dir / "checkpoints"
    checkpoints = Checkpoints(root, job.loop.keep_checkpoints, _report_to_ray, scratch=root / f".writing-rank-{rank}")
    try:
        config["worker"](job, checkpoints)
    except HOPELESS as error:
        error_file.write_text(f"{type(error).__name__}: {error}")
        raise


def _report_to_ray(folder: Path, step: int) -> None:
    """Let Ray upload, count and prune a checkpoint. Figures never go this way: a report costs 2 s."""
    from ray import train

    train.report(
        {"step": step},
        checkpoint=train.Checkpoint.from_directory(str(folder)),
        checkpoint_dir_name=step_name(step),
        checkpoint_upload_mode=train.CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )

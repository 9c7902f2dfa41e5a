"""`shotloom train`: fine-tune a model folder on a prepared dataset with one of the methods.

    prepared dataset + model folder -> run folder with checkpoints/, metrics.jsonl, tensorboard/ and model/

The model folder it leaves is read by plain diffusers and by `shotloom sample`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from infra.knobs import knob, required

if TYPE_CHECKING:
    from infra.log import Progress
    from train.job import TrainJob


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank updates instead of all weights."""

    rank: int = knob(0, "rank of the updates; 0 = train all weights")
    alpha: int = knob(16, "updates are scaled by alpha / rank")
    targets: list[str] = knob(["to_q", "to_k", "to_v", "to_out.0"], "names of the linear layers to update")
    merge: bool = knob(True, "also write a whole model folder with the updates added; false = only the LoRA file")
    merge_scale: float = knob(1.0, "strength of the updates in that folder; the authors of TIC-FT sample at 0.75")


@dataclass(kw_only=True)
class TextDropConfig:
    """Texts left out at random, so that guidance can do without them at sampling; at most one layer per sample."""

    everything: float = knob(0.1, "share of samples without any text")
    story: float = knob(0.0, "share without the story, only the shots' prompts")
    prompts: float = knob(0.0, "share without the shots' prompts, only the story")
    given: float = knob(0.0, "aid, fca: share without the given frames, only text")
    both: float = knob(0.0, "aid, fca: share without text and given frames; guidance by both needs it")
    shots: float = knob(0.0, "share of scenes in which about half of the shots have no text: they follow the others")


@dataclass(kw_only=True)
class HeldOutConfig:
    """The loss on scenes that are never trained on, at a few noise levels; off unless `share` or `dataset` is set."""

    share: float = knob(0.0, "share of the dataset's scenes, chosen by their ids, to keep out of training; 0 = none")
    dataset: Path | None = knob(None, "a second prepared dataset, whose scenes are measured instead")
    every: int = knob(100, "steps between measurements; the last step is always measured")
    batches: int = knob(4, "batches of held-out scenes per measurement")

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"held_out.share={self.share}: expected at least 0 and less than 1")
        if self.share and self.dataset:
            raise ValueError(f"held_out.share={self.share} and held_out.dataset={self.dataset}: set one of them")
        if self.every < 1 or self.batches < 1:
            raise ValueError(f"held_out.every={self.every}, held_out.batches={self.batches}: expected at least 1")


@dataclass(kw_only=True)
class TrainConfig:
    """All that `shotloom train` can be told."""

    dataset: Path = required("folder that `shotloom prepare` wrote")
    model: Path = required("model folder to start from")
    run_dir: Path = required("folder of this run; started again on the same folder, a run goes on where it was")
    expert: Literal["high", "low"] | None = knob(
        None, "which of a Wan 2.2 A14B's two models to train, each in a run of its own; null = the model has one"
    )
    method: str = knob("lct", "fvdm, lct, tic_ft, fca or aid")
    method_params: dict[str, Any] = knob({}, "parameters of the method; empty = its defaults")
    shots_per_scene: int = knob(
        3, "neighbouring shots per sample; fca takes 1, tic_ft always takes one, after its references"
    )
    single_shot_prob: float = knob(0.25, "share of batches made of single shots")
    latents: Literal["sample", "mean"] = knob("sample", "draw latents from the VAE's posterior, or take its mean")
    text_drop: TextDropConfig = knob(TextDropConfig, "texts left out in training")
    steps: int = knob(1000, "optimizer steps")
    batch_size: int = knob(8, "samples per optimizer step, over all workers")
    accumulate: int = knob(1, "micro-batches per optimizer step; each has batch_size / accumulate samples")
    learning_rate: float = knob(1e-4, "peak learning rate of AdamW")
    warmup_steps: int = knob(50, "steps of linear warm-up")
    lr_schedule: Literal["constant", "cosine"] = knob("constant", "after warm-up; cosine ends at a tenth of the peak")
    weight_decay: float = knob(0.01, "AdamW weight decay of matrices")
    grad_clip: float = knob(1.0, "largest global gradient norm; 0 = no clipping")
    ema_decay: float = knob(0.99, "decay per step of the averaged weights, which are the ones exported")
    precision: Literal["fp32", "bf16"] = knob("fp32", "of matrix products; master weights are always fp32")
    seed: int = knob(0, "of data order, noise and LoRA start")
    num_workers: int = knob(1, "Ray Train workers; 0 = in this process, without Ray")
    parallel: Literal["one_device", "fsdp2"] = knob("one_device", "fsdp2 = shard model and optimizer over the workers")
    activation_checkpointing: bool = knob(False, "recompute blocks in the backward pass: less memory, more time")
    compile: bool = knob(False, "torch.compile each block")
    checkpoint_every: int = knob(100, "steps between checkpoints; 0 = only at the end")
    keep_checkpoints: int = knob(2, "how many of the newest to keep")
    log_every: int = knob(10, "steps between lines of metrics.jsonl and TensorBoard")
    held_out: HeldOutConfig = knob(HeldOutConfig, "measure the loss on scenes that are not trained on")
    lora: LoraConfig = knob(LoraConfig, "low-rank updates instead of all weights")

    def __post_init__(self) -> None:
        if self.batch_size % (self.accumulate * max(self.num_workers, 1)):
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of accumulate={self.accumulate} times "
                f"num_workers={max(self.num_workers, 1)}"
            )
        if self.num_workers > 1 and self.parallel != "fsdp2":
            raise ValueError(f"num_workers={self.num_workers} needs parallel=fsdp2")
        if self.num_workers == 0 and self.parallel != "one_device":
            raise ValueError("num_workers=0 runs in this process: it needs parallel=one_device")


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves behind."""

    model_dir: Path | None  # whole model folder; None for a LoRA that was not to be merged
    lora_dir: Path | None  # holds pytorch_lora_weights.safetensors, which diffusers opens
    steps: int
    losses_path: Path  # metrics.jsonl
    checkpoint: Path
    held_out: dict[str, float]  # the last measurement, {"loss/0.5": ...}; {} if there was none

    def summary(self) -> str:
        """Two lines for the terminal, three with held-out scenes."""
        written = ", ".join(str(folder) for folder in (self.model_dir, self.lora_dir) if folder)
        lines = [f"Trained to step {self.steps}: {written}"]
        if self.held_out:
            figures = ", ".join(f"{name} {value:.4g}" for name, value in self.held_out.items())
            lines.append(f"Held-out scenes: {figures}")
        return "\n".join([*lines, f"Figures: tensorboard --logdir {self.losses_path.parent}"])


def run_train(
    config: TrainConfig,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    on_checkpoint: Callable[[int, Path], None] | None = None,
) -> TrainResult:
    """Train to the last step, from the newest checkpoint of `run_dir` if there is one.

    Needs a Ray session (`infra.ray_session`) unless `num_workers=0`; opens one of its own if none is up.

    Args:
        on_step: called with each line of metrics.jsonl.
        on_checkpoint: called as (step, folder) with each new checkpoint.
    """
    from infra.log import progress
    from infra.ray_session import ray_session
    from train.checkpoint import latest
    from train.metrics import last_evaluation
    from train.trainer import fit
    from train.watch import watching

    job, run_dir = make_job(config), config.run_dir
    with ExitStack() as stack:
        if on_step is None:
            newest = latest(run_dir / "checkpoints")
            bar = stack.enter_context(progress("train", config.steps, done=newest[0] if newest else 0))
            on_step = partial(_show, bar)
        if config.num_workers:
            stack.enter_context(ray_session())
        stack.enter_context(watching(run_dir, on_step, on_checkpoint))
        step, checkpoint = fit(job, config.num_workers)
    return TrainResult(
        run_dir / "model" if not job.lora or job.lora.merge else None,
        run_dir / "lora" if job.lora else None,
        step,
        run_dir / "metrics.jsonl",
        checkpoint,
        last_evaluation(run_dir / "metrics.jsonl") if job.held_out else {},
    )


def _show(bar: Progress, line: dict[str, Any]) -> None:
    bar.update(line["step"], loss=line["loss"], tokens_per_s=line["tokens_per_s"], data_wait=line["data_wait"])


def make_job(config: TrainConfig) -> TrainJob:
    """The job of a config; encodes the empty text with the model's encoder."""
    from models.folder import check_expert, load_model
    from models.methods import get_method
    from models.text import null_text
    from train.job import HeldOut, Lora, TrainJob
    from train.loop import LoopSettings
    from train.shards import shards_of
    from train.text_drop import TextDrop

    check_expert(config.model, config.expert)
    get_method(config.method, **config.method_params)  # both would raise later, with a large text encoder loaded
    shards_of(config.dataset)
    lora, model = config.lora, load_model(config.model, parts=("text", "image"))
    apart = config.held_out
    held_out = HeldOut(apart.share, apart.dataset.resolve() if apart.dataset else None, apart.batches)
    return TrainJob(
        model=config.model.resolve(),
        dataset=config.dataset.resolve(),
        run_dir=config.run_dir.resolve(),
        null_text=null_text(model.text, model.settings.text_length),
        text_hash=model.text.hash,
        image_hash=model.image_encoder.hash if model.reads_images else None,
        method=config.method,
        method_params=config.method_params,
        batch_size=config.batch_size // config.accumulate,
        shots_per_scene=config.shots_per_scene,
        single_shot_prob=config.single_shot_prob,
        text_drop=TextDrop(**vars(config.text_drop)),
        latents=config.latents,
        lora=Lora(lora.rank, lora.alpha, tuple(lora.targets), lora.merge, lora.merge_scale) if lora.rank else None,
        expert=config.expert,
        parallel=config.parallel,
        activation_checkpointing=config.activation_checkpointing,
        compile_blocks=config.compile,
        held_out=held_out if apart.share or apart.dataset else None,
        loop=LoopSettings(
            steps=config.steps,
            learning_rate=config.learning_rate,
            warmup_steps=config.warmup_steps,
            lr_schedule=config.lr_schedule,
            weight_decay=config.weight_decay,
            grad_clip=config.grad_clip,
            accumulate=config.accumulate,
            ema_decay=config.ema_decay,
            precision=config.precision,
            seed=config.seed,
            checkpoint_every=config.checkpoint_every,
            keep_checkpoints=config.keep_checkpoints,
            log_every=config.log_every,
            evaluate_every=apart.every if apart.share or apart.dataset else 0,
        ),
    )

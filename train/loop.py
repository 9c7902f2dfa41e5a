"""The training loop: one for every method, backbone and number of workers.

Draw a noise level per latent frame, noise, predict, weigh per frame, step. Everything random is keyed by the seed and
the sample's number, so a run that was killed and resumed ends with the weights of one that never was, at any number of
workers.

Shapes: B batch, F latent frames, C channels, H W latent size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.backbones.base import Backbone
from models.layout import ClipLayout
from models.methods.base import Method
from models.patches import token_layout
from train.batches import BatchSource, SceneBatch, keyed_generator, keyed_seed, prefetch, whole_tokens
from train.checkpoint import Checkpoints, TrainState
from train.metrics import Tracker, Window
from train.optim import EMA, SCHEDULES, clip_gradients, learning_rate_at, make_optimizer
from train.parallel import Parallel, Precision, sync_gradients, trainable


@dataclass(frozen=True)
class LoopSettings:
    """How to train. Steps are optimizer steps; one takes `accumulate` micro-batches of the source's batch size."""

    steps: int
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    lr_schedule: str = "constant"  # or "cosine", down to a tenth at the last step
    weight_decay: float = 0.01
    grad_clip: float = 1.0  # largest global gradient norm; 0 = no clipping
    accumulate: int = 1
    ema_decay: float = 0.999
    precision: Precision = "fp32"  # "bf16": matrix products in bfloat16, master weights stay float32
    seed: int = 0
    checkpoint_every: int = 500  # steps; 0 = only at the end
    keep_checkpoints: int = 2
    log_every: int = 20
    evaluate_every: int = 0  # steps; 0 = never

    def __post_init__(self) -> None:
        if self.lr_schedule not in SCHEDULES:
            raise ValueError(f"lr_schedule={self.lr_schedule!r}: choose one of {', '.join(SCHEDULES)}")
        if min(self.steps, self.accumulate, self.log_every, self.keep_checkpoints) < 1:
            raise ValueError("steps, accumulate, log_every and keep_checkpoints must be at least 1")


@dataclass(frozen=True)
class LoopResult:
    """What a finished run leaves: its last step and checkpoint, and the averaged weights (sharded as trained)."""

    step: int
    checkpoint: Path
    average: dict[str, Tensor]


def run_loop(
    backbone: Backbone,
    method: Method,
    source: BatchSource,
    settings: LoopSettings,
    run_dir: Path,
    *,
    parallel: Parallel | None = None,
    checkpoints: Checkpoints | None = None,
    evaluate: Callable[[int, Backbone], dict[str, float]] | None = None,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    on_checkpoint: Callable[[int, Path], None] | None = None,
) -> LoopResult:
    """Train `backbone` (after `train.parallel.prepare`) in place to `settings.steps`, from the last checkpoint if any.

    Args:
        evaluate: called every `evaluate_every` steps, on every rank, as (step, backbone holding the averaged weights,
            in eval mode, no gradients); its figures are logged under "eval/".
        on_log: called on rank 0 with each line of metrics.jsonl.
        on_checkpoint: called on rank 0 as (step, folder) after each checkpoint.
    Raises:
        ValueError: the backbone cannot do what the method asks of it.
        FloatingPointError: the loss is not finite; the last checkpoint is from before that.
    """
    # Initialise
    method.check_backbone(backbone.capabilities)
    parallel = parallel or Parallel()
    checkpoints = checkpoints or Checkpoints(run_dir / "checkpoints", settings.keep_checkpoints)
    parameters, patch = trainable(backbone), backbone.capabilities.frames_per_token
    optimizer = make_optimizer(parameters, settings.learning_rate, settings.weight_decay, method.rate_scale)
    ema = EMA(parameters, settings.ema_decay)
    identity = {
        "seed": settings.seed,
        "accumulate": settings.accumulate,
        "method": method.name,
        "method_params": method.config(),
        **source.identity(),
        **({"expert": backbone.expert.name, "boundary": backbone.expert.boundary} if backbone.expert else {}),
    }
    state = TrainState(parameters, ema, optimizer, identity)
    backbone.train()

    # Resume
    start = step = checkpoints.resume(state)
    tracker = Tracker(run_dir, start) if parallel.rank == 0 else None
    rows = parallel.rows(source.batch_size)
    micro = prefetch(source, rows, start * settings.accumulate, settings.steps * settings.accumulate)
    window = Window(parallel)
    checkpoint = checkpoints.path(start)

    # Loop
    for step in range(start + 1, settings.steps + 1):
        torch.manual_seed(keyed_seed(settings.seed, "modules", step, parallel.rank))
        loss_sum, samples, tokens, waited = torch.zeros((), device=parallel.device), 0, 0, 0.0
        for part in range(settings.accumulate):
            before = time.perf_counter()
            batch = whole_tokens(next(micro), patch).to(parallel.device)
            waited += time.perf_counter() - before

            first = ((step - 1) * settings.accumulate + part) * source.batch_size + rows.start
            levels, noise = draw(method, batch, settings.seed, first, backbone.learns_at, patch)
            conditions = given_conditions(method, batch, settings.seed, first)
            sync_gradients(backbone, on=part == settings.accumulate - 1)
            with parallel.autocast(settings.precision):
                losses, errors, weights = clip_losses(backbone, method, batch, levels, noise, conditions)
            loss = losses.mean() / settings.accumulate
            loss.backward()

            loss_sum += loss.detach()
            samples += source.batch_size
            tokens += batch.latents[:, 0].numel() * parallel.world // backbone.pixels_per_token
            window.add_errors(levels, errors.detach(), weights)

        rate = set_learning_rate(optimizer, settings, step - 1)
        grad_norm = clip_gradients(parameters.values(), settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(step - 1)
        window.add_step(loss_sum, grad_norm, samples, tokens, waited)

        # Status
        last = step == settings.steps
        saving = last or _due(step, settings.checkpoint_every)
        evaluating = evaluate is not None and (
            _due(step, settings.evaluate_every) or (last and settings.evaluate_every)
        )
        if not (saving or evaluating or _due(step, settings.log_every)):
            continue
        checkpoint = _publish(checkpoints, parallel, on_checkpoint) or checkpoint
        figures = window.close() | {"lr": rate}
        if not math.isfinite(loss := figures["loss"] + figures["grad_norm"]):
            raise FloatingPointError(f"{run_dir}: loss {loss} by step {step}; last good checkpoint: {checkpoint}")
        if evaluate and evaluating:
            backbone.eval()
            with ema.swapped_in(), torch.no_grad(), parallel.autocast(settings.precision):
                figures |= {f"eval/{name}": value for name, value in evaluate(step, backbone).items()}
            backbone.train()
        if tracker:
            line = tracker.log(step, **figures)
            if on_log:
                on_log(line)

        # Snapshot
        if saving:
            checkpoints.save(step, state)
            if last or not checkpoints.writers:
                checkpoint = _publish(checkpoints, parallel, on_checkpoint) or checkpoint
        window = Window(parallel)
    if tracker:
        tracker.close()
    return LoopResult(step, checkpoint, ema.average)


def set_learning_rate(optimizer: torch.optim.Optimizer, settings: LoopSettings, step: int) -> float:
    """Set and return the rate of 0-based `step`; each group has it times its own scale."""
    rate = learning_rate_at(
        step,
        peak=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        total_steps=settings.steps,
        schedule=settings.lr_schedule,
    )
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_scale"]
    return rate


def draw(
    method: Method,
    batch: SceneBatch,
    seed: int,
    first: int,
    learns_at: Callable[[Tensor], Tensor] | None = None,
    patch: int = 1,
) -> tuple[Tensor, Tensor]:
    """Noise levels [B,F] and noise [B,C,F,H,W], keyed by each sample's number (`first` is that of row 0).

    So a sample gets the same draws however the step is split into micro-batches and workers. `learns_at` is the
    backbone's (`Backbone.learns_at`); None: all levels are its to learn. Where a token holds `patch` latent frames,
    levels are drawn per token.
    """
    numbers = range(first, first + len(batch.latents))
    tokens = token_layout(batch.layout, patch)
    levels = [draw_levels(method, tokens, keyed_generator(seed, "levels", n), learns_at) for n in numbers]
    noise = [torch.randn(batch.latents.shape[1:], generator=keyed_generator(seed, "noise", n)) for n in numbers]
    per_frame = torch.cat(levels).repeat_interleave(patch, dim=1)
    return per_frame.to(batch.latents.device), torch.stack(noise).to(batch.latents.device)


def draw_levels(
    method: Method,
    layout: ClipLayout,
    generator: torch.Generator,
    learns_at: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Levels [1,F] of one sample: the method's, given that the backbone learns there.

    One of two experts so learns what it will be asked in sampling, in the proportions of the method: draws that are the
    other's are thrown away. ValueError if tens of thousands are.
    """
    for count in (1, *[1024] * 64):
        levels = method.sample_levels(layout, count, generator)
        own = levels if learns_at is None else levels[learns_at(method.model_levels(levels))]
        if len(own):
            return own[:1]
    raise ValueError(
        f"method {method.name!r} ({method.config()}) draws no levels for this expert: the highest of "
        f"{layout.num_frames} frames never lies on its side of the boundary; let frames share a level, or take another "
        "density or shift"
    )


def given_conditions(method: Method, batch: SceneBatch, seed: int, first: int) -> dict[str, Tensor]:
    """The method's conditions of a batch, all zeros in the samples that lose them; keyed like `draw`."""
    conditions = all_conditions(method, batch)
    numbers = range(first, first + len(batch.latents))
    for name, share in method.drops.items():
        draws = [torch.rand((), generator=keyed_generator(seed, "condition", name, n)) for n in numbers]
        kept = (torch.stack(draws) >= share).to(conditions[name])
        conditions[name] = conditions[name] * kept.view(-1, *[1] * (conditions[name].ndim - 1))
    if batch.given_lost is not None and "given" in conditions:
        conditions["given"] = conditions["given"] * ~batch.given_lost.view(-1, 1, 1, 1, 1)
    return conditions


def all_conditions(method: Method, batch: SceneBatch) -> dict[str, Tensor]:
    """The method's conditions of a batch, predicted states and image embeddings among them; no sample loses any."""
    clean = batch.latents
    if batch.given is not None:
        clean = torch.cat([batch.given, clean[:, :, batch.given.shape[2] :]], dim=2)
    conditions = method.conditions(clean, batch.layout, batch.labels)
    beside = {"states": batch.states, "embedding": batch.embedding}
    return conditions | {name: value for name, value in beside.items() if value is not None}


def clip_losses(
    backbone: Backbone,
    method: Method,
    batch: SceneBatch,
    levels: Tensor,  # [B,F]
    noise: Tensor,  # [B,C,F,H,W]
    conditions: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """What is minimised, per sample [B]; with it the squared error and the weight of each frame, [B,F]."""
    process, clean = backbone.process, clean_latents(batch, levels)
    weights = frame_weights(method, batch, levels)
    noisy = process.precondition(process.add_noise(clean, noise, levels), levels)
    prepared = method.prepare(backbone, batch.layout, batch.text, conditions)
    seen = {"text": batch.text} | prepared | method.backbone_kwargs(batch.layout)
    prediction = backbone(noisy, method.model_levels(levels), **seen)
    errors = (prediction.float() - process.target(clean, noise, levels)).square().mean(dim=(1, 3, 4))
    return (errors * weights * process.loss_weight(levels)).sum(dim=1), errors, weights


def clean_latents(batch: SceneBatch, levels: Tensor) -> Tensor:
    """The clip [B,C,F,H,W] that is noised to `levels` [B,F]: first frames at level 0 are those that were encoded alone.

    They are given ones, which in sampling know nothing of what is made; cut out of the clip they would (`SceneBatch`).
    """
    if batch.given is None:
        return batch.latents
    count = batch.given.shape[2]
    first, rest = batch.latents[:, :, :count], batch.latents[:, :, count:]
    given = (levels[:, :count] == 0)[:, None, :, None, None]
    return torch.cat([torch.where(given, batch.given, first), rest], dim=2)


def frame_weights(method: Method, batch: SceneBatch, levels: Tensor) -> Tensor:
    """Loss weights [B,F], summing to 1 per sample; 0 for frames at whose level nothing is learnt."""
    weights = method.loss_weights(batch.layout).to(levels) * method.learns(levels)
    return weights / weights.sum(dim=1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)


def _publish(
    checkpoints: Checkpoints, parallel: Parallel, on_checkpoint: Callable[[int, Path], None] | None
) -> Path | None:
    """Make the checkpoint being written visible; returns its folder, None if none is being written."""
    step = checkpoints.finish()
    if step is None:
        return None
    if on_checkpoint and parallel.rank == 0:
        on_checkpoint(step, checkpoints.path(step))
    return checkpoints.path(step)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0

"""Noise levels per latent frame: the sampling plan, the training distribution and the loss weights.

B batch, F latent frames, C channels, H W latent size, K steps. A level u lies in [0, 1], 0 exactly clean and 1 the
noisiest, and is float32; what it means for x and for the model is up to the process (models/process.py). The timestep
shift is applied once, to base levels and to training draws; caps, multipliers and the context level are in final units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from models.layout import ClipLayout
from models.process import EDM

PlanMode = Literal["uniform", "hold", "scale", "min", "lag"]
LevelDist = Literal["shared", "per_frame", "mixed", "per_shot", "capped"]
Density = Literal["logit_normal", "uniform", "edm"]
Reduce = Literal["frame", "shot"]

EDM_LOG_MEAN, EDM_LOG_STD = 0.7, 1.6  # of sigma, in the training of Stable Video Diffusion


def base_levels(num_steps: int, shift: float = 1.0) -> Tensor:
    """Sampling levels [K+1] from 1 to 0: evenly spaced, then shifted, u -> s u / (1 + (s-1) u) (SD3, 2403.03206)."""
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, expected at least 1")
    return shift_levels(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift).float()


def shift_levels(levels: Tensor, shift: float) -> Tensor:
    """Timestep shift; `shift` > 1 spends more of the range at high noise, 0 and 1 stay where they are."""
    if shift <= 0:
        raise ValueError(f"shift is {shift}, expected a positive number (1 = no shift)")
    return shift * levels / (1 + (shift - 1) * levels)


def noise_plan(
    layout: ClipLayout,
    levels: Tensor,  # [K+1] base levels, non-increasing, last 0
    mode: PlanMode,
    *,
    caps: Sequence[float] | Tensor | None = None,  # [F], for "min"
    multipliers: Sequence[float] | Tensor | None = None,  # [F], for "scale"
    context_level: float = 0.0,  # for "hold" and "lag"
    lag: int = 0,  # for "lag"
) -> Tensor:
    """The level of every frame before each step: [K+1,F], non-increasing, zero on targets in the last row.

    uniform: s[k]                              all frames share the clock
    hold:    given frames stay at `context_level`, the rest s[k]          (FVDM tasks 2410.03160; LCT 2503.10589)
    scale:   m_f s[k]                          noisy given frames, ramps  (FVDM progressive; Pusa)
    min:     min(s[k], cap_f)                  buffer frames join late    (TIC-FT 2506.00996)
    lag:     s[clip(k - lag * i, 0, K)] for the i-th frame that is not given; K + lag (n-1) + 1 rows
             (Diffusion Forcing 2407.01392); given frames stay at `context_level`
    Dummy frames are at 0 throughout. Raises ValueError for levels that rise or do not end at 0, and for missing or
    unfitting caps and multipliers.
    """
    levels = levels.float()
    if levels.ndim != 1 or len(levels) < 2 or (levels[1:] > levels[:-1]).any() or levels[-1] != 0 or levels[0] > 1:
        raise ValueError(f"base levels must fall from at most 1 to exactly 0, are {levels.tolist()}")
    if not 0 <= context_level <= 1:
        raise ValueError(f"context_level is {context_level}, expected 0 to 1")
    given = layout.is_given.to(levels.device)
    clock = levels[:, None].expand(-1, layout.num_frames)  # [K+1,F]
    if mode == "uniform":
        plan = clock
    elif mode == "hold":
        plan = torch.where(given, context_level, clock)
    elif mode == "scale":
        plan = clock * _frame_values("multipliers", multipliers, layout).to(levels)
    elif mode == "min":
        plan = torch.minimum(clock, _frame_values("caps", caps, layout).to(levels))
    elif mode == "lag":
        plan = torch.where(given, context_level, _lagged(levels, ~given, lag))
    else:
        raise ValueError(f"unknown plan mode {mode!r}; choose one of {', '.join(get_args(PlanMode))}")
    return torch.where(layout.is_dummy.to(levels.device), 0.0, plan)


def sample_levels(
    layout: ClipLayout,
    batch: int,
    dist: LevelDist,
    *,
    generator: torch.Generator,
    p: float = 0.2,  # "mixed": share of samples with independent levels
    shift: float = 1.0,
    density: Density = "logit_normal",
    mean: float = 0.0,  # of the logit
    std: float = 1.0,
    clean_prob: float = 0.0,  # share of samples in which some frames (or shots) are exactly clean
    clean_first: bool = False,  # that is the clip's first one alone; else any
    shared_prob: float = 0.0,  # "per_shot": share of samples with one level for all shots
    context_prob: float = 0.0,  # share of samples in which some frames (or shots) are at `context_level`
    context_level: float = 0.0,
    context_first: bool = False,  # those are the first of the clip; else any
    caps: Sequence[float] | Tensor | None = None,  # [F], for "capped"
) -> Tensor:
    """Training levels [B,F], on the generator's device.

    shared: one level per sample. per_frame: one per frame. mixed: per frame with probability `p`, else shared (PTSS,
    FVDM 2410.03160). per_shot: one per shot (LCT 2503.10589). capped: min(shared, cap_f) (TIC-FT).
    Continuous draws never hit 0 exactly, so `clean_prob` of the samples get 1 to n-1 of their n frames (shots for
    per_shot) set to 0; never all of them, so that every sample has something to learn. Likewise `context_prob` of the
    samples and `context_level`, near which a density may have next to no draws; a frame chosen for both is clean.
    Dummy frames are at 0 and count for nothing.

    Densities of one draw: uniform; logit_normal; edm, ln(sigma) ~ N(0.7, 1.6^2) of a `models.process.EDM`, as Stable
    Video Diffusion was trained (2311.15127), whose levels no shift changes.
    """
    if dist not in get_args(LevelDist):
        raise ValueError(f"unknown level distribution {dist!r}; choose one of {', '.join(get_args(LevelDist))}")
    for name, value in (
        ("p", p), ("clean_prob", clean_prob), ("shared_prob", shared_prob), ("context_prob", context_prob),
        ("context_level", context_level),
    ):  # fmt: skip
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}, expected 0 to 1")
    if density == "edm" and shift != 1:
        raise ValueError(f"shift is {shift}, but density 'edm' says the sigmas themselves: set shift=1")
    device = generator.device
    # units that share a level: the shots, or the single frames, dummies left out; [F] -> unit
    shots = [i for i, frames in enumerate(layout.shot_slices) for _ in range(frames.stop - frames.start)]
    names = shots if dist == "per_shot" else list(range(layout.num_frames))
    drawn = dict.fromkeys(name for name, role in zip(names, layout.roles, strict=True) if role != "dummy")
    numbers = {name: number for number, name in enumerate(drawn)}
    unit = torch.tensor([numbers.get(name, 0) for name in names], device=device)
    units = len(numbers)

    def draw(*shape: int) -> Tensor:
        if density == "uniform":
            base = torch.rand(shape, generator=generator, device=device, dtype=torch.float32)
        elif density == "logit_normal":
            normal = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
            base = torch.sigmoid(mean + std * normal)
        elif density == "edm":
            normal = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
            base = EDM().to_level((EDM_LOG_MEAN + EDM_LOG_STD * normal).exp())
        else:
            raise ValueError(f"unknown density {density!r}; choose one of {', '.join(get_args(Density))}")
        return shift_levels(base, shift)

    def happens(probability: float) -> Tensor:  # [B,1]
        return torch.rand((batch, 1), generator=generator, device=device) < probability

    # every draw is always made, so that one setting does not move the random numbers of another
    shared, own = draw(batch, 1), draw(batch, units)
    independent = {"shared": 0.0, "capped": 0.0, "per_frame": 1.0, "mixed": p, "per_shot": 1 - shared_prob}[dist]
    levels = torch.where(happens(independent), own, shared)  # [B,units]

    def some(probability: float, first: bool = False) -> Tensor:  # [B,units]; 1 to units - 1 of them, in such samples
        happening = happens(probability)
        if units < 2:
            return torch.zeros_like(levels, dtype=torch.bool)
        count = torch.randint(1, units, (batch, 1), generator=generator, device=device)
        rank = torch.rand((batch, units), generator=generator, device=device).argsort(dim=1).argsort(dim=1)
        return happening & ((torch.arange(units, device=device) if first else rank) < count)

    cleaned, contexts = some(clean_prob, clean_first), some(context_prob, context_first)
    if clean_first:
        cleaned[:, 1:] = False
    levels = torch.where(contexts, context_level, levels)
    levels = torch.where(cleaned, 0.0, levels)
    levels = levels[:, unit]  # [B,F]
    if dist == "capped":
        levels = torch.minimum(levels, _frame_values("caps", caps, layout).to(levels))
    return torch.where(layout.is_dummy.to(device), 0.0, levels)


def check_edm_levels(method: str, density: Density | None, process: EDM) -> None:
    """Raises ValueError where training levels of `density` are not those that an EDM was trained at."""
    if density != "edm":
        raise ValueError(
            f"{method}: density is {density!r}, but this model is an EDM, which learns ln(sigma) ~ N(0.7, 1.6^2): "
            "set method_params.density=edm method_params.shift=1"
        )
    for bound in ("sigma_min", "sigma_max"):
        if (value := getattr(process, bound)) != (expected := getattr(EDM(), bound)):
            raise ValueError(
                f"{method}: {bound} is {value:g} in the model's scheduler, but density 'edm' draws for {expected:g}, "
                "that of Stable Video Diffusion: correct scheduler/scheduler_config.json"
            )


def loss_weights(layout: ClipLayout, reduce: Reduce = "frame") -> Tensor:
    """Weight of each frame in the loss, [F], summing to 1; zero on every frame that is not a target.

    "frame": all target frames alike. "shot": all shots alike, however long (LCT: mean per shot, then over shots).
    """
    target = layout.is_target.float()
    if not target.any():
        raise ValueError(f"no frame to learn from: the layout's roles are {layout.roles}")
    if reduce == "frame":
        return target / target.sum()
    if reduce != "shot":
        raise ValueError(f"unknown reduction {reduce!r}; choose one of {', '.join(get_args(Reduce))}")
    weights = torch.zeros_like(target)
    for frames in layout.shot_slices:
        weights[frames] = target[frames] / target[frames].sum().clamp_min(1)
    return weights / weights.sum()


def diffusion_loss(pred: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Squared error, mean over C, H, W, weighted over F by `weights` ([F] or [B,F]), mean over B: a scalar."""
    per_frame = (pred.float() - target.float()).square() if pred.dtype.itemsize < 4 else (pred - target).square()
    return (per_frame.mean(dim=(1, 3, 4)) * weights.to(per_frame)).sum(dim=-1).mean()


def _frame_values(name: str, values: Sequence[float] | Tensor | None, layout: ClipLayout) -> Tensor:
    if values is None:
        raise ValueError(f"this needs {name}: one number per latent frame, {layout.num_frames} of them")
    tensor = torch.as_tensor(values, dtype=torch.float32)
    if tensor.shape != (layout.num_frames,) or tensor.min() < 0 or tensor.max() > 1:
        raise ValueError(f"{name} must be {layout.num_frames} numbers in [0, 1], got {tensor.tolist()}")
    return tensor


def _lagged(levels: Tensor, moving: Tensor, lag: int) -> Tensor:
    """[K + lag (n-1) + 1, F]: the n moving frames follow the clock, each `lag` rows after the one before."""
    if lag < 0:
        raise ValueError(f"lag is {lag}, expected 0 or more rows")
    steps, count = len(levels) - 1, int(moving.sum())
    order = (moving.long().cumsum(0) - 1).clamp_min(0)  # [F]
    rows = torch.arange(steps + lag * max(count - 1, 0) + 1, device=levels.device)
    return levels[(rows[:, None] - lag * order).clamp(0, steps)]

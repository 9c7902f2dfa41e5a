"""What variants of one computation cost beside one another: CPU-seconds, wall time and counted FLOPs.

A shared machine is never equally fast twice. So every repetition runs all variants, in an order that moves on by one
each time (AB, BA, AB, ...), and a ratio is the median over repetitions of the ratio within one: what slows a whole
repetition down leaves it alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

Variants = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Ratio:
    """Median of the ratios of each repetition, and the 95 % percentile bootstrap interval of that median."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Cost:
    """One variant: seconds of each repetition, and the floating-point operations of one run."""

    cpu_s: tuple[float, ...]  # of all threads of this process
    wall_s: tuple[float, ...]  # until the device is done
    flops: int


def measure(variants: Variants, repetitions: int, device: torch.device) -> tuple[dict[str, Cost], dict[str, Any]]:
    """The cost of each variant, and what each gave; the run that counts FLOPs comes first and is not timed."""
    results, flops = {}, {}
    for name, run in variants.items():
        results[name], flops[name] = count_flops(run)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for turn in range(repetitions):
        for name in in_turn(list(variants), turn):
            seconds[name].append(_time(variants[name], device))
    columns = {name: tuple(zip(*rows, strict=True)) for name, rows in seconds.items()}
    return {name: Cost(cpu, wall, flops[name]) for name, (cpu, wall) in columns.items()}, results


def in_turn(names: Sequence[str], turn: int) -> list[str]:
    """The names from number `turn` on, wrapped around: over len(names) turns each stands once in each place."""
    start = turn % len(names)
    return [*names[start:], *names[:start]]


def ratio(ours: Sequence[float], theirs: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> Ratio:
    """ours / theirs, paired by repetition. Raises ValueError for sides of different length or without repetitions."""
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"{len(ours)} repetitions against {len(theirs)}: a ratio needs equally many, at least one")
    each = np.array(ours) / np.array(theirs)
    rng = np.random.Generator(np.random.PCG64(seed))
    medians = np.median(each[rng.integers(len(each), size=(resamples, len(each)))], axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return Ratio(float(np.median(each)), float(low), float(high))


def count_flops(run: Callable[[], Any]) -> tuple[Any, int]:
    """What `run` gives, and the floating-point operations of its matrix products and attention, 2 per multiply-add.

    PyTorch's counter has no formula for the attention kernel of CPUs and would count it as nothing.
    """
    aten = torch.ops.aten
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        result = run()
    return result, counter.get_total_flops()


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)  # shapes: the counter hands shapes to its formulas


def _attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def _time(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """(CPU-seconds, wall seconds) of one run."""
    _wait(device)
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    _wait(device)
    return time.process_time() - cpu, time.perf_counter() - wall


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

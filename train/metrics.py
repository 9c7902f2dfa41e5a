"""Figures of a run: `metrics.jsonl` (one object per line, the record) and TensorBoard (the same, to look at)."""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.parallel import Parallel

NUM_BANDS = 10


class Window:
    """Sums over the steps since the last log line, kept on the device so that no step waits for them.

    Loss bands: mean squared error of the frames whose noise level lies in [b/10, (b+1)/10), unweighted, so that it can
    be compared between methods. Frames without weight in the loss do not count.
    """

    def __init__(self, parallel: Parallel):
        self.parallel = parallel
        self.sums = torch.zeros(2 + 2 * NUM_BANDS, dtype=torch.float64, device=parallel.device)
        self.steps, self.samples, self.tokens = 0, 0, 0
        self.began, self.waited = time.perf_counter(), 0.0

    def add_errors(self, levels: Tensor, errors: Tensor, weights: Tensor) -> None:
        """levels, errors (squared, mean over C H W), weights: [B,F]."""
        band = (levels * NUM_BANDS).long().clamp_(0, NUM_BANDS - 1).flatten()
        counted = (weights > 0).double().expand_as(errors).flatten()
        self.sums[2 : 2 + NUM_BANDS].index_add_(0, band, errors.double().flatten() * counted)
        self.sums[2 + NUM_BANDS :].index_add_(0, band, counted)

    def add_step(self, loss: Tensor, grad_norm: Tensor, samples: int, tokens: int, waited: float) -> None:
        """One optimizer step: this rank's loss, the global gradient norm, global counts, seconds waited for data."""
        self.sums[0] += loss.double()
        self.sums[1] += grad_norm.double()
        self.steps, self.samples, self.tokens = self.steps + 1, self.samples + samples, self.tokens + tokens
        self.waited += waited

    def close(self) -> dict[str, float]:
        """Figures of the window, the same on every rank (a collective)."""
        sums = self.parallel.total(self.sums).tolist()
        seconds = time.perf_counter() - self.began
        figures = {
            "loss": sums[0] / self.steps / self.parallel.world,
            "grad_norm": sums[1] / self.steps / self.parallel.world,
            "step_s": seconds / self.steps,
            "samples_per_s": self.samples / seconds,
            "tokens_per_s": self.tokens / seconds,
            "data_wait": self.waited / seconds,
            "memory_gb": memory_gb(self.parallel.device),
        }
        for band in range(NUM_BANDS):
            if count := sums[2 + NUM_BANDS + band]:
                figures[f"loss_level/{band / NUM_BANDS:.1f}"] = sums[2 + band] / count
        return figures


def memory_gb(device: torch.device) -> float:
    """Peak memory so far, GB: of the device if it is a GPU, of the process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Tracker:
    """Writes figures of rank 0. A resumed run drops the lines past its first step, so that no step is there twice."""

    def __init__(self, run_dir: Path, start: int, tensorboard: bool = True):
        self.path = run_dir / "metrics.jsonl"
        run_dir.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read(self.path) if line["step"] <= start]
        whole = self.path.with_suffix(".tmp")
        whole.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(whole, self.path)
        self.file = self.path.open("a")
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(run_dir / "tensorboard", purge_step=start + 1)

    def log(self, step: int, **figures: Any) -> dict[str, Any]:
        """One line after `step` steps; returns it."""
        line = {"step": step, **{k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in figures.items()}}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        if self.board:
            for name, value in line.items():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, step)
        return line

    def close(self) -> None:
        self.file.close()
        if self.board:
            self.board.close()


def last_evaluation(path: Path) -> dict[str, float]:
    """The newest held-out figures of a metrics.jsonl, {"loss/0.5": ...}; {} if there are none."""
    for line in reversed(read(path)):
        if found := {name.removeprefix("eval/"): value for name, value in line.items() if name.startswith("eval/")}:
            return found
    return {}


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line cut short by a kill is left out."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines

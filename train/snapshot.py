"""Snapshots of a small one-process training run: weights, average, optimizer and step in one atomic file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SNAPSHOT = "snapshot.pt"


def save_snapshot(
    run_dir: Path,
    step: int,
    model: nn.Module,
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
) -> None:
    """Write `run_dir/snapshot.pt` whole or not at all (temporary file + rename)."""
    state = {
        "step": step,
        "model": model.state_dict(),
        "average": average,
        "optimizer": optimizer.state_dict(),
        "settings": settings,
    }
    temporary = run_dir / (SNAPSHOT + ".tmp")
    torch.save(state, temporary)
    os.replace(temporary, run_dir / SNAPSHOT)


def load_snapshot(
    run_dir: Path,
    model: nn.Module,
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
) -> int:
    """Load the snapshot of `run_dir` into the given objects and return its step, or 0 if there is none.

    Raises ValueError when the snapshot was made with another seed: its data order is not ours to continue.
    """
    path = run_dir / SNAPSHOT
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    made, asked = state["settings"].get("seed"), settings.get("seed")
    if made != asked:
        raise ValueError(f"{path}: made with seed {made}, asked for {asked}; use a new run folder")
    model.load_state_dict(state["model"])
    for name, value in state["average"].items():
        average[name].copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])

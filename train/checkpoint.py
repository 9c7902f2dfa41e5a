"""Exact, resumable training state: sharded checkpoints (torch DCP) that load at any number of workers.

A checkpoint holds the trainable weights, their EMA, AdamW's moments and the step; the data position and every random
draw are functions of (seed, step), so the step is all they need. It does not hold frozen weights (they come from the
model folder) nor figures (metrics.jsonl). The folder is `step-000100/` with DCP's files and `state.json`.

A DCP index is a pickle: resume only runs that you trust, as with any DCP checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from models.methods import trained_params
from train.optim import EMA

STATE_FILE = "state.json"
_NAME = re.compile(r"step-(\d{6,})")


@dataclass
class TrainState:
    """What a checkpoint holds. `identity` must be the same on resume: it fixes the meaning of a step's number."""

    parameters: dict[str, nn.Parameter]
    ema: EMA
    optimizer: torch.optim.AdamW
    identity: dict[str, Any]

    def tensors(self, step: int) -> dict[str, Tensor]:
        """Every tensor of the state by a flat name, sharing memory with the live one (moments are made if absent)."""
        found: dict[str, Tensor] = {"step": torch.tensor(step)}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state[parameter]
            if not moments:
                moments["step"] = torch.tensor(0.0, device=parameter.device)
                moments["exp_avg"] = torch.zeros_like(parameter)
                moments["exp_avg_sq"] = torch.zeros_like(parameter)
            found[f"weight.{name}"] = parameter.detach()
            found[f"average.{name}"] = self.ema.average[name]
            found[f"exp_avg.{name}"] = moments["exp_avg"]
            found[f"exp_avg_sq.{name}"] = moments["exp_avg_sq"]
        return found

    def restored(self, step: int) -> None:
        """Set AdamW's own step counters, which equal ours because every parameter is stepped every time."""
        for parameter in self.parameters.values():
            self.optimizer.state[parameter]["step"].fill_(step)


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def latest(root: Path) -> tuple[int, Path] | None:
    """(step, path) of the newest whole checkpoint under `root`; broken or half-copied ones are passed over."""
    found = [(int(m[1]), path) for path in root.glob("step-*") if (m := _NAME.fullmatch(path.name))]
    for step, path in sorted(found, reverse=True):
        if is_whole(path):
            return step, path
    return None


def identity_of(root: Path) -> dict[str, Any]:
    """`TrainState.identity` of the newest whole checkpoint under `root`; {} if there is none."""
    found = latest(root)
    return _identity(found[1]) if found else {}


def is_whole(path: Path) -> bool:
    """Every byte that the checkpoint's index points to is there."""
    if not (path / STATE_FILE).is_file() or not (path / ".metadata").is_file():
        return False
    try:
        index = dcp.FileSystemReader(path).read_metadata().storage_data.values()
    except Exception:  # a cut pickle raises anything
        return False
    ends: dict[str, int] = {}
    for item in index:
        ends[item.relative_path] = max(ends.get(item.relative_path, 0), item.offset + item.length)
    return all((path / name).is_file() and (path / name).stat().st_size >= end for name, end in ends.items())


class Checkpoints:
    """Saves into, prunes and resumes from one folder. `publish` moves a finished folder to where it belongs.

    In a process group the state is copied and written by a thread while training goes on, over a process group of its
    own; without one it is written at once.

    Args:
        root: folder of the checkpoints, seen by every rank.
        keep: how many of the newest to keep.
        publish: called on every rank as (folder just written, step); the default renames it to `root/step-000100` on
            rank 0 and prunes. Ray Train hands in its own, which uploads.
        scratch: folder to write to before publishing; `root` (one file system) unless told.
    """

    def __init__(
        self, root: Path, keep: int, publish: Callable[[Path, int], None] | None = None, scratch: Path | None = None
    ):
        self.root, self.keep, self.scratch = root, keep, scratch or root
        self.publish = publish or self._rename
        self.writers = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.pending: tuple[Future[Any], Path, int, dict[str, Any]] | None = None
        root.mkdir(parents=True, exist_ok=True)

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` lies (whether it exists or not)."""
        return self.root / step_name(step)

    def save(self, step: int, state: TrainState) -> None:
        """Take the state after `step` steps; `finish` makes the checkpoint visible, whole or not at all."""
        self.finish()
        folder = self.scratch / f".writing-{step_name(step)}"
        shutil.rmtree(folder, ignore_errors=True)
        _barrier()
        folder.mkdir(parents=True, exist_ok=True)
        if self.writers:
            future = dcp.async_save(state.tensors(step), checkpoint_id=folder, process_group=self.writers)
        else:
            future = Future()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                future.set_result(dcp.save(state.tensors(step), checkpoint_id=folder, no_dist=True))
        self.pending = future, folder, step, state.identity

    def finish(self) -> int | None:
        """Wait for the save under way, if any, and publish it; returns its step. Call it on every rank."""
        if self.pending is None:
            return None
        (future, folder, step, identity), self.pending = self.pending, None
        future.result()
        if _rank() == 0:
            (folder / STATE_FILE).write_text(json.dumps({"step": step, "identity": identity}, indent=1, sort_keys=True))
        _barrier()
        self.publish(folder, step)
        return step

    def resume(self, state: TrainState) -> int:
        """Load the newest whole checkpoint into `state` in place and return its step; 0 if there is none.

        Raises ValueError when the run was made with another seed, data or batch: its steps would not continue ours.
        """
        found = latest(self.root)
        if _rank() == 0:
            remove_unfinished(self.root, found[0] if found else 0)
        _barrier()
        if found is None:
            return 0
        step, path = found
        _check_identity(path, _identity(path), state.identity)
        tensors = state.tensors(step)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(tensors, checkpoint_id=path, no_dist=not dist.is_initialized())
        state.restored(step)
        return step

    def _rename(self, folder: Path, step: int) -> None:
        if _rank() != 0:
            return
        final = self.path(step)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(folder, final)
        prune(self.root, self.keep)


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints under `root`."""
    old = sorted(((int(m[1]), p) for p in root.glob("step-*") if (m := _NAME.fullmatch(p.name))), reverse=True)[keep:]
    for _, path in old:
        shutil.rmtree(path)


def remove_unfinished(root: Path, newest: int) -> None:
    """Remove what a killed run left half-written after the `newest` whole checkpoint."""
    later = [p for p in root.glob("step-*") if (m := _NAME.fullmatch(p.name)) and int(m[1]) > newest]
    for path in [*later, *root.glob(".writing-*")]:
        shutil.rmtree(path)


def _identity(path: Path) -> dict[str, Any]:
    return json.loads((path / STATE_FILE).read_text())["identity"]


def _check_identity(path: Path, made_with: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    asked = json.loads(json.dumps(asked))  # as it would have been read back
    if "method_params" in made_with:
        made_with = {**made_with, "method_params": trained_params(made_with["method"], made_with["method_params"])}
    for field in sorted(set(made_with) & set(asked)):
        before, now = made_with[field], asked[field]
        if isinstance(before, dict) and isinstance(now, dict):  # parameters there were not yet are not compared either
            before, now = ({name: each[name] for name in sorted(set(before) & set(now))} for each in (before, now))
        if before != now:
            raise ValueError(
                f"{path}: made with {field}={before!r}, asked for {now!r}; "
                "a run cannot change this on the way: use a new run folder, or set it back"
            )


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()

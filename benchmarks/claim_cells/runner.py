"""One cell with one seed: fine-tune, make the held-out prompts, judge, and leave one file that a later run skips.

    results/claims/PAPER/CELL-SEED.json    settings and their hash, scores per prompt, steps, command, seconds

A file counts as finished while the hash of its settings is that of the settings asked for; any other is made again. A
run that was stopped goes on from its last checkpoint. Cells of equal training share the trained model.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from claim_cells.cell import Cell, Paper, TableConfig
from claim_cells.data import VERSION as DATA_VERSION
from claim_cells.data import dataset
from infra.log import get_logger
from infra.storage import atomic_write_text, sha256_file
from models.folder import INDEX_FILE, load_model
from pipelines.train import LoraConfig, TextDropConfig, TrainConfig, run_train
from toyworld.judge import clip_features, read
from toyworld.render import render_shot

VERSION = 2  # change it when equal settings would give other figures
WARMUP = 30  # steps
NOT_SETTINGS = ("cells", "seeds", "run", "model", "generate_at_once", "compile", "device", "out", "results")


def settings_of(paper: Paper, cell: Cell, seed: int, config: TableConfig) -> dict[str, Any]:
    """All that decides a cell's figures."""
    keys = {name: value for name, value in asdict(config).items() if name not in NOT_SETTINGS}
    used, unused = data_count(cell, config), {"clips", "scenes", "pairs"}
    if paper.name != "lct":
        unused.add("scene_lengths")
    return {
        "versions": [VERSION, DATA_VERSION],
        "model": model_key(config.model),
        "cell": plain(asdict(cell)),
        "seed": seed,
        "data": used,
        **{name: value for name, value in keys.items() if name not in unused},
    }


def training_of(cell: Cell, seed: int, config: TableConfig, stages: int) -> dict[str, Any]:
    """All that decides the weights after the first `stages` stages of a cell."""
    return {
        "versions": [VERSION, DATA_VERSION],
        "model": model_key(config.model),
        "data": [cell.data, data_count(cell, config)],
        "stages": plain([asdict(stage) for stage in cell.stages[:stages]]),
        "seed": seed,
        "steps": config.steps,
        "batch_size": config.batch_size,
    }


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def plain(value: Any) -> Any:
    """As JSON would give it back."""
    return json.loads(json.dumps(value))


def data_count(cell: Cell, config: TableConfig) -> int:
    return {"clips": config.clips, "scenes": config.scenes}.get(cell.data, config.pairs)


def model_key(model: Path) -> str:
    """Hash over a model folder's files, whatever their times; the card is no part of the model."""
    files = tuple(sorted(path for path in model.rglob("*") if path.is_file() and path.suffix != ".md"))
    stats = tuple((path.relative_to(model).as_posix(), path.stat().st_mtime_ns) for path in files)
    return _model_key(model, stats)


@functools.lru_cache(maxsize=8)
def _model_key(model: Path, stats: tuple[tuple[str, int], ...]) -> str:
    return digest([(name, sha256_file(model / name)) for name, _ in stats])


def result_path(paper: Paper, cell: Cell, seed: int, config: TableConfig) -> Path:
    return config.results / "claims" / paper.name / f"{cell.name}-{seed}.json"


def finished(paper: Paper, cell: Cell, seed: int, config: TableConfig) -> dict[str, Any] | None:
    """The record of a cell that was made with these settings; None if there is none."""
    path = result_path(paper, cell, seed, config)
    if not path.is_file():
        return None
    record = json.loads(path.read_text())
    return record if record["hash"] == digest(settings_of(paper, cell, seed, config)) else None


def run_cells(paper: Paper, cells: Sequence[Cell], config: TableConfig, command: str) -> list[Path]:
    """Make what is not finished, seed by seed, so that every cell has one before any has two; returns new files."""
    log, made = get_logger("claims"), []
    for seed in config.seeds:
        for cell in cells:
            if finished(paper, cell, seed, config) is not None:
                continue
            log.info(f"{paper.name} {cell.name} seed {seed}")
            made.append(run_cell(paper, cell, seed, config, command))
    return made


def run_cell(paper: Paper, cell: Cell, seed: int, config: TableConfig, command: str) -> Path:
    """Train and judge one cell; returns its file."""
    times = [_clocks()]
    folder, losses = train_cell(cell, seed, config)
    times.append(_clocks())
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    judged = paper.judge(load_model(folder, device=device), cell, config)
    times.append(_clocks())
    settings = settings_of(paper, cell, seed, config)
    record = {
        "paper": paper.name,
        "cell": cell.name,
        "seed": seed,
        "command": command,
        "hash": digest(settings),
        "settings": settings,
        "steps": config.steps,
        "device": device,
        "loss": losses,
        "seconds": _spent(times, 0),
        "cpu_seconds": _spent(times, 1),
        "scores": judged.scores,
        "features": judged.features,
    }
    path = result_path(paper, cell, seed, config)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, _compact(record))
    return path


def _clocks() -> tuple[float, float]:
    """Wall and CPU time; on a busy machine only the second says what a cell costs."""
    return time.monotonic(), time.process_time()


def _spent(times: Sequence[tuple[float, float]], clock: int) -> dict[str, float]:
    began, trained, judged = (one[clock] for one in times)
    return {"train": round(trained - began, 1), "judge": round(judged - trained, 1)}


def _compact(record: dict[str, Any]) -> str:
    """JSON with a line for every key, and for every score and feature set."""
    lines = []
    for key, value in sorted(record.items()):
        if key in ("scores", "features"):
            rows = [f"  {json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in sorted(value.items())]
            lines.append(f" {json.dumps(key)}: {{\n" + ",\n".join(rows) + "\n }")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value, sort_keys=True)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def train_cell(cell: Cell, seed: int, config: TableConfig) -> tuple[Path, list[float]]:
    """The model folder after all stages, and the last logged loss of each."""
    start, losses = config.model, []
    data = dataset(config.out / "data", cell.data, data_count(cell, config), config.model)
    for number in range(len(cell.stages)):
        run = (
            config.out / "train" / f"{cell.stages[number].method}-{digest(training_of(cell, seed, config, number + 1))}"
        )
        if not (run / "model" / INDEX_FILE).is_file():
            run_train(train_config(cell, number, seed, config, data, start, run))
            shutil.rmtree(run / "checkpoints")
        start = run / "model"
        losses.append(round(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["loss"], 4))
    return start, losses


def train_config(
    cell: Cell, number: int, seed: int, config: TableConfig, data: Path, start: Path, run: Path
) -> TrainConfig:
    """Stage `number` as `shotloom train` would be told it, in this process and without Ray."""
    stage = cell.stages[number]
    before = sum(one.share for one in cell.stages[:number])
    steps = round(config.steps * (before + stage.share)) - round(config.steps * before)  # they add up to config.steps
    given = dict(stage.train)
    nested = {"lora": LoraConfig, "text_drop": TextDropConfig}
    given |= {name: made(**given[name]) for name, made in nested.items() if name in given}
    return TrainConfig(
        dataset=data,
        model=start,
        run_dir=run,
        method=stage.method,
        method_params=dict(stage.params),
        steps=max(steps, 1),
        batch_size=max(round(config.batch_size * stage.batch_share), 1),
        warmup_steps=min(WARMUP, steps),
        lr_schedule="cosine",
        num_workers=0,
        seed=seed,
        checkpoint_every=100,
        keep_checkpoints=1,
        log_every=max(1, steps // 20),
        compile=config.compile,
        **given,
    )


def reference_features(paper: Paper, name: str, config: TableConfig) -> np.ndarray:
    """What the judge reads in `reference` true shots, the prompts' own first: [R,D]. Kept in `out`."""
    scenes = paper.reference(name, config.reference)
    file = config.out / f"reference-{digest([VERSION, *(scene.to_dict() for scene in scenes)])}.json"
    if not file.is_file():
        rows = [clip_features(read(render_shot(scene, 0, 64))).round(4).tolist() for scene in scenes]
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(file, json.dumps(rows))
    return np.array(json.loads(file.read_text()))


def small(config: TableConfig) -> TableConfig:
    """The same in minutes, in folders of its own: it shows that everything runs, and no claim."""
    return replace(
        config, seeds=config.seeds[:1], steps=10, clips=12, scenes=4, pairs=4, prompts=8, reference=16, sample_steps=4,
        out=config.out / "quick", results=config.out / "quick",
    )  # fmt: skip

"""Kill it anywhere: driver, workers and raylet of `shotloom prepare`, at random moments; the audit is exact."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.prepare import PrepareConfig, make_settings
from preprocess.verify import verify
from tests.pipelines.chaos import Run
from tests.preprocess.runs import run_here
from tests.preprocess.videos import write_unusable
from toyworld.video import write_video
from toyworld.world import sample_scene

KILLS = int(os.environ.get("SHOTLOOM_CHAOS_KILLS", "20"))
SHARD_MB = 0.05  # several shards
PATIENCE = 900.0  # seconds in which something has to happen, on a machine that has other work
SEED = 4
VIDEOS = 8
WHERE = {
    "driver": ["start", "lock", "raylet", "worker", "attempt", "part", "compaction"],
    "raylet": ["raylet", "worker", "attempt", "part"],
    "worker": ["worker", "attempt", "part"],
}


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Eight clips that can be written, and three that cannot."""
    folder = tmp_path / "videos"
    for k in range(VIDEOS):
        write_video(sample_scene("small", seed=51, index=k, num_shots=2), folder / f"toy{k}.mp4", size=64)
    write_unusable(folder)
    return folder


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Ray's own files; a short path, as sockets are in it."""
    folder = Path(tempfile.mkdtemp(prefix="chaos"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def rows(output: Path, name: str) -> list[dict]:
    """Of a table; how often a video was tried is not the same in every run."""
    return [row | {"attempts": 0} for row in pq.read_table(output / f"{name}.parquet").to_pylist()]


def audit(output: Path, whole: Path) -> None:
    """Exactly what an undisturbed run makes, and nothing else in the folder."""
    assert verify(output).faults == []
    expected = {path.name for path in whole.iterdir()} | {".lock", "report.json"}
    assert {path.name for path in output.iterdir()} == expected
    shards = {path.name: path.read_bytes() for path in (whole / "shards").iterdir()}
    assert {path.name: path.read_bytes() for path in (output / "shards").iterdir()} == shards and len(shards) > 2
    for name in ("index", "manifest", "sources"):
        assert rows(output, name) == rows(whole, name), name
    assert json.loads((output / "dataset.json").read_text()) == json.loads((whole / "dataset.json").read_text())


def landmarks(run: Run) -> dict[str, Callable[[], object]]:
    """Places in a run, in order, and how one sees that it has got there."""
    parts, output = run.output / "parts", run.output
    begun = len(list(parts.glob("*.tar")))
    return {
        "start": lambda: True,
        "lock": (output / ".lock").exists,
        "raylet": lambda: run.raylets,
        "worker": lambda: run.workers,
        "attempt": lambda: (parts / "attempts").is_dir() and run.workers,
        "part": lambda: len(list(parts.glob("*.tar"))) > begun,
        "compaction": (output / "next").is_dir,
    }


def strike(run: Run, choice: random.Random, deaths: int) -> str:
    """Kill something of a run at a random moment; says what and where, "" where the run ended before that."""
    # three deaths of workers at one video would be taken for its fault
    what = choice.choice(["driver", "raylet", "worker"] if deaths < 2 else ["driver", "raylet"])
    where = choice.choice(WHERE[what])
    if not run.wait_for(landmarks(run)[where], PATIENCE):
        return ""
    if where != "compaction" and run.ends_within(choice.uniform(0.0, 2.0)):
        return ""
    if what == "driver":
        run.kill_driver()
    elif victims := run.raylets if what == "raylet" else run.workers:
        run.kill([choice.choice(victims)])
    else:
        return ""
    return f"{what} at {where}"


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_kills_at_random_moments(videos: Path, model: Path, tmp_path: Path, ray_folder: Path) -> None:
    """Each time the same command again; a dataset that is whole before the last kill is followed by another."""
    choice = random.Random(SEED)
    config = PrepareConfig(sources=[str(videos)], output=tmp_path / "whole", model=model)
    run_here(videos, config.output, model, make_settings(config), shard_bytes=int(SHARD_MB * 2**20))
    kills, whole = 0, 0
    while True:
        output = tmp_path / f"{whole}" / "out"
        output.parent.mkdir(exist_ok=True)
        arguments = [f"sources=[{videos}]", f"output={output}", f"model={model}", f"shard_mb={SHARD_MB}"]
        with Run(arguments, output, ray_folder) as run:
            deaths = 0  # of workers
            while kills < KILLS and run.driver.poll() is None:
                struck = strike(run, choice, deaths)
                print(f"{time.strftime('%X')} kill {kills + 1}: {struck or 'too late'}", flush=True)
                kills += bool(struck)
                deaths += struck.startswith("worker")
                if struck and not struck.startswith("worker"):
                    break
            run.wait_for_end(PATIENCE)
            print(f"{time.strftime('%X')} ended with {run.driver.returncode}", flush=True)
        if run.driver.returncode == 0:
            audit(output, config.output)
            whole += 1
            if kills == KILLS:
                return

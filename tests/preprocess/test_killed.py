"""Killed at any change to the output folder, the same command again gives what a run gives that nobody kills.

What is killed here is this process's child, one change at a time, so that every place is hit; `test_chaos.py` of the
pipelines kills a real run at random moments.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from infra.storage import atomic_write_json
from preprocess.encode import Encoder
from preprocess.parts import part_path, part_samples, read_part
from preprocess.rows import EncodeRow, caption_row, decode_row, probe_row
from preprocess.run import lock, plan_work
from preprocess.sources import list_sources
from preprocess.unit import Unit
from preprocess.workplace import Workplace
from tests.preprocess.disturb import killed_at
from tests.preprocess.runs import SETTINGS, SHARD_BYTES, run_here
from toyworld.video import write_video
from toyworld.world import sample_scene


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for i in range(2):
        write_video(sample_scene("small", seed=31, index=i, num_shots=2), folder / f"toy{i}.mp4", size=64)
    return folder


def dataset(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}


def finish(videos: Path, output: Path, model: Path) -> None:
    """What the driver does when every video has its part. Nothing may be left to do."""
    with lock(output):
        work = plan_work(list_sources([videos]).files, output, SETTINGS, model)
        assert not work.todo
        if not work.unchanged(SHARD_BYTES):
            work.compact(SHARD_BYTES)
        atomic_write_json(output / "report.json", {"seconds": 1})
        work.clean()


def test_compaction_and_commit(videos: Path, model: Path, tmp_path: Path) -> None:
    """Over an older dataset, before every change; then killed at the same number while it is put right; then not."""
    state, few = tmp_path / "state", tmp_path / "few"
    few.mkdir()
    shutil.copy2(videos / "toy1.mp4", few), shutil.copy2(videos / "toy1.json", few)
    run_here(few, state, model)
    work = plan_work(list_sources([videos]).files, state, SETTINGS, model)
    run_rows(work.place, [file.video_id for file in work.todo], videos, EncodeRow(work.place, str(model), "cpu", 1))
    finish(videos, shutil.copytree(state, tmp_path / "whole"), model)
    whole = dataset(tmp_path / "whole")
    assert len(work.todo) == 1 and whole["manifest.parquet"] != (state / "manifest.parquet").read_bytes()
    for at in count(1):
        output = shutil.copytree(state, tmp_path / "out")
        if not killed_at(output, at, lambda output=output: finish(videos, output, model)):
            break
        killed_at(output, at, lambda output=output: finish(videos, output, model))
        finish(videos, output, model)
        assert dataset(output) == whole, at
        shutil.rmtree(output)
    assert at > 25


def run_rows(place: Workplace, ids: list[str], videos: Path, encode: EncodeRow) -> None:
    for file in list_sources([videos]).files:
        if file.video_id in ids:
            row = {"video_id": file.video_id, "unit": Unit(file).to_json()}
            encode(caption_row(decode_row(probe_row(row, place), place), place))


def test_a_worker_and_the_row_again(videos: Path, model: Path, encoder: Encoder, tmp_path: Path) -> None:
    """Every stage, before each of its changes and after the last: the next worker makes the same part of the same row.

    What is killed after the last change has done all but say so.
    """
    (file, _) = list_sources([videos]).files
    row, state = {"video_id": file.video_id, "unit": Unit(file).to_json()}, tmp_path / "state" / "parts"
    settings = replace(SETTINGS, seconds_per_video=100.0)

    def at(parts: Path) -> Workplace:
        return Workplace(settings, parts, parts / "scratch", "key")

    def encode(row: dict[str, str], place: Workplace) -> dict[str, str]:
        actor = EncodeRow.__new__(EncodeRow)  # with the encoder that is there
        actor.place, actor.encoder = place, encoder
        return actor(row)

    state.mkdir(parents=True)
    expected: dict[str, object] = {}
    changes = {}
    for name, stage in (("probe", probe_row), ("decode", decode_row), ("captions", caption_row), ("encode", encode)):
        for number in count(1):
            parts = shutil.copytree(state, tmp_path / "out" / "parts")
            dead = killed_at(parts, number, lambda stage=stage, row=row, parts=parts: stage(row, at(parts)))
            again = stage(row, at(parts))
            found = {k: data for k, data in dataset(parts).items() if k.endswith(".frames")}
            if (part := read_part(part_path(parts, file.video_id))) is not None:
                source = part.source | {"attempts": 0}
                found |= {"rows": (source, part.shots), "samples": list(part_samples(part_path(parts, file.video_id)))}
            expected = expected if number > 1 else found
            assert found == expected and ("rows" in found) == (name == "encode"), (name, number)
            unit = json.loads(again["unit"]) if "unit" in again else again
            assert unit["status"] == ("written" if name == "encode" else ""), (name, number, unit.get("reason"))
            if not dead:
                break
            shutil.rmtree(parts)
        changes[name] = number
        state, row = parts.rename(tmp_path / name), again
    assert changes["encode"] > 5 and changes["decode"] > 5, changes
    part = read_part(part_path(state, file.video_id))
    assert part is not None and part.source["status"] == "written"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_whole_run(videos: Path, model: Path, tmp_path: Path) -> None:
    """Killed before its first change, the next before its second, and so on, until one ends."""
    run_here(videos, tmp_path / "whole", model)
    for at in count(1):
        if not killed_at(tmp_path / "out", at, lambda: run_here(videos, tmp_path / "out", model)):
            break
    assert at > 30 and dataset(tmp_path / "out") == dataset(tmp_path / "whole")

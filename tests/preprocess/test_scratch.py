"""Room in scratch: what counts, who waits, and that nothing that died keeps a run waiting for ever."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

import preprocess.rows
import preprocess.scratch as module
from preprocess.rows import decode_row
from preprocess.run import plan_work
from preprocess.scratch import ScratchRoom, free_room, scratch_room
from preprocess.settings import PrepareSettings
from preprocess.sources import SourceFile
from preprocess.unit import Unit
from preprocess.workplace import Workplace


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(PrepareSettings(), tmp_path / "parts", tmp_path / "parts" / "scratch" / "run", "")


def leave(path: Path, count: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(count))
    return path


def test_room_counts_what_this_run_wrote_in_scratch_and_of_films(place: Workplace) -> None:
    old = leave(place.parts / "films" / "a-0" / "0001.frames", 1000)  # a film of an earlier run frees no room
    os.utime(old, (1, 1))
    room = scratch_room(place, 3 / 2**30)
    assert room.limit == 3 and room.held() == 0 and not room.full()
    frames = leave(place.scratch / "b.frames", 2)
    leave(place.parts / "b.tar", 100)  # a part is a result
    leave(place.scratch / "d.source.mp4", 100)  # who waits has it himself
    assert room.held() == 2 and not room.full()
    leave(place.parts / "films" / "c-0" / "0001.frames", 5)
    assert room.held() == 7 and room.full()
    frames.unlink()
    assert room.held() == 5


def test_the_room_that_nobody_names_is_half_of_what_is_free(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10 * 2**30})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage)
    assert scratch_room(place, None).limit == free_room(place.parts / "not" / "there") == 5 * 2**30
    usage.free = 2**50
    assert scratch_room(place, None).limit == module.MOST


def test_who_waits_goes_on_when_there_is_room_and_at_the_latest_when_patience_ends(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PAUSE", 0.01)
    frames = leave(place.scratch / "of_a_worker_that_died.frames", 10)
    room = ScratchRoom((place.scratch,), 10)
    began = time.monotonic()
    room.wait(patience=0.2)
    assert 0.2 <= time.monotonic() - began < 5
    threading.Timer(0.2, frames.unlink).start()
    began = time.monotonic()
    room.wait(patience=60)
    assert 0.15 <= time.monotonic() - began < 10 and not room.full()


def test_a_decode_waits_before_its_attempt_begins(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of the time limit, and not where there is nothing to decode."""
    waits: list[bool] = []
    monkeypatch.setattr(ScratchRoom, "wait", lambda room: waits.append((place.parts / "attempts").exists()))
    monkeypatch.setattr(preprocess.rows, "decode_stage", lambda unit, place, side_by_side: None)
    room = ScratchRoom((place.scratch,), 1)
    file = SourceFile("a", "a.mp4", "a.mp4", bytes=1)
    for status in ("", "failed"):
        row = {"video_id": "a", "unit": Unit(file, status=status).to_json()}
        assert decode_row(row, place, room=room)["video_id"] == "a"
    assert waits == [False] and (place.parts / "attempts").exists()


def test_a_round_begins_with_an_empty_scratch(tmp_path: Path) -> None:
    """Frames of a video whose row Ray has dropped would hold room until the end of the run."""
    work = plan_work([SourceFile("a", "a.mp4", "a.mp4", bytes=1)], tmp_path, PrepareSettings(), _model(tmp_path))
    frames = work.place.scratch / "a.frames"
    rounds = []
    for _ in work.rounds():
        rounds.append(frames.exists())
        leave(frames, 10)
    assert rounds == [False] * 3


def _model(folder: Path) -> Path:
    from models.tiny import build_tiny_folder

    build_tiny_folder(folder / "model")
    return folder / "model"

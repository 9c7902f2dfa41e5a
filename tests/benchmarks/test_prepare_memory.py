"""benchmarks/prepare_memory.py: what its processes do, and a wrong key."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import av
import prepare_memory
import pytest


def test_what_the_processes_do(tmp_path: Path) -> None:
    clips = prepare_memory.make_clips(tmp_path / "clips", 1)
    found = prepare_memory.in_a_process("whole run", clips, tmp_path / "out", 5.0)
    assert found["videos"] == 1 and found["frames"] > 30 and found["scenes"] == 1
    assert 2**27 < found["at_start"] <= found["bytes"] < 2**33
    assert len(list((tmp_path / "out" / "shards").glob("*.tar"))) == 1


def test_goals_are_off_by_how_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Growth and shrinking count alike, for the number of videos and the length of the film."""
    sizes = {"few": 100, "many": 110, "short": 100, "long": 80}

    def measured(work: str, videos: Path, folder: Path, unit_minutes: float) -> dict[str, int]:
        assert unit_minutes == 5.0
        return {"bytes": sizes[videos.name] * 2**20, "at_start": 0, "frames": 1, "pieces": 1}

    for name in ("make_clips", "make_film"):
        monkeypatch.setattr(prepare_memory, name, lambda folder, *_: folder)
    monkeypatch.setattr(prepare_memory, "in_a_process", measured)
    monkeypatch.setattr(sys, "argv", ["prepare_memory.py", "--json"])
    assert prepare_memory.main() == 1
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (record["few"], record["many"], record["short_minutes"], record["long_minutes"]) == (20, 200, 3.0, 30.0)
    found = {goal["name"]: (goal["value"], goal["met"]) for goal in record["goals"]}
    for work in prepare_memory.WORK:
        assert found[f"{work}: 200 videos against 20 videos, off by"] == (0.1, True)
        assert found[f"{work}: film of 30 min against film of 3 min, off by"] == (0.2, False)


def test_a_film_has_its_length(tmp_path: Path) -> None:
    film = prepare_memory.make_film(tmp_path / "film", 0.25, 32)
    with av.open(str(film / "film.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 0.25 * 60 * 24


def test_copies_beyond_the_distinct_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_memory, "DISTINCT", 1)
    first, second = sorted(prepare_memory.make_clips(tmp_path, 2).glob("*.mp4"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("key", ["fw=3", "few=-1", "side=large"])
def test_a_wrong_key_is_named_before_any_work(
    key: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare_memory.py", key])
    with pytest.raises(SystemExit, match="2"):
        prepare_memory.main()
    assert key.split("=")[0] in capsys.readouterr().err

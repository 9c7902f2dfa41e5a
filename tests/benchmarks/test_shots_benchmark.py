"""benchmarks/shots.py runs on its own files, counts as it says, and works without PySceneDetect."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import shots


def test_quick_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["shots.py", "--quick", "--json", "size=64"])
    assert shots.main() == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["films"] == 3 and set(record["groups"]) == {"ToyWorld small", "ToyWorld full"}
    small = record["groups"]["ToyWorld small"]["shotloom"]
    assert small["true"] == small["hits"] > 0 and all(goal["met"] is None for goal in record["goals"])


def test_a_change_is_found_once_and_within_its_tolerance() -> None:
    changes = (shots.Change("cut", 10, 10), shots.Change("dissolve", 20, 26))
    film = shots.Film("a", "b", Path("a"), changes, (shots.Change("gradual", 40, 50),))
    found = [(11, "cut"), (21, "dissolve"), (24, "cut"), (45, "cut"), (60, "cut")]
    zero, one = shots.Score(), shots.Score()
    zero.add(film, found, 0)
    one.add(film, found, 1)
    assert (zero.hits, zero.misses, zero.false, zero.typed) == (1, 1, 3, 1)
    assert (one.hits, one.misses, one.false) == (2, 0, 2)
    assert zero.f1 == pytest.approx(2 / 6) and one.f1 == pytest.approx(4 / 6)
    assert shots.Score().f1 == 1.0

"""benchmarks/decode.py runs on its own files and says what it measured."""

from __future__ import annotations

import json
import sys

import decode
import pytest


def test_quick_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["decode.py", "--quick", "--json"])
    assert decode.main() == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["files"] == 4 and record["refused"] == 0 and record["disagree"] == 0
    assert min(record["frames_per_cpu_s"].values()) > 0

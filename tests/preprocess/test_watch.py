"""Guards: attempts are counted across dead processes; a hang ends at the time limit, even with the lock held."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from preprocess.outcome import Failed
from preprocess.watch import MAX_ATTEMPTS, Attempts

DIE = """
import os, sys
from pathlib import Path
from preprocess.watch import Attempts
with Attempts(Path(sys.argv[1])).attempt("v", "decode", float(sys.argv[2])):
    exec(sys.argv[3])
"""


def run(folder: Path, code: str, seconds: float = 60.0) -> int:
    return subprocess.run([sys.executable, "-c", DIE, str(folder), str(seconds), code]).returncode


def test_deaths_are_counted_and_bounded(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    for deaths in range(MAX_ATTEMPTS):
        assert attempts.deaths("v", "decode") == deaths
        assert run(tmp_path, "os.kill(os.getpid(), 9)") == -9
    assert attempts.unfinished("v") == ("decode", MAX_ATTEMPTS)
    with pytest.raises(Failed, match="its worker process died, 3 attempts"), attempts.attempt("v", "decode", 60):
        raise AssertionError("must not run a fourth time")
    with attempts.attempt("other", "decode", 60) as number:
        assert number == 1


def test_a_hang_with_the_interpreter_lock_held_ends_at_the_limit(tmp_path: Path) -> None:
    began = time.monotonic()
    # PyDLL calls hold the lock: no Python thread could end this
    assert run(tmp_path, "import ctypes; ctypes.PyDLL(None).sleep(600)", seconds=0.5) != 0
    assert time.monotonic() - began < 60
    attempts = Attempts(tmp_path)
    assert attempts.unfinished("v") == ("decode", 1)
    assert attempts.cause("v", "decode", 1) == "it hung and was ended at the time limit, 1 attempts"


def test_an_attempt_that_ends_is_forgotten_and_errors_end_it_too(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    with attempts.attempt("v", "probe", 60) as number:
        assert number == 1
    with pytest.raises(ValueError), attempts.attempt("v", "decode", 60):
        raise ValueError
    assert attempts.deaths("v", "probe") == 0

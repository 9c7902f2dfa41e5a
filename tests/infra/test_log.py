"""Progress and log lines: plain and rare in a file, one shared live display on a terminal."""

from __future__ import annotations

import logging
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from infra import log
from infra.log import duration, get_logger, progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    return now


def test_lines_say_count_rate_time_left_and_figures(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("train", 8) as job:
        clock[0] += 4
        job.advance(2, loss=0.123456, phase="warm-up")
        clock[0] += 4
        job.advance(6, loss=0.1)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "train: started, 8 to do",
        "train: 2/8 (25 %), 2 s each, 12 s left, loss 0.1235, phase warm-up",
        "train: 8/8 (100 %), 1/s, loss 0.1, phase warm-up",
        "train: 8/8 (100 %), 1/s, loss 0.1, phase warm-up, done after 8.0 s",
    ]


def test_lines_come_at_a_bounded_rate(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("many") as job:
        for _ in range(36_000):  # an hour, ten items a second
            clock[0] += 0.1
            job.advance()
    lines = capsys.readouterr().err.splitlines()
    assert 60 <= len(lines) <= 110
    assert lines[-1] == "many: 36000, 10/s, done after 1:00 h"
    assert not any("\r" in line or "\x1b" in line for line in lines)


def test_an_error_inside_is_shown_as_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), progress("encode", 3) as job:
        job.advance()
        raise KeyError("x")
    assert "encode: 1/3 (33 %), stopped after 0.0 s" in capsys.readouterr().err


def test_a_resumed_job_starts_where_it_was(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("train", 1000, done=400) as job:
        clock[0] += 10
        job.advance(100)
    err = capsys.readouterr().err
    assert err.startswith("train: started, 600 to do")
    assert err.endswith("train: 500/1000 (50 %), 10/s, 50 s left, done after 10 s\n")


def test_counts_can_be_set_outright(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("copy") as job:
        clock[0] += 4
        job.update(done=2, total=4, file="a")
        job.update(file="b")
    assert capsys.readouterr().err.endswith("copy: 2/4 (50 %), 2 s each, 4.0 s left, file b, done after 4.0 s\n")


def test_stages_stand_in_the_line_of_their_job(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("prepare", 9) as job:
        decode, encode = job.part("decode"), job.part("encode")
        clock[0] += 4
        decode.update(8, 9, running=1, waiting=0)
        encode.update(2, 9, running=1, waiting=5)
        clock[0] += 4
        job.advance(2, written=2)
        job.drop_parts()
    assert capsys.readouterr().err.splitlines()[1:] == [
        "prepare: 0/9 (0 %); decode: 8/9 (88 %), 2/s, 0.5 s left, running 1, waiting 0; encode: 0",
        "prepare: 2/9 (22 %), 4 s each, 28 s left, written 2; decode: 8/9 (88 %), 1/s, 1.0 s left, running 1, "
        "waiting 0; encode: 2/9 (22 %), 4 s each, 28 s left, running 1, waiting 5",
        "prepare: 2/9 (22 %), 4 s each, 28 s left, written 2, done after 8.0 s",
    ]


def test_threads_lose_no_count(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("threads", 4000) as job:
        threads = [threading.Thread(target=lambda: [job.advance() for _ in range(1000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert job.done == 4000


def test_logger_writes_one_line_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    get_logger("prepare").info("%d files", 3)
    get_logger("prepare").warning("slow disk")
    get_logger("prepare").debug("unseen")
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert out == "" and first.endswith(" prepare: 3 files") and second.endswith(" prepare: warning: slow disk")
    ours = [h for h in logging.getLogger("shotloom").handlers if "pytest" not in type(h).__module__]  # it adds its own
    assert len(ours) == 1


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.97, "10 s"),
        (42.4, "42 s"),
        (59.7, "1:00 min"),
        (185, "3:05 min"),
        (8040, "2:14 h"),
    ],
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


SCRIPT = """
from infra.log import get_logger, progress
with progress("outer [1]", 2) as outer:
    for _ in range(2):
        with progress("inner", 3) as inner:
            for i in range(3):
                inner.advance(loss=i)
        get_logger("x").info("hello")
        outer.advance()
"""


STAGES = """
import time
from infra.log import progress
with progress("prepare", 9) as job:
    decode, encode = job.part("decode"), job.part("encode")
    time.sleep(1.1)
    for done in range(1, 4):
        decode.update(done + 4, 9, running=1, waiting=0)
        encode.update(done, 9, running=1, waiting=3)
        job.advance(written=done)
        time.sleep(0.2)
"""


def test_a_terminal_gets_one_live_display(repo_root: Path) -> None:
    text = on_a_terminal(SCRIPT, repo_root)
    assert text.count("x: hello") == 2
    assert text.count("inner: 3/3 (100 %), loss 2, done after") == 2
    assert text.count("outer [1]: 2/2 (100 %), done after") == 1
    assert text.rstrip().endswith("\x1b[?25h"), "the cursor must be visible again"


def test_a_terminal_gets_a_line_per_stage_with_items_rate_queue_and_time_left(repo_root: Path) -> None:
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", on_a_terminal(STAGES, repo_root))
    for name, state in (("decode", r"7/9"), ("encode", r"3/9"), ("prepare", r"3/9")):
        lines = [line for line in re.split(r"[\r\n]+", text) if line.strip().startswith(name) and state in line]
        assert lines and re.search(r"\d:\d\d:\d\d .*(/s|s each)", lines[-1] if name != "prepare" else lines[0]), lines
    assert "running 1, waiting 3" in text
    assert "decode:" not in text and "prepare: 3/9 (33 %)" in text  # the job alone leaves a line


def on_a_terminal(script: str, repo_root: Path) -> str:
    """What the script writes to a terminal of 120 columns."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=repo_root, env=environment, stderr=theirs, stdout=theirs, stdin=theirs
    )
    os.close(theirs)
    received = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not chunk:
            break
        received += chunk
    os.close(ours)
    text = received.decode()
    assert process.wait() == 0, text
    return text

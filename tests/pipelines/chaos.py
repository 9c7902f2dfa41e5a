"""`shotloom prepare` as a command of its own that is killed, piece by piece, at chosen landmarks of its run."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_MARK = "SHOTLOOM_TEST_RUN"  # in the environment of a run, and so of every process that comes of it


class Run:
    """One start of the command. Its processes are known by a mark in their environment, whoever their parent is."""

    def __init__(self, arguments: Sequence[str], output: Path, ray: Path) -> None:
        self.output, self.mark = output, secrets.token_hex(8)
        self.log = (output.parent / "log").open("ab")
        environment = os.environ | {_MARK: self.mark, "RAY_TMPDIR": str(ray), "PYTHONPATH": str(ROOT)}
        environment.pop("RAY_ADDRESS", None)
        self.driver = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", "prepare", *arguments],
            stdout=self.log, stderr=self.log, env=environment, cwd=ROOT, start_new_session=True,
        )  # fmt: skip

    def processes(self) -> dict[int, str]:
        """Those of this run that live: process id -> command line."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    if f"{_MARK}={self.mark}".encode() in (entry / "environ").read_bytes():
                        found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                except OSError:
                    continue
        return found

    def named(self, *words: str) -> list[int]:
        """Processes whose command begins with one of these words, or whose program ends with it."""
        return sorted(pid for pid, line in self.processes().items() if _program(line, words))

    @property
    def workers(self) -> list[int]:
        """Of tasks and actors."""
        return self.named("ray::Map", "ray::decode")

    @property
    def raylets(self) -> list[int]:
        return self.named("/raylet")

    def wait_for(self, landmark: Callable[[], object], seconds: float) -> bool:
        """Whether the landmark came in sight before the run ended. Raises TimeoutError."""
        end = time.monotonic() + seconds
        while not landmark():
            if self.driver.poll() is not None:
                return False
            if time.monotonic() > end:
                raise TimeoutError(f"nothing happens in {self.output} for {seconds} s: {self.processes()}")
            time.sleep(0.003)
        return True

    def ends_within(self, seconds: float) -> bool:
        """Whether the driver ended by itself in this time."""
        try:
            self.driver.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def wait_for_end(self, seconds: float) -> None:
        """Raises TimeoutError where the driver does not end."""
        if not self.ends_within(seconds):
            raise TimeoutError(f"the run in {self.output} does not end in {seconds} s: {self.processes()}")

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        """No process of this run stays."""
        end = time.monotonic() + 5
        while (left := self.processes()) and (self.driver.poll() is None or time.monotonic() < end):
            if self.driver.poll() is None:
                self.kill_driver()
            time.sleep(0.1)
        self.kill(list(left))
        self.log.close()

    def kill_driver(self) -> None:
        """The driver and its process group."""
        os.killpg(self.driver.pid, signal.SIGKILL)

    def kill(self, pids: Sequence[int]) -> None:
        for pid in pids:
            _kill(pid)


def _program(line: str, words: Sequence[str]) -> bool:
    program = line.split(" ", 1)[0]
    return any(line.startswith(word) if word.startswith("ray::") else program.endswith(word) for word in words)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass

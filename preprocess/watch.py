"""Guards around work that can kill or hang its process: attempts are counted on disk, time is bounded by the system.

A worker that dies takes its memory of the attempt with it, so each attempt is written down before it begins. The time
limit is a C thread (faulthandler), which fires even when a decoder hangs with the interpreter lock held.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from preprocess.outcome import Failed

MAX_ATTEMPTS = 3


class Attempts:
    """The attempts of one run, one small file per video: a line when a stage begins, another when it has ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._under_way: tuple[str, str, float, TextIO] | None = None  # video, stage, seconds, trace

    @contextlib.contextmanager
    def attempt(self, video_id: str, stage: str, seconds: float) -> Iterator[int]:
        """Run a stage as one counted attempt under a time limit; gives the number of this attempt, from 1.

        Raises Failed without running it after MAX_ATTEMPTS attempts that did not end. At the time limit the process
        exits, and its stack lies in the trace file.
        """
        deaths = self.deaths(video_id, stage)
        if deaths >= MAX_ATTEMPTS:
            raise Failed(stage, self.cause(video_id, stage, deaths))
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._trace(video_id, stage).open("w") as trace:
            self._under_way = video_id, stage, seconds, trace
            self._begin()
            try:
                yield deaths + 1
            finally:
                self._end()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within an attempt: what is done here, such as waiting for other attempts, is no part of it.

        The time limit begins anew afterwards.
        """
        self._end()
        try:
            yield
        finally:
            self._begin()

    def _begin(self) -> None:
        assert self._under_way is not None
        video_id, stage, seconds, trace = self._under_way
        self._note(video_id, f"begin {stage}")
        faulthandler.dump_traceback_later(seconds, exit=True, file=trace)

    def _end(self) -> None:
        assert self._under_way is not None
        video_id, stage, _, _ = self._under_way
        faulthandler.cancel_dump_traceback_later()
        self._note(video_id, f"end {stage}")

    def deaths(self, video_id: str, stage: str) -> int:
        """How often a stage began and did not end."""
        lines = self._lines(video_id)
        return lines.count(f"begin {stage}") - lines.count(f"end {stage}")

    def unfinished(self, video_id: str) -> tuple[str, int]:
        """(stage, deaths) of the stage that a video last began and did not end; ("", 0) where there is none."""
        for line in reversed(self._lines(video_id)):
            if line.startswith("begin ") and (deaths := self.deaths(video_id, line[6:])):
                return line[6:], deaths
        return "", 0

    def cause(self, video_id: str, stage: str, deaths: int) -> str:
        """Why the attempts did not end, in words."""
        try:
            hung = self._trace(video_id, stage).read_text().startswith("Timeout")
        except OSError:
            hung = False
        how = "it hung and was ended at the time limit" if hung else "its worker process died"
        return f"{how}, {deaths} attempts"

    def _trace(self, video_id: str, stage: str) -> Path:
        return self.folder / f"{video_id}.{stage}.trace"

    def _lines(self, video_id: str) -> list[str]:
        try:
            return (self.folder / video_id).read_text().splitlines()
        except OSError:
            return []

    def _note(self, video_id: str, line: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / video_id).open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

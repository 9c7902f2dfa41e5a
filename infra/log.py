"""What a long job says while it runs: log lines on stderr, and progress that suits a terminal and a log file alike."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

_lock = threading.RLock()


class _Stderr(logging.StreamHandler):
    """Writes to what sys.stderr is now, so that lines appear above a live progress line and pytest captures them."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr


def get_logger(name: str) -> logging.Logger:
    """The logger `shotloom.<name>`; lines read `12:30:01 prepare: 3 files set aside`."""
    root = logging.getLogger("shotloom")
    with _lock:
        if not root.handlers:
            handler = _Stderr()
            handler.setFormatter(_Format())
            root.addHandler(handler)
            root.setLevel(logging.INFO)
            root.propagate = False
    return root.getChild(name)


class _Format(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        text = f"{clock} {record.name.removeprefix('shotloom.')}: {level}{record.getMessage()}"
        return text + (f"\n{self.formatException(record.exc_info)}" if record.exc_info else "")


class Progress:
    """Progress of one job of `total` items (None: not known). Made by `progress`; safe to use from several threads."""

    def __init__(self, name: str, total: int | None, done: int) -> None:
        self.name, self.total, self.done, self.first = name, total, done, done
        self.figures: dict[str, Any] = {}
        self.parts: list[Progress] = []
        self.started = time.monotonic()

    def part(self, name: str, total: int | None = None) -> Progress:
        """A stage of this job, shown until `drop_parts` or the job's end: a line of its own on a terminal, else in the
        job's line.
        """
        with _lock:
            self.parts.append(self._part(name, total))
            return self.parts[-1]

    def drop_parts(self) -> None:
        """Shows the stages no more."""
        with _lock:
            while self.parts:
                self.parts.pop()._close(True)

    def advance(self, n: int = 1, **figures: Any) -> None:
        """Counts `n` more items as done and shows the latest figures, e.g. `advance(loss=0.12)`."""
        with _lock:
            self.done += n
            self.figures |= figures
            self._changed()

    def update(self, done: int | None = None, total: int | None = None, **figures: Any) -> None:
        """Sets the count, the total or figures outright, e.g. where another process does the work."""
        with _lock:
            self.done = self.done if done is None else done
            self.total = self.total if total is None else total
            self.figures |= figures
            self._changed()

    def line(self) -> str:
        """The state in words: `train: 12/24 (50 %), 3.1/s, 0:04 left, loss 0.123`."""
        count = f"{self.done}/{self.total} ({100 * self.done // self.total} %)" if self.total else str(self.done)
        words = [f"{self.name}: {count}", *self._speed()]
        if (rate := self._rate()) and self.total and self.total > self.done:
            words.append(f"{duration((self.total - self.done) / rate)} left")
        return "; ".join([", ".join(words + self._figures()), *(part.line() for part in self.parts)])

    def _rate(self) -> float:
        """Items per second of this run; 0 where it is too early to tell."""
        seconds = time.monotonic() - self.started
        return (self.done - self.first) / seconds if self.done > self.first and seconds > 1 else 0.0

    def _speed(self) -> list[str]:
        rate = self._rate()
        return [f"{_figure(rate)}/s" if rate >= 1 else f"{_figure(1 / rate)} s each"] if rate else []

    def _figures(self) -> list[str]:
        return [f"{key} {_figure(value)}" for key, value in self.figures.items()]

    def _last_line(self, completed: bool) -> str:
        return f"{self.line()}, {'done' if completed else 'stopped'} after {duration(time.monotonic() - self.started)}"

    def _part(self, name: str, total: int | None) -> Progress:
        raise NotImplementedError

    def _changed(self) -> None:
        raise NotImplementedError

    def _close(self, completed: bool) -> None:
        raise NotImplementedError


class _Lines(Progress):
    """For files and pipes: a plain line at the start and the end, in between ever more rarely (2 s to 1 min apart)."""

    def __init__(self, name: str, total: int | None, done: int) -> None:
        super().__init__(name, total, done)
        self._shown = self.started
        _say(f"{name}: started" + (f", {total - done} to do" if total is not None else ""))

    def _changed(self) -> None:
        now = time.monotonic()
        if now - self._shown >= min(max((now - self.started) / 10, 2.0), 60.0):
            self._shown = now
            _say(self.line())

    def _part(self, name: str, total: int | None) -> Progress:
        return _InLine(self, name, total)

    def _close(self, completed: bool) -> None:
        self.drop_parts()
        _say(self._last_line(completed))


class _InLine(Progress):
    """A stage whose state is told in the line of its job."""

    def __init__(self, job: Progress, name: str, total: int | None) -> None:
        super().__init__(name, total, 0)
        self._job = job

    def _changed(self) -> None:
        self._job._changed()

    def _close(self, completed: bool) -> None:
        pass


class _Live(Progress):
    """For terminals: one moving line, drawn by rich. Nested jobs share one display, as rich allows only one."""

    _display: Any = None
    _users = 0

    def __init__(self, name: str, total: int | None, done: int, quiet: bool = False) -> None:
        from rich import progress as rich

        super().__init__(name, total, done)
        self._quiet, self._closed = quiet, False  # quiet: leaves no line when it ends
        with _lock:
            if _Live._users == 0:
                columns = (
                    rich.TextColumn("{task.description}", markup=False),
                    rich.BarColumn(bar_width=24),
                    rich.MofNCompleteColumn(),
                    rich.TimeElapsedColumn(),
                    rich.TimeRemainingColumn(),
                    rich.TextColumn("{task.fields[figures]}", markup=False),
                )
                _Live._display = rich.Progress(*columns, console=_console())
                _Live._display.start()
            _Live._users += 1
            self._task = _Live._display.add_task(name, total=total, completed=done, figures="")

    def _changed(self) -> None:
        if self._closed:  # another thread may come late
            return
        figures = ", ".join(self._speed() + self._figures())
        _Live._display.update(self._task, completed=self.done, total=self.total, figures=figures)

    def _part(self, name: str, total: int | None) -> Progress:
        return _Live(f"  {name}", total, 0, quiet=True)

    def _close(self, completed: bool) -> None:
        self.drop_parts()
        self._closed = True
        _Live._users -= 1
        _Live._display.remove_task(self._task)
        if not self._quiet:
            _Live._display.console.print(self._last_line(completed), markup=False, highlight=False)
        if _Live._users == 0:
            _Live._display.stop()
            _Live._display = None


@contextlib.contextmanager
def progress(name: str, total: int | None = None, done: int = 0) -> Iterator[Progress]:
    """Shows the progress of a job: `with progress("encode", len(items)) as p: p.advance(loss=0.12)`.

    total: items in all, None where not known. done: items done before, by the run that this one resumes.
    """
    terminal = sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb")
    job: Progress = _Live(name, total, done) if terminal else _Lines(name, total, done)
    completed = False
    try:
        yield job
        completed = True
    finally:
        with _lock:
            job._close(completed)


def duration(seconds: float) -> str:
    """Seconds in words a person reads: `0.4 s`, `12 s`, `3:05 min`, `2:14 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)

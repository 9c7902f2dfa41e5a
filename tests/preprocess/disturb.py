"""Trouble at one chosen step of a run: an error from the system, or a kill, at the n-th change to a folder.

Python tells an audit hook of every file that is opened, made, renamed or removed, before it happens. (Files that are
written by C libraries are opened beside it, but each of ours takes its place by a rename.)
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

_MAKES = {"os.mkdir", "os.rename"}
_REMOVES = {"os.remove", "os.rmdir"}
_counts: list[Count] = []


@cache
def _listen() -> None:
    """An audit hook stays for good, so there is one."""

    def hook(event: str, arguments: tuple) -> None:
        for count in _counts:
            count(event, arguments)

    sys.addaudithook(hook)


class Count:
    """Changes to `folder` so far; from number `at` on, `then` is called with the path before each."""

    def __init__(self, folder: Path, at: int, then: Callable[[str], None], removals: bool) -> None:
        self.folder, self.at, self.then, self.seen = str(folder), at, then, 0
        self.events = _MAKES | (_REMOVES if removals else set())

    def __call__(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            if not (mode and set(mode) & set("wax+") or mode is None and flags & (os.O_WRONLY | os.O_RDWR)):
                return
        elif event in self.events:
            path = arguments[0]
        else:
            return
        inside = isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self.folder)
        if inside or (event in _REMOVES and len(arguments) > 1 and arguments[1] != -1):  # rmtree works by descriptors
            self.seen += 1
            if self.seen >= self.at:
                self.then(os.fspath(path))


@contextmanager
def disturbed(folder: Path, at: int, then: Callable[[str], None], removals: bool = False) -> Iterator[Count]:
    """Calls `then` with the path before the n-th change to `folder` (n = `at`, from 1), and before each after it."""
    _listen()
    count = Count(folder, at, then, removals)
    _counts.append(count)
    try:
        yield count
    finally:
        _counts.remove(count)


def fail(number: int) -> Callable[[str], None]:
    """The error of this number, as the system raises it."""

    def then(path: str) -> None:
        raise OSError(number, os.strerror(number), path)

    return then


def killed_at(folder: Path, at: int, work: Callable[[], object]) -> bool:
    """Does `work` in a process of its own, killed before its n-th change to `folder`; False if it ended before that.

    Raises RuntimeError where the work fails.
    """
    child = os.fork()
    if not child:
        try:
            with disturbed(folder, at, lambda path: os.kill(os.getpid(), signal.SIGKILL), removals=True):
                work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if status:
        raise RuntimeError(f"the work at change {at} ended with status {status}")
    return False

"""Follow a run from outside: its log lines and its checkpoints, wherever its workers are."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train.checkpoint import latest
from train.metrics import read

POLL_S = 0.5


@contextmanager
def watching(
    run_dir: Path,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    on_checkpoint: Callable[[int, Path], None] | None = None,
) -> Iterator[None]:
    """Call `on_log(line)` for each new line of metrics.jsonl and `on_checkpoint(step, folder)` for each new checkpoint.

    The callbacks run one at a time on a thread of this process; what is there already is not reported. The first error
    of a callback ends the watch and is raised at the end of the block, so that a broken display stops no training.
    """
    lines = read(run_dir / "metrics.jsonl")
    seen = {"log": lines[-1]["step"] if lines else 0, "checkpoint": (latest(run_dir / "checkpoints") or (0,))[0]}
    log = _Tail(run_dir / "metrics.jsonl")
    done, errors = threading.Event(), []

    def look() -> None:
        for line in log.new_lines():
            if on_log and line["step"] > seen["log"]:
                seen["log"] = line["step"]
                on_log(line)
        newest = latest(run_dir / "checkpoints") if on_checkpoint else None
        if on_checkpoint and newest and newest[0] > seen["checkpoint"]:
            seen["checkpoint"] = newest[0]
            on_checkpoint(*newest)

    def follow() -> None:
        try:
            while not done.wait(POLL_S):
                look()
            look()
        except Exception as error:  # raised in the caller's thread below
            errors.append(error)

    thread = threading.Thread(target=follow, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if errors:
        raise errors[0]


class _Tail:
    """Whole lines added to a file since the last look; from the top again if it was replaced (a restarted run)."""

    def __init__(self, path: Path):
        self.path, self.inode, self.position = path, 0, 0

    def new_lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self.inode:
                self.inode, self.position = inode, 0
            file.seek(self.position)
            whole, _, _ = file.read().rpartition(b"\n")
        self.position += len(whole) + 1 if whole else 0
        return [json.loads(line) for line in whole.splitlines()]

"""What Ray Data's scheduler is told in the driver: not to decode into full scratch; and what it knows of each stage.

Ray Data bounds what waits between two stages by the bytes of its rows. Ours hold paths, so that it would decode a whole
data set ahead of the encoders; the policy here goes by what lies on disk. Policies are asked before each task is
started and hold no CPU while they say no. Where nothing at all runs, Ray starts one task against them, so they cannot
lock a run; such a task waits in its worker (`preprocess.scratch`), bounded.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    BackpressurePolicy,
)

from preprocess.scratch import ScratchRoom

_INTERVAL = 1.0  # seconds between two looks at the disk, and two updates of what is shown
_STAGES = {"probe_row": "probe", "decode_row": "decode", "caption_row": "captions", "CaptionRow": "captions",
           "EncodeRow": "encode"}  # fmt: skip


@dataclass(frozen=True)
class StageState:
    """Rows of one operator of Ray Data, which runs stages that follow one another as one where it can."""

    name: str  # "probe, decode, captions"
    done: int
    running: int
    waiting: int
    total: int  # as far as can be known before all long videos are cut

    @property
    def figures(self) -> dict[str, int]:
        return {"running": self.running, "waiting": self.waiting}


Watcher = Callable[[list[StageState]], None]
_watchers: dict[str, Watcher] = {}  # by name: a policy's arguments are copied, and sent to workers with the context


@contextmanager
def stage_policies(decode: str, room: ScratchRoom, rows: int, watcher: Watcher) -> Iterator[list[Any]]:
    """Ray Data's own policies and ours, for `backpressure_policies.enabled` of its context.

    decode: name of the function that decodes. rows: of the manifest. watcher: told about once a second, from the thread
    of the scheduler.
    """
    name = secrets.token_hex(8)
    _watchers[name] = watcher
    try:
        ours = partial(StagePolicy, decode=decode, room=room, rows=rows, watcher=name)
        yield [*ENABLED_BACKPRESSURE_POLICIES, ours]
    finally:
        del _watchers[name]


class StagePolicy(BackpressurePolicy):
    """No decode is started while scratch is full; what has been started goes on.

    Raises RuntimeError where no operator decodes: this release of Ray names them otherwise.
    """

    name = "Scratch"

    def __init__(
        self, context: Any, topology: Mapping[Any, Any], resources: Any, *, decode: str, room: ScratchRoom, rows: int,
        watcher: str,
    ) -> None:  # fmt: skip
        super().__init__(context, topology, resources)  # type: ignore[arg-type]
        self._decode = next((op for op in topology if f"({decode})" in op.name), None)
        if self._decode is None:
            raise RuntimeError(f"no operator of Ray Data runs {decode}: {[op.name for op in topology]}")
        self._last, self._room, self._rows, self._watcher = next(reversed(list(topology))), room, rows, watcher
        self._looked = self._told = -_INTERVAL
        self._full = False

    def can_add_input(self, op: Any) -> bool:
        now = time.monotonic()
        if op is self._last and now - self._told >= _INTERVAL and self._watcher in _watchers:
            self._told = now
            _watchers[self._watcher](stage_states(self._topology, self._rows))
        if op is not self._decode:
            return True
        if now - self._looked >= _INTERVAL:
            self._looked, self._full = now, self._room.full()
        return not self._full


def stage_states(topology: Mapping[Any, Any], rows: int) -> list[StageState]:
    """Where the rows are, stage by stage; `rows` are in the manifest."""
    found: list[StageState] = []
    coming = rows
    for op, state in topology.items():
        names = [_STAGES[name] for name in re.findall(r"\((\w+)\)", op.name) if name in _STAGES]
        if not names:
            continue
        done, running = op.metrics.num_tasks_finished, op.num_active_tasks()
        waiting = state.total_enqueued_input_blocks()
        here = done + running + waiting
        total = here + coming if found else coming
        found.append(StageState(", ".join(names), done, running, waiting, total))
        coming = total - done
    return found

"""How much scratch may hold: frames wait for the encoder as raw pixels, and decoding is the faster of the two."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from preprocess.pieces import FRAMES
from preprocess.workplace import Workplace

MOST = 64 * 2**30  # bytes, where nobody says
PATIENCE = 600.0  # seconds that one decode waits at most: whatever holds the room, a run never stands still
_PAUSE = 1.0


@dataclass(frozen=True)
class ScratchRoom:
    """Room for the frames of videos under way. All nodes see the same folders.

    No lock and no count that a killed worker could leave wrong: what lies there is measured each time.
    """

    folders: tuple[Path, ...]
    limit: int  # bytes
    since: float = 0.0  # of `time.time`: what was written before this is of an earlier run, and frees no room

    def held(self) -> int:
        """Bytes of frames in the folders now, without what is older than `since`."""
        return sum(_held(folder, self.since) for folder in self.folders)

    def full(self) -> bool:
        return self.held() >= self.limit

    def wait(self, patience: float = PATIENCE) -> None:
        """Returns when there is room, or after `patience` seconds."""
        deadline = time.monotonic() + patience
        while self.full() and time.monotonic() < deadline:
            time.sleep(min(_PAUSE, patience))


def scratch_room(place: Workplace, gigabytes: float | None) -> ScratchRoom:
    """The room of a run that begins now; None: half of what is free, MOST at most."""
    place.parts.mkdir(parents=True, exist_ok=True)
    limit = free_room(place.parts) if gigabytes is None else int(gigabytes * 2**30)
    return ScratchRoom((place.scratch, place.parts / "films"), max(1, limit), time.time())


def free_room(folder: Path) -> int:
    """Bytes that scratch may hold where nobody says, for an output that may not be there yet."""
    while not folder.exists():
        folder = folder.parent
    return min(MOST, shutil.disk_usage(folder).free // 2)


def _held(folder: Path, since: float) -> int:
    """Of frames alone: who waits has a copy of a remote video himself, and would wait for those who wait for him."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            if not name.endswith(FRAMES):
                continue
            try:
                status = os.stat(os.path.join(path, name))
            except OSError:  # gone by now
                continue
            if status.st_mtime >= since:
                total += status.st_size
    return total

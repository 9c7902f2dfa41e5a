"""What this process may use: cores and memory, as limited by CPU affinity and by a container's cgroup."""

from __future__ import annotations

import math
import os
import resource
import sys
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores this process may run on, at least 1; a container quota of 1.5 cores counts as 2."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read(_CGROUP / "cpu.max").split()  # cgroup v2: "150000 100000" or "max 100000"
    if len(quota) == 2 and quota[0].isdecimal():
        cores = min(cores, math.ceil(int(quota[0]) / int(quota[1])))
    return max(cores, 1)


def total_memory() -> int:
    """Bytes of memory this process may use: the machine's, or its container's limit if that is smaller."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup v2, v1
        limit = _read(_CGROUP / name).strip()
        if limit.isdecimal():
            total = min(total, int(limit))
    return total


def available_memory() -> int:
    """Bytes of memory that can be taken without swapping; the total where the system does not say."""
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            return min(int(line.split()[1]) * 1024, total_memory())
    return total_memory()


def peak_memory() -> int:
    """Bytes of memory that this process has held at most.

    Linux counts in `getrusage` what the parent held when it started this process, too; VmHWM is of the program alone.
    """
    for line in _read(Path("/proc/self/status")).splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

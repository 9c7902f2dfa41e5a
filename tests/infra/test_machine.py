"""What a process may use, read from the files of a container."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra import machine


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    return tmp_path


def test_no_container(cgroup: Path) -> None:
    assert machine.usable_cores() == 8
    assert machine.total_memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < machine.available_memory() <= machine.total_memory()


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("150000 100000", 2), ("50000 100000", 1), ("9900000 100000", 8), ("", 8)]
)
def test_core_quota(cgroup: Path, quota: str, cores: int) -> None:
    (cgroup / "cpu.max").write_text(quota + "\n")
    assert machine.usable_cores() == cores


def test_memory_limit(cgroup: Path) -> None:
    (cgroup / "memory.max").write_text("536870912\n")
    assert machine.total_memory() == 2**29
    assert machine.available_memory() <= 2**29
    (cgroup / "memory.max").write_text("max\n")
    assert machine.total_memory() > 2**29


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux counts the parent's memory")
def test_peak_memory_is_of_this_program_alone(repo_root: Path) -> None:
    """A large parent starts a small child: `getrusage` would give the child the parent's peak."""
    child = "import resource; from infra.machine import peak_memory; print(peak_memory(), "
    child += "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    parent = f"import subprocess, sys; held = b'x' * 2**28; subprocess.run([sys.executable, '-c', {child!r}])"
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True, cwd=repo_root)
    peak, counted = (int(word) for word in done.stdout.split())
    assert 2**20 < peak < 2**27 < 1024 * counted

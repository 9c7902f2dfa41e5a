"""One Ray session per process: started small and quiet on this machine, or joined where a cluster already runs.

    with ray_session() as session:       # starts Ray here, and stops it at the end
    with ray_session(address="auto"):    # joins a running cluster, and leaves it running

What starting means: one GCS, one raylet and worker processes on demand, bound to the loopback address only, with no
dashboard and no usage reports; session files go to Ray's own temporary folder. Nothing outlives the `with` block.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.machine import total_memory, usable_cores

_MIB = 2**20
_SHM = Path("/dev/shm")
_lock = threading.Lock()
_SWITCHES = {
    "RAY_USAGE_STATS_ENABLED": "0",  # usage reports need a network
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run`, Ray would build an environment for each worker, online
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # leaves CUDA as it is for tasks that ask for no GPU, without a warning
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # Serve kills a proxy that is not up in time; Ray's 5 s are too few
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",  # on a busy laptop
}


class SessionError(RuntimeError):
    """Ray cannot be started or joined; says what to do."""


@dataclass(frozen=True)
class RaySession:
    """Which Ray this process talks to. `started` is true where this block started it and will stop it."""

    address: str
    started: bool
    num_cpus: float
    num_gpus: float


@contextlib.contextmanager
def ray_session(
    num_cpus: int | None = None, address: str | None = None, *, log_to_driver: bool = False
) -> Iterator[RaySession]:
    """Gives a Ray session for the duration of the block.

    num_cpus: CPUs a session started here offers; default the usable cores, at least 2, so that a pipeline of two
        actor pools can run on one core. Ignored where a session or cluster exists already.
    address: a cluster to join ("auto" or "host:port"); default the RAY_ADDRESS that `ray job submit` sets, else a
        new local session.
    log_to_driver: show what workers print. Errors reach the caller as exceptions either way.

    A session that this process already has is used as it is and left running, so blocks may be nested.
    Raises SessionError, with what to do, when Ray cannot be started or joined.
    """
    for name, value in _SWITCHES.items():
        os.environ.setdefault(name, value)
    import ray

    wanted = address or os.environ.get("RAY_ADDRESS") or "local"
    with contextlib.ExitStack() as stack:
        with _lock:  # two threads must not both find Ray uninitialised
            started = not ray.is_initialized()
            if started:
                if wanted == "local":
                    stack.enter_context(_loopback_only())
                stack.callback(ray.shutdown)  # ends a local session; from a cluster it only disconnects
                _init(num_cpus, wanted, log_to_driver)
        have = ray.cluster_resources()
        gcs = ray.get_runtime_context().gcs_address
        yield RaySession(gcs, started and wanted == "local", have.get("CPU", 0.0), have.get("GPU", 0.0))


def _init(num_cpus: int | None, address: str, log_to_driver: bool) -> None:
    import ray

    common: dict[str, Any] = {"log_to_driver": log_to_driver, "logging_level": logging.ERROR}
    if address == "local":
        common |= {
            "num_cpus": num_cpus or max(usable_cores(), 2),
            "include_dashboard": False,
            "object_store_memory": object_store_bytes(),
        }
    try:
        ray.init(address=address, **common)
    except Exception as error:
        joining = "check the address and that the cluster runs the same Ray and Python versions"
        remedy = "free memory or disk; `shotloom doctor` says more" if address == "local" else joining
        raise SessionError(f"Ray could not be reached at '{address}': {error}\nWhat to do: {remedy}") from error


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """Lets a session listen on 127.0.0.1 only: whoever reaches Ray's ports can run code as this user.

    Ray has this switch for desktops; it is read when Ray is first imported (here) and by every process Ray starts.
    """
    from ray._private import ray_constants

    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before[1]
        os.environ.pop(name)
        if before[0] is not None:
            os.environ[name] = before[0]


def object_store_bytes() -> int:
    """Size of a local session's object store: 15 % of memory, 128 MiB to 8 GiB, within half of free shared memory.

    Ray's own default is 30 % of memory; Shotloom passes paths and small records between stages, not video frames.
    """
    wanted = min(max(int(total_memory() * 0.15), 128 * _MIB), 8192 * _MIB)
    if _SHM.is_dir():
        wanted = min(wanted, max(shutil.disk_usage(_SHM).free // 2, 128 * _MIB))
    return wanted

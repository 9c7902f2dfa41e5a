"""One Ray session: started once, on loopback only, and left alone where it was there before."""

from __future__ import annotations

import os
import socket

import pytest
import ray

from infra import ray_session as module
from infra.ray_session import RaySession, object_store_bytes, ray_session


def test_session_runs_tasks_and_is_small(ray_module: RaySession) -> None:
    assert ray_module.started and ray_module.num_cpus == 2
    assert ray.get(ray.remote(lambda: os.environ["RAY_USAGE_STATS_ENABLED"]).remote()) == "0"
    assert ray.cluster_resources()["object_store_memory"] == pytest.approx(object_store_bytes(), rel=0.2)


def test_session_listens_on_loopback_only(ray_module: RaySession) -> None:
    host, port = ray_module.address.rsplit(":", 1)
    assert host == "127.0.0.1"
    assert ray.get_runtime_context().gcs_address == ray_module.address
    with socket.create_connection((host, int(port)), timeout=5):
        pass
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; tells which address this machine has towards a network
        except OSError:
            pytest.skip("this machine has no other address")
        outside = probe.getsockname()[0]
    if outside.startswith("127."):
        pytest.skip("this machine has no other address")
    with pytest.raises(OSError):
        socket.create_connection((outside, int(port)), timeout=5)


def test_a_nested_session_is_the_same_and_stays(ray_module: RaySession) -> None:
    with ray_session(num_cpus=7) as inner:
        assert inner.address == ray_module.address and not inner.started and inner.num_cpus == 2
    assert ray.is_initialized()


def test_an_error_inside_leaves_an_outer_session_running(ray_module: RaySession) -> None:
    with pytest.raises(KeyError), ray_session():
        raise KeyError
    assert ray.is_initialized()


def test_object_store_fits_small_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    mib = 2**20
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**50}))
    for memory, expected in ((512, 128), (8192, 1228), (16384, 2457), (1024 * 1024, 8192)):
        monkeypatch.setattr(module, "total_memory", lambda memory=memory: memory * mib)
        assert object_store_bytes() // mib == expected
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 600 * mib}))
    assert object_store_bytes() // mib == 300


def test_an_unreachable_cluster_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise ConnectionError("no answer")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(RuntimeError, match=r"'10.0.0.1:6379': no answer\nWhat to do: check the address"):
        with ray_session(address="10.0.0.1:6379"):
            pass
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    with pytest.raises(RuntimeError, match="10.0.0.2"), ray_session():
        pass

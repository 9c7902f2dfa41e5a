"""The service on Ray Serve, over HTTP: a storyboard becomes an mp4, and a killed replica loses no job."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import ray

from infra.ray_session import RaySession
from models.tiny import build_tiny_folder
from pipelines.serve import ServeConfig, serving
from sample.video_io import read_video, write_video

SHOTS = [{"prompt": "[SHOT CUT] One goes."}, {"prompt": "[SHOT CUT] One comes.", "seed": 4}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def config(folder: Path) -> ServeConfig:
    build_tiny_folder(folder / "tiny-lct", method="lct")
    return ServeConfig(
        model=folder / "tiny-lct",
        folder=folder / "service",
        port=0,
        steps=3,
        min_side=0,
        cpus_per_replica=0.5,
        lease_s=3,
        drain_s=5,
    )


class Service:
    """The service, and a client that can be had anew after a restart."""

    def __init__(self, config: ServeConfig) -> None:
        self.config, self.stack = config, ExitStack()

    def start(self) -> None:
        url = self.stack.enter_context(serving(self.config))
        self.client = self.stack.enter_context(httpx.Client(base_url=url, timeout=30))

    def stop(self) -> None:
        self.stack.close()


@pytest.fixture(scope="module")
def service(config: ServeConfig, ray_module: RaySession) -> Iterator[Service]:
    service = Service(config)
    service.start()
    yield service
    service.stop()


@pytest.fixture
def client(service: Service) -> httpx.Client:
    return service.client


def wait(client: httpx.Client, video_id: str, until: Any, seconds: float = 180) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        video = client.get(f"/v1/videos/{video_id}").json()
        if until(video):
            return video
        time.sleep(0.1)
    raise AssertionError(f"still {video} after {seconds} s")


def finished(video: dict[str, Any]) -> bool:
    return video["status"] in ("completed", "failed")


def create(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/videos", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_storyboard_becomes_a_video_with_progress_on_the_way(client: httpx.Client, tmp_path: Path) -> None:
    video = create(client, prompt="[Story] A walk.", storyboard={"shots": SHOTS}, seed=1, steps=150)
    assert video["status"] in ("queued", "in_progress") and video["model"] == "tiny-lct"
    seen = set()

    def watch(current: dict[str, Any]) -> bool:
        seen.add((current["status"], current["progress"]))
        return finished(current)

    done = wait(client, video["id"], watch)
    assert done["status"] == "completed" and done["progress"] == 100 and done["completed_at"] >= done["created_at"]
    assert any(status == "in_progress" and 0 < progress < 100 for status, progress in seen), seen
    content = client.get(f"/v1/videos/{video['id']}/content")
    assert content.headers["content-type"] == "video/mp4"
    (tmp_path / "a.mp4").write_bytes(content.content)
    frames, fps = read_video(tmp_path / "a.mp4")
    assert frames.shape == (10, 32, 32, 3) and fps == 8
    assert [shot["start_frame"] for shot in done["shots"]] == [0, 5]
    listed = client.get("/v1/videos").json()
    assert listed["last_id"] == video["id"] and listed["has_more"] is False


def test_the_same_seed_repeats_the_file_and_a_multipart_request_works(client: httpx.Client) -> None:
    bodies = []
    for prompt in ("A walk.", "A walk. "):  # another body, the same words
        response = client.post("/v1/videos", data={"prompt": prompt, "seed": "5"}, files={})
        if response.status_code == 415:  # httpx sends a form where there is no file
            pytest.fail(response.text)
        done = wait(client, response.json()["id"], finished)
        assert done["status"] == "completed", done
        bodies.append(client.get(f"/v1/videos/{done['id']}/content").content)
    assert bodies[0] == bodies[1]


def test_files_of_a_storyboard_are_parts_of_the_form(client: httpx.Client, tmp_path: Path) -> None:
    grey = np.full((5, 40, 40, 3), 90, np.uint8)
    write_video(grey, tmp_path / "given.mp4", 8)
    board = {"shots": [{"prompt": "It is there.", "given": "media/given.mp4"}, {"prompt": "It goes on."}]}
    files = {"media/given.mp4": ("given.mp4", (tmp_path / "given.mp4").read_bytes(), "video/mp4")}
    response = client.post("/v1/videos", data={"storyboard": json.dumps(board), "seed": "2"}, files=files)
    assert response.status_code == 200, response.text
    done = wait(client, response.json()["id"], finished)
    assert done["status"] == "completed", done
    (tmp_path / "made.mp4").write_bytes(client.get(f"/v1/videos/{done['id']}/content").content)
    frames, _ = read_video(tmp_path / "made.mp4")
    assert len(frames) == 10 and abs(frames[:5].astype(int) - 90).max() <= 3 and frames[5:].std() > 3
    response = client.post("/v1/videos", data={"storyboard": json.dumps(board | {"task": "extension"})}, files=files)
    assert response.status_code == 400 and response.json()["error"]["param"] == "storyboard.task"


def test_a_proxy_has_a_minute_to_come_up(service: Service) -> None:
    def limit() -> float:
        from ray.serve._private.constants import PROXY_READY_CHECK_TIMEOUT_S

        return PROXY_READY_CHECK_TIMEOUT_S

    assert ray.get(ray.remote(limit).options(num_cpus=0).remote()) == 60, "as Serve's controller reads it"


def test_bad_requests_and_failures_are_told_apart(client: httpx.Client) -> None:
    response = client.post("/v1/videos", json={"prompt": "x", "size": "1x1"})
    assert response.status_code == 400 and response.json()["error"]["param"] == "size"
    video = create(client, prompt="[Story] " + "x" * 400, storyboard={"shots": [{"prompt": "y" * 400}]})
    done = wait(client, video["id"], finished)
    assert done["status"] == "failed" and done["error"]["code"] == "invalid_request"
    assert "do not fit" in done["error"]["message"]
    assert client.delete(f"/v1/videos/{video['id']}").json()["deleted"] is True


def test_cancel_ends_a_running_job_and_the_next_one_starts(client: httpx.Client) -> None:
    video = create(client, prompt="x", storyboard={"shots": SHOTS}, steps=200, guidance=2.5)
    wait(client, video["id"], lambda v: v["status"] == "in_progress")
    client.post(f"/v1/videos/{video['id']}/cancel")
    done = wait(client, video["id"], finished)
    assert done["status"] == "failed" and done["error"]["code"] == "cancelled"
    assert wait(client, create(client, prompt="next")["id"], finished)["status"] == "completed"


def test_a_killed_replica_loses_no_job(client: httpx.Client, config: ServeConfig) -> None:
    video = create(client, prompt="long", storyboard={"shots": SHOTS * 4}, steps=200)
    wait(client, video["id"], lambda v: v["status"] == "in_progress")
    with sqlite3.connect(config.folder / "jobs.sqlite") as db:
        (worker,) = db.execute("SELECT worker FROM jobs WHERE id = ?", (video["id"],)).fetchone()
    host, pid = worker.rsplit(":", 1)
    assert host == socket.gethostname()
    os.kill(int(pid), signal.SIGKILL)
    done = wait(client, video["id"], finished, seconds=200)  # a replica starts in 10 s, or in 60 on a busy machine
    assert done["status"] == "completed"
    with sqlite3.connect(config.folder / "jobs.sqlite") as db:
        attempts, heir = db.execute("SELECT attempts, worker FROM jobs WHERE id = ?", (video["id"],)).fetchone()
    assert attempts == 2 and heir != worker
    assert client.get(f"/v1/videos/{video['id']}/content").status_code == 200


def test_only_the_local_address_is_bound(client: httpx.Client) -> None:
    port = client.base_url.port
    with open("/proc/net/tcp") as table:
        listening = [row.split()[1] for row in table.readlines()[1:] if row.split()[3] == "0A"]
    addresses = {address for address, _, local in (row.partition(":") for row in listening) if int(local, 16) == port}
    assert addresses == {"0100007F"}, addresses


def test_one_session_serves_one_thing(service: Service) -> None:
    with pytest.raises(RuntimeError, match="already serves"), serving(service.config):
        pass


def test_unfinished_jobs_go_on_when_the_folder_is_served_again(service: Service) -> None:
    video = create(service.client, prompt="again", storyboard={"shots": SHOTS * 4}, steps=200)
    wait(service.client, video["id"], lambda v: v["status"] == "in_progress")
    service.stop()
    with sqlite3.connect(service.config.folder / "jobs.sqlite") as db:
        status, attempts = db.execute("SELECT status, attempts FROM jobs WHERE id = ?", (video["id"],)).fetchone()
    assert (status, attempts) == ("queued", 0), "stopped in order, the job is given back at once"
    service.start()
    assert wait(service.client, video["id"], finished)["status"] == "completed"
    assert service.client.get("/v1/videos").json()["data"][0]["id"] == video["id"]

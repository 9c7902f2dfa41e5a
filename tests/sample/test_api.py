"""The HTTP contract, over a real job store; a worker is played by hand."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from sample.api import VideoService, build_api
from sample.jobs import JobStore
from sample.video_io import write_video

NO_IMAGE = "data:image/png;base64,AAAA"


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "jobs.sqlite")


@pytest.fixture
def service(tmp_path: Path) -> VideoService:
    return VideoService(
        model="toy", width=64, height=48, fps=8.0, frames_per_shot=17, frame_step=4, max_frames=33, max_shots=3,
        first_frame=True, results=tmp_path / "videos", max_queued=5,
    )  # fmt: skip


@pytest.fixture
def client(store: JobStore, service: VideoService) -> TestClient:
    return TestClient(build_api(store, service), raise_server_exceptions=False)


def png(width: int = 10, height: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (255, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def error_of(response, status: int) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


def finish(store: JobStore, service: VideoService) -> str:
    lease = store.lease("test")
    frames = np.zeros((5, 48, 64, 3), np.uint8)
    write_video(frames, service.results / "v.mp4", 8)
    store.complete(lease, "v.mp4")
    return lease.job.id


def test_create_by_json_gives_the_video_object(client: TestClient, store: JobStore) -> None:
    response = client.post("/v1/videos", json={"prompt": "A red circle.", "seconds": "2", "size": "64x48"})
    assert response.status_code == 200 and response.headers["x-should-retry"] == "false"
    video = response.json()
    expected = {"object": "video", "status": "queued", "progress": 0, "model": "toy", "size": "64x48",
                "prompt": "A red circle.", "error": None, "seconds": "2.125", "completed_at": None}  # fmt: skip
    assert {key: video[key] for key in expected} == expected
    assert isinstance(video["created_at"], int) and isinstance(video["seconds"], str)
    shot = store.get(video["id"]).request["storyboard"]["shots"][0]
    assert shot["frames"] == 17 and shot["sentence"] == "A red circle."


def test_create_by_multipart_with_an_image(client: TestClient, store: JobStore) -> None:
    response = client.post(
        "/v1/videos",
        data={"prompt": "A red circle.", "seconds": "1", "seed": "7"},
        files={"input_reference": ("frame.png", png(), "image/png")},
    )
    assert response.status_code == 200, response.text
    request = store.get(response.json()["id"]).request
    assert request["storyboard"]["seed"] == 7 and request["storyboard"]["shots"][0]["frames"] == 9
    with Image.open(io.BytesIO(base64.b64decode(request["first_frame"]))) as image:
        assert image.size == (64, 48)


def test_multipart_without_files_as_the_openai_client_sends_it(client: TestClient) -> None:
    boundary = "xyz"
    body = f'--{boundary}\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nhello\r\n--{boundary}--\r\n'
    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    assert client.post("/v1/videos", content=body, headers=headers).status_code == 200


@pytest.mark.parametrize("form", [False, True])
def test_a_storyboard_travels_in_shots(client: TestClient, store: JobStore, form: bool) -> None:
    shots = [{"prompt": "one", "seed": 3}, {"prompt": "two", "seconds": 1, "sentence": "alone"}]
    body = {"prompt": "[Story] x", "steps": 4, "guidance": 2.5}
    if form:
        response = client.post("/v1/videos", data={**body, "shots": json.dumps(shots)})
    else:
        response = client.post("/v1/videos", json={**body, "shots": shots})
    assert response.status_code == 200, response.text
    video = response.json()
    assert [(s["start_frame"], s["num_frames"]) for s in video["shots"]] == [(0, 17), (17, 9)]
    request = store.get(video["id"]).request
    assert request["steps"] == 4 and request["guidance"] == 2.5 and request["storyboard"]["story"] == "[Story] x"
    assert [s["seed"] for s in request["storyboard"]["shots"]] == [3, None]


@pytest.mark.parametrize(
    ("body", "param", "word"),
    [
        ({}, "prompt", "required"),
        ({"prompt": ""}, "prompt", "at least 1"),
        ({"prompt": "x", "size": "720x1280"}, "size", "'64x48'"),
        ({"prompt": "x", "seconds": "8"}, "seconds", "4.12 s"),
        ({"prompt": "x", "seconds": -1}, "seconds", "greater than 0"),
        ({"prompt": "x", "seconds": "soon"}, "seconds", "number"),
        ({"prompt": "x", "model": "sora-2"}, "model", "'toy'"),
        ({"prompt": "x", "shotz": []}, "shotz", "known: prompt, model"),
        ({"prompt": "x", "shots": []}, "shots", "at least 1"),
        ({"prompt": "x", "shots": [{"prompt": "a"}] * 4}, "shots", "at most 3"),
        ({"prompt": "x", "shots": [{"prompt": "a", "length": 2}]}, "shots.0.length", "known: prompt, sentence"),
        ({"prompt": "x", "shots": [{"prompt": "a", "seconds": 99}]}, "shots.0.seconds", "too long"),
        ({"prompt": "x", "steps": 0}, "steps", "greater than or equal to 1"),
        ({"prompt": "x", "input_reference": {"image_url": "https://example.org/a"}}, "input_reference", "data: URL"),
        ({"prompt": "x", "input_reference": {"image_url": NO_IMAGE}}, "input_reference", "not a readable"),
        ({"prompt": "x", "input_reference": {"file_id": "f"}}, "input_reference", "uploaded image"),
    ],
)  # fmt: skip
def test_bad_requests_say_which_field_and_what_to_do(
    client: TestClient, store: JobStore, body: dict, param: str, word: str
) -> None:
    error = error_of(client.post("/v1/videos", json=body), 400)
    assert error["param"] == param and word in error["message"] and error["type"] == "invalid_request_error"
    assert store.page()[0] == [], "a refused request leaves no job"


def test_bad_bodies(client: TestClient) -> None:
    error_of(client.post("/v1/videos", content="{", headers={"content-type": "application/json"}), 400)
    error_of(client.post("/v1/videos", json=["x"]), 400)
    error_of(client.post("/v1/videos", content="x", headers={"content-type": "text/plain"}), 415)
    error_of(client.post("/v1/videos", data={"prompt": "x", "shots": "[{"}), 400)
    big = b"{" + b" " * (33 * 2**20)
    error_of(client.post("/v1/videos", content=big, headers={"content-type": "application/json"}), 413)


def test_a_model_that_cannot_start_from_an_image_says_so(store: JobStore, service: VideoService) -> None:
    client = TestClient(build_api(store, replace(service, first_frame=False)))
    response = client.post("/v1/videos", data={"prompt": "x"}, files={"input_reference": ("f.png", png())})
    assert "cannot start from an image" in error_of(response, 400)["message"]


def test_a_client_retry_makes_no_second_job(client: TestClient, store: JobStore) -> None:
    first = client.post("/v1/videos", json={"prompt": "x"}).json()["id"]
    assert client.post("/v1/videos", json={"prompt": "x"}).json()["id"] == first
    headers = {"Idempotency-Key": "k"}
    keyed = client.post("/v1/videos", json={"prompt": "x"}, headers=headers).json()["id"]
    assert keyed != first and client.post("/v1/videos", json={"prompt": "x"}, headers=headers).json()["id"] == keyed
    clash = client.post("/v1/videos", json={"prompt": "y"}, headers=headers)
    assert error_of(clash, 409)["code"] == "idempotency_key_reused" and clash.headers["x-should-retry"] == "false"
    assert len(store.page()[0]) == 2


def test_a_full_queue_asks_to_wait(client: TestClient) -> None:
    for index in range(5):
        assert client.post("/v1/videos", json={"prompt": f"{index}"}).status_code == 200
    response = client.post("/v1/videos", json={"prompt": "one more"})
    assert error_of(response, 429)["code"] == "queue_full"
    assert response.headers["retry-after"] == "10" and "x-should-retry" not in response.headers


def test_retrieve_shows_progress_and_failure_with_200(client: TestClient, store: JobStore) -> None:
    video_id = client.post("/v1/videos", json={"prompt": "x"}).json()["id"]
    lease = store.lease("w")
    store.renew(lease, progress=42)
    video = client.get(f"/v1/videos/{video_id}").json()
    assert (video["status"], video["progress"]) == ("in_progress", 42)
    assert error_of(client.get(f"/v1/videos/{video_id}/content"), 409)["code"] == "video_not_ready"
    store.fail(lease, "generation_failed", "boom")
    response = client.get(f"/v1/videos/{video_id}")
    assert response.status_code == 200 and response.json()["status"] == "failed"
    assert response.json()["error"] == {"code": "generation_failed", "message": "boom"}
    assert error_of(client.get(f"/v1/videos/{video_id}/content"), 409)["code"] == "video_failed"
    assert error_of(client.get("/v1/videos/video_none"), 404)["code"] == "video_not_found"
    error_of(client.get("/v1/nothing"), 404)


def test_content_is_the_file_and_delete_removes_both(
    client: TestClient, store: JobStore, service: VideoService
) -> None:
    video_id = client.post("/v1/videos", json={"prompt": "x"}).json()["id"]
    assert error_of(client.delete(f"/v1/videos/{video_id}"), 409)["code"] == "video_not_finished"
    assert finish(store, service) == video_id
    response = client.get(f"/v1/videos/{video_id}/content")
    assert response.headers["content-type"] == "video/mp4" and response.content[4:8] == b"ftyp"
    error_of(client.get(f"/v1/videos/{video_id}/content", params={"variant": "spritesheet"}), 400)
    assert client.delete(f"/v1/videos/{video_id}").json() == {
        "id": video_id, "object": "video.deleted", "deleted": True,
    }  # fmt: skip
    assert not (service.results / "v.mp4").exists()
    error_of(client.get(f"/v1/videos/{video_id}"), 404)


def test_cancel_fails_the_job_with_its_own_code(client: TestClient) -> None:
    video_id = client.post("/v1/videos", json={"prompt": "x"}).json()["id"]
    video = client.post(f"/v1/videos/{video_id}/cancel").json()
    assert video["status"] == "failed" and video["error"]["code"] == "cancelled"
    error_of(client.post("/v1/videos/video_none/cancel"), 404)


def test_pages_carry_last_id_and_has_more(client: TestClient) -> None:
    ids = [client.post("/v1/videos", json={"prompt": f"{n}"}).json()["id"] for n in range(3)]
    page = client.get("/v1/videos", params={"limit": 2}).json()
    assert page["object"] == "list" and page["has_more"] is True
    assert [v["id"] for v in page["data"]] == [ids[2], ids[1]] and page["last_id"] == ids[1]
    rest = client.get("/v1/videos", params={"limit": 2, "after": page["last_id"]}).json()
    assert [v["id"] for v in rest["data"]] == [ids[0]] and rest["has_more"] is False
    error_of(client.get("/v1/videos", params={"limit": 0}), 400)
    error_of(client.get("/v1/videos", params={"order": "up"}), 400)
    assert error_of(client.get("/v1/videos", params={"after": "nope"}), 404)["param"] == "after"

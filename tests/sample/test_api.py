"""The HTTP contract, over a real job store; a worker is played by hand."""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from sample.api import build_api
from sample.jobs import JobStore
from sample.storyboard import Storyboard
from sample.video_io import fit_frames, read_video, write_video
from sample.video_request import MAX_STORYBOARD_BYTES, MAX_UPLOADS, VideoService

NO_IMAGE = "data:image/png;base64,AAAA"


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "jobs.sqlite")


@pytest.fixture
def service(tmp_path: Path) -> VideoService:
    return VideoService(
        model="toy", width=64, height=48, fps=8.0, frames_per_shot=17, frame_step=4, max_frames=33, max_shots=3,
        max_shots_in_turn=5, media_width=32, media_height=24, results=tmp_path / "videos", max_queued=5,
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
    video_id = response.json()["id"]
    (shot,) = store.get(video_id).request["storyboard"]["shots"]
    assert store.get(video_id).request["storyboard"]["seed"] == 7 and shot["frames"] == 9
    with Image.open(io.BytesIO(store.media(video_id)[shot["first_frame"]])) as image:
        assert image.size == (32, 24), "kept at the model's own size"


def test_multipart_without_files_as_the_openai_client_sends_it(client: TestClient) -> None:
    boundary = "xyz"
    body = f'--{boundary}\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nhello\r\n--{boundary}--\r\n'
    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    assert client.post("/v1/videos", content=body, headers=headers).status_code == 200


@pytest.mark.parametrize("sent", ["json", "field", "file"])
def test_a_storyboard_is_one_field(client: TestClient, store: JobStore, sent: str) -> None:
    shots = [{"prompt": "one", "seed": 3}, {"prompt": "two", "frames": 9, "sentence": "alone"}]
    board = {"name": "walk", "shots": shots, "task": "autoregressive", "history": 2, "negative": "dull"}
    body = {"prompt": "[Story] x", "steps": 4, "guidance": 2.5, "image_guidance": 1, "scene_guidance": 3, "seconds": 2}
    body["null_text"] = "shot"
    if sent == "field":
        response = client.post("/v1/videos", data={**body, "storyboard": json.dumps(board)})
    elif sent == "file":
        response = client.post("/v1/videos", data=body, files={"storyboard": ("walk.json", json.dumps(board))})
    else:
        response = client.post("/v1/videos", json={**body, "storyboard": board})
    assert response.status_code == 200, response.text
    video = response.json()
    assert [(s["start_frame"], s["num_frames"]) for s in video["shots"]] == [(0, 17), (17, 9)]
    request = store.get(video["id"]).request
    assert (request["steps"], request["guidance"]) == (4, 2.5)
    assert (request["image_guidance"], request["scene_guidance"], request["null_text"]) == (1, 3, "shot")
    asked = Storyboard.from_dict(request["storyboard"])
    assert (asked.name, asked.story, asked.task, asked.history) == ("walk", "[Story] x", "autoregressive", 2)
    assert asked.negative == "dull" and [s.seed for s in asked.shots] == [3, None]


@pytest.mark.parametrize("sent", ["json", "form"])
def test_image_guidance_can_grow_over_the_frames(client: TestClient, store: JobStore, sent: str) -> None:
    body = {"prompt": "x", "image_guidance": [1, 3] if sent == "json" else "[1, 3]"}
    response = client.post("/v1/videos", **({"json": body} if sent == "json" else {"data": body}))
    assert response.status_code == 200, response.text
    assert store.get(response.json()["id"]).request["image_guidance"] == [1, 3]


def test_a_storyboard_needs_no_prompt_and_a_prompt_no_words(client: TestClient, store: JobStore) -> None:
    def asked(**body) -> Storyboard:
        response = client.post("/v1/videos", json=body)
        assert response.status_code == 200, response.text
        return Storyboard.from_dict(store.get(response.json()["id"]).request["storyboard"])

    whole = asked(storyboard={"story": "S", "shots": [{"prompt": "a"}, {"prompt": "b"}]}, prompt="S", seed=4)
    assert whole.story == "S" and whole.seed == 4
    assert asked(storyboard={"shots": [{"sentence": "a", "states": ["first", "then"]}]}).shots[0].states == [
        "first", "then",
    ]  # fmt: skip
    lone = asked(prompt="It spins.", storyboard={"task": "diagonal", "plan": {"lag": 2}})
    assert lone.shots[0].sentence == "It spins." and lone.story == "" and lone.plan == {"lag": 2}


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
        ({"prompt": "x", "storyboard[task]": "edit"}, "storyboard[task]", "as JSON text"),
        ({"prompt": " "}, "prompt", "write one"),
        ({"prompt": "x", "storyboard": "[{"}, "storyboard", "not valid JSON"),
        ({"prompt": "x", "storyboard": "[" * 100000}, "storyboard", "not valid JSON"),
        ({"prompt": "x", "storyboard": []}, "storyboard", "dictionary"),
        ({"storyboard": {"shots": []}}, "storyboard.shots", "no shots"),
        ({"storyboard": {"shots": 3}}, "storyboard.shots", "expected list"),
        ({"storyboard": {"shots": [{"prompt": "a"}] * 4}}, "storyboard.shots", "at most 3"),
        ({"storyboard": {"task": "extension", "shots": [{"prompt": "a"}] * 6}}, "storyboard.shots", "at most 5"),
        ({"storyboard": {"shots": [{"promt": "a"}]}}, "storyboard.shots.0.promt", "did you mean 'prompt'"),
        ({"storyboard": {"shots": [{"prompt": "a", "frames": 4}]}}, "storyboard.shots.0.frames", "nearest is 5"),
        ({"storyboard": {"shots": [{"prompt": "a", "frames": 37}]}}, "storyboard.shots.0.frames", "up to 33 (4.12 s)"),
        ({"storyboard": {"shots": [{"prompt": "a", "frames": "9"}]}}, "storyboard.shots.0.frames", "expected int"),
        ({"storyboard": {"shots": [{"prompt": "a", "seed": -1}]}}, "storyboard.shots.0.seed", "2**63"),
        ({"prompt": "x", "storyboard": {"task": "edits"}}, "storyboard.task", "'edit'"),
        ({"prompt": "x", "storyboard": {"history": 2}}, "storyboard.history", "one after another"),
        ({"prompt": "x", "storyboard": {"plan": {"lag": 2}}}, "storyboard.plan", "is for a task of"),
        ({"prompt": "x", "storyboard": {"task": "diagonal", "plan": {"lag": 1e9}}}, "storyboard.plan.lag", "at most"),
        ({"prompt": "x", "storyboard": {"task": "diagonal", "plan": {"lag": math.nan}}}, "storyboard", "JSON"),
        ({"prompt": "x", "storyboard": {"\ud800": 1}}, "storyboard.?", "unknown field"),
        ({"prompt": "x", "storyboard": {"plan": {"a": [[1]]}}}, "storyboard.plan.a", "list of numbers"),
        ({"prompt": "x", "storyboard": {"task": "edit"}}, "input_reference", "the video to edit"),
        ({"prompt": "x", "seed": 1, "storyboard": {"seed": 2}}, "seed", "leave one of them out"),
        ({"prompt": "x", "storyboard": {"story": "y", "shots": [{"prompt": "a"}]}}, "prompt", "storyboard.story"),
        ({"storyboard": {"shots": [{"prompt": "x" * MAX_STORYBOARD_BYTES}]}}, "storyboard", "at most 262144"),
        ({"storyboard": {"shots": [{"prompt": "\ud800"}]}}, "storyboard", "surrogates"),
        (
            {"storyboard": {"shots": [{"prompt": "a", "given": "/etc/passwd"}, {"prompt": "b"}]}},
            "storyboard.shots.0.given", "names no uploaded part",
        ),
        (
            {"storyboard": {"shots": [{"prompt": "a", "first_frame": "data:image/png,x"}]}},
            "storyboard.shots.0.first_frame", "base64",
        ),
        (
            {"storyboard": {"shots": [{"prompt": "a", "references": [{"role": "boss", "path": "a"}]}]}},
            "storyboard.shots.0.references.0.role", "'portrait'",
        ),
        ({"prompt": "x", "steps": 0}, "steps", "greater than or equal to 1"),
        ({"prompt": "x", "image_guidance": [1]}, "image_guidance", "of the first and that of the last frame"),
        ({"prompt": "x", "image_guidance": [1, 2, 3]}, "image_guidance", "of the first and that of the last frame"),
        ({"prompt": "x", "image_guidance": [1, 31]}, "image_guidance", "0 to 30"),
        ({"prompt": "x", "image_guidance": -1}, "image_guidance", "0 to 30"),
        ({"prompt": "x", "image_guidance": math.nan}, "image_guidance", "0 to 30"),
        ({"prompt": "x", "image_guidance": "much"}, "image_guidance", "number"),
        ({"prompt": "x", "input_reference": {"image_url": "https://example.org/a"}}, "input_reference", "data: URL"),
        ({"prompt": "x", "input_reference": {"image_url": NO_IMAGE}}, "input_reference", "not a readable"),
        ({"prompt": "x", "input_reference": {"file_id": "f"}}, "input_reference", "uploaded file"),
    ],
)  # fmt: skip
def test_bad_requests_say_which_field_and_what_to_do(
    client: TestClient, store: JobStore, body: dict, param: str, word: str
) -> None:
    headers = {"content-type": "application/json"}  # in ASCII: half a character has no other form
    error = error_of(client.post("/v1/videos", content=json.dumps(body), headers=headers), 400)
    assert error["param"] == param and word in error["message"] and error["type"] == "invalid_request_error"
    assert store.page()[0] == [], "a refused request leaves no job"


def test_bad_bodies(client: TestClient) -> None:
    error_of(client.post("/v1/videos", content="{", headers={"content-type": "application/json"}), 400)
    error_of(client.post("/v1/videos", json=["x"]), 400)
    error_of(client.post("/v1/videos", content="x", headers={"content-type": "text/plain"}), 415)
    error_of(client.post("/v1/videos", data={"prompt": "x", "storyboard": "[{"}), 400)
    big = b"{" + b" " * (33 * 2**20)
    error_of(client.post("/v1/videos", content=big, headers={"content-type": "application/json"}), 413)


def test_a_model_that_cannot_start_from_an_image_says_so(store: JobStore, service: VideoService) -> None:
    service = replace(
        service, refused_fields={"first_frame": "cannot start from an image"}, refused_tasks={"edit": "has no task"}
    )
    client = TestClient(build_api(store, service))
    response = client.post("/v1/videos", data={"prompt": "x"}, files={"input_reference": ("f.png", png())})
    error = error_of(response, 400)
    assert "cannot start from an image" in error["message"] and error["param"] == "input_reference"
    response = client.post(
        "/v1/videos", data={"prompt": "x", "storyboard": '{"task": "edit"}'}, files={"input_reference": png()}
    )
    assert error_of(response, 400) | {"message": ""} == {
        "message": "", "type": "invalid_request_error", "param": "storyboard.task", "code": None,
    }  # fmt: skip


def film(frames: int, height: int = 48, width: int = 64, **write) -> bytes:
    """An MP4 whose frames differ."""
    path = write.pop("path")
    grey = np.linspace(20, 230, frames).astype(np.uint8)
    write_video(np.broadcast_to(grey[:, None, None, None], (frames, height, width, 3)), path, 8)
    return path.read_bytes()


def test_files_are_parts_that_the_storyboard_names(client: TestClient, store: JobStore, tmp_path: Path) -> None:
    clip = film(7, path=tmp_path / "clip.mp4")
    shots = [
        {"prompt": "a", "given": "media/a.mp4"},
        {"prompt": "b", "first_frame": "b.png"},
        {
            "prompt": "c",
            "references": [{"role": "portrait", "path": "b.png"}, {"role": "source", "path": "media/a.mp4"}],
        },
    ]
    response = client.post(
        "/v1/videos",
        data={"storyboard": json.dumps({"shots": shots})},
        files={"media/a.mp4": ("x.bin", clip), "b.png": ("../../b.png", png(), "text/plain")},
    )
    assert response.status_code == 200, response.text
    video = response.json()
    assert [s["num_frames"] for s in video["shots"]] == [5, 17, 17], "a given shot is as long as its file, 4k+1"
    board = Storyboard.from_dict(store.get(video["id"]).request["storyboard"])
    media = store.media(video["id"])
    given, first = board.shots[0].given, board.shots[1].first_frame
    assert set(media) == {given, first} and [one.path for one in board.shots[2].references] == [first, given]
    assert "/" not in given + first and given.endswith(".mkv") and first.endswith(".png")
    (tmp_path / given).write_bytes(media[given])
    kept, seen = read_video(tmp_path / given)[0], read_video(tmp_path / "clip.mp4")[0]
    assert np.array_equal(kept, fit_frames(seen, 24, 32)), "no loss but that of the size"


def test_a_data_url_stands_where_a_part_is_named(client: TestClient, store: JobStore) -> None:
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    by_url = client.post("/v1/videos", json={"prompt": "x", "storyboard": {"shots": [{"first_frame": url}]}})
    by_part = client.post("/v1/videos", data={"prompt": "x"}, files={"input_reference": ("f", png())})
    assert by_url.status_code == 200, by_url.text
    assert by_url.json()["id"] == by_part.json()["id"], "the same request"
    other = client.post("/v1/videos", data={"prompt": "x"}, files={"input_reference": ("f", png(9, 8))})
    assert other.json()["id"] == by_part.json()["id"], "other bytes, the same pixels at the model's size"


def test_an_input_reference_may_be_any_part_of_a_storyboard(client: TestClient, store: JobStore) -> None:
    board = {"shots": [{"prompt": "a", "given": "input_reference"}, {"prompt": "b"}]}
    response = client.post(
        "/v1/videos", data={"prompt": "x", "storyboard": json.dumps(board)}, files={"input_reference": png()}
    )
    assert response.status_code == 200, response.text
    given, made = store.get(response.json()["id"]).request["storyboard"]["shots"]
    assert given["given"].endswith(".png") and given["frames"] == 1 and made["first_frame"] == ""
    board = {"shots": [{"prompt": "a", "first_frame": "b"}]}
    response = client.post(
        "/v1/videos", data={"storyboard": json.dumps(board)}, files={"input_reference": png(), "b": png()}
    )
    assert error_of(response, 400)["param"] == "input_reference"


def test_an_edited_film_is_as_long_as_it_was(client: TestClient, store: JobStore, tmp_path: Path) -> None:
    for frames, made in ((7, 5), (40, 9)):
        response = client.post(
            "/v1/videos",
            data={"prompt": "x", "seconds": 1, "storyboard": '{"task": "edit", "plan": {"edit_level": 0.6}}'},
            files={"input_reference": ("f.mp4", film(frames, path=tmp_path / f"{frames}.mp4"), "video/mp4")},
        )
        assert response.status_code == 200, response.text
        assert response.json()["shots"][0]["num_frames"] == made


@pytest.mark.parametrize(
    ("shot", "files", "param", "word"),
    [
        ({"first_frame": "a"}, {"a": b"GIF89a"}, "storyboard.shots.0.first_frame", "not a readable image"),
        ({"first_frame": "a"}, {"b": png()}, "storyboard.shots.0.first_frame", "there are 'b'"),
        ({"first_frame": "a"}, {"a": png(), "b": png()}, "b", "does not name it"),
        ({"first_frame": "a"}, {"a": png(900, 100)}, "storyboard.shots.0.first_frame", "8 times"),
        ({}, {"a": png()}, "a", "does not name it"),
        (
            {"references": [{"role": "portrait", "path": "v"}]}, {"v": None},
            "storyboard.shots.0.references.0.path", "a portrait is an image",
        ),
        (
            {"references": [{"role": "image", "path": f"data:image/png;base64,{'A' * n}="} for n in range(3, 75, 4)]},
            {}, "storyboard.shots.0.references.0.path", "not a readable image",
        ),
    ],
)  # fmt: skip
def test_bad_uploads_say_which_field(
    client: TestClient, store: JobStore, tmp_path: Path, shot: dict, files: dict, param: str, word: str
) -> None:
    body = {"storyboard": json.dumps({"shots": [{"prompt": "a", **shot}]})}
    sent = {name: film(5, path=tmp_path / "v.mp4") if data is None else data for name, data in files.items()}
    error = error_of(client.post("/v1/videos", data=body, files=sent), 400)
    assert error["param"] == param and word in error["message"]
    assert store.page()[0] == []


def test_uploads_are_limited_in_number(client: TestClient) -> None:
    names = [f"p{n}" for n in range(MAX_UPLOADS + 1)]
    board = {"shots": [{"prompt": "a", "references": [{"role": "image", "path": name} for name in names]}]}
    parts = {name: png() for name in names}
    error = error_of(client.post("/v1/videos", data={"storyboard": json.dumps(board)}, files=parts), 400)
    assert error["param"] == "storyboard.shots.0.references.16.path" and "more than 16" in error["message"]
    error_of(client.post("/v1/videos", data={"prompt": "x"}, files={f"q{n}": png() for n in range(18)}), 400)


def test_media_go_when_their_job_ends(client: TestClient, store: JobStore, service: VideoService) -> None:
    def ask(prompt: str) -> str:
        response = client.post("/v1/videos", data={"prompt": prompt}, files={"input_reference": png()})
        return response.json()["id"]

    done, cancelled, waiting = ask("a"), ask("b"), ask("c")
    assert finish(store, service) == done
    client.post(f"/v1/videos/{cancelled}/cancel")
    assert (store.media(done), store.media(cancelled)) == ({}, {}) and len(store.media(waiting)) == 1


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


def test_given_frames_are_named_parts_and_images_are_known_by_their_bytes(client: TestClient, store: JobStore) -> None:
    def post(frames: list[dict]) -> object:
        shot = {"prompt": "It moves.", "given_frames": frames}
        files = {"a": ("a", png(), "image/png"), "b": ("b", png(12), "image/png")}
        return client.post("/v1/videos", data={"storyboard": json.dumps({"shots": [shot]})}, files=files)

    response = post([{"path": "a"}, {"path": "b", "at": -1}])
    assert response.status_code == 200, response.text
    kept = store.get(response.json()["id"]).request["storyboard"]["shots"][0]["given_frames"]
    assert [one["at"] for one in kept] == [0, -1] and all(one["path"].endswith(".png") for one in kept)
    error = error_of(post([{"path": "a"}, {"path": "b", "at": -1, "frames": 1}]), 400)
    assert error["param"] == "storyboard.shots.0.given_frames.1" and "leave them out for an image" in error["message"]


def test_a_label_stands_in_the_place_of_words(store: JobStore, service: VideoService) -> None:
    def post(body: dict, **changes) -> object:
        return TestClient(build_api(store, replace(service, **changes))).post("/v1/videos", json=body)

    labelled = {"storyboard": {"shots": [{"label": 2}]}}
    response = post(labelled)
    assert response.status_code == 200, response.text
    shot = store.get(response.json()["id"]).request["storyboard"]["shots"][0]
    assert (shot["label"], shot["prompt"], shot["sentence"]) == (2, "", "")
    named = post({**labelled, "prompt": "seven"})
    assert named.status_code == 200, "a prompt is then the name of the job and no words of the shot"
    for label in (0, 2):
        error = error_of(
            post({"storyboard": {"shots": [{"label": label}]}}, refused_fields={"label": "no classes"}), 400
        )
        assert error["param"] == "storyboard.shots.0.label" and "no classes" in error["message"]

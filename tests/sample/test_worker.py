"""The sampler replica without Ray: how a leased job ends."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.scene import Reference
from models.tiny import build_tiny_folder
from pipelines.serve import ServeConfig, server_settings
from pipelines.states import GrammarStates, StatesConfig
from sample.api import video_object
from sample.generate import GenerateSettings, generate_scene
from sample.server_settings import ServerSettings
from sample.storyboard import Storyboard, StoryboardShot
from sample.video_io import read_video, write_video
from sample.video_request import ApiError, parse_request
from sample.worker import VideoSampler


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> ServerSettings:
    folder = tmp_path_factory.mktemp("worker")
    build_tiny_folder(folder / "tiny", method="fvdm", frames_per_shot=5)
    return server_settings(ServeConfig(model=folder / "tiny", folder=folder / "service", steps=2, min_side=64))


@pytest.fixture
def sampler(settings: ServerSettings, tmp_path: Path) -> VideoSampler:
    service = replace(settings.service, results=tmp_path / "videos")
    return VideoSampler(replace(settings, folder=tmp_path, service=service))


def submit(sampler: VideoSampler, files: dict[str, bytes] | None = None, **body: Any) -> str:
    parsed = parse_request({"prompt": "x", **body}, sampler.settings.service, files)
    job, _ = sampler.store.create(parsed.request, media=parsed.media)
    return job.id


def test_the_service_describes_the_files_it_makes(settings: ServerSettings) -> None:
    service = settings.service
    assert (service.size, service.fps, service.max_frames, service.max_shots) == ("64x64", 8.0, 5, 1)
    assert (service.media_width, service.media_height) == (32, 32) and service.model == "tiny"
    assert set(service.refused_fields) == {"given", "references", "states", "label"}
    assert set(service.refused_tasks) == {"autoregressive", "extension"}


def test_a_job_ends_with_its_video(sampler: VideoSampler) -> None:
    job_id = submit(sampler, seed=1)
    asyncio.run(sampler.run(job_id))
    job = sampler.store.get(job_id)
    assert job.status == "completed" and job.progress == 100
    frames, fps = read_video(sampler.settings.service.results / job.result)
    assert frames.shape == (5, 64, 64, 3) and fps == 8
    asyncio.run(sampler.run(job_id))
    assert sampler.store.get(job_id) == job, "a finished job is not made again"


def test_a_first_frame_reaches_the_model(sampler: VideoSampler) -> None:
    videos = []
    for colour in ((250, 250, 250), (5, 5, 5)):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), colour).save(buffer, format="PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        job_id = submit(sampler, seed=1, input_reference={"image_url": url})
        asyncio.run(sampler.run(job_id))
        videos.append(read_video(sampler.settings.service.results / sampler.store.get(job_id).result)[0])
    assert abs(videos[0][0].astype(int) - videos[1][0]).mean() > 1


def film(path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8).repeat(8, 1).repeat(10, 2)
    return write_video(pixels, path, 8)


IN_TURN = {"method": "lct", "method_params": {"attention_rule": "group_causal"}}
LIKE_FILES: list[tuple[dict[str, Any], Storyboard]] = [
    ({"method": "fvdm"}, Storyboard("edit", "", [StoryboardShot("x", first_frame="film.mp4")], task="edit",
                                    plan={"edit_level": 0.7})),
    ({"method": "fvdm"}, Storyboard("grow", "", [StoryboardShot("x", first_frame="image.png")], task="progressive")),
    ({"method": "tic_ft", "frames_per_shot": 9}, Storyboard("portrait", "A figure.", [
        StoryboardShot("x", references=[Reference("portrait", "image.png"), Reference("place", "image.png")])])),
    (IN_TURN, Storyboard("turns", "S", [StoryboardShot("a"), StoryboardShot("b"), StoryboardShot("c", history=[0])],
                         task="autoregressive", history=2)),
    (IN_TURN, Storyboard("on", "S", [StoryboardShot("a", given="film.mp4"), StoryboardShot("b")], task="extension")),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "board"), LIKE_FILES, ids=lambda value: getattr(value, "name", ""))
def test_a_request_makes_what_the_same_storyboard_makes_from_files(
    kind: dict[str, Any], board: Storyboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[np.ndarray, list[int]]] = []

    def generate(*args: Any, **options: Any) -> Any:
        made.append(generate_scene(*args, **options))
        return made[-1]

    monkeypatch.setattr("sample.worker.generate_scene", generate)
    film(tmp_path / "film.mp4")
    Image.fromarray(read_video(tmp_path / "film.mp4")[0][0]).save(tmp_path / "image.png")
    build_tiny_folder(tmp_path / "model", **kind)
    sampler = VideoSampler(
        server_settings(ServeConfig(model=tmp_path / "model", folder=tmp_path, steps=2, guidance=2.0, min_side=64))
    )
    parts = {name: (tmp_path / name).read_bytes() for name in board.media()}
    parsed = parse_request({"storyboard": board.to_dict(), "seed": 1}, sampler.settings.service, parts)
    job, _ = sampler.store.create(parsed.request, media=parsed.media)
    asyncio.run(sampler.run(job.id))
    job = sampler.store.get(job.id)
    assert job.status == "completed", job.error_message
    assert sampler.store.media(job.id) == {}, "a finished job keeps its video alone"

    files = board.with_media(lambda field, name: str(tmp_path / name))
    frames, cuts = generate_scene(sampler.model, files, GenerateSettings(steps=2, guidance=2.0), seed=1)
    (served, served_cuts), difference = made[0], abs(made[0][0].astype(int) - frames)
    assert difference.max() <= 1 and difference.mean() < 0.1  # a grey level, where rounding differs
    assert served_cuts == cuts and sum(
        s["num_frames"] for s in video_object(job, sampler.settings.service)["shots"]
    ) == len(served)


def test_files_that_do_not_fit_fail_with_a_reason_that_names_no_path(sampler: VideoSampler, tmp_path: Path) -> None:
    data = film(tmp_path / "film.mp4").read_bytes()
    job_id = submit(sampler, {"input_reference": data})
    asyncio.run(sampler.run(job_id))
    job = sampler.store.get(job_id)
    assert (job.status, job.error_code) == ("failed", "invalid_request")
    assert "shot 0: first_frame: " in job.error_message and "/" not in job.error_message


def test_settings_and_predictor_of_states_reach_the_model(
    settings: ServerSettings, sampler: VideoSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ServeConfig(model=settings.model, states=StatesConfig(backend="toyworld", count=2))
    predictor = server_settings(config).states()
    assert isinstance(predictor, GrammarStates) and predictor.count == 2 and settings.states() is None
    seen: list[Any] = []

    def generate(model: Any, board: Any, settings: Any, seed: int, **options: Any) -> Any:
        scales = settings.guidance, settings.image_guidance, settings.scene_guidance
        seen.append((settings.steps, *scales, settings.null_text, options["states"]))
        return np.zeros((5, 32, 32, 3), np.uint8), []

    monkeypatch.setattr("sample.worker.generate_scene", generate)
    sampler.states = predictor
    with pytest.raises(ApiError, match="one shot at a time") as caught:
        submit(sampler, scene_guidance=2)
    assert caught.value.param == "scene_guidance"
    sampler.settings = replace(settings, service=replace(settings.service, lone_shots=False))
    for body in ({}, {"steps": 7, "guidance": 0, "image_guidance": [1, 3], "scene_guidance": 2, "null_text": "shot"}):
        asyncio.run(sampler.run(submit(sampler, **body)))
    assert seen == [(2, 5.0, None, None, "all", predictor), (7, 0, [1, 3], 2, "shot", predictor)]


def test_progress_and_cancel_between_steps(sampler: VideoSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = submit(sampler, steps=50)
    seen = []
    renew = sampler.store.renew

    def watch(lease: Any, progress: int | None = None) -> bool:
        seen.append(progress)
        sampler.store.cancel(job_id)
        return renew(lease, progress)

    monkeypatch.setattr(sampler.store, "renew", watch)
    asyncio.run(sampler.run(job_id))
    job = sampler.store.get(job_id)
    assert (job.status, job.error_code) == ("failed", "cancelled") and len(seen) == 1 and 0 < seen[0] < 95


def test_a_stopped_replica_gives_its_job_back(sampler: VideoSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = submit(sampler, steps=200)
    started = threading.Event()
    renew = sampler.store.renew
    monkeypatch.setattr(sampler.store, "renew", lambda *a, **k: (started.set(), renew(*a, **k))[1])

    async def stop_it() -> None:
        task = asyncio.create_task(sampler.run(job_id))
        await asyncio.to_thread(started.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(stop_it())
    job = sampler.store.get(job_id)
    assert (job.status, job.attempts) == ("queued", 0) and sampler.store.waiting() == [job_id]


def test_a_worker_that_lost_its_lease_leaves_no_file(sampler: VideoSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = submit(sampler)
    complete, heirs = sampler.store.complete, []

    def too_late(lease: Any, result: str) -> None:
        monkeypatch.setattr(sampler.store, "clock", lambda: 1e12)
        heirs.append(sampler.store.lease("heir", job_id))
        complete(lease, result)

    monkeypatch.setattr(sampler.store, "complete", too_late)
    asyncio.run(sampler.run(job_id))
    assert list(sampler.settings.service.results.iterdir()) == []
    job = sampler.store.get(job_id)
    assert job.status == "in_progress" and job.fence == heirs[0].fence


def test_what_cannot_be_made_fails_with_its_reason(sampler: VideoSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = submit(sampler, prompt="x" * 3000)
    asyncio.run(sampler.run(job_id))
    job = sampler.store.get(job_id)
    assert (job.status, job.error_code) == ("failed", "invalid_request") and "tokens" in job.error_message
    job_id = submit(sampler, seed=9)
    monkeypatch.setattr(sampler.model.codec, "decode", lambda latents: 1 / 0)
    asyncio.run(sampler.run(job_id))
    job = sampler.store.get(job_id)
    assert (job.status, job.error_code) == ("failed", "generation_failed") and "division" in job.error_message

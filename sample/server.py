"""The Ray Serve app: api -> job store <- dispatcher -> sampler replicas.

Ray Serve never replays a call whose replica died, and it forgets background work when it scales down. So the record
is the job store; the dispatcher keeps one handle call open per job, which the autoscaler sees and a drain waits for;
and a sampler replica takes the lease itself, when it begins, and renews it while it works. A replica that dies stops
renewing, the lease runs out, and the dispatcher hands the job to another.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from models.folder import load_model
from sample.api import VideoService, build_api
from sample.generate import GenerateSettings, generate_scene, largest_scene, starts_from_image
from sample.jobs import JobStore, Lease, LeaseLost
from sample.storyboard import Storyboard, StoryboardError, derive_seed
from sample.video_io import write_video

log = logging.getLogger("ray.serve")
POLL_S = 0.2


@dataclass(frozen=True)
class ServerSettings:
    """Everything the replicas need; `folder` holds the job store and the finished videos."""

    model: Path
    folder: Path
    generate: GenerateSettings
    max_shots: int
    max_frames: int
    device: str = "cpu"
    dtype: str = "float32"
    min_replicas: int = 1
    max_replicas: int = 1
    num_cpus: float = 1.0  # per sampler replica
    num_gpus: float = 0.0
    lease_s: float = 30.0
    max_attempts: int = 3
    dedupe_s: float = 30.0
    max_queued: int = 100
    drain_s: float = 600.0  # how long a replica that is told to stop may finish its video

    def store(self) -> JobStore:
        return JobStore(
            self.folder / "jobs.sqlite", lease_s=self.lease_s, max_attempts=self.max_attempts, dedupe_s=self.dedupe_s
        )

    @property
    def results(self) -> Path:
        return self.folder / "videos"


class Cancelled(Exception):
    """The client asked for an end."""


class Stopped(Exception):
    """The replica is told to stop; the job goes back to the queue."""


class VideoApi:
    """The ingress: FastAPI routes over the job store."""

    def __init__(self, settings: ServerSettings, dispatcher: DeploymentHandle) -> None:
        self.settings = settings
        self.dispatcher = dispatcher  # held so that Serve deploys it with the app

    def __serve_build_asgi_app__(self) -> FastAPI:
        settings = self.settings
        described = load_model(settings.model, parts=()).settings
        service = VideoService(
            model=settings.model.name,
            width=described.width,
            height=described.height,
            fps=described.fps,
            frames_per_shot=described.frames_per_shot,
            temporal_stride=4,
            max_frames=settings.max_frames,
            max_shots=min(settings.max_shots, largest_scene(described)),
            first_frame=starts_from_image(described),
            results=settings.results,
            max_queued=settings.max_queued,
        )
        return build_api(settings.store(), service)


class Dispatcher:
    """Holds one open call to a sampler per waiting job. Stateless: a new one starts from the store."""

    async def __init__(self, settings: ServerSettings, sampler: DeploymentHandle) -> None:
        self.store = settings.store()
        self.sampler = sampler
        self.calls: dict[str, asyncio.Task[None]] = {}
        self.watcher = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            for job_id in await asyncio.to_thread(self.store.waiting):
                if job_id not in self.calls:
                    self.calls[job_id] = asyncio.create_task(self._hold(job_id))
            await asyncio.sleep(POLL_S)

    async def _hold(self, job_id: str) -> None:
        try:
            await self.sampler.run.remote(job_id)
        except Exception as error:  # a dead replica: its lease runs out, and the job shows up as waiting again
            log.warning("call for %s ended with %s: %s", job_id, type(error).__name__, error)
        finally:
            del self.calls[job_id]

    async def check_health(self) -> None:
        if self.watcher.done():
            raise RuntimeError(f"the dispatcher stopped watching: {self.watcher.exception()!r}")


class VideoSampler:
    """One loaded model, one job at a time."""

    def __init__(self, settings: ServerSettings) -> None:
        import torch

        torch.set_num_threads(max(1, int(settings.num_cpus)))
        self.settings = settings
        self.store = settings.store()
        self.model = load_model(settings.model, device=settings.device, dtype=getattr(torch, settings.dtype))
        self.worker = f"{socket.gethostname()}:{os.getpid()}"
        self.busy = threading.Lock()

    async def run(self, job_id: str) -> None:
        """Do the job if it is still to be had. In a thread, so that Serve's health checks are answered meanwhile."""
        stop = threading.Event()
        try:
            await asyncio.to_thread(self._run, job_id, stop)
        except asyncio.CancelledError:
            stop.set()
            raise

    def _run(self, job_id: str, stop: threading.Event) -> None:
        with self.busy:  # a cancelled call's thread may still be on its last step
            lease = self.store.lease(self.worker, job_id)
            if lease is None:
                return
            with _renewing(self.store, lease):
                self._do(lease, stop)

    def _do(self, lease: Lease, stop: threading.Event) -> None:
        result = self.settings.results / f"{lease.job.id}.{lease.fence}.mp4"  # never the file of another attempt
        try:
            frames, fps = self._generate(lease, stop)
            write_video(frames, result, fps)
            self.store.complete(lease, result.name)
        except LeaseLost as error:
            result.unlink(missing_ok=True)
            log.warning("%s", error)
        except Stopped:
            self.store.release(lease)
        except Cancelled:
            self.store.fail(lease, "cancelled", "cancelled while it was made")
        except StoryboardError as error:
            self.store.fail(lease, "invalid_request", str(error))
        except Exception as error:
            log.exception("video %s failed", lease.job.id)
            self.store.fail(lease, "generation_failed", f"{type(error).__name__}: {error}")

    def _generate(self, lease: Lease, stop: threading.Event) -> tuple[Any, float]:
        request = lease.job.request
        board = Storyboard.from_dict(request["storyboard"])
        settings = self.settings.generate.override(steps=request["steps"], guidance=request["guidance"])
        seed = derive_seed(lease.job.id) if board.seed is None else board.seed
        noted = 0.0

        def on_step(done: int, total: int) -> None:
            nonlocal noted
            if stop.is_set():
                raise Stopped
            if done < total and time.monotonic() - noted < 0.1:  # the store need not hear of every short step
                return
            noted = time.monotonic()
            if self.store.renew(lease, progress=95 * done // total):  # the rest is decoding and writing
                raise Cancelled

        with tempfile.TemporaryDirectory() as scratch:
            if request["first_frame"] is not None:
                image = Path(scratch) / "first_frame.png"
                image.write_bytes(base64.b64decode(request["first_frame"]))
                board.shots[0].first_frame = str(image)
            frames, _ = generate_scene(self.model, board, settings, seed, callback=on_step)
        return frames, self.model.settings.fps


@contextmanager
def _renewing(store: JobStore, lease: Lease) -> Iterator[None]:
    """Renew the lease from a thread: a step or a decode may last longer than a lease."""
    done = threading.Event()

    def renew() -> None:
        while not done.wait(store.lease_s / 3):
            try:
                store.renew(lease)
            except LeaseLost:  # the working thread hears the same at its next step
                return
            except Exception:  # a busy store: the next try may do
                log.exception("could not renew the lease of %s", lease.job.id)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def build_app(settings: ServerSettings) -> Application:
    """The Serve application, ready for `serve.run(app, route_prefix="/")`."""
    resources = {"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus}
    scaling: dict[str, Any] = {"num_replicas": settings.min_replicas}
    if settings.max_replicas > settings.min_replicas:
        bounds = {"min_replicas": settings.min_replicas, "max_replicas": settings.max_replicas}
        scaling = {"autoscaling_config": {**bounds, "target_ongoing_requests": 1, "downscale_delay_s": 60}}
    sampler = serve.deployment(
        VideoSampler,
        name="sampler",
        max_ongoing_requests=1,  # a model serves one video at a time
        ray_actor_options=resources,
        graceful_shutdown_timeout_s=settings.drain_s,
        **scaling,
    ).bind(settings)
    light = {"num_cpus": 0}
    dispatcher = serve.deployment(Dispatcher, name="dispatcher", num_replicas=1, ray_actor_options=light)
    api = serve.deployment(
        serve.ingress()(VideoApi), name="api", num_replicas=1, max_ongoing_requests=100, ray_actor_options=light
    )
    return api.bind(settings, dispatcher.bind(settings, sampler))

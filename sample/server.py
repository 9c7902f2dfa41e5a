"""The Ray Serve app: api -> job store <- dispatcher -> sampler replicas.

Ray Serve never replays a call whose replica died, and it forgets background work when it scales down. So the record
is the job store; the dispatcher keeps one handle call open per job, which the autoscaler sees and a drain waits for;
and a sampler replica (worker.py) takes the lease itself, when it begins, and renews it while it works. A replica that
dies stops renewing, the lease runs out, and the dispatcher hands the job to another. Only samplers import torch.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from sample.api import build_api
from sample.server_settings import ServerSettings

log = logging.getLogger("ray.serve")
POLL_S = 0.2
DISPATCHER = "dispatcher"


class VideoApi:
    """The ingress: FastAPI routes over the job store."""

    def __init__(self, settings: ServerSettings, dispatcher: DeploymentHandle) -> None:
        self.settings = settings
        self.dispatcher = dispatcher  # held so that Serve deploys it with the app

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self.settings.store(), self.settings.service)


class Dispatcher:
    """Holds one open call to a sampler per waiting job. Stateless: a new one starts from the store."""

    async def __init__(self, settings: ServerSettings, sampler: DeploymentHandle) -> None:  # type: ignore[misc]
        self.store = settings.store()
        self.sampler = sampler
        self.calls: dict[str, Any] = {}  # open DeploymentResponses by job id
        self.holders: set[asyncio.Task[None]] = set()  # a task that nobody refers to may be collected
        self.watcher = asyncio.create_task(self._watch())

    async def drain(self) -> None:
        """Give the jobs in work back to the queue at their next step: the server is about to stop."""
        self.watcher.cancel()
        for call in self.calls.values():
            call.cancel()

    async def check_health(self) -> None:
        if self.watcher.done() and not self.watcher.cancelled():
            raise RuntimeError(f"the dispatcher stopped watching: {self.watcher.exception()!r}")

    async def _watch(self) -> None:
        while True:
            for job_id in await asyncio.to_thread(self.store.waiting):
                if job_id not in self.calls:
                    self.calls[job_id] = self.sampler.run.remote(job_id)
                    holder = asyncio.create_task(self._hold(job_id))
                    self.holders.add(holder)
                    holder.add_done_callback(self.holders.discard)
            await asyncio.sleep(POLL_S)

    async def _hold(self, job_id: str) -> None:
        try:
            await self.calls[job_id]
        except Exception as error:  # a dead replica: its lease runs out, and the job shows up as waiting again
            log.warning("the call for %s ended with %s: %s", job_id, type(error).__name__, error)
        finally:
            del self.calls[job_id]


def build_app(settings: ServerSettings) -> Application:
    """The Serve application, ready for `serve.run(app, route_prefix="/")`."""
    from sample.worker import VideoSampler

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
    ).bind(settings)  # type: ignore[attr-defined]
    light = {"num_cpus": 0}
    dispatcher = serve.deployment(Dispatcher, name=DISPATCHER, num_replicas=1, ray_actor_options=light)
    api = serve.deployment(
        serve.ingress()(VideoApi), name="api", num_replicas=1, max_ongoing_requests=100, ray_actor_options=light
    )
    return api.bind(settings, dispatcher.bind(settings, sampler))  # type: ignore[attr-defined]

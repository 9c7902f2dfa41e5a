"""A sampler replica: leases one job, makes its video, renews the lease meanwhile."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from models.folder import load_model
from sample.generate import GenerateSettings, generate_scene
from sample.jobs import JobStore, Lease, LeaseLost
from sample.storyboard import Storyboard, StoryboardError, derive_seed
from sample.video_io import enlarge, write_video

if TYPE_CHECKING:
    import numpy as np

    from sample.server_settings import ServerSettings

log = logging.getLogger("ray.serve")


class Cancelled(Exception):
    """The client asked for an end."""


class Stopped(Exception):
    """The replica is told to stop; the job goes back to the queue."""


class VideoSampler:
    """One loaded model, one job at a time."""

    def __init__(self, settings: ServerSettings) -> None:
        torch.set_num_threads(max(1, int(settings.num_cpus)))
        self.settings = settings
        self.store = settings.store()
        self.model = load_model(settings.model, device=settings.device, dtype=getattr(torch, settings.dtype))
        self.states = None if settings.states is None else settings.states()
        self.worker = f"{socket.gethostname()}:{os.getpid()}"
        self.busy = threading.Lock()

    async def run(self, job_id: str) -> None:
        """Do the job if it is still to be had. In a thread, so that Serve's health checks are answered meanwhile."""
        stop = threading.Event()
        work = asyncio.create_task(asyncio.to_thread(self._run, job_id, stop))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            stop.set()
            await work  # until the job is given back, at its next step
            raise

    def _run(self, job_id: str, stop: threading.Event) -> None:
        with self.busy:
            lease = self.store.lease(self.worker, job_id)
            if lease is None:
                return
            with _renewing(self.store, lease):
                self._do(lease, stop)

    def _do(self, lease: Lease, stop: threading.Event) -> None:
        result = (
            self.settings.service.results / f"{lease.job.id}.{lease.fence}.mp4"
        )  # never the file of another attempt
        try:
            frames, fps = self._generate(lease, stop)
            write_video(enlarge(frames, self.settings.min_side), result, fps)
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

    def _generate(self, lease: Lease, stop: threading.Event) -> tuple[np.ndarray, float]:
        request = lease.job.request
        board = Storyboard.from_dict(request["storyboard"])
        names = ("steps", "guidance", "image_guidance", "scene_guidance", "null_text")
        said = {name: getattr(self.settings, name) if (own := request.get(name)) is None else own for name in names}
        said["noise_aug"] = self.settings.noise_aug
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
            for name, data in self.store.media(lease.job.id).items():
                (Path(scratch) / name).write_bytes(data)
            board = board.with_media(lambda field, name: str(Path(scratch) / name))
            try:
                frames, _ = generate_scene(
                    self.model, board, GenerateSettings(**said), seed, states=self.states, callback=on_step
                )
            except StoryboardError as error:  # clients know no paths of the server
                raise StoryboardError(str(error).replace(f"{scratch}/", ""), error.param) from error
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

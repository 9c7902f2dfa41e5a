"""What the replicas of the Ray Serve app are told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sample.guidance import Scale
from sample.jobs import JobStore
from sample.video_request import VideoService

if TYPE_CHECKING:
    from models.states import StatePredictor


@dataclass(frozen=True)
class ServerSettings:
    """Everything the replicas need; `folder` holds the job store and the finished videos."""

    model: Path
    folder: Path
    service: VideoService
    steps: int = 30  # of requests that name none, as the next
    guidance: float = 5.0
    image_guidance: Scale | None = None
    scene_guidance: float | None = None
    null_text: Literal["shot", "all"] = "all"
    noise_aug: float = 0.0
    states: Callable[[], StatePredictor | None] | None = None  # opens the predictor of states; runs in each replica
    min_side: int = 0  # smaller videos are enlarged to this
    device: str = "cpu"
    dtype: str = "float32"
    min_replicas: int = 1
    max_replicas: int = 1
    num_cpus: float = 1.0  # per sampler replica
    num_gpus: float = 0.0
    lease_s: float = 30.0
    max_attempts: int = 3
    dedupe_s: float = 30.0
    drain_s: float = 600.0  # how long a replica that is scaled down may take to finish its video

    def store(self) -> JobStore:
        return JobStore(
            self.folder / "jobs.sqlite", lease_s=self.lease_s, max_attempts=self.max_attempts, dedupe_s=self.dedupe_s
        )

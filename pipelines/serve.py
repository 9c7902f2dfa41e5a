"""`shotloom serve`: a model folder behind OpenAI's video routes, on Ray Serve, with jobs that survive restarts."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from infra.knobs import knob, required
from pipelines.sample import check_image_guidance
from pipelines.states import StatesConfig, make_predictor

if TYPE_CHECKING:
    from sample.server_settings import ServerSettings

APP = "shotloom"


@dataclass(kw_only=True)
class ServeConfig:
    """All that `shotloom serve` can be told."""

    model: Path = required("model folder")
    folder: Path = knob(Path("runs/serve"), "job store and finished videos; kept between runs")
    host: str = knob(
        "127.0.0.1", "address to listen on; there is no authentication, so keep it local or put a proxy before it"
    )
    port: int = knob(8000, "port to listen on; 0 = a free one")
    steps: int = knob(30, "denoising steps of a request that names none")
    guidance: float = knob(5.0, "guidance scale of a request that names none; 1 = none")
    image_guidance: float | list[float] | None = knob(
        None,
        "guidance scale of the given frames, for models of methods aid, fca and svd, of a request that names none, or "
        "[first frame's, last frame's]; 1 = none; null = 1 (fca), 1.5 (aid, svd)",
    )
    scene_guidance: float | None = knob(
        None, "guidance scale of a scene's other shots, for models of method lct, of a request that names none"
    )
    null_text: Literal["shot", "all"] = knob(
        "all",
        "what guidance amplifies of the text, of a request that names none: all = story and prompt; shot = the "
        "prompt alone",
    )
    noise_aug: float = knob(
        0.0, "for models on Stable Video Diffusion (svd, aid): noise on the first frame before it is encoded, as 0.02"
    )
    states: StatesConfig = knob(StatesConfig, "for models of method aid: who says the states a storyboard does not")
    max_shots: int = knob(9, "most shots of one storyboard")
    max_frames: int = knob(0, "most pixel frames of one shot; 0 = as many as the model was trained on")
    min_side: int = knob(256, "smaller videos are enlarged by a whole factor to this many pixels a side; 0 = never")
    min_replicas: int = knob(1, "sampler replicas kept ready; 0 = load the model at the first request")
    max_replicas: int = knob(1, "sampler replicas at most")
    cpus_per_replica: float = knob(1.0, "CPUs of each sampler replica")
    gpus_per_replica: float = knob(0.0, "GPUs of each sampler replica")
    device: str = knob("cpu", "torch device: cpu, cuda, ...")
    dtype: Literal["float32", "bfloat16"] = knob("float32", "of the model's weights and activations")
    lease_s: float = knob(30.0, "seconds after which the job of a silent replica goes to another")
    max_attempts: int = knob(3, "replicas a job may lose before it fails")
    dedupe_s: float = knob(30.0, "seconds in which a repeated request without a key is taken for a client's retry")
    max_queued: int = knob(100, "waiting jobs after which new ones are refused with 429")
    drain_s: float = knob(600.0, "seconds a replica that is scaled down may take to finish its video")

    def __post_init__(self) -> None:
        check_image_guidance(self.image_guidance)
        if not 0 <= self.min_replicas <= self.max_replicas or self.max_replicas < 1:
            raise ValueError(
                f"replicas: need 0 <= min_replicas={self.min_replicas} <= max_replicas={self.max_replicas} >= 1"
            )
        if self.lease_s <= 0 or self.max_attempts < 1:
            raise ValueError(f"lease_s={self.lease_s} must be positive and max_attempts={self.max_attempts} at least 1")


@contextmanager
def serving(config: ServeConfig) -> Iterator[str]:
    """The service, up and ready inside the block; gives its base URL, such as http://127.0.0.1:8000.

    Uses the Ray session that is there, or starts one. Jobs unfinished at the end go on when the same `folder` is
    served again. Raises ValueError for an unusable model folder OSError when the port is taken, and
    RuntimeError when the Ray session serves something else.
    """
    from ray import serve

    from infra.ray_session import ray_session
    from sample.server import DISPATCHER, build_app

    settings = server_settings(config)
    port = _free_port(config.host, config.port)
    with ray_session():
        if serve.status().proxies:  # it would ignore our address and port, and our shutdown would end it
            raise RuntimeError("this Ray session already serves something; stop that first, or use another session")
        serve.start(proxy_location="HeadOnly", http_options={"host": config.host, "port": port})
        try:
            serve.run(build_app(settings), name=APP, route_prefix="/")
            yield f"http://{config.host}:{port}"
            serve.get_deployment_handle(DISPATCHER, APP).drain.remote().result(timeout_s=30)
        finally:
            serve.shutdown()


def run_serve(config: ServeConfig) -> None:
    """Serve until interrupted (Ctrl-C or SIGTERM)."""
    from infra.log import get_logger

    log, stop = get_logger("serve"), threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stop.set())
    with serving(config) as url:
        log.info(
            "serving %s on %s/v1/videos, jobs and videos in %s; stop with Ctrl-C", config.model, url, config.folder
        )
        stop.wait()
        log.info("stopping; unfinished jobs go on at the next start")


def server_settings(config: ServeConfig) -> ServerSettings:
    """The replicas' settings; checks the model folder here, where the error reaches the user."""
    import numpy as np

    from models.codecs import VideoCodec
    from models.folder import is_distilled, load_settings
    from sample.abilities import check_noise_aug, check_scene_guidance, largest_scene, refused_fields, refused_tasks
    from sample.guidance import check_guidance
    from sample.server_settings import ServerSettings
    from sample.video_io import enlarge
    from sample.video_request import VideoService

    described, distilled = load_settings(config.model), is_distilled(config.model)
    check_guidance(config.guidance, distilled)
    check_scene_guidance(config.scene_guidance, described)
    check_noise_aug(config.noise_aug, described)
    height, width = enlarge(np.empty((0, described.height, described.width, 3), np.uint8), config.min_side).shape[1:3]
    service = VideoService(
        model=config.model.resolve().name,
        width=width,
        height=height,
        fps=described.fps,
        frames_per_shot=described.frames_per_shot,
        frame_step=VideoCodec.frame_step_of(config.model),
        max_frames=config.max_frames or described.frames_per_shot,
        max_shots=min(config.max_shots, largest_scene(described)),
        max_shots_in_turn=config.max_shots,
        media_width=described.width,
        media_height=described.height,
        refused_tasks=refused_tasks(described),
        refused_fields=refused_fields(described),
        distilled=distilled,
        lone_shots=largest_scene(described) == 1,
        results=config.folder.resolve() / "videos",
        max_queued=config.max_queued,
    )
    return ServerSettings(
        model=config.model.resolve(),
        folder=config.folder.resolve(),
        service=service,
        steps=config.steps,
        guidance=config.guidance,
        image_guidance=config.image_guidance,
        scene_guidance=config.scene_guidance,
        null_text=config.null_text,
        noise_aug=config.noise_aug,
        states=partial(make_predictor, config.states),
        min_side=config.min_side,
        device=config.device,
        dtype=config.dtype,
        min_replicas=config.min_replicas,
        max_replicas=config.max_replicas,
        num_cpus=config.cpus_per_replica,
        num_gpus=config.gpus_per_replica,
        lease_s=config.lease_s,
        max_attempts=config.max_attempts,
        dedupe_s=config.dedupe_s,
        drain_s=config.drain_s,
    )


def _free_port(host: str, port: int) -> int:
    """`port` if it can be had, a free one for 0; Serve itself would only log that it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(f"cannot listen on {host}:{port} ({error.strerror}); choose another `port`") from error
        return int(probe.getsockname()[1])

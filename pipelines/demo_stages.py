"""The work of each stage of the demo, on top of the jobs `prepare`, `train`, `sample`, `evaluate` and `serve`."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from infra.log import progress
from pipelines.shipped import SHOT_GAP

if TYPE_CHECKING:
    from models.scene import Scene
    from pipelines.demo_types import DemoConfig, Stage
    from pipelines.train import TrainConfig
    from preprocess.report import PrepareReport
    from sample.storyboard import Storyboard
    from toyworld.world import ToyScene

LEVEL: Literal["small"] = "small"  # what the shipped model knows
HELD_OUT_SEED = 1  # scenes to generate are drawn here, in split "test"
SCENES, SHOTS = 2, 3  # generated before and after
SERVE_TIMEOUT_S = 300.0
# Levels and gap as the shipped model was trained. Half of the samples have one level, as sampling has.
LCT_PARAMS = {"density": "uniform", "position_gap": SHOT_GAP, "shared_prob": 0.5}
# Shares of scenes that lose text besides that for guidance: where some shots have none, or all have no story, only the
# other shots tell who is in them.
LCT_SILENT, LCT_STORYLESS = 0.25, 0.15


@dataclass(frozen=True)
class Prepared:
    """A prepared dataset: the folder its videos lie in, what `shotloom prepare` reported, and its scenes."""

    videos: Path
    report: PrepareReport
    scenes: list[Scene]


@dataclass(frozen=True)
class Takes:
    """Videos of the same storyboards by one model: records of `shotloom sample`, in the storyboards' order."""

    name: str
    folder: Path
    records: list[dict[str, Any]]


@dataclass(frozen=True)
class Served:
    """A video fetched over HTTP: the server's Video object and the file."""

    video: dict[str, Any]
    path: Path
    seconds: float


def check_model(folder: Path) -> None:
    """Raise ValueError, before any work, unless `folder` is a model folder."""
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"model={folder}: no model folder there; `make toy-models` makes the one the demo starts from")


def render(config: DemoConfig, folder: Path, stage: Stage) -> Path:
    """`shotloom toyworld render`: training scenes of 3 to 6 shots, with the captions a captioner would give."""
    from pipelines.toyworld_render import RenderConfig, run_render

    report = run_render(
        RenderConfig(
            out=folder,
            count=config.count,
            level=LEVEL,
            seed=config.seed,
            shots=(3, 6),
            vary_wording=True,
        )  # fmt: skip
    )
    stage.items = len(report.videos)
    stage.what = f"{len(report.videos)} ToyWorld videos, {report.num_shots} shots, {report.num_frames} frames, H.264"
    return folder


def collect(config: DemoConfig, stage: Stage) -> Path:
    """Look at the user's folder; its files are read where they are and never changed."""
    from preprocess.sources import list_sources

    assert config.videos is not None
    found = list_sources([config.videos], exclude=config.out)
    stage.items, stage.set_aside = len(found.files), len(found.repeated)
    size = sum(max(file.bytes, 0) for file in found.files) / 1e6
    stage.what = f"{len(found.files)} files, {size:.0f} MB; up to {config.max_seconds:g} s of each are taken"
    return config.videos


def prepare_dataset(config: DemoConfig, videos: Path, dataset: Path, stage: Stage) -> Prepared:
    """`shotloom prepare`; the scenes it wrote are read back with plain webdataset."""
    from pipelines.prepare import PrepareConfig, prepare

    report = prepare(
        PrepareConfig(
            sources=[str(videos)],
            output=dataset,
            model=config.model,
            max_seconds_per_video=None if config.videos is None else config.max_seconds,
        )
    )
    stage.items, stage.set_aside = report.written, report.filtered + report.failed
    if not report.encoded_shots:
        reasons = "; ".join(f"{row['name']}: {row['reason']}" for row in report.set_aside[:3])
        raise ValueError(f"no shot of {videos} could be used ({reasons or 'all are too short'}); see {dataset}")
    stage.what = f"{report.scenes} scenes, {report.shots} shots, {report.encoded_frames} frames encoded"
    return Prepared(videos, report, read_scenes(dataset))


def read_scenes(dataset: Path) -> list[Scene]:
    """The scene records of a prepared dataset, in shard order."""
    import webdataset

    from models.scene import Scene

    shards = [str(path) for path in sorted((dataset / "shards").glob("*.tar"))]
    if not shards:
        return []
    samples = webdataset.WebDataset(shards, shardshuffle=False)
    return [Scene.from_json(sample["json"]) for sample in samples]


def train_config(config: DemoConfig, dataset: Path, run_dir: Path) -> TrainConfig:
    """The demo's fine-tuning: LCT on windows of three shots, all weights."""
    from pipelines.train import TextDropConfig, TrainConfig

    return TrainConfig(
        dataset=dataset,
        model=config.model,
        run_dir=run_dir,
        method="lct",
        method_params=LCT_PARAMS,
        shots_per_scene=SHOTS,
        single_shot_prob=0.1,
        text_drop=TextDropConfig(shots=LCT_SILENT, story=LCT_STORYLESS),
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        warmup_steps=min(30, config.steps),
        lr_schedule="cosine",
        compile=config.compile,
        checkpoint_every=500 if config.steps > 500 else 0,  # a short run is over before one pays
        log_every=max(1, config.steps // 60),
        seed=config.seed,
    )


def finetune(config: DemoConfig, dataset: Path, run_dir: Path, stage: Stage) -> None:
    """`shotloom train` with method lct."""
    from pipelines.train import run_train

    result = run_train(train_config(config, dataset, run_dir))
    stage.items, stage.what = result.steps, f"{result.steps} steps of LCT"


def storyboards(config: DemoConfig, scenes: Sequence[Scene], notes: list[str]) -> list[Storyboard]:
    """Two scenes of three shots: held-out ToyWorld scenes, or in the words of two scenes of the user's videos."""
    if config.videos is None:
        return held_out_storyboards(SCENES, config.seed + HELD_OUT_SEED)
    from models.folder import load_model

    boards = footage_storyboards(scenes, load_model(config.model, parts=()).settings.frames_per_shot)
    shots = [len(board.shots) for board in boards]
    if len(boards) < SCENES or min(shots) < SHOTS:
        counts = " and ".join(f"one of {n} shot{'s' * (n > 1)}" for n in shots)
        notes.append(
            f"Your videos hold too few scenes of {SHOTS} shots for {SCENES} scenes to generate; made instead: {counts}."
        )
    return boards


def held_out_scenes(count: int, seed: int) -> list[ToyScene]:
    """Scenes whose every shot shows an identity, or an identity doing what, training never shows."""
    from toyworld.world import sample_scene

    return [sample_scene(LEVEL, seed=seed, index=index, split="test", num_shots=SHOTS) for index in range(count)]


def held_out_storyboards(count: int, seed: int) -> list[Storyboard]:
    """`held_out_scenes` as they are asked for."""
    from pipelines.evaluate import toy_storyboard

    return [toy_storyboard(scene) for scene in held_out_scenes(count, seed)]


def footage_storyboards(scenes: Sequence[Scene], frames_per_shot: int) -> list[Storyboard]:
    """Captions of the scenes with most encoded shots (at most `SHOTS` each) as storyboards, `SCENES` at most."""
    from sample.storyboard import Storyboard, StoryboardShot

    boards = []
    for scene in sorted(scenes, key=lambda s: -min(SHOTS, len(_told(s)))):
        shots = [
            StoryboardShot(shot.prompt, shot.sentence, frames=min(shot.encoded.num_frames, frames_per_shot))
            for shot in _told(scene)[:SHOTS]
            if shot.encoded is not None
        ]
        if shots and len(boards) < SCENES:
            name = re.sub(r"[^A-Za-z0-9._-]+", "-", scene.scene_id).strip("-._")[:100] or f"scene-{len(boards)}"
            boards.append(Storyboard(name, scene.story, shots))
    if not boards:
        raise ValueError("no prepared shot has a caption, so there are no words to generate from")
    return boards


def _told(scene: Scene) -> list[Any]:
    return [shot for shot in scene.shots if shot.encoded is not None and (shot.prompt or shot.sentence)]


def generate(
    config: DemoConfig, boards: Sequence[Storyboard], models: dict[str, Path], out: Path, stage: Stage
) -> list[Takes]:
    """The same storyboards with the same noise by each model; "before" makes every shot alone, as it was trained."""
    from pipelines.sample import SampleConfig, run_sample

    takes = []
    for name, model in models.items():
        report = run_sample(
            SampleConfig(
                model=model,
                out=out / "generated" / name,
                independent=name == "before",
                steps=config.sample_steps,
                guidance=config.guidance,
                scene_guidance=None if name == "before" else config.scene_guidance,
                batch_size=len(boards),
                seed=config.seed,
            ),
            boards,
        )
        if failed := [record for record in report.records if record["status"] != "completed"]:
            raise ValueError(f"{failed[0]['name']} ({name}) could not be made: {failed[0]['error']}")
        takes.append(Takes(name, out / "generated" / name, report.records))
    made = sum(len(take.records) for take in takes)
    stage.items, stage.what = made, f"{len(boards)} scenes before and after, {made} videos"
    return takes


def judge(takes: Sequence[Takes], stage: Stage) -> dict[str, dict[str, dict[str, float]]]:
    """`shotloom evaluate` of every folder: {"before"/"after": {metric: {"value", "count"}}}."""
    from pipelines.evaluate import EvaluateConfig, run_evaluate

    reports = {take.name: run_evaluate(EvaluateConfig(videos=take.folder)) for take in takes}
    stage.items = sum(len(report.videos) for report in reports.values())
    stage.set_aside = sum(len(report.failed) for report in reports.values())
    said = " -> ".join(f"{100 * report.metrics['identity_said']['value']:.0f} %" for report in reports.values())
    stage.what = f"{stage.items} videos read; identity across shots {said}"
    return {name: report.metrics for name, report in reports.items()}


def serve_one(config: DemoConfig, model: Path, board: Storyboard, out: Path, stage: Stage) -> Served:
    """Serve the fine-tuned model with Ray Serve on a free loopback port and fetch one video over HTTP."""
    from pipelines.serve import ServeConfig, serving

    served = ServeConfig(
        model=model,
        folder=out / "serve",
        port=0,
        steps=config.sample_steps,
        guidance=config.guidance,
        scene_guidance=config.scene_guidance,
    )
    with serving(served) as url:
        result = fetch_video(url, board, config.seed, out / "served.mp4")
    stage.items, stage.what = 1, f"1 video over HTTP, {result.seconds:.1f} s after the request"
    return result


def fetch_video(url: str, board: Storyboard, seed: int, path: Path) -> Served:
    """Ask a running service for a storyboard's video, wait for it and write it to `path`.

    Raises ValueError when the service refuses, the job fails, or it takes longer than SERVE_TIMEOUT_S.
    """
    import httpx

    from infra.storage import atomic_write_bytes

    board = replace(board, shots=board.shots[:SHOTS])
    body = {
        "storyboard": {
            "story": board.story,
            "shots": [{"prompt": shot.prompt, "sentence": shot.sentence} for shot in board.shots],
        },
        "seed": seed,
    }
    began = time.monotonic()
    with httpx.Client(base_url=url, timeout=60.0, trust_env=False) as client, progress("serve", 100) as bar:
        video = _answer(client.post("/v1/videos", json=body))
        while video["status"] not in ("completed", "failed", "cancelled"):
            if time.monotonic() - began > SERVE_TIMEOUT_S:
                raise ValueError(f"{url}: video {video['id']} is still {video['status']} after {SERVE_TIMEOUT_S:g} s")
            time.sleep(0.5)
            video = _answer(client.get(f"/v1/videos/{video['id']}"))
            bar.update(done=int(video["progress"] or 0))
        if video["status"] != "completed":
            raise ValueError(f"{url}: video {video['id']} {video['status']}: {video['error']}")
        content = client.get(f"/v1/videos/{video['id']}/content")
        if content.status_code != 200:
            raise ValueError(f"{url}: content of video {video['id']}: HTTP {content.status_code} {content.text[:300]}")
        bar.update(done=100)
    atomic_write_bytes(path, content.content)
    return Served(video, path, time.monotonic() - began)


def _answer(response: Any) -> dict[str, Any]:
    if response.status_code != 200:
        raise ValueError(f"{response.request.method} {response.url}: HTTP {response.status_code} {response.text[:300]}")
    return response.json()

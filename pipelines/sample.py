"""`shotloom sample`: storyboards and a model folder in, one mp4 per storyboard and manifest.jsonl out.

    storyboards -> groups of equal shape -> generate (this process, or a Ray Data actor pool) -> out/NAME.mp4 + .json

Each video leaves its own record NAME.json once it is whole. A second run skips what has a record of the same
storyboard, settings, seed and model, makes the rest, and tries failed ones again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from infra.knobs import knob, required
from models.scene import MAX_HISTORY
from pipelines.states import StatesConfig, make_predictor, predictor_key

if TYPE_CHECKING:
    from models.folder import Model
    from sample.generate import GenerateSettings
    from sample.storyboard import Storyboard


@dataclass(kw_only=True)
class SampleConfig:
    """All that `shotloom sample` can be told."""

    model: Path = required("model folder")
    storyboards: list[Path] | Path = knob([], "storyboard file (YAML or JSON), folder of them, or a list of these")
    out: Path = knob(Path("runs/sample"), "folder for the videos, their records and manifest.jsonl")
    seed: int = knob(0, "of storyboards without a seed of their own; each name gets its own noise from it")
    independent: bool = knob(False, "make every shot by itself: the single-shot baseline")
    text: Literal["scene", "sentence"] = knob("scene", "a shot reads its story and prompt, or its lone sentence")
    task: Literal["auto", "autoregressive", "extension"] = knob(
        "auto",
        "of storyboards that name none: auto = all shots at once; autoregressive = one after another, each seeing "
        "earlier ones; extension = likewise, as one shot that goes on",
    )
    history: int = knob(MAX_HISTORY, "how many earlier shots a shot sees that is made after them, 1 to 8")
    steps: int = knob(30, "denoising steps")
    guidance: float = knob(5.0, "classifier-free guidance scale of the text; 1 = none")
    image_guidance: float | list[float] | None = knob(
        None,
        "guidance scale of the given frames, for models of methods aid, fca and svd, or [first frame's, last frame's]; "
        "1 = none; null = 1 (fca), 1.5 (aid, svd)",
    )
    scene_guidance: float | None = knob(
        None, "guidance scale of a scene's other shots, for models of method lct; null = only the text is amplified"
    )
    null_text: Literal["shot", "all"] = knob(
        "all", "what guidance amplifies of the text: all = story and prompt; shot = the prompt alone"
    )
    noise_aug: float = knob(
        0.0, "for models on Stable Video Diffusion (svd, aid): noise on the first frame before it is encoded, as 0.02"
    )
    given_pixels: bool = knob(
        False, "show the frames that a shot starts from (first_frame) as they were given, not as the model shows them"
    )
    states: StatesConfig = knob(StatesConfig, "for models of method aid: who says the states a storyboard does not")
    solver: Literal["euler", "second_order", "ancestral"] = knob("euler", "how frames move between noise levels")
    min_side: int = knob(256, "smaller videos are enlarged by a whole factor to this many pixels a side; 0 = never")
    batch_size: int = knob(1, "storyboards of equal shape made at once")
    device: str = knob("cpu", "torch device: cpu, cuda, ...")
    dtype: Literal["float32", "bfloat16"] = knob("float32", "of the model's weights and activations")
    num_workers: int = knob(0, "Ray Data actors, each with its own copy of the model; 0 = in this process")
    cpus_per_worker: float = knob(1.0, "CPUs of each actor")
    gpus_per_worker: float = knob(0.0, "GPUs of each actor")

    def __post_init__(self) -> None:
        check_image_guidance(self.image_guidance)
        for name, least in (("batch_size", 1), ("num_workers", 0), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}; give at least {least}")
        if not 1 <= self.history <= MAX_HISTORY:
            raise ValueError(f"history={self.history}; a shot sees 1 to {MAX_HISTORY} earlier shots")
        if self.independent and self.task != "auto":
            raise ValueError(f"task={self.task} with independent=true: shots made by themselves see no others")


@dataclass(frozen=True)
class SampleReport:
    """What a run did; `records` are the lines of the manifest, in the storyboards' order."""

    made: int
    skipped: int
    failed: int
    seconds: float
    manifest: Path
    records: list[dict[str, Any]]

    @property
    def exit_code(self) -> int:
        """Of the command: 1 if a storyboard failed, though the others were made."""
        return int(self.failed > 0)

    def summary(self) -> str:
        """A line per failure, then one that counts."""
        lines = [f"{r['name']} failed: {r['error']}" for r in self.records if r["status"] == "failed"]
        reasons = " (reasons above and in the manifest; a second run tries only these)" if self.failed else ""
        counts = f"{self.made} made, {self.skipped} were there, {self.failed} failed{reasons}; {self.manifest}"
        return "\n".join([*lines, counts])


def run_sample(
    config: SampleConfig,
    storyboards: Sequence[Storyboard] | None = None,
    on_video: Callable[[dict[str, Any]], None] | None = None,
) -> SampleReport:
    """Make every storyboard of the files and of `storyboards`; one that fails is recorded and stops no other.

    `on_video` gets each record as its video is finished or has failed. Raises ConfigError for unreadable storyboard
    files and ValueError for an unusable model folder, a task or a guidance that is not the model's, before anything is
    made.
    """
    from infra.log import progress
    from infra.storage import atomic_write_text
    from models.codecs import VideoCodec
    from models.folder import is_distilled, load_model
    from pipelines.storyboards import load_storyboards
    from sample.abilities import check_noise_aug, check_scene_guidance, check_task
    from sample.guidance import check_guidance

    started = time.monotonic()
    paths = [config.storyboards] if isinstance(config.storyboards, Path) else config.storyboards
    described = load_model(config.model, parts=()).settings
    frame_step = VideoCodec.frame_step_of(config.model)
    boards = [*load_storyboards(paths, frame_step), *(storyboards or [])]
    names = [board.name for board in boards]
    if not boards:
        raise ValueError("no storyboards to sample; name files or folders in `storyboards`")
    if len(set(names)) != len(names):
        raise ValueError(f"storyboard names must differ, they become file names: {sorted(names)}")
    check_guidance(config.guidance, is_distilled(config.model))
    check_scene_guidance(config.scene_guidance, described)
    check_noise_aug(config.noise_aug, described)
    config.out.mkdir(parents=True, exist_ok=True)
    check_task(config.task, described)
    weights = folder_fingerprint(config.model)
    jobs = {board.name: _Job.of(board, config, weights, frame_step) for board in boards}
    records = {name: record for name, job in jobs.items() if (record := job.finished(config.out)) is not None}
    skipped = len(records)
    groups = _group([job for name, job in jobs.items() if name not in records], described, config.batch_size)
    try:
        with progress("sample", len(boards)) as bar:
            bar.advance(skipped)
            for record in _make_all(config, groups):
                records[record["name"]] = record
                bar.advance(1)
                if on_video is not None:
                    on_video(record)
    finally:  # also when stopped half-way: the manifest lists what is there
        ordered = [records[name] for name in names if name in records]
        manifest = config.out / "manifest.jsonl"
        atomic_write_text(manifest, "".join(json.dumps(record, sort_keys=True) + "\n" for record in ordered))
    failed = sum(record["status"] == "failed" for record in ordered)
    made = len(ordered) - skipped - failed
    return SampleReport(made, skipped, failed, time.monotonic() - started, manifest, ordered)


@dataclass(frozen=True)
class _Job:
    """One video to make; plain data, so that it travels to Ray actors as JSON."""

    board: dict[str, Any]
    seed: int
    fingerprint: str

    @staticmethod
    def of(board: Storyboard, config: SampleConfig, weights: str, frame_step: int) -> _Job:
        from sample.storyboard import derive_seed

        board.validate(frame_step=frame_step)
        seed = derive_seed(config.seed, board.name) if board.seed is None else board.seed
        fingerprint = board.fingerprint(
            seed=seed,
            settings=repr(generate_settings(config)),
            states=predictor_key(config.states),
            independent=config.independent,
            min_side=config.min_side,
            dtype=config.dtype,
            model=weights,
            media=[(path, Path(path).stat().st_size, Path(path).stat().st_mtime_ns) for path in board.media()],
        )
        return _Job(board.to_dict(), seed, fingerprint)

    def finished(self, out: Path) -> dict[str, Any] | None:
        """The record of an earlier run that made this very video, if its file is there."""
        path = out / f"{self.board['name']}.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        same = record.get("fingerprint") == self.fingerprint and record.get("status") == "completed"
        return record if same and (out / f"{self.board['name']}.mp4").is_file() else None


def generate_settings(config: SampleConfig) -> GenerateSettings:
    from sample.generate import GenerateSettings

    return GenerateSettings(
        config.steps,
        config.guidance,
        config.text,
        config.solver,
        config.task,
        config.history,
        config.image_guidance,
        config.scene_guidance,
        config.null_text,
        config.noise_aug,
        config.given_pixels,
    )


def check_image_guidance(scale: float | list[float] | None) -> None:
    """ValueError unless it is a number, or two."""
    if isinstance(scale, list):
        from sample.guidance import read_scale

        read_scale("image_guidance", scale)


def folder_fingerprint(folder: Path) -> str:
    """Hash over names, sizes and times of a folder's files: cheap at any size, and a changed model never looks old."""
    import hashlib

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    rows = [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def _group(jobs: list[_Job], described: Any, size: int) -> list[list[_Job]]:
    """Up to `size` jobs of one shape per group, in the order in which the first of each comes."""
    from sample.generate import scene_shape
    from sample.storyboard import Storyboard

    groups: list[list[_Job]] = []
    open_groups: dict[Any, list[_Job]] = {}
    for job in jobs:
        shape = scene_shape(Storyboard.from_dict(job.board), described)
        group = open_groups.get(shape)
        if group is None or len(group) >= size:
            group = open_groups[shape] = []
            groups.append(group)
        group.append(job)
    return groups


def _make_all(config: SampleConfig, groups: list[list[_Job]]) -> Iterator[dict[str, Any]]:
    if not groups:
        return
    if config.num_workers == 0:
        maker = _Maker(config)
        for group in groups:
            yield from maker.make(group)
        return
    import ray.data

    from infra.ray_session import ray_session

    missing = {job.board["name"]: job for group in groups for job in group}
    with ray_session(), _data_context():
        rows = [{"group": json.dumps([vars(job) for job in group])} for group in groups]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Maker,
            fn_constructor_args=[config],
            batch_size=1,
            # one group at a time per actor: a group that kills it takes no other along
            compute=ray.data.ActorPoolStrategy(
                size=min(config.num_workers, len(groups)), max_tasks_in_flight_per_actor=1
            ),
            num_cpus=config.cpus_per_worker,
            num_gpus=config.gpus_per_worker,
            max_task_retries=1,  # Ray's default is without end: a group that kills its actor would loop forever
        )
        for row in dataset.iter_rows():
            record = json.loads(row["record"])
            del missing[record["name"]]
            yield record
    for job in missing.values():
        yield _record(
            config, job, status="failed", error="the worker that made it died, twice; is there enough memory?"
        )


@contextmanager
def _data_context() -> Iterator[None]:
    """Ray Data's switches for this job, put back afterwards."""
    from ray.data import DataContext

    context = DataContext.get_current()
    wanted = {
        "max_errored_blocks": -1,  # a group that kills its worker must not end the run; what is missing is noticed
        "execution_no_progress_timeout_s": -1,  # one long video is no hang
        "enable_progress_bars": False,
        "print_on_execution_start": False,
    }
    before = {name: getattr(context, name) for name in wanted}
    try:
        for name, value in wanted.items():
            setattr(context, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)


class _Maker:
    """A loaded model that turns groups into videos; used as it is, and as Ray Data's actor."""

    def __init__(self, config: SampleConfig) -> None:
        import torch

        from models.folder import load_model

        if config.num_workers > 0:
            torch.set_num_threads(max(1, int(config.cpus_per_worker)))
        self.config = config
        self.states = make_predictor(config.states)
        self.model: Model = load_model(config.model, device=config.device, dtype=getattr(torch, config.dtype))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        records = []
        for text in batch["group"]:
            records += self.make([_Job(**job) for job in json.loads(text)])
        return {"record": [json.dumps(record) for record in records]}

    def make(self, group: list[_Job]) -> list[dict[str, Any]]:
        """Records of the group's videos. A group that fails is made one by one, so that the bad one stands alone."""
        try:
            return self._make(group)
        except Exception as error:
            if len(group) > 1:
                return [record for job in group for record in self.make([job])]
            return [_record(self.config, group[0], status="failed", error=f"{type(error).__name__}: {error}")]

    def _make(self, group: list[_Job]) -> list[dict[str, Any]]:
        from sample.generate import generate_scenes
        from sample.storyboard import Storyboard
        from sample.video_io import enlarge, write_video

        started = time.monotonic()
        boards = [Storyboard.from_dict(job.board) for job in group]
        clips = generate_scenes(
            self.model,
            boards,
            generate_settings(self.config),
            [job.seed for job in group],
            independent=self.config.independent,
            states=self.states,
        )
        seconds = round((time.monotonic() - started) / len(group), 3)
        records = []
        for job, clip in zip(group, clips, strict=True):
            pixels = enlarge(clip.frames, self.config.min_side)
            path = write_video(pixels, self.config.out / f"{job.board['name']}.mp4", self.model.settings.fps)
            frames, height, width, _ = pixels.shape
            figures: dict[str, Any] = {"frames": frames, "height": height, "width": width}
            figures |= {"fps": self.model.settings.fps} | ({"states": clip.states} if clip.states else {})
            records.append(
                _record(
                    self.config, job, status="completed", file=path.name, cuts=clip.cuts, seconds=seconds, **figures
                )
            )
        return records


def _record(config: SampleConfig, job: _Job, **facts: Any) -> dict[str, Any]:
    """The record of a finished or failed video, also written beside it."""
    from infra.storage import atomic_write_json

    record = {"name": job.board["name"], "seed": job.seed, "storyboard": job.board, **facts}
    record |= {"model": str(config.model), "independent": config.independent}
    record |= {"steps": config.steps, "guidance": config.guidance, "fingerprint": job.fingerprint}
    atomic_write_json(config.out / f"{job.board['name']}.json", record)
    return record

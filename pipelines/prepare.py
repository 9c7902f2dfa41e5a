"""`shotloom prepare`: videos to a dataset of scenes.

    sources -> probe -> decode once (shots, encoded spans) -> captions -> text and latents -> parts -> shards

One row per video from the first stage until its part is on disk; a long video is decoded in pieces, and its scenes
are rows of their own from then on. The chain of stages is `run_stages`; what a stage does lies in `preprocess/`, one
file each. Started again on the same output it does only what is missing or changed.
"""

from __future__ import annotations

import json
import logging
import re
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.knobs import knob, required
from pipelines.aesthetic import AestheticConfig, make_scorer, scorer_key
from pipelines.captioner import CaptionerConfig, api_key, asks, captioner_name, make_asker
from pipelines.sizes import check_sizes, read_sizes
from pipelines.states import StatesConfig, predictor_key
from preprocess.filters import FilterSettings
from preprocess.report import Pool, PrepareReport
from preprocess.settings import CaptionBackend, Cuts, Ids, PrepareSettings, StoreType
from preprocess.watch import MAX_ATTEMPTS

if TYPE_CHECKING:
    from infra.log import Progress
    from pipelines.dry_run import DryRun
    from pipelines.stage_policy import StageState, Watcher
    from preprocess.pieces import Job
    from preprocess.replay import Waterfall
    from preprocess.scratch import ScratchRoom
    from preprocess.sources import SourceList
    from preprocess.spans import PieceShots
    from preprocess.workplace import Workplace

_POLICIES = "backpressure_policies.enabled"  # Ray Data's key for them
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # a Path writes s3://bucket as s3:/bucket; C:/ is a drive


@dataclass(kw_only=True)
class PrepareConfig:
    """All that `shotloom prepare` can be told."""

    sources: list[str] = required(
        "folders, globs, videos, WebDataset tars and lists (.txt .csv .jsonl .parquet with a `path` column), each a "
        "path or an address (s3:// gs:// az:// http://)"
    )
    output: Path = required("folder of the dataset; started again on the same folder, a run does what is missing")
    model: Path = required("model folder whose VAE and text encoder encode the shots")
    ids: Ids = knob("path", "what a video's id is made of: its name, or its content (every file is read first)")
    frames_fps: float | None = knob(None, "take folders of numbered images for videos at this rate; null = leave them")
    list_root: Path | None = knob(None, "folder that lists may name files of; null = the list's own folder")
    height: int | None = knob(None, "of the encoded frames; null = the model's")
    width: int | None = knob(None, "of the encoded frames; null = the model's")
    sizes: list[str] | None = knob(
        None, "WIDTHxHEIGHT, such as [832x480,480x832]: each video takes the one of its aspect; null = one size for all"
    )
    fps: float | None = knob(None, "of the encoded frames; null = the model's")
    shot_frames: int | None = knob(None, "encoded frames per shot at most (Wan: 4k+1); null = the model's")
    min_shot_frames: int = knob(5, "a shot with fewer encoded frames is recorded but not encoded")
    max_shots: int = knob(9, "shots per scene at most")
    cuts: Cuts = knob(
        "detect",
        "where shots begin; transnet = TransNetV2 judges where the detector is in doubt; captions = where the shots of "
        "X.json beside X.mp4 begin and end",
    )
    captions: CaptionBackend = knob(
        "sidecar_or_describe",
        "sidecar = X.json beside X.mp4, describe = measured, endpoint = an OpenAI-compatible vision chat server, "
        "transformers = a local one",
    )
    captioner: CaptionerConfig = knob(CaptionerConfig, "the model of captions=endpoint and captions=transformers")
    max_seconds_per_video: float | None = knob(None, "take this much of each video; null = all")
    min_side: int = knob(32, "filter: pixels of the shorter side")
    min_rate: float = knob(0.5, "filter: source frames per encoded frame")
    filters: FilterSettings = knob(FilterSettings, "thresholds of the filters on shots")
    aesthetic: AestheticConfig = knob(AestheticConfig, "model of the aesthetic filter")
    crop_bars: bool = knob(True, "leave black bars around the picture out")
    what_if: bool = knob(False, "only print what the filters would take, from the scores of the dataset in output")
    dry_run: bool = knob(
        False, "only print the plan, with time, disk and memory estimated from a sample; writes nothing in output"
    )
    states: StatesConfig = knob(StatesConfig, "for method aid: predict the states of every shot")
    texts_apart: bool = knob(
        False, "CogVideoX, for method lct with global_prompt=group: also encode story and prompts each alone"
    )
    dtype: StoreType = knob("float16", "how latents and text embeddings are stored")
    tile_over: int | None = knob(
        None, "encode frames higher or wider than this in overlapping tiles of this side: less memory; null = whole"
    )
    shard_mb: float = knob(256.0, "target size of a shard")
    unit_minutes: float = knob(
        5.0, "longer videos are decoded and encoded in units of about this, side by side; changes no result"
    )
    seconds_limit: float = knob(3600.0, "time limit for one stage of one video, or of one unit of a long video")
    scratch_gb: float | None = knob(
        None,
        "decode waits while frames that wait for the encoder take this much of the output's disk (GiB); "
        "null = half of what is free at the start, 64 at most",
    )
    retry_failed: bool = knob(False, "try sources again that failed in an earlier run")
    decode_cpus: float = knob(0.75, "CPUs counted for one decoding task; how many run at once follows from it")
    encoders: int = knob(1, "actors that run the VAE and the text encoder")
    encoder_cpus: float = knob(0.5, "CPUs counted for one encoder")
    encoder_gpus: float = knob(0.0, "GPUs for one encoder; 0 = CPU")

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources is empty; name folders, globs, list files, tars or videos")
        if found := _ADDRESS.match(str(self.output)):
            scheme, rest = found[0].rstrip("/"), str(self.output)[found.end() :].lstrip("/")
            raise ValueError(
                f"output={scheme}//{rest} is an address, and datasets are written to folders: name one that all nodes "
                "see (local, NFS, or a bucket that is mounted), or prepare to a local one and copy it there afterwards"
            )
        if self.frames_fps is not None and not 0 < self.frames_fps <= 1000:
            raise ValueError(f"frames_fps={self.frames_fps} must lie above 0 and at most at 1000 frames per second")
        if self.sizes and (self.height or self.width):
            raise ValueError(f"sizes={self.sizes}, height={self.height}, width={self.width}: give sizes, or one size")
        read_sizes(self.sizes)
        if self.unit_minutes <= 0:
            raise ValueError(f"unit_minutes={self.unit_minutes} must be positive")
        if self.scratch_gb is not None and self.scratch_gb <= 0:
            raise ValueError(f"scratch_gb={self.scratch_gb} must be positive, or null")
        if self.shard_mb <= 0 or self.encoders < 1:
            raise ValueError("shard_mb must be positive and encoders at least 1")
        if self.dry_run and self.what_if:
            raise ValueError("dry_run and what_if are two questions; ask one of them")
        self.captioner.check(self.captions)


def run_prepare(config: PrepareConfig) -> PrepareReport | Waterfall | DryRun:
    """What the command does: prepare, or say what filters would take (`what_if`) or what it would cost (`dry_run`)."""
    if config.dry_run:
        from pipelines.dry_run import dry_run

        return dry_run(config)
    if config.what_if:
        from preprocess.replay import replay

        return replay(config.output.resolve(), make_settings(config))
    return prepare(config)


def prepare(config: PrepareConfig) -> PrepareReport:
    """Prepare all sources; leaves a dataset folder in which every source ended as written, filtered or failed.

    Needs a Ray session (`infra.ray_session`); opens one of its own if there is work to do and none is up.

    Raises:
        ValueError, OSError: bad config, sources or model folder.
        OutputError: the output cannot be written; what is done stays, and the next run goes on from it.
        ReconcileError: scenes lost or doubled; the dataset that was there before is left as it was.
    """
    from infra.log import get_logger, progress
    from infra.ray_session import ray_session
    from infra.storage import atomic_write_json
    from preprocess.dataset import scenes_aside
    from preprocess.room import writing
    from preprocess.run import lock, plan_work
    from preprocess.scratch import scratch_room

    began = time.monotonic()
    log = get_logger("prepare")
    output, model = config.output.resolve(), config.model.resolve()
    settings = make_settings(config)
    if config.captions == "endpoint":
        api_key(config.captioner)  # a key that is missing is told before the first decode
    with lock(output), writing(output):
        found = listed_sources(config, output)
        work = plan_work(found.files, output, settings, model, config.retry_failed)
        todo = {file.video_id for file in work.todo}
        report = PrepareReport(output, repeated=found.repeated)
        log.info("%d sources: %d to do, %d unchanged", len(work.files), len(todo), len(work.files) - len(todo))
        if todo:
            work.check_room()
            room = scratch_room(work.place, config.scratch_gb)
            with work.scratch(), ray_session(), progress("prepare", len(todo)) as shown:
                report.pools = worker_pools(config)
                for manifest in work.rounds():
                    with closing(run_stages(config, work.place, manifest, room, _shown_by(shown))) as rows:
                        for row in rows:
                            work.take(row)
                            report.count_done(json.loads(row["seconds"]), row["stage"], bool(row["status"]))
                            if row["status"]:  # else more of a long video is under way
                                shown.advance(**{row["status"]: shown.figures.get(row["status"], 0) + 1})
                    shown.drop_parts()
        shard_bytes = int(config.shard_mb * 2**20)
        if work.unchanged(shard_bytes):
            log.info("nothing has changed; the dataset stays as it is")
            record = work.earlier.facts
        else:
            with report.timed("shards"):
                record = work.compact(shard_bytes)
        report.count_rows([work.finished[file.video_id].part.source for file in work.files], todo)
        report.count_shots(row for file in work.files for row in work.finished[file.video_id].part.shots)
        report.scenes_aside = scenes_aside(
            [one.part.source for one in work.finished.values()],
            (row for file in work.files for row in work.finished[file.video_id].part.shots),
        )
        report.count_totals(record)
        report.seconds = time.monotonic() - began
        atomic_write_json(output / "report.json", report.to_dict())
        work.clean()
    return report


def listed_sources(config: PrepareConfig, output: Path) -> SourceList:
    """What the config's sources name. Raises what `list_sources` raises."""
    from preprocess.dataset import known_hashes
    from preprocess.sources import list_sources

    return list_sources(
        config.sources,
        output,
        ids=config.ids,
        frames_fps=config.frames_fps,
        list_root=config.list_root,
        known=known_hashes(output) if config.ids == "content" else None,
    )


def run_stages(
    config: PrepareConfig, place: Workplace, manifest: Path, room: ScratchRoom, watcher: Watcher
) -> Generator[dict[str, str], None, None]:
    """The whole data job as one chain: streams the outcome of each video of the manifest as its part is written.

    No video is decoded while scratch lacks `room`; `watcher` is told where the rows are.

    A video whose worker died in every attempt has no outcome here; `Work.rounds` accounts for it.
    """
    import ray.data
    from pyarrow.parquet import read_metadata
    from ray.data import ActorPoolStrategy

    from pipelines.stage_policy import stage_policies
    from preprocess.rows import CaptionRow, EncodeRow, caption_row, decode_row, probe_row, spread_row

    # bounded: Ray's default is to run a row that kills its worker for ever
    on_cpu: dict[str, Any] = {"num_cpus": config.decode_cpus, "max_retries": MAX_ATTEMPTS - 1, "fn_args": (place,)}
    on_decode: dict[str, Any] = {"side_by_side": partial(_side_by_side, config.decode_cpus), "room": room}
    rows = read_metadata(manifest).num_rows
    with stage_policies(decode_row.__name__, room, rows, watcher) as policies, _data_context(policies):
        chain = (
            ray.data.read_parquet(str(manifest), override_num_blocks=1)
            .repartition(target_num_rows_per_block=1)  # a dying worker takes its whole block with it
            .map(probe_row, **on_cpu)
            .map(decode_row, fn_kwargs=on_decode, **on_cpu)
        )
        if asks(config.captions, config.states):
            chain = chain.flat_map(spread_row, **on_cpu)
            captioner = config.captioner
            at_once = captioner.at_once(config.captions, config.states)
            chain = chain.map(
                CaptionRow,
                fn_constructor_kwargs={
                    "place": place,
                    "make_asker": partial(make_asker, config.captions, captioner, config.states),
                },
                compute=ActorPoolStrategy(
                    size=captioner.actors,
                    max_concurrent_calls_per_actor=at_once,
                    enable_true_multi_threading=at_once > 1,
                ),
                num_cpus=captioner.cpus,
                num_gpus=captioner.gpus or None,
                max_task_retries=MAX_ATTEMPTS - 1,
            )
        else:
            chain = chain.map(caption_row, **on_cpu).flat_map(spread_row, **on_cpu)
        chain = chain.map(
            EncodeRow,
            fn_constructor_kwargs={
                "place": place,
                "model": str(config.model.resolve()),
                "device": "cuda" if config.encoder_gpus else "cpu",
                "threads": max(1, int(config.encoder_cpus)),
                "make_aesthetic": partial(make_scorer, config.aesthetic, bool(config.encoder_gpus)),
            },
            compute=ActorPoolStrategy(size=config.encoders),
            num_cpus=config.encoder_cpus,
            num_gpus=config.encoder_gpus or None,
            max_task_retries=MAX_ATTEMPTS - 1,
        )
        yield from chain.iter_rows()


def _side_by_side(cpus: float, work: Callable[[Job], PieceShots], jobs: Sequence[Job]) -> list[PieceShots | None]:
    """The pieces of a long video as tasks of their own; the task that waits for them lends them its CPU."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    task = ray.remote(num_cpus=cpus, max_retries=MAX_ATTEMPTS - 1)(work)
    found: list[PieceShots | None] = []
    for result in [task.remote(job) for job in jobs]:
        try:
            found.append(ray.get(result))
        except RayTaskError as error:
            raise error.cause from error  # a full disk, say: it ends the run
        except RayError:  # its worker or its node died
            found.append(None)
    return found


def _shown_by(job: Progress) -> Watcher:
    """Shows each stage below the line of the job."""
    lines: dict[str, Progress] = {}

    def show(stages: list[StageState]) -> None:
        for stage in stages:
            if stage.name not in lines:
                lines[stage.name] = job.part(stage.name)
            lines[stage.name].update(stage.done, stage.total, **stage.figures)

    return show


def worker_pools(config: PrepareConfig) -> list[Pool]:
    """Who works on which stages, how many at once in the Ray session that is open, and what makes them more."""
    import ray

    cpus = ray.cluster_resources().get("CPU", 1.0)
    captioner = config.captioner
    asked = asks(config.captions, config.states)
    left = cpus - config.encoders * config.encoder_cpus - asked * captioner.actors * captioner.cpus
    decoding = max(1, int(left / config.decode_cpus))
    here = ["probe", "decode"] if asked else ["probe", "decode", "captions"]
    pools = [Pool(here, decoding, "decode_cpus (less: more videos at once), or more CPUs")]
    if asked:
        at_once = captioner.at_once(config.captions, config.states)
        knob = "captioner.side_by_side, or a faster server" if at_once > 1 else "captioner.actors, captioner.gpus"
        pools.append(Pool(["captions"], captioner.actors * at_once, knob))
    return [*pools, Pool(["encode"], config.encoders, "encoders, encoder_gpus")]


@contextmanager
def _data_context(policies: list[Any]) -> Iterator[None]:
    """Ray Data's switches for this job, put back afterwards."""
    from ray.data import DataContext

    context = DataContext.get_current()
    wanted = {
        "target_max_block_size": 1,  # bytes, so a row is a block: rows of one block would be done in turn, by one actor
        "max_errored_blocks": -1,  # a video that kills its worker must not end the run; `Work.rounds` misses it
        "execution_no_progress_timeout_s": -1,  # one long video is no hang; every stage has its own limit
        "enable_progress_bars": False,
        "print_on_execution_start": False,
    }
    before = {name: getattr(context, name) for name in wanted}
    asked_before = context.get_config(_POLICIES, None)
    log = logging.getLogger("ray.data")
    level = log.level
    try:
        for name, value in wanted.items():
            setattr(context, name, value)
        context.set_config(_POLICIES, policies)
        log.setLevel(logging.ERROR)  # our own progress line and report say what these lines would
        with warnings.catch_warnings():
            # `max_retries` and `max_task_retries` have no named form in Ray 2.60, which warns that 2.64 will need one
            warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
            yield
    finally:
        log.setLevel(level)
        for name, value in before.items():
            setattr(context, name, value)
        context.remove_config(_POLICIES)
        if asked_before is not None:
            context.set_config(_POLICIES, asked_before)


def make_settings(config: PrepareConfig) -> PrepareSettings:
    """The stages' settings, with what is not given taken from the model folder."""
    from models.codecs import VideoCodec
    from models.folder import load_settings

    if config.cuts == "transnet":
        from preprocess.transnet import require_transnet

        require_transnet()
    model = load_settings(config.model)
    sizes = read_sizes(config.sizes)
    check_sizes(config.model, config.height, config.width, sizes)
    if config.tile_over is not None:
        try:
            VideoCodec.check_tile_of(config.model, config.tile_over)
        except ValueError as error:
            raise ValueError(f"tile_over={config.tile_over}: {error}") from error
    return PrepareSettings(
        height=config.height or model.height,
        width=config.width or model.width,
        sizes=sizes,
        fps=config.fps or model.fps,
        frame_step=VideoCodec.frame_step_of(config.model),
        shot_frames=config.shot_frames or model.frames_per_shot,
        min_shot_frames=config.min_shot_frames,
        max_shots=config.max_shots,
        max_seconds=config.max_seconds_per_video,
        min_side=config.min_side,
        min_rate=config.min_rate,
        crop_bars=config.crop_bars,
        filters=config.filters,
        aesthetic_key=scorer_key(config.aesthetic),
        cuts=config.cuts,
        captions=config.captions,
        caption_model=captioner_name(config.captions, config.captioner),
        caption_frames=config.captioner.frames,
        caption_words=config.captioner.words,
        dtype=config.dtype,
        tile_over=config.tile_over,
        seconds_per_video=config.seconds_limit,
        unit_seconds=60 * config.unit_minutes,
        states_key=predictor_key(config.states),
        states_frames=config.states.frames,
        texts_apart=config.texts_apart,
    )

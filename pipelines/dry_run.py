"""`shotloom prepare dry_run=true`: what would be done, and about what it costs, without writing to the output folder.

Every source is listed. Up to PROBED of them, evenly over the list, are probed, and a few of those that pass go through
all stages in a temporary folder, cut to SECONDS each; what they took, per source frame, is scaled to the rest. No Ray
and no captioning model is started: what a model would be asked is left out of the estimate, and said.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pyarrow.parquet as pq

from infra.log import duration
from infra.machine import available_memory, peak_memory, usable_cores
from preprocess.dataset import Earlier, Finished, find_finished
from preprocess.encode import Encoder, encoder_key
from preprocess.filters import thresholds
from preprocess.index import INDEX
from preprocess.parts import part_path
from preprocess.pieces import frames_taken
from preprocess.scratch import free_room
from preprocess.settings import ASKED, PrepareSettings
from preprocess.sizes import Size, in_words
from preprocess.sources import SourceFile
from preprocess.unit import (
    Unit,
    Workplace,
    caption_stage,
    close_stage,
    decode_stage,
    encode_stage,
    probe_stage,
    run_stage,
)

if TYPE_CHECKING:
    from pipelines.prepare import PrepareConfig

T = TypeVar("T")

PROBED = 500  # videos
SAMPLE = 4  # videos that go through all stages
SECONDS = 20.0  # of each
STAGES = ("probe", "decode", "captions", "encode")
_SHOWN = 20  # videos set aside that are named


@dataclass
class DryRun:
    """What was found and measured; `summary` says it for people. Seconds are of work, bytes of files and memory."""

    output: Path
    settings: PrepareSettings
    decoding: int  # decoding tasks at once, on this machine
    encoders: int
    cores: int
    asked: str = ""  # the captioner and the state predictor, which are not asked
    sources: int = 0
    unchanged: int = 0
    repeated: int = 0
    probed: int = 0
    set_aside: list[tuple[str, str]] = field(default_factory=list)  # (status, "name (stage): reason")
    ended: list[str] = field(default_factory=list)  # of the sample, "status name (stage): reason"
    frames: float = 0.0  # of what is to do, as far as it passes the probe; scaled where not all were probed
    video_seconds: float = 0.0
    sizes: dict[Size, float] = field(default_factory=dict)  # those frames by the training size of their video
    sampled: list[str] = field(default_factory=list)
    sample_frames: int = 0
    sample_shots: int = 0
    sample_encoded_shots: int = 0
    # of the stages and of the parts, as if the sizes had the shares in the sample that they have in what is to do
    sample_seconds: dict[str, float] = field(default_factory=dict)
    sample_bytes: float = 0.0
    scratch_bytes: float = 0.0  # of one video of the longest kind, while it waits to be encoded
    scratch_sum: float = 0.0  # of all videos of the sample together
    scratch_room: float = math.inf  # decode waits while so many bytes wait
    kept_bytes: float = 0.0  # of unchanged scenes, which are written again into the new shards
    memory: dict[str, int] = field(default_factory=dict)  # bytes of one process: decoding, encoding
    free_disk: int = 0
    free_memory: int = 0

    def _scaled(self, amount: float) -> float:
        return amount * self.frames / self.sample_frames if self.sample_frames else 0.0

    @property
    def work(self) -> dict[str, float]:
        """Seconds of work of each stage, over all videos."""
        return {stage: self._scaled(seconds) for stage, seconds in self.sample_seconds.items()}

    @property
    def limits(self) -> dict[str, float]:
        """Seconds of the clock that each kind of worker needs for its part, were it alone; the longest one counts."""
        work = self.work
        encode = work.get("encode", 0.0)
        before = sum(work.values()) - encode
        return {
            "decoding": before / max(1, min(self.decoding, self.cores)),
            "encoding": encode / self.encoders,
            "all cores": sum(work.values()) / self.cores,
        }

    @property
    def seconds(self) -> float:
        return max(self.limits.values())

    @property
    def dataset_bytes(self) -> float:
        return self._scaled(self.sample_bytes) + self.kept_bytes

    @property
    def waiting_bytes(self) -> float:
        """Frames that wait for the encoder, at most: all there are, or the room and what is being decoded then."""
        bound = self.scratch_room + self.decoding * self.scratch_bytes
        return min(bound, max(self.scratch_bytes, self._scaled(self.scratch_sum)))

    @property
    def disk_bytes(self) -> float:
        """On top of what is there, at most at once: parts beside the shards that are made of them, the shards of what
        is kept beside the old ones, and frames that wait for the encoder.
        """
        return self.dataset_bytes + self._scaled(self.sample_bytes) + self.waiting_bytes

    @property
    def memory_bytes(self) -> int:
        return self.decoding * self.memory.get("decoding", 0) + self.encoders * self.memory.get("encoding", 0)

    def summary(self) -> str:
        todo = self.sources - self.unchanged
        lines = [f"dry run: nothing is written in {self.output}"]
        again = f"; {self.repeated} entries name a file already listed" if self.repeated else ""
        lines.append(f"{self.sources} sources: {todo} to do, {self.unchanged} unchanged since the last run{again}")
        if todo:
            lines.append(self._probe_words(todo))
            lines += [f"  {status} {words}" for status, words in self.set_aside[:_SHOWN]]
            if len(self.set_aside) > _SHOWN:
                lines.append(f"  ... {len(self.set_aside) - _SHOWN} more")
        lines += self._setting_words()
        if not self.frames:
            return "\n".join([*lines, "nothing to decode, so nothing to estimate"])
        if not self.sample_frames:
            ends = [f"  {words}" for words in self.ended]
            return "\n".join([*lines, "no sample could be processed, so nothing is estimated:", *ends])
        lines += self._sample_words()
        longest = max(self.limits, key=lambda name: self.limits[name])
        knobs = {
            "decoding": "decode_cpus (less lets more videos be decoded at once), or more machines",
            "encoding": "encoders, encoder_gpus",
            "all cores": "more cores or machines",
        }
        kept = f" ({_size(self.kept_bytes)} of it unchanged, and written again)" if self.kept_bytes else ""
        lines += [
            f"time: about {duration(self.seconds)} on {self.cores} cores, and the start of Ray; "
            f"{longest} takes longest: {knobs[longest]}",
            f"disk: dataset about {_size(self.dataset_bytes)}{kept}, while it is made at most {_size(self.disk_bytes)} "
            f"more than now, {_size(self.waiting_bytes)} of it frames that wait for the encoder (scratch_gb); "
            f"{_size(self.free_disk)} are free",
            f"memory: about {_size(self.memory_bytes)} ({self.decoding} decoding, {self.encoders} encoding processes), "
            f"and Ray's own; {_size(self.free_memory)} are free",
        ]
        return "\n".join(lines)

    def _probe_words(self, todo: int) -> str:
        by = Counter(status for status, _ in self.set_aside)
        aside = ", ".join(f"{count} {status}" for status, count in sorted(by.items())) or "none"
        which = "" if self.probed == todo else f" of {todo}, evenly over the list"
        about = "" if self.probed == todo else "about "
        return (
            f"probed {self.probed}{which}; set aside: {aside}; "
            f"to decode: {about}{duration(self.video_seconds)} of video, {self.frames:.0f} frames"
        )

    def _setting_words(self) -> list[str]:
        one = self.settings
        captions = f"captions={one.captions}" + (f" ({one.caption_model})" if one.caption_model else "")
        lines = [
            f"stages: probe -> decode ({self.decoding} videos at once) -> captions -> encode ({self.encoders}) "
            "-> shards",
            f"frames: {self._size_words()} (width x height), {one.fps:g} a second, "
            f"shots of {one.min_shot_frames} to {one.shot_frames}, at most {one.max_shots} shots a scene; "
            f"cuts={one.cuts} {captions} crop_bars={str(one.crop_bars).lower()}",
        ]
        limits = {name: limit for name, limit in thresholds(one).items() if name != "min_shot_frames"}
        lines.append("filters: " + " ".join(f"{k}={'off' if v is None else f'{v:g}'}" for k, v in limits.items()))
        if self.asked:
            lines.append(f"not asked and not in the estimate: {self.asked}")
        return lines

    def _size_words(self) -> str:
        if not self.settings.sizes:
            return in_words((self.settings.height, self.settings.width))
        shares = {size: self.sizes.get(size, 0.0) / max(1.0, self.frames) for size in self.settings.sizes}
        return ", ".join(f"{in_words(size)} ({share:.0%} of what is decoded)" for size, share in shares.items())

    def _sample_words(self) -> list[str]:
        whole = sum(self.sample_seconds.values())
        lines = [
            f"sample: {len(self.sampled)} videos, {self.sample_frames} frames, {self.sample_shots} shots "
            f"({self.sample_encoded_shots} encoded), in {duration(whole)}: {', '.join(self.sampled)}"
        ]
        for stage, seconds in self.sample_seconds.items():
            each = 1e3 * seconds / self.sample_frames
            lines.append(f"  {stage}: {each:.2f} ms a source frame, {duration(self.work[stage])} of work in all")
        return lines


def dry_run(config: PrepareConfig) -> DryRun:
    """List, probe and process a sample. Raises what `prepare` raises for bad sources, config or model folder."""
    from pipelines.aesthetic import make_scorer
    from pipelines.prepare import listed_sources, make_settings

    output, model = config.output.resolve(), config.model.resolve()
    wanted = make_settings(config)
    cores = max(usable_cores(), 2)  # as a Ray session that is started here has
    found = DryRun(
        output,
        wanted,
        decoding=max(1, math.floor((cores - config.encoders * config.encoder_cpus) / config.decode_cpus)),
        encoders=config.encoders,
        cores=cores,
        asked=_asked(wanted),
        free_disk=_free_disk(output),
        free_memory=available_memory(),
    )
    listed = listed_sources(config, output)
    found.scratch_room = free_room(output) if config.scratch_gb is None else config.scratch_gb * 2**30
    todo, kept = _todo(listed.files, output, wanted, model, config.retry_failed)
    found.kept_bytes = _bytes_of(kept, output) if todo else 0.0
    found.sources, found.repeated = len(listed.files), len(listed.repeated)
    found.unchanged = len(listed.files) - len(todo)
    with tempfile.TemporaryDirectory(prefix="shotloom-dry-run-") as name:
        folder = Path(name)
        settings = _without_models(wanted)
        place = Workplace(settings, folder / "parts", folder / "scratch", "")
        passed = _probe(_evenly(todo, PROBED), len(todo), place, found)
        cut = min(SECONDS, wanted.max_seconds or SECONDS)
        place = replace(place, settings=replace(settings, max_seconds=cut))
        units = [Unit(unit.file) for unit in _of_each_size(passed)]
        largest = max((_pixels(unit, wanted) for unit in passed), default=0)
        _decode(units, place, found, largest)
        device = "cuda" if config.encoder_gpus else "cpu"
        scorer = make_scorer(config.aesthetic, bool(config.encoder_gpus))
        if any(not unit.status for unit in units):
            encoder = Encoder.from_folder(model, device, max(1, int(config.encoder_cpus)), scorer)
            _encode(units, place, encoder, found)
    return found


def _todo(
    files: list[SourceFile], output: Path, settings: PrepareSettings, model: Path, retry_failed: bool
) -> tuple[list[SourceFile], list[Finished]]:
    """Sources without a result that still holds, as `prepare` finds them, but for what only a started run repairs; and
    the results that hold.
    """
    parts = output / "parts"
    place, earlier = Workplace(settings, parts, parts / "scratch", encoder_key(model)), Earlier(output)
    limits = thresholds(settings)
    todo, kept = [], []
    for file in files:
        finished = find_finished(file, place.keys_for, parts, earlier, retry_failed, limits)
        if finished is None:
            todo.append(file)
        else:
            kept.append(finished)
    return todo, kept


def _bytes_of(kept: list[Finished], output: Path) -> float:
    """Of the scenes of these results, as shards hold them: all are written into new shards where one is new."""
    places = [one.path for one in kept if one.path is not None]
    keys = {key for one in kept if one.path is None for key in one.part.keys}
    try:
        index = pq.read_table(output / INDEX, columns=["key", "length"]).to_pylist() if keys else []
    except (OSError, ValueError):  # an index that is gone is made again; `shotloom verify` names it
        index = []
    return sum(path.stat().st_size for path in places) + sum(row["length"] for row in index if row["key"] in keys)


def _probe(files: list[SourceFile], todo: int, place: Workplace, found: DryRun) -> list[Unit]:
    """Probe, and count what passes; gives the units that do."""
    passed = []
    for file in files:
        unit = run_stage("probe", lambda u: probe_stage(u, place), Unit(file))
        place.forget(unit)
        found.probed += 1
        if unit.status:
            found.set_aside.append((unit.status, f"{file.name} ({unit.stage}): {unit.reason}"))
        elif unit.info is not None:
            passed.append(unit)
            # as if there were no black bars: they are found in the decode
            size = place.settings.size_of((unit.info.height, unit.info.width))
            unit.size, frames = size, frames_taken(unit.info, found.settings)
            found.sizes[size] = found.sizes.get(size, 0.0) + frames
            found.frames += frames
            found.video_seconds += min(unit.info.duration_s, found.settings.max_seconds or math.inf)
    scale = todo / max(1, len(files))
    found.frames, found.video_seconds = found.frames * scale, found.video_seconds * scale
    found.sizes = {size: frames * scale for size, frames in found.sizes.items()}
    return passed


def _decode(units: list[Unit], place: Workplace, found: DryRun, largest: int) -> None:
    """All before the encoder, video by video; `largest`: pixels of all frames of the video that has most."""
    import decord  # noqa: F401  its import is no part of the sample

    for unit in units:
        run_stage("probe", lambda u: probe_stage(u, place), unit)
        run_stage("decode", lambda u: decode_stage(u, place), unit)
        run_stage("captions", lambda u: caption_stage(u, place), unit)
        if unit.status:
            found.ended.append(f"{unit.status} {unit.file.name} ({unit.stage}): {unit.reason}")
        shown = unit.count.shown if unit.count else 0
        waits = place.scratch_file(unit)
        if shown and waits.exists():
            pixels = shown * _area(unit)
            found.scratch_sum += waits.stat().st_size
            found.scratch_bytes = max(found.scratch_bytes, waits.stat().st_size * largest / pixels)
    found.memory["decoding"] = peak_memory()


def _encode(units: list[Unit], place: Workplace, encoder: Encoder, found: DryRun) -> None:
    for unit in units:
        run_stage("encode", lambda u: encode_stage(u, place, encoder), unit)
        close_stage(unit, place)
    units = [unit for unit in units if unit.count is not None and unit.count.shown]
    weights = _weights(units, found)
    for unit, weight in zip(units, weights, strict=True):
        assert unit.count is not None
        found.sampled.append(unit.file.name)
        found.sample_frames += unit.count.shown
        found.sample_shots += len(unit.shots)
        found.sample_encoded_shots += sum(bool(shot.span_pts) for shot in unit.shots)
        found.sample_bytes += weight * part_path(place.parts, unit.file.video_id).stat().st_size
        for stage in STAGES:
            found.sample_seconds[stage] = found.sample_seconds.get(stage, 0.0) + weight * unit.seconds.get(stage, 0.0)
    found.memory["encoding"] = peak_memory()


def _weights(units: list[Unit], found: DryRun) -> list[float]:
    """For each unit of the sample: frames to do at its size for one frame of the sample, over the mean of all sizes.

    With one size all are 1. A size that no unit of the sample has turned out to take is left out.
    """
    shown: dict[Size | None, int] = {}
    for unit in units:
        shown[unit.size] = shown.get(unit.size, 0) + (unit.count.shown if unit.count else 0)
    todo = {size: found.sizes.get(size, 0.0) for size in shown if size}
    mean = sum(todo.values()) / max(1, sum(shown.values()))
    return [todo[unit.size] / shown[unit.size] / mean if mean and unit.size else 1.0 for unit in units]


def _of_each_size(units: list[Unit]) -> list[Unit]:
    """The sample: SAMPLE units evenly over the list, or of several sizes as many of each, at least one."""
    groups: dict[Size | None, list[Unit]] = {}
    for unit in units:
        groups.setdefault(unit.size, []).append(unit)
    return [unit for group in groups.values() for unit in _evenly(group, max(1, SAMPLE // len(groups)))]


def _pixels(unit: Unit, settings: PrepareSettings) -> int:
    """Of all frames that are decoded of a probed video, at its training size."""
    return frames_taken(unit.info, settings) * _area(unit) if unit.info else 0


def _area(unit: Unit) -> int:
    """Pixels of a frame at its training size."""
    return math.prod(unit.size) if unit.size else 0


def _without_models(settings: PrepareSettings) -> PrepareSettings:
    """The same without anybody to ask: shots that a model would caption are described."""
    if settings.captions in ASKED:
        settings = replace(settings, captions="describe", caption_model="")
    return replace(settings, states_key="")


def _asked(settings: PrepareSettings) -> str:
    who = [f"captions={settings.captions} ({settings.caption_model})"] if settings.captions in ASKED else []
    return ", ".join([*who, *(["the state predictor"] if settings.states_key else [])])


def _evenly(items: list[T], most: int) -> list[T]:
    """At most `most` of the items, evenly over them, each from the middle of its part."""
    count = min(most, len(items))
    return [items[(2 * k + 1) * len(items) // (2 * count)] for k in range(count)]


def _free_disk(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _size(count: float) -> str:
    """Bytes in words: `12 MB`, `3.4 GB`."""
    for unit, size in (("GB", 2**30), ("MB", 2**20)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 2**10:.3g} KB"

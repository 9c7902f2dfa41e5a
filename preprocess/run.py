"""One run over an output folder: what is to do, what still holds from earlier, rounds until every source has a part."""

from __future__ import annotations

import contextlib
import fcntl
import json
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.storage import atomic_path, atomic_write_bytes, drop_temporaries
from preprocess import dataset
from preprocess.compaction import cleaned_sample, gone_by_scene, without_duplicates
from preprocess.dataset import Earlier, Finished, find_finished, find_pictures
from preprocess.duplicates import find_duplicates
from preprocess.encode import encoder_key
from preprocess.filters import thresholds
from preprocess.parts import Part, part_path, read_part, write_part
from preprocess.room import OutputError, no_room
from preprocess.settings import PrepareSettings
from preprocess.source_rows import source_row
from preprocess.sources import SourceFile
from preprocess.unit import Unit
from preprocess.watch import MAX_ATTEMPTS, Attempts
from preprocess.workplace import Workplace, drop

_ROOM = 2**20  # bytes without which no work is begun


@contextlib.contextmanager
def lock(output: Path) -> Iterator[None]:
    """Keep a second run out of the same output folder; the lock goes with this process, however it ends.

    Raises ValueError where there is one, OutputError where the folder cannot be made or written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = (output / ".lock").open("a")
    except OSError as error:
        raise no_room(output, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{output}: another `shotloom prepare` is writing there; wait for it or stop it") from None
        yield


@dataclass
class Work:
    """The sources of one run, in order, and which of them are finished."""

    output: Path
    place: Workplace
    files: list[SourceFile]
    earlier: Earlier
    finished: dict[str, Finished] = field(default_factory=dict)

    @property
    def todo(self) -> list[SourceFile]:
        return [file for file in self.files if file.video_id not in self.finished]

    @property
    def attempts(self) -> Attempts:
        return Attempts(self.place.parts / "attempts")

    def rounds(self) -> Iterator[Path]:
        """Manifests of what is still to do, as Parquet with one row per video, until every source has a part.

        Ray drops a row whose worker died too often, and says so nowhere: what has no part after a round is given
        another, and ends as failed after MAX_ATTEMPTS rounds or deaths.
        """
        rounds = 0
        while todo := self.todo:
            rounds += 1
            drop([self.place.scratch])  # what was left by rows that Ray has dropped
            self.check_room()
            yield write_manifest(self.place.parts / "todo.parquet", [self._unit(file) for file in todo])
            for file in todo:
                part = read_part(part_path(self.place.parts, file.video_id))
                if part is None:
                    self.check_room()
                    stage, deaths = self.attempts.unfinished(file.video_id)
                    if max(deaths, rounds) < MAX_ATTEMPTS:
                        continue
                    part = self._give_up(file, stage, max(deaths, rounds))
                self.finished[file.video_id] = Finished(part, part_path(self.place.parts, file.video_id))

    def check_room(self) -> None:
        """Raises OutputError where nothing can be written: no video is to blame for a full disk."""
        try:
            atomic_write_bytes(self.place.parts / "room", bytes(_ROOM))
            (self.place.parts / "room").unlink()
        except OSError as error:
            raise no_room(self.output, error) from error

    def take(self, row: dict[str, str]) -> None:
        """What `EncodeRow` says of a unit: what lay in scratch for a video that has ended goes.

        Raises OutputError where the unit could not be written.
        """
        if row["stopped"]:
            raise OutputError(0, row["stopped"])
        if row["status"]:
            drop(Path(path) for path in json.loads(row["leftovers"]))

    def _unit(self, file: SourceFile) -> Unit:
        limits = thresholds(self.place.settings)
        row, places = find_pictures(file, self.place.keys_for, self.place.parts, self.earlier, limits)
        return Unit(file, recall=places, earlier=row)

    def _give_up(self, file: SourceFile, stage: str, attempts: int) -> Part:
        unit = Unit(file, status="failed", stage=stage or "probe", attempts=attempts)
        unit.reason = self.attempts.cause(file.video_id, unit.stage, attempts)
        part = Part(source_row(unit, self.place))
        write_part(self.place.parts, part, iter(()))
        return part

    def unchanged(self, shard_bytes: int) -> bool:
        """Whether the dataset in the folder is already what this run would write."""
        here = [file.video_id for file in self.files]
        return (
            list(self.earlier.parts) == here
            and self.earlier.facts.get("shard_bytes") == shard_bytes
            and self.same_settings("filters", "sizes", "tile_over")
            and all(one.path is None for one in self.finished.values())
        )

    def compact(self, shard_bytes: int) -> dict[str, Any]:
        """Write all parts into shards and put the new dataset in place of the old; returns dataset.json."""
        parts = [self.finished[file.video_id].part for file in self.files]
        verdicts = find_duplicates(parts, self.place.settings.filters)
        for file in self.files:
            self.finished[file.video_id] = without_duplicates(
                self.finished[file.video_id], verdicts, self.place.settings.cuts
            )
        finished = [self.finished[file.video_id] for file in self.files]
        clean = partial(cleaned_sample, scenes=gone_by_scene(verdicts))
        no_result = ("seconds_per_video", "unit_seconds")  # depends on these
        settings = {k: v for k, v in asdict(self.place.settings).items() if k not in no_result}
        facts = {"settings": settings, **self.place.keys()}
        record = dataset.build(self.output, finished, self.earlier, shard_bytes, facts, clean, self.place.answers())
        dataset.commit(self.output)
        return record

    def same_settings(self, *names: str) -> bool:
        """Whether the dataset in the folder was made with these settings of this run; what it lacks had its default."""
        now = json.loads(json.dumps(asdict(self.place.settings)))
        was = asdict(PrepareSettings()) | self.earlier.facts.get("settings", {})
        return all(json.loads(json.dumps(was[name])) == now[name] for name in names)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[None]:
        """However the block ends, frames and copies of videos under way go after it: their room may be wanted."""
        try:
            yield
        finally:
            shutil.rmtree(self.place.parts / "scratch", ignore_errors=True)

    def clean(self) -> None:
        shutil.rmtree(self.place.parts, ignore_errors=True)


def plan_work(
    files: Sequence[SourceFile], output: Path, settings: PrepareSettings, model: Path, retry_failed: bool = False
) -> Work:
    """What has to be done for `files`. Completes an interrupted commit first, and drops what was half done."""
    dataset.recover(output)
    parts = output / "parts"
    drop_temporaries(output, "report")
    drop_temporaries(parts)
    for leftover in ("attempts", "scratch"):
        shutil.rmtree(parts / leftover, ignore_errors=True)
    # a folder of this run's own: a worker that outlives a killed driver for a moment may still write in the old one
    place = Workplace(settings, parts, parts / "scratch" / secrets.token_hex(4), encoder_key(model))
    work = Work(output, place, list(files), Earlier(output))
    originals: set[str] = set()  # shots and videos, kept by the earlier dataset, that later ones may double
    for file in files:
        finished = find_finished(file, place.keys_for, parts, work.earlier, retry_failed, thresholds(settings))
        if finished is None:
            continue
        rows = finished.part.shots if finished.path is None else []
        doubled = {row["duplicate_of"] for row in rows if row["duplicate_of"]}
        # the latents of a duplicate are gone: where it is none any more, they have to be made again
        if not doubled or (doubled <= originals and work.same_settings("filters")):
            originals |= {
                name for row in rows if row["key"] and not row["filtered"] for name in (row["shot_id"], row["video_id"])
            }
            work.finished[file.video_id] = finished
    return work


def write_manifest(path: Path, units: Sequence[Unit]) -> Path:
    """One row per video: its id, and the unit as JSON."""
    rows = [{"video_id": unit.file.video_id, "unit": unit.to_json()} for unit in units]
    schema = pa.schema([("video_id", pa.string()), ("unit", pa.string())])
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema), temporary)
    return path

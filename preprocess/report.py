"""What a prepare run did: seconds and items per stage, how every source ended, decodes per frame."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from infra.log import duration
from preprocess.filters import rule_of
from preprocess.parts import Row
from preprocess.sizes import in_words


@dataclass
class StageReport:
    """Sums over the run. `seconds` is work, over all workers; it exceeds the clock where stages ran side by side."""

    items: int = 0
    seconds: float = 0.0
    set_aside: int = 0


@dataclass(frozen=True)
class Pool:
    """Workers that share stages: `at_once` videos are in them side by side; `knob` says what makes it more."""

    stages: list[str]
    at_once: int
    knob: str


@dataclass(frozen=True)
class Speed:
    """What a pool could do, by what a video took it, and what it did."""

    stages: str
    items: int
    each: float  # seconds of work on one video
    at_once: int
    ceiling: float  # videos a second, if its workers never waited
    rate: float  # videos a second of the run's clock, the same for all pools that see every video
    knob: str

    @property
    def busy(self) -> float:
        """Share of the clock in which its workers worked."""
        return self.rate / self.ceiling


@dataclass
class PrepareReport:
    output: Path
    seconds: float = 0.0  # of the clock
    stages: dict[str, StageReport] = field(default_factory=dict)
    pools: list[Pool] = field(default_factory=list)  # who works on them
    sources: int = 0
    written: int = 0
    filtered: int = 0
    failed: int = 0
    reused: int = 0  # sources whose earlier result still held; nothing was done for them
    repeated: list[str] = field(default_factory=list)  # entries that named a file already listed
    scenes: int = 0
    shots: int = 0
    encoded_shots: int = 0
    encoded_frames: int = 0
    sizes: dict[str, int] = field(default_factory=dict)  # encoded shots by width x height
    shards: int = 0
    source_frames: int = 0  # frames of this run's videos that lie in the part that was taken
    decoded_frames: int = 0
    set_aside: list[Row] = field(default_factory=list)  # name, status, stage, reason, attempts
    filtered_shots: dict[str, int] = field(default_factory=dict)  # by the filter that took them
    lost: dict[str, list[str]] = field(default_factory=dict)  # of sources that are written: name -> stretches, why
    scenes_aside: dict[str, str] = field(default_factory=dict)  # of sources that are written: id -> "stage: reason"

    @property
    def decodes_per_frame(self) -> float:
        """How often a frame was decoded, over the videos of this run; the promise is at most 1.15."""
        return self.decoded_frames / self.source_frames if self.source_frames else 0.0

    def count_done(self, seconds: dict[str, float], stage: str, last: bool = True) -> None:
        """Add the stage times of one video, and where it was set aside ("" if it was written).

        A long video is counted with the last of its units.
        """
        for name, spent in seconds.items():
            entry = self.stages.setdefault(name, StageReport())
            entry.items += last
            entry.seconds += spent
        if not last:
            return
        if "probe" in seconds and stage not in ("probe", "sources"):
            self.stages.setdefault("filters", StageReport()).items += 1
        if stage:
            self.stages.setdefault(stage, StageReport()).set_aside += 1

    def count_rows(self, rows: Sequence[Row], done: set[str]) -> None:
        """Take totals from the rows of sources.parquet; `done` are the videos worked on in this run."""
        status = Counter(row["status"] for row in rows)
        self.sources, self.written = len(rows), status["written"]
        self.filtered, self.failed = status["filtered"], status["failed"]
        self.reused = len(rows) - len(done)
        for row in rows:
            if row["status"] != "written":
                self.set_aside.append({k: row[k] for k in ("name", "status", "stage", "reason", "attempts")})
            if row.get("lost") and row["status"] == "written":
                self.lost[row["name"]] = json.loads(row["lost"])
            if row["video_id"] in done:
                self.source_frames += row["used_frames"]
                self.decoded_frames += row["decoded_frames"] if row["used_frames"] else 0

    def count_shots(self, rows: Iterable[Row]) -> None:
        """Take from the rows of manifest.parquet which filter left out how many shots, and the sizes of the others."""
        rows = list(rows)
        self.sizes = sizes_of(rows)
        self.filtered_shots = dict(Counter(rule_of(row["filtered"]) for row in rows if row["filtered"]))

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the seconds of a block that runs once, on the driver."""
        began = time.monotonic()
        yield
        entry = self.stages.setdefault(stage, StageReport())
        entry.seconds += time.monotonic() - began

    def count_totals(self, record: dict[str, Any]) -> None:
        """Take the totals of dataset.json."""
        totals = record["totals"]
        self.scenes, self.shots = totals["scenes"], totals["shots"]
        self.encoded_shots, self.encoded_frames = totals["encoded_shots"], totals["encoded_frames"]
        self.shards = len(record["shards"])
        if "shards" in self.stages:
            self.stages["shards"].items = self.scenes

    def speeds(self) -> list[Speed]:
        return speeds(self.pools, self.stages, self.seconds)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"output": str(self.output), "decodes_per_frame": round(self.decodes_per_frame, 4)}

    def summary(self) -> str:
        """For people: a few lines."""
        lines = [
            f"{self.sources} sources: {self.written} written, {self.filtered} filtered, {self.failed} failed"
            + (f"; {self.reused} unchanged since the last run, not done again" if self.reused else ""),
            f"{self.scenes} scenes, {self.shots} shots, {self.encoded_shots} of them encoded, in {self.shards} shards: "
            f"{self.output}",
        ]
        if len(self.sizes) > 1:
            (first, count), *others = self.sizes.items()
            more = "".join(f", {size} ({number})" for size, number in others)
            lines.append(f"encoded at {first} ({count} shots){more}")
        if self.filtered_shots:
            taken = ", ".join(f"{count} {name}" for name, count in self.filtered_shots.items())
            lines.append(f"filters left out {sum(self.filtered_shots.values())} shots: {taken}")
        if self.repeated:
            lines.append(f"{len(self.repeated)} entries name a file already listed: {', '.join(self.repeated[:3])}")
        for row in self.set_aside:
            lines.append(f"  {row['status']} {row['name']} ({row['stage']}): {row['reason']}")
        for name, stretches in self.lost.items():
            lines += [f"  lost of {name}: {stretch}" for stretch in stretches]
        for scene, reason in self.scenes_aside.items():
            lines.append(f"  set aside scene {scene} ({reason})")
        for name, stage in self.stages.items():
            kind = "scenes" if name == "shards" else "videos"
            aside = f", {stage.set_aside} set aside" if stage.set_aside else ""
            lines.append(f"  {name}: {stage.items} {kind}, {duration(stage.seconds)}{aside}")
        lines += [f"  {words}" for words in speed_words(self.speeds(), self.stages, self.seconds)]
        if self.source_frames:
            lines.append(f"  decoded {self.decoded_frames} frames, {self.decodes_per_frame:.3f} per source frame")
        return "\n".join([*lines, f"took {duration(self.seconds)}"])


def read_speeds(report: dict[str, Any]) -> tuple[list[Speed], str]:
    """Speeds of the pools of a report.json, and which knob is next; nothing where it has none."""
    stages = {name: StageReport(**one) for name, one in report["stages"].items()}
    found = speeds([Pool(**one) for one in report.get("pools", [])], stages, report["seconds"])
    return found, "; ".join(speed_words(found, stages, report["seconds"]))


def speeds(pools: Iterable[Pool], stages: dict[str, StageReport], seconds: float) -> list[Speed]:
    """How fast each pool could work and did; without pools that had nothing to do.

    seconds: of the clock. The ceiling is measured in the run itself, so it holds for its machine, load and videos.
    """
    shards = stages["shards"].seconds if "shards" in stages else 0.0
    clock = seconds - shards  # they are written when all else is done
    found = []
    for pool in pools:
        here = [stages[name] for name in pool.stages if name in stages]
        items = max((stage.items for stage in here), default=0)
        work = sum(stage.seconds for stage in here)
        if items and work > 0 and clock > 0:
            each = work / items
            ceiling = pool.at_once / each
            found.append(Speed(", ".join(pool.stages), items, each, pool.at_once, ceiling, items / clock, pool.knob))
    return found


def speed_words(found: Sequence[Speed], stages: dict[str, StageReport], seconds: float) -> list[str]:
    """The pool that bounds the run, and what to turn next; where something else does, what that is."""
    if not found:
        return []
    slowest = min(found, key=lambda one: one.ceiling)
    name = slowest.stages
    lines = [
        f"slowest: {name}, at most {_per_second(slowest.ceiling)} with {slowest.at_once} at once; "
        f"the run did {_per_second(slowest.rate)}, {min(slowest.busy, 1):.0%} of that"
    ]
    shards = stages["shards"].seconds if "shards" in stages else 0.0
    if shards > seconds / 2:
        lines.append(f"next: a faster disk; shards, written by one process, took {shards / seconds:.0%} of the time")
    elif slowest.busy < 0.5:
        lines.append("next: more videos in one run; starting and waiting took most of the time")
    else:
        lines.append(f"next: {slowest.knob}")
    return lines


def _per_second(rate: float) -> str:
    return f"{rate:.3g} videos/s" if rate >= 1 else f"a video in {duration(1 / rate)}"


def sizes_of(rows: Iterable[Row]) -> dict[str, int]:
    """Encoded shots of manifest rows by their size, the most frequent one first."""
    sizes = [(row["encoded_height"], row["encoded_width"]) for row in rows if row.get("encoded_width")]
    return {in_words(size): count for size, count in sorted(Counter(sizes).items(), key=lambda one: (-one[1], one[0]))}

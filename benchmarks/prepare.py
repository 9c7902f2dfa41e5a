"""Throughput of `shotloom prepare` beside a bare loop, the cost of decoding, and the order of work of other tools.

    python benchmarks/prepare.py data=../shared/data/clips

(a) The whole command against the same stages in a plain loop, without Ray, on the shipped model: CPU-seconds per frame
    of everything but the start (runs on few files and on all files, subtracted), and the shards must be equal.
(b) The CPU part (probe, bars, decode, shots, filters, spans) against decoding and both resizes, nothing else.
(c) The same against the peers' order of work (`_peers_order.py`), which needs `pip install scenedetect`.

CPU-seconds are judged, of all processes and threads that the work started: on a machine that others use they vary
less than wall time, which stands beside. (b) and (c) run in one process, file by file, in turn. `--quick`: own files.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median_high
from typing import Any
from unittest import mock

from _common import MODEL, ROOT, Goal, finish, have_scenedetect, parser, refusing, table
from _measure import in_turn, ratio
from _peers_order import peers_order

from infra.config import load_config
from infra.knobs import knob
from infra.machine import usable_cores
from infra.storage import sha256_file
from preprocess.decode import DecodeCount, frames
from preprocess.letterbox import NO_BARS, find_bars
from preprocess.probe import probe
from preprocess.settings import PrepareSettings
from preprocess.sources import SourceFile, list_sources
from preprocess.unit import Unit, all_stages, decode_stage, probe_stage, run_stage
from preprocess.workplace import Workplace

SIZES = {
    "64x64": PrepareSettings(),  # the shipped model's
    "832x480": PrepareSettings(height=480, width=832, fps=16.0, shot_frames=81),  # Wan 2.1's
}
# what (b) is made of: where a function is looked up, its name there, what it is called here
PIECES = (
    ("preprocess.unit", "probe", "probe"),
    ("preprocess.unit", "sha256_at", "hash of the file"),
    ("preprocess.unit", "find_bars", "black bars"),
    ("preprocess.decode.Frame", "small", "resize to 48x27"),
    ("preprocess.shots.ShotDetector", "push", "shot detector"),
    ("preprocess.spans", "measure_shot", "colours, light, camera"),
    ("preprocess.quality", "_shake", "shake"),
    ("preprocess.quality", "blur_effect", "blur"),
    ("preprocess.quality", "text_share", "overlaid text"),
    ("preprocess.spans", "measure_quality", "other measures"),
    ("preprocess.spans", "make_signature", "signature"),
)


@dataclass(kw_only=True)
class PrepareBenchmark:
    """Keys of this benchmark."""

    data: Path = knob(ROOT.parent / "shared" / "data" / "clips", "folder of videos; own ones where it is not there")
    parts: str = knob("abc", "which of (a), (b) and (c)")
    count: int = knob(0, "files, evenly over their names; 0 = 16, of own ones 4")
    repetitions: int = knob(0, "of every way; 0 = 3, with --quick 1")

    def __post_init__(self) -> None:
        if not self.parts or set(self.parts) - set("abc"):
            raise ValueError(f"parts={self.parts!r}: give some of a, b and c, such as bc")
        if self.count < 0 or self.repetitions < 0:
            raise ValueError(f"count={self.count} and repetitions={self.repetitions} must not be negative")


@dataclass
class Seconds:
    """CPU and wall seconds, one entry per repetition."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


# ---------------------------------------------------------------------- (a) beside a bare loop


class TreeClock:
    """CPU-seconds of this process and all its descendants, the ended ones as last seen, at most 0.2 s before."""

    def __enter__(self) -> TreeClock:
        self._seen: dict[tuple[int, str], float] = {}
        self._before: dict[tuple[int, str], float] = {}
        self._stop = threading.Event()
        self._look()
        self._before = dict(self._seen)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    @property
    def seconds(self) -> float:
        return sum(spent - self._before.get(process, 0.0) for process, spent in self._seen.items())

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            self._look()

    def _look(self) -> None:
        parents, spent = {}, {}
        for entry in os.listdir("/proc"):
            if entry.isdecimal():
                try:
                    fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                parents[int(entry)] = int(fields[1])
                spent[int(entry)] = fields[19], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        ours, more = set(), {os.getpid()}
        while more:
            ours |= more
            more = {pid for pid, parent in parents.items() if parent in ours} - ours
        for pid in ours & set(spent):
            started, seconds = spent[pid]
            self._seen[pid, started] = seconds


def bare(config: Any) -> None:
    """What `prepare` does, in one loop: the same stages, the same files in the end."""
    from pipelines.prepare import make_settings
    from preprocess.encode import Encoder
    from preprocess.run import lock, plan_work

    output = config.output.resolve()
    with lock(output):
        found = list_sources(config.sources, output)
        work = plan_work(found.files, output, make_settings(config), config.model.resolve())
        encoder = Encoder.from_folder(config.model)
        for _ in work.rounds():
            for file in work.todo:
                all_stages(Unit(file), work.place, encoder)
        work.compact(int(config.shard_mb * 2**20))
        work.clean()


def beside_bare(files: list[SourceFile], few: int, repetitions: int, folder: Path) -> dict[str, Any]:
    """Both ways on `few` files and on all: seconds of each run, and how many shards differ."""
    from infra.ray_session import ray_session
    from pipelines.prepare import PrepareConfig, prepare

    ways: dict[str, Callable[[Any], object]] = {"shotloom": prepare, "bare loop": bare}
    spent = {(way, size): Seconds() for way in ways for size in ("few", "all")}
    starts, differ = Seconds(), 0
    with ExitStack() as stack:
        with TreeClock() as clock:
            began = time.perf_counter()
            stack.enter_context(ray_session())
            starts.wall.append(time.perf_counter() - began)
        starts.cpu.append(clock.seconds)
        for turn in range(repetitions):
            shards = {}
            for way in in_turn(list(ways), turn):
                for size, chosen in (("few", files[:few]), ("all", files)):
                    output = folder / f"{way}-{size}-{turn}"
                    config = PrepareConfig(sources=[file.path for file in chosen], output=output, model=MODEL)
                    began = time.perf_counter()
                    with TreeClock() as clock:
                        ways[way](config)
                    spent[way, size].cpu.append(clock.seconds)
                    spent[way, size].wall.append(time.perf_counter() - began)
                    shards[way] = [sha256_file(path) for path in sorted((output / "shards").glob("*.tar"))]
            differ += shards["shotloom"] != shards["bare loop"]
    return {"spent": spent, "start": starts, "differ": differ}


# ---------------------------------------------------------------------- (b), (c) in one process


def cpu_part(file: SourceFile, settings: PrepareSettings, folder: Path) -> Unit:
    """Everything up to the encoded frames in the scratch file."""
    place = Workplace(settings, folder / "parts", folder / "scratch", "")
    unit = Unit(file)
    run_stage("probe", lambda u: probe_stage(u, place), unit)
    run_stage("decode", lambda u: decode_stage(u, place), unit)
    place.forget(unit)
    return unit


def ceiling(file: SourceFile, settings: PrepareSettings, size: tuple[int, int]) -> None:
    """Every frame decoded at training size and resized to the analysis size."""
    for frame in frames(file.path, probe(file.path), *size, count=DecodeCount()):
        frame.small()


def in_one_process(
    files: list[SourceFile], settings: PrepareSettings, repetitions: int, peers: bool, folder: Path
) -> dict[str, Seconds]:
    """Seconds of each way over all files; on each file all ways, in an order that moves on."""
    ways = ["CPU part", "ceiling", *(["peers' order"] if peers else [])]
    spent = {way: Seconds([0.0] * repetitions, [0.0] * repetitions) for way in ways}
    for turn in range(repetitions):
        for number, file in enumerate(files):
            info = probe(file.path)
            bars = find_bars(file.path, info)[0] if settings.crop_bars else NO_BARS
            size = bars.decode_size(info, settings.height, settings.width)
            for way in in_turn(ways, turn + number):
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    cpu, wall = time.process_time(), time.perf_counter()
                    if way == "CPU part":
                        cpu_part(file, settings, Path(scratch))
                    elif way == "ceiling":
                        ceiling(file, settings, size)
                    else:
                        peers_order(file.path, settings, Path(scratch))
                    spent[way].cpu[turn] += time.process_time() - cpu
                    spent[way].wall[turn] += time.perf_counter() - wall
    return spent


@contextmanager
def clocked() -> Iterator[dict[str, float]]:
    """CPU-seconds of each of PIECES in this thread, what a piece inside of another took counted for the inner one."""
    seconds: dict[str, float] = defaultdict(float)
    inner = [0.0]

    def watched(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            inner.append(0.0)
            began = time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                spent = time.thread_time() - began
                seconds[name] += spent - inner.pop()
                inner[-1] += spent

        return run

    with ExitStack() as stack:
        for place, attribute, name in PIECES:
            owner = _owner(place)
            stack.enter_context(mock.patch.object(owner, attribute, watched(getattr(owner, attribute), name)))
        yield seconds


def _owner(place: str) -> Any:
    """A module, or a class in one."""
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError:
        module, _, name = place.rpartition(".")
        return getattr(importlib.import_module(module), name)


def where_time_goes(files: list[SourceFile], settings: PrepareSettings, folder: Path) -> dict[str, Any]:
    """Milliseconds per frame of each piece of the CPU part; what is left is decoding, its resize, and writing spans."""
    began, frame_count, shots = time.process_time(), 0, 0
    with clocked() as seconds, tempfile.TemporaryDirectory(dir=folder) as scratch:
        for file in files:
            unit = cpu_part(file, settings, Path(scratch))
            frame_count += unit.count.shown if unit.count else 0
            shots += len(unit.shots)
    rest = time.process_time() - began - sum(seconds.values())
    pieces = {"decode, resize, write spans": rest, **dict(sorted(seconds.items(), key=lambda item: -item[1]))}
    return {
        "frames": frame_count,
        "shots": shots,
        "ms_per_frame": {name: round(1e3 * spent / max(frame_count, 1), 4) for name, spent in pieces.items()},
    }


# ---------------------------------------------------------------------- what is reported


def main() -> int:
    made = parser(__doc__.splitlines()[0])
    arguments = made.parse_intermixed_args()
    with refusing(made):
        config = load_config(PrepareBenchmark, None, arguments.overrides)
    repetitions = config.repetitions or (1 if arguments.quick else 3)
    parts, data = config.parts, config.data
    peers = "c" in parts and have_scenedetect()
    own = arguments.quick or not data.is_dir()
    record: dict[str, Any] = {
        "benchmark": "prepare",
        "cores": usable_cores(),
        "scenedetect": importlib.metadata.version("scenedetect") if peers else None,
        "repetitions": repetitions,
        "figures": {},
        "where_time_goes": {},
    }
    goals: list[Goal] = []
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = _files(_own_files(folder / "videos") if own else data, config.count or (4 if own else 16))
        count = sum(len(probe(file.path).pts) for file in files)
        record |= {"files": len(files), "frames": count, "own_files": own}
        lines.append(f"{len(files)} files, {count} frames, {record['cores']} cores, {repetitions} repetitions\n")
        if "a" in parts:
            few = max(1, len(files) // 4)
            rest = count - sum(len(probe(file.path).pts) for file in files[:few])
            _report_bare(beside_bare(files, few, repetitions, folder), rest, record, goals, lines, not arguments.quick)
        for size, settings in SIZES.items() if "b" in parts or "c" in parts else ():
            if arguments.quick and size != "64x64":
                continue
            spent = in_one_process(files, settings, repetitions, peers, folder)
            record["where_time_goes"][size] = where_time_goes(files, settings, folder)
            _report_parts(size, spent, count, record, goals, lines, not arguments.quick)
    if "c" in parts and not peers:
        lines.append("\nPySceneDetect is not installed: pip install scenedetect; the peers' order is not judged")
    return finish(record, goals, "\n".join(lines) + "\n", as_json=arguments.json)


def _report_bare(
    found: dict[str, Any], frame_count: int, record: dict[str, Any], goals: list[Goal], lines: list[str], judged: bool
) -> None:
    spent = found["spent"]
    gone = {
        (way, clock): [
            whole - part for whole, part in zip(getattr(spent[way, "all"], clock), getattr(spent[way, "few"], clock),
                                                strict=True)
        ]
        for way in ("shotloom", "bare loop") for clock in ("cpu", "wall")
    }  # fmt: skip
    cpu = ratio(gone["bare loop", "cpu"], gone["shotloom", "cpu"])
    wall = ratio(gone["bare loop", "wall"], gone["shotloom", "wall"])
    whole = ratio(spent["bare loop", "all"].cpu, spent["shotloom", "all"].cpu)
    record["figures"]["(a) bare loop / shotloom"] = {
        "cpu": _rounded(cpu), "wall": _rounded(wall), "with_start_cpu": _rounded(whole),
        "cpu_s": {f"{way}, {size}": [round(one, 2) for one in s.cpu] for (way, size), s in spent.items()},
        "wall_s": {f"{way}, {size}": [round(one, 2) for one in s.wall] for (way, size), s in spent.items()},
        "session_start": {"cpu_s": round(found["start"].cpu[0], 2), "wall_s": round(found["start"].wall[0], 2)},
    }  # fmt: skip
    goals.append(Goal("(a) throughput beside a bare loop", cpu.value, ">", 0.90, judged))
    goals.append(Goal("(a) runs whose shards differ from the bare loop's", found["differ"], "<", 1))
    rows = [
        [way, *(f"{1e3 * median_high(gone[way, clock]) / frame_count:.2f}" for clock in ("cpu", "wall")),
         *(f"{median_high(getattr(spent[way, 'all'], clock)):.1f}" for clock in ("cpu", "wall"))]
        for way in ("shotloom", "bare loop")
    ]  # fmt: skip
    header = ["(a) all stages", "CPU ms/frame", "wall ms/frame", "CPU s with start", "wall s with start"]
    lines += [table(header, rows), f"\nbare loop / shotloom: CPU {cpu}, wall {wall}, CPU with the start {whole}\n"]


def _report_parts(
    size: str,
    spent: dict[str, Seconds],
    frame_count: int,
    record: dict[str, Any],
    goals: list[Goal],
    lines: list[str],
    judged: bool,
) -> None:
    ours = spent["CPU part"]
    rows = [
        [way, *(f"{1e3 * median_high(values) / frame_count:.2f}" for values in (seconds.cpu, seconds.wall))]
        for way, seconds in spent.items()
    ]
    lines.append(table([size, "CPU ms/frame", "wall ms/frame"], rows))
    for way, name, target in (("ceiling", "(b) ceiling / CPU part", 0.75), ("peers' order", "(c) peers / CPU part", 4)):
        if way in spent:
            cpu, wall = ratio(spent[way].cpu, ours.cpu), ratio(spent[way].wall, ours.wall)
            record["figures"][f"{name}, {size}"] = {"cpu": _rounded(cpu), "wall": _rounded(wall)}
            goals.append(Goal(f"{name}, {size}", cpu.value, ">", target, judged))
            lines.append(f"\n{name}: CPU {cpu}, wall {wall}")
    profile = record["where_time_goes"][size]
    per_shot = profile["frames"] / max(profile["shots"], 1)
    pieces = [[name, f"{ms:.3f}", f"{ms * per_shot:.2f}"] for name, ms in profile["ms_per_frame"].items()]
    lines += ["\n" + table([f"CPU part, {size}", "ms/frame", "ms/shot"], pieces) + "\n"]


def _rounded(one: Any) -> list[float]:
    return [round(value, 4) for value in (one.value, one.low, one.high)]


def _files(folder: Path, count: int) -> list[SourceFile]:
    """`count` files of a folder, evenly over their names."""
    every = [file for file in list_sources([str(folder)]).files if not file.span and not file.error]
    count = min(count, len(every))
    return [every[k * len(every) // count] for k in range(count)]


def _own_files(folder: Path) -> Path:
    from toyworld.video import write_video
    from toyworld.world import sample_scene

    for index in range(4):
        scene = sample_scene("full", seed=81, index=index, num_shots=(2, 4))
        write_video(scene, folder / f"scene{index}.mp4", size=128, captions=False)
    return folder


if __name__ == "__main__":
    sys.exit(main())

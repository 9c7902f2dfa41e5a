"""Peak memory of the work of `shotloom prepare`: does it grow with the number of videos, or with the length of one?

    python benchmarks/prepare_memory.py

Each figure is the peak of a process of its own, without Ray: one does what a decoding worker does (probe, bars, decode,
shots, filters, captions), the other a whole run in one loop, with encoder and compaction. Videos are clips of ToyWorld,
the film is made of shots that come back. The goal is a peak that is flat within 15 %, from 20 to 200 videos and from a
film of 3 minutes to one of 30. `--quick`: few and short ones.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import MODEL, Goal, finish, parser, refusing, table

from infra.config import load_config
from infra.knobs import knob
from infra.machine import peak_memory

DISTINCT = 20  # clips that are made; the others are copies of them
FLAT = 0.15
FULL = {"few": 20, "many": 200, "short_minutes": 3.0, "long_minutes": 30.0, "unit_minutes": 5.0, "side": 256}
QUICK = {"few": 3, "many": 6, "short_minutes": 0.5, "long_minutes": 2.0, "unit_minutes": 0.75, "side": 64}
WORK = ("decoding", "whole run")
MEMORY = ("bytes", "at_start")


@dataclass(kw_only=True)
class MemoryBenchmark:
    """Keys of this benchmark; 0 = the default, which `--quick` makes smaller."""

    few: int = knob(0, "videos of the smaller run; 0 = 20")
    many: int = knob(0, "videos of the larger run; 0 = 200")
    short_minutes: float = knob(0.0, "of the shorter film; 0 = 3")
    long_minutes: float = knob(0.0, "of the longer film; 0 = 30")
    unit_minutes: float = knob(0.0, "as of `shotloom prepare`; 0 = its default, 5")
    side: int = knob(0, "pixels of a side of the film; 0 = 256")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0:
                raise ValueError(f"{name}={value} must not be negative")


def peaks(work: str, videos: Path, folder: Path, unit_minutes: float) -> dict[str, Any]:
    """Do `work` on all videos of a folder in this process; its peak, and what was worked on."""
    from pipelines.prepare import PrepareConfig, make_settings
    from preprocess.encode import Encoder
    from preprocess.run import lock, plan_work
    from preprocess.sources import list_sources
    from preprocess.unit import Unit, all_stages, caption_stage, decode_stage, probe_stage, run_stage

    config = PrepareConfig(sources=[str(videos)], output=folder, model=MODEL, unit_minutes=unit_minutes)
    counted = {"videos": 0, "frames": 0, "pieces": 0}
    with lock(folder):
        work_here = plan_work(list_sources(config.sources).files, folder, make_settings(config), MODEL)
        place = work_here.place
        encoder = Encoder.from_folder(MODEL) if work == "whole run" else None
        start = peak_memory()  # programs and weights
        for _ in work_here.rounds():
            for file in work_here.todo:
                unit = Unit(file)
                if encoder is not None:
                    all_stages(unit, place, encoder)
                else:
                    run_stage("probe", lambda u: probe_stage(u, place), unit)
                    run_stage("decode", lambda u: decode_stage(u, place), unit)
                    run_stage("captions", lambda u: caption_stage(u, place), unit)
                    place.forget(unit)
                counted["videos"] += 1
                counted["frames"] += unit.count.shown if unit.count else 0
                counted["pieces"] += len({shot.piece for shot in unit.shots})
            if encoder is None:
                break  # nothing was written, so there is no end to the rounds
        if encoder is not None:
            counted["scenes"] = work_here.compact(int(config.shard_mb * 2**20))["totals"]["scenes"]
    return {"bytes": peak_memory(), "at_start": start, **counted}


def in_a_process(work: str, videos: Path, folder: Path, unit_minutes: float) -> dict[str, Any]:
    """`peaks` in a process of its own."""
    arguments = ["--process", work, str(videos), str(folder), str(unit_minutes)]
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{work} of {videos} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def make_clips(folder: Path, count: int) -> Path:
    """Clips of two to four shots, 128x128."""
    from toyworld.video import write_video
    from toyworld.world import sample_scene

    for index in range(count):
        path = folder / f"clip{index:04d}.mp4"
        if index < DISTINCT:
            scene = sample_scene("full", seed=82, index=index, num_shots=(2, 4))
            write_video(scene, path, size=128, captions=False)
        else:
            shutil.copyfile(folder / f"clip{index % DISTINCT:04d}.mp4", path)
    return folder


def make_film(folder: Path, minutes: float, side: int) -> Path:
    """One film at 24 frames/s: shots of three to nine seconds, ten pictures that come back; written frame by frame."""
    import av
    import numpy as np

    folder.mkdir(parents=True)
    choice = np.random.default_rng(6)
    grounds = choice.integers(30, 225, (10, side + 120, side + 120, 1)) // 8 + choice.integers(20, 200, (10, 1, 1, 3))
    left = round(minutes * 60 * 24)
    with av.open(str(folder / "film.mp4"), "w") as output:
        stream = output.add_stream("libx264", rate=24)
        stream.width = stream.height = side
        stream.pix_fmt, stream.options = "yuv420p", {"preset": "ultrafast", "x264-params": "threads=1:log-level=none"}
        while left:
            ground, length = grounds[choice.integers(10)].astype(np.uint8), min(left, int(choice.integers(72, 216)))
            left -= length
            for k in range(length):
                at = k * 120 // 216  # a slow pan
                picture = np.ascontiguousarray(ground[at : at + side, at : at + side])
                output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode())
    return folder


def main() -> int:
    if sys.argv[1:2] == ["--process"]:
        work, videos, folder, unit_minutes = sys.argv[2:]
        print(json.dumps(peaks(work, Path(videos), Path(folder), float(unit_minutes))))
        return 0
    made = parser(__doc__.splitlines()[0])
    arguments = made.parse_intermixed_args()
    with refusing(made):
        config = load_config(MemoryBenchmark, None, arguments.overrides)
    defaults = QUICK if arguments.quick else FULL
    sizes: dict[str, Any] = {name: getattr(config, name) or default for name, default in defaults.items()}
    record: dict[str, Any] = {"benchmark": "prepare_memory", **sizes, "figures": {}}
    goals, rows = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = {
            f"{sizes['few']} videos": make_clips(folder / "few", sizes["few"]),
            f"{sizes['many']} videos": make_clips(folder / "many", sizes["many"]),
            f"film of {sizes['short_minutes']:g} min": make_film(
                folder / "short", sizes["short_minutes"], sizes["side"]
            ),
            f"film of {sizes['long_minutes']:g} min": make_film(folder / "long", sizes["long_minutes"], sizes["side"]),
        }
        for work in WORK:
            found = {
                what: in_a_process(work, videos, folder / work / videos.name, sizes["unit_minutes"])
                for what, videos in inputs.items()
            }
            record["figures"][work] = found
            for small, large in (list(inputs)[:2], list(inputs)[2:]):
                off = abs(found[large]["bytes"] / found[small]["bytes"] - 1)
                goals.append(Goal(f"{work}: {large} against {small}, off by", off, "<", FLAT, not arguments.quick))
            rows += [
                [work, what, *(f"{one[k]}" for k in ("frames", "pieces")), *(f"{one[k] / 2**20:.0f}" for k in MEMORY)]
                for what, one in found.items()
            ]
    text = table(["process", "input", "frames", "units", "peak MiB", "at the start"], rows)
    return finish(record, goals, text + "\n", as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())

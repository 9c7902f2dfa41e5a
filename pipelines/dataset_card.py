"""`shotloom inspect DIR`: the dataset card, one self-contained HTML file to judge a prepared dataset by.

Contact sheets of scenes with what was left out of them and why, a histogram per score with its threshold, what each
filter took, every source that was set aside with its reason, and per stage its time, its speed beside what its workers
could do, and the knob to turn next. Reads the tables and, for the
scenes shown, their records and sources; a source that is gone leaves its pictures out.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from infra.log import duration
from models.scene import Scene, SceneError
from pipelines.report import Entry, write_page
from pipelines.report_media import frames_at, image_uri, source_here
from preprocess.dataset import Earlier, scenes_aside
from preprocess.filters import RULES, SCORES, rule_of
from preprocess.parts import Part, Row
from preprocess.replay import Step, recorded_waterfall
from preprocess.report import read_speeds, sizes_of
from preprocess.room import OutputError, is_about
from preprocess.sizes import in_words

_BINS = 32
# what a score says, in words
_MEANINGS = {
    "frames": "encoded frames that the shot has room for",
    "black": "share of black frames",
    "movement": "grey levels by which the liveliest places change in half a second",
    "frozen": "share of the shot that its longest stretch of equal frames takes",
    "shake": "percent of the width by which the camera's path jumps per frame",
    "brightness": "mean luma",
    "clipped": "share of pixels without detail",
    "blur": "blur effect, 0 sharp to 1",
    "text": "share of the picture under overlaid text",
    "aesthetic": "aesthetic score",
    "hash_distance": "bits by which the nearest shot of an earlier video differs",
    "similarity": "cosine similarity to the nearest shot of an earlier video",
    "bars": "share of the picture that lay in black bars and was cropped",
}


@dataclass(frozen=True)
class CardShot:
    begins: str
    when: str
    caption: str
    images: list[str]  # data URIs
    filtered: str


@dataclass(frozen=True)
class CardScene:
    source: str
    scene_id: str
    story: str
    shots: list[CardShot]


@dataclass(frozen=True)
class Histogram:
    score: str
    meaning: str
    range: str
    svg: Markup


@dataclass(frozen=True)
class Aside:
    """Sources set aside at one stage."""

    title: str
    sources: list[Row]


def write_card(folder: Path, out: Path, max_scenes: int = 60) -> Path:
    """Write the card of the dataset in `folder` to `out`.

    Raises ValueError where there is no dataset, OutputError where the card cannot be written.
    """
    earlier = Earlier(folder)
    if not earlier.facts:
        raise ValueError(f"{folder}: no dataset in it; `shotloom prepare output={folder}` makes one")
    parts = list(earlier.parts.values())
    totals, settings = earlier.facts["totals"], earlier.facts["settings"]
    rows = [row for part in parts for row in part.shots]
    steps = recorded_waterfall(parts, settings)
    limits = {"min_shot_frames": settings["min_shot_frames"], **settings["filters"]}
    seconds = sum(row["duration_s"] for row in rows)
    report = _report(folder)
    speeds, next_knob = read_speeds(report) if report else ([], "")
    groups = _scenes(parts)
    shown = [groups[k] for k in _evenly(len(groups), max_scenes)]
    try:
        return write_page(
            out,
            "dataset_card.html.j2",
            title=f"Dataset {folder.resolve().name}",
            figures=[
                Entry(
                    "videos: written, filtered, failed",
                    " / ".join(str(totals[k]) for k in ("written", "filtered", "failed")),
                ),
                Entry("scenes", str(totals["scenes"])),
                Entry("shots, of them encoded", f"{totals['shots']} / {totals['encoded_shots']}"),
                Entry("seconds of shots", f"{seconds:.0f}"),
                Entry("encoded frames", str(totals["encoded_frames"])),
                Entry("size (encoded shots), frames/s", f"{_sizes(rows, settings)}, {settings['fps']:g}"),
            ],
            bars=_bar_rows(steps, len(rows)),
            histograms=[chart for name in SCORES if (chart := histogram(name, rows, limits)) is not None],
            aside=_set_aside(parts),
            scenes=_sheets(shown, earlier),
            num_scenes=len(groups),
            stages=_stages(report),
            speeds=speeds,
            next_knob=next_knob,
        )
    except OSError as error:
        if not is_about(error, out.parent):
            raise
        why = f"the card cannot be written to {out} ({os.strerror(error.errno or 0)}): name another file with --out"
        raise OutputError(error.errno, why) from error


def _sizes(rows: Sequence[Row], settings: Row) -> str:
    """Width x height, each with its number of shots where there are several."""
    found = sizes_of(rows)
    if len(found) < 2:
        return next(iter(found), in_words((settings["height"], settings["width"])))
    return ", ".join(f"{size} ({count})" for size, count in found.items())


def _bar_rows(steps: Sequence[Step], shots: int) -> list[tuple[Step, float]]:
    """Each filter with the share of all shots that are left after it, in percent."""
    return [(step, 100.0 * step.left / max(1, shots)) for step in steps]


def histogram(name: str, rows: Sequence[Row], limits: dict[str, float | None]) -> Histogram | None:
    """An SVG histogram of a score, kept and taken shots stacked, with its thresholds; None where none was measured."""
    pairs = [(row[f"score_{name}"], not row["filtered"]) for row in rows if row[f"score_{name}"] is not None]
    if not pairs:
        return None
    values = np.array([value for value, _ in pairs])
    kept = np.array([keep for _, keep in pairs])
    lines = [(limits[rule.threshold], rule.side) for rule in RULES if rule.score == name]
    marks = [float(limit) for limit, _ in lines if limit is not None]
    low, high = (float(edge([edge(values), *marks])) for edge in (min, max))
    if high <= low:
        high = low + 1.0
    edges = np.linspace(low, high, _BINS + 1)
    counts = [np.histogram(values[chosen], edges)[0] for chosen in (kept, ~kept)]
    top = max(1, int((counts[0] + counts[1]).max()))
    width, height = 320, 90
    shapes = []
    for i in range(_BINS):
        base = float(height)
        for count, colour in ((counts[0][i], "after"), (counts[1][i], "bad")):
            if count:
                size = max(1.0, height * count / top)
                place = f'x="{width * i / _BINS:.1f}" y="{base - size:.1f}" width="{width / _BINS - 1:.1f}"'
                shapes.append(f'<rect {place} height="{size:.1f}" fill="var(--{colour})"/>')
                base -= size
    for mark in marks:
        x = width * (mark - low) / (high - low)
        shapes.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" stroke="var(--ink)" stroke-dasharray="3 3"/>'
        )
    label = f"{name}: {len(pairs)} shots from {values.min():g} to {values.max():g}"
    svg = Markup(  # numbers and the names of our own scores only: nothing here comes from outside
        f'<svg viewBox="-2 0 {width + 4} {height}" role="img" aria-label="{label}">{"".join(shapes)}</svg>'
    )
    words = f"{values.min():.3g} to {values.max():.3g}, median {np.median(values):.3g}"
    if marks:
        words += ", threshold " + " and ".join(f"{mark:g}" for mark in marks)
    return Histogram(name, _MEANINGS[name], words, svg)


def _evenly(count: int, most: int) -> list[int]:
    """At most `most` positions of `count`, evenly spread."""
    return sorted({k * count // max(1, min(most, count)) for k in range(min(most, count))})


def _scenes(parts: Sequence[Part]) -> list[tuple[Part, list[Row]]]:
    """Shots by scene, in order, written or not."""
    found = []
    for part in parts:
        groups: dict[str, list[Row]] = defaultdict(list)
        for row in part.shots:
            groups[row["scene_id"]].append(row)
        found += [(part, rows) for rows in groups.values()]
    return found


def _sheets(shown: Sequence[tuple[Part, list[Row]]], earlier: Earlier) -> list[CardScene]:
    """Contact sheets; each source is decoded once, as far as its last picture."""
    records: dict[str, Scene] = {}
    sources: dict[str, Row] = {}
    wanted: dict[str, set[int]] = defaultdict(set)
    for part, rows in shown:
        scene = _record(rows, earlier)
        if scene is not None:
            records[scene.scene_id] = scene
        name = part.source["name"]  # a path may hold many: a tar does
        sources[name] = part.source
        wanted[name] |= {pts for row in rows for pts in _pts(row, scene)}
    pictures = {name: _frames(sources[name], sorted(pts)) for name, pts in wanted.items()}
    sheets = []
    for part, rows in shown:
        scene = records.get(rows[0]["scene_id"])
        there = pictures[part.source["name"]]
        shots = [
            CardShot(
                row["transition"],
                f"{row['start_s']:.1f} s, lasts {row['duration_s']:.1f} s",
                row["prompt"] or row["sentence"],
                [image_uri(there[pts]) for pts in _pts(row, scene) if pts in there],
                row["filtered"],
            )
            for row in rows
        ]
        sheets.append(CardScene(part.source["name"], rows[0]["scene_id"], scene.story if scene else "", shots))
    return sheets


def _frames(source: Row, pts: list[int]) -> dict[int, np.ndarray]:
    with source_here(source) as path:
        return {} if path is None else frames_at(path, pts, source["frames_fps"] or None)


def _record(rows: Sequence[Row], earlier: Earlier) -> Scene | None:
    """The record of a written scene; None where it is not written or cannot be read (`shotloom verify` says why)."""
    key, shard = rows[0]["key"], rows[0]["shard"]
    if not key:
        return None
    try:
        return Scene.from_json(earlier.reader.sample(shard, key)["json"])
    except (OSError, KeyError, SceneError):
        return None


def _pts(row: Row, scene: Scene | None) -> list[int]:
    """First, middle and last encoded frame of a shot; its first frame where it is not encoded."""
    span = scene.shots[row["index"]].encoded if scene is not None else None
    if span is None:
        return [row["start_pts"]]
    return sorted({span.pts[0], span.pts[(len(span.pts) - 1) // 2], span.pts[-1]})


def _set_aside(parts: Sequence[Part]) -> list[Aside]:
    """Sources that were not written, by status and by the stage or rule that ended them; then single scenes."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for part in parts:
        source = part.source
        if source["status"] == "written":
            continue
        rules = sorted({rule_of(row["filtered"]) for row in part.shots if row["filtered"]})
        groups[f"{source['status']} in {source['stage']}"].append(
            {
                **{name: source[name] for name in ("name", "reason")},
                **_whence(source),
                "rules": ", ".join(rules),
            }
        )
    found = [Aside(f"{len(sources)} {title}", sources) for title, sources in sorted(groups.items())]
    names = {row["scene_id"]: part.source for part in parts for row in part.shots}
    scenes = scenes_aside([part.source for part in parts], (row for part in parts for row in part.shots))
    rows = [{"name": scene, "reason": reason, **_whence(names[scene]), "rules": ""} for scene, reason in scenes.items()]
    return found + [Aside(f"{len(rows)} scenes of videos that are written", rows)] * bool(rows)


def _whence(source: Row) -> Row:
    facts = f"{source['width']}x{source['height']}, {source['duration_s']:.1f} s" if source["width"] else ""
    return {name: source[name] for name in ("attempts", "path", "codec")} | {"facts": facts}


def _report(folder: Path) -> dict[str, Any]:
    """What the last run said of itself; nothing where its report is gone."""
    try:
        report: dict[str, Any] = json.loads((folder / "report.json").read_text())
        return report if {"stages", "seconds"} <= report.keys() else {}
    except (OSError, ValueError):
        return {}


def _stages(report: dict[str, Any]) -> list[tuple[str, int, int, str]]:
    """Stage, items, set aside, time."""
    stages = report.get("stages", {})
    return [(name, one["items"], one["set_aside"], duration(one["seconds"])) for name, one in stages.items()]

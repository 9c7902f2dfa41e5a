"""Try other thresholds on the recorded scores: what each filter would take, in order, without decoding anything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from preprocess.dataset import Earlier
from preprocess.duplicates import find_duplicates
from preprocess.filters import (
    AESTHETIC,
    DATASET_RULES,
    RULES,
    SAME_FILE,
    VideoShape,
    first_broken,
    rule_of,
    thresholds,
    video_rules,
)
from preprocess.parts import Part, Row
from preprocess.settings import PrepareSettings
from preprocess.sizes import in_words

# scores measured under other settings are other scores
_MEASURED_UNDER = ("height", "width", "fps", "frame_step", "shot_frames", "max_seconds", "crop_bars", "cuts")


@dataclass(frozen=True)
class Step:
    """One filter of the waterfall: what it takes of what the filters before it left."""

    name: str
    threshold: str
    shots: int
    seconds: float
    left: int
    left_seconds: float
    unscored: int = 0  # shots it was asked about that have no such score; they are kept


@dataclass
class Waterfall:
    steps: list[Step] = field(default_factory=list)
    shots: int = 0
    seconds: float = 0.0
    failed: int = 0  # videos: no filter is asked about them
    undecoded: int = 0  # videos that a filter took before they were decoded, and that it would take no more
    undecoded_seconds: float = 0.0
    taken: int = 0  # videos that it would take again; how many shots they have is not known
    kept_now: int = 0  # shots that the dataset holds as it is

    def summary(self) -> str:
        """A table, a line per filter; those that are off or take nothing too."""
        rows = [("filter", "threshold", "takes shots", "seconds", "leaves shots", "seconds")]
        rows.append(("", "", "", "", str(self.shots), f"{self.seconds:.1f}"))
        for step in self.steps:
            taken = (str(step.shots), f"{step.seconds:.1f}")
            rows.append((step.name, step.threshold, *taken, str(step.left), f"{step.left_seconds:.1f}"))
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) if k < 2 else cell.rjust(width) for k, (cell, width) in enumerate(pairs))
            for pairs in (list(zip(row, widths, strict=True)) for row in rows)
        ]
        for step in self.steps:
            if step.unscored:
                lines.append(f"{step.name}: {step.unscored} shots have no such score and are counted as kept")
        left = self.steps[-1].left if self.steps else self.shots
        lines.append(f"{left} of {self.shots} shots would be encoded; the dataset holds {self.kept_now}")
        if self.taken:
            lines.append(f"{self.taken} videos are taken before a decode, so their shots are not known and not counted")
        if self.undecoded:
            seconds = f"{self.undecoded_seconds:.1f} s"
            lines.append(f"{self.undecoded} videos ({seconds}) would pass now, but were never decoded: not counted")
        if self.failed:
            lines.append(f"{self.failed} videos failed and are not counted")
        return "\n".join([*lines, "nothing was changed"])


def replay(folder: Path, settings: PrepareSettings) -> Waterfall:
    """The waterfall that the dataset in `folder` would have with the thresholds of `settings`.

    Raises ValueError where there is no dataset, or it was measured under other settings.
    """
    earlier = Earlier(folder)
    if not earlier.facts:
        raise ValueError(f"{folder}: no dataset to try thresholds on; prepare it first")
    was, now = earlier.facts["settings"], json.loads(json.dumps(asdict(settings)))
    for name in _MEASURED_UNDER:
        if was.get(name) != now[name]:
            raise ValueError(
                f"{name}={now[name]}, but the scores in {folder} were measured with {name}={was.get(name)}; "
                "leave it as it was, or prepare again"
            )
    if sorted(was.get("sizes", [])) != sorted(now["sizes"]):
        words = ("[" + ", ".join(map(in_words, sizes)) + "]" for sizes in (now["sizes"], was.get("sizes", [])))
        raise ValueError(
            f"sizes={next(words)}, but the scores in {folder} were measured with sizes={next(words)}; leave them as "
            "they were, or prepare again"
        )
    if settings.aesthetic_key and was.get("aesthetic_key") != settings.aesthetic_key:
        raise ValueError(
            f"the shots in {folder} were not scored by this aesthetic model; leave it out, or prepare again"
        )
    return make_waterfall(list(earlier.parts.values()), settings)


def make_waterfall(parts: Sequence[Part], settings: PrepareSettings) -> Waterfall:
    """What each filter takes of the recorded shots, in the order in which they are asked."""
    found = Waterfall(failed=sum(part.source["status"] == "failed" for part in parts))
    found.kept_now = sum(row["encoded_frames"] > 0 for part in parts for row in part.shots)
    known, on_videos = [], video_rules(settings)
    for part in parts:
        if part.shots and part.source["status"] != "failed":
            known.append(part)
        elif part.source["status"] == "filtered":
            if any(rule.reason(_shape(part.source)) for rule in on_videos):
                found.taken += 1
            else:
                found.undecoded += 1
                found.undecoded_seconds += part.source["duration_s"]
    left = [Part(part.source, [_fresh(row) for row in part.shots]) for part in known]
    found.shots, found.seconds = _size(left)

    def step(name: str, threshold: Any, kept: list[Part], unscored: int = 0) -> None:
        nonlocal left
        before, after = _size(left), _size(kept)
        words = "off" if threshold is None or threshold is False else "on" if threshold is True else f"{threshold:g}"
        found.steps.append(Step(name, words, before[0] - after[0], before[1] - after[1], *after, unscored))
        left = kept

    for video_rule in on_videos:
        step(video_rule.name, video_rule.threshold, [p for p in left if not video_rule.reason(_shape(p.source))])
    limits = thresholds(settings)
    for rule in RULES:
        if rule not in DATASET_RULES:
            kept = [
                Part(p.source, [r for r in p.shots if not first_broken(json.loads(r["scores"]), limits, [rule])])
                for p in left
            ]
            shots = [] if limits[rule.threshold] is None else [row for part in left for row in part.shots]
            step(rule.name, limits[rule.threshold], kept, sum(rule.score not in json.loads(r["scores"]) for r in shots))
    verdicts = find_duplicates(left, settings.filters)
    reasons = {shot: rule_of(verdict.reason) for shot, verdict in verdicts.items() if verdict.reason}
    for name, threshold in (
        (SAME_FILE, settings.filters.same_file), *((rule.name, limits[rule.threshold]) for rule in DATASET_RULES)
    ):  # fmt: skip
        kept = [Part(p.source, [r for r in p.shots if reasons.get(r["shot_id"]) != name]) for p in left]
        compares = name != SAME_FILE and threshold is not None
        step(name, threshold, kept, sum(compares and not row["signature"] for part in left for row in part.shots))
    return found


def recorded_waterfall(parts: Sequence[Part], settings: dict[str, Any]) -> list[Step]:
    """What each filter has taken of the shots of a dataset, by their recorded reasons."""
    rows = [
        row for part in parts for row in part.shots if part.source["status"] != "failed" and not row.get("set_aside")
    ]
    left, seconds = len(rows), sum(row["duration_s"] for row in rows)
    steps = []
    limits = {"min_shot_frames": settings["min_shot_frames"], **settings["filters"]}
    if not settings["aesthetic_key"]:
        limits[AESTHETIC.threshold] = None
    named = [(rule.name, limits[rule.threshold]) for rule in RULES]
    named.insert(len(RULES) - len(DATASET_RULES), (SAME_FILE, None if not limits[SAME_FILE] else 0))
    for name, threshold in named:
        taken = [row for row in rows if rule_of(row["filtered"]) == name]
        left, seconds = left - len(taken), seconds - sum(row["duration_s"] for row in taken)
        words = "off" if threshold is None else "on" if name == SAME_FILE else f"{threshold:g}"
        steps.append(Step(name, words, len(taken), sum(row["duration_s"] for row in taken), left, seconds))
    return steps


def _fresh(row: Row) -> Row:
    """A row as it was before any filter was asked."""
    return row | {"filtered": "", "duplicate_of": ""}


def _size(parts: Sequence[Part]) -> tuple[int, float]:
    return sum(len(part.shots) for part in parts), sum(row["duration_s"] for part in parts for row in part.shots)


def _shape(row: Row) -> VideoShape:
    """What the rules on videos ask of a source."""
    return VideoShape(row["width"], row["height"], row["fps"], row["source_frames"], row["duration_s"])

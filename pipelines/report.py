"""The demo's report: facts in, one self-contained HTML file out, media embedded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from infra.storage import atomic_write_text

TEMPLATES = Path(__file__).resolve().parent / "templates"

# metric: (name, what it says, direction of better, as a share)
METRICS: dict[str, tuple[str, str, int, bool]] = {
    "identity_said": (
        "Identity across shots, said", "pairs of shots with colour, shape and pattern as asked in both", 1, True,
    ),
    "identity_unsaid": (
        "Identity across shots, unsaid",
        "change of traits that no text mentions: 1 as between strangers, 0 none; lower is better", -1, False,
    ),
    "place_agreement": ("Place across shots", "pairs of shots that both show the place asked for", 1, True),
    "colour": ("Colour", "characters in the colour asked for", 1, True),
    "shape": ("Shape", "characters in the shape asked for", 1, True),
    "place": ("Place", "shots in the place asked for", 1, True),
    "style": ("Style", "shots in the style asked for", 1, True),
    "action": ("Action", "shots with the action asked for, by the right character", 1, True),
    "legibility": ("Legibility", "due frames with a character that can be read", 1, True),
    "cut_recall": ("Cuts", "cuts that are seen in the pixels", 1, True),
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A label and what it names: a figure, a step of the flow, a command."""

    label: str
    value: str


@dataclass(frozen=True)
class ShotSheet:
    """One shot of a contact sheet; images are data URIs."""

    begins: str
    when: str
    caption: str
    images: list[str]


@dataclass(frozen=True)
class SceneSheet:
    source: str
    story: str
    shots: list[ShotSheet]


@dataclass(frozen=True)
class Take:
    """One video made, as a data URI; `strip` holds a few of its frames per shot."""

    label: str
    note: str
    video: str
    width: int  # pixels
    strip: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class GeneratedScene:
    name: str
    story: str
    prompts: list[str]
    takes: list[Take]


@dataclass(frozen=True)
class SetAside:
    name: str
    status: str  # filtered or failed
    stage: str
    reason: str


@dataclass(frozen=True)
class StageRow:
    name: str
    what: str
    items: int
    set_aside: int
    time: str


@dataclass(frozen=True)
class JudgeRow:
    label: str
    meaning: str
    before: str
    after: str
    count: str
    trend: str  # CSS class: better, worse or nothing


@dataclass(kw_only=True)
class Report:
    """Everything the page shows; text is escaped by the template."""

    title: str
    happened: str
    headline: list[Entry]
    flow: list[Entry]
    compared: str
    generated: list[GeneratedScene]
    judge: list[JudgeRow]
    no_judge: str
    dataset: list[Entry]
    num_sources: int
    set_aside: list[SetAside]
    num_scenes: int
    sheets: list[SceneSheet]
    training: str
    curve: Markup | None
    served: Take | None
    stages: list[StageRow]
    total_time: str
    next_steps: list[Entry]
    notes: list[str] = field(default_factory=list)


def write_report(path: Path, report: Report) -> Path:
    """Render the page to `path` in one step; the file is whole or absent."""
    return write_page(path, "report.html.j2", report=report)


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Render a template to `path` in one step; text in `values` is escaped."""
    pages = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    atomic_write_text(path, pages.get_template(template).render(**values))
    return path


def judge_rows(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> list[JudgeRow]:
    """Rows for the metrics that both sides have, {metric: {"value", "count"}}; others say too little to show."""
    rows = []
    for name, (label, meaning, direction, share) in METRICS.items():
        if name not in before or name not in after:
            continue
        old, new = before[name], after[name]
        change = (new["value"] - old["value"]) * direction
        counts = (int(old["count"]), int(new["count"]))
        rows.append(
            JudgeRow(
                label,
                meaning,
                _score(old["value"], share),
                _score(new["value"], share),
                str(counts[0]) if counts[0] == counts[1] else f"{counts[0]} / {counts[1]}",
                "better" if change > 1e-9 else "worse" if change < -1e-9 else "",
            )
        )
    return rows


def _score(value: float, share: bool) -> str:
    return f"{100 * value:.0f} %" if share else f"{value:.2f}"


def loss_curve(lines: Sequence[dict[str, Any]], width: int = 1000, height: int = 300) -> Markup | None:
    """An SVG of the lines' "loss" over "step", None with fewer than two points."""
    points = [(float(line["step"]), float(line["loss"])) for line in lines if "loss" in line]
    if len(points) < 2:
        return None
    left, right, top, bottom = 56, 16, 12, 34
    last = max(step for step, _ in points)
    high = max(loss for _, loss in points)
    y_ticks, x_ticks = _ticks(high * 1.05), _ticks(last)
    high = max(high * 1.05, y_ticks[-1])

    def x(step: float) -> float:
        return left + (width - left - right) * step / last

    def y(loss: float) -> float:
        return height - bottom - (height - top - bottom) * loss / high

    grid = "".join(
        f'<line x1="{left}" x2="{width - right}" y1="{y(t):.1f}" y2="{y(t):.1f}" stroke="var(--line)"/>'
        f'<text x="{left - 8}" y="{y(t) + 4:.1f}" text-anchor="end">{t:g}</text>'
        for t in y_ticks
    ) + "".join(f'<text x="{x(t):.1f}" y="{height - 12}" text-anchor="middle">{t:g}</text>' for t in x_ticks)
    line = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points)
    first_loss, last_loss = points[0][1], points[-1][1]
    return Markup(  # numbers only: nothing here comes from outside
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="loss {first_loss:.3f} to {last_loss:.3f}">'
        f'<g fill="var(--soft)" font-size="13" font-family="inherit">{grid}</g>'
        f'<polyline points="{line}" fill="none" stroke="var(--after)" stroke-width="2.2" stroke-linejoin="round"/>'
        f'<circle cx="{x(points[-1][0]):.1f}" cy="{y(last_loss):.1f}" r="4" fill="var(--after)"/></svg>'
    )


def _ticks(high: float, about: int = 5) -> list[float]:
    """Round values from 0 to at most `high`."""
    if high <= 0:
        return [0.0]
    raw = high / about
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * k for k in (1, 2, 2.5, 5, 10) if unit * k >= raw)
    return [step * k for k in range(int(high / step + 1e-9) + 1)]

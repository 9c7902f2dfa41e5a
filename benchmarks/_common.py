"""What every benchmark shares: --quick, --json, goals that are met or not, and result files without dates."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MODEL = ROOT / "toyworld" / "weights" / "wan-small"

sys.path.insert(0, str(ROOT))  # so that `python benchmarks/x.py` finds its helpers and, uninstalled, the packages


def have_scenedetect() -> bool:
    try:
        import scenedetect  # noqa: F401
    except ImportError:
        return False
    return True


@dataclass(frozen=True)
class Goal:
    """A figure and what it should be: `value` above or below `target`. `met` is None where nothing was judged."""

    name: str
    value: float
    relation: str  # ">" or "<"
    target: float
    judged: bool = True

    @property
    def met(self) -> bool | None:
        if not self.judged:
            return None
        return self.value > self.target if self.relation == ">" else self.value < self.target

    def record(self) -> dict[str, Any]:
        words = f"{self.relation} {self.target:g}"
        return {
            "name": self.name,
            "value": round(self.value, 4) or float(f"{self.value:.2g}"),
            "goal": words,
            "met": self.met,
        }


def parser(description: str) -> argparse.ArgumentParser:
    """Arguments that all benchmarks take, and KEY=VALUE for the rest."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--quick", action="store_true", help="a small run that shows it works; judges no goal")
    made.add_argument("--json", action="store_true", help="print nothing but the last line, one JSON object")
    made.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    return made


@contextmanager
def refusing(made: argparse.ArgumentParser) -> Iterator[None]:
    """Wrong keys and values end the program as wrong arguments do: the error on stderr, exit code 2."""
    try:
        yield
    except ValueError as error:
        made.error(str(error))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it reads well as text."""
    widths = [max(len(str(row[k])) for row in [header, *rows]) for k in range(len(header))]
    lines = [
        "| " + " | ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [header, *rows]
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def finish(record: dict[str, Any], goals: Sequence[Goal], text: str, *, as_json: bool) -> int:
    """Print the text and, as the last line, the record with its goals; gives exit code 1 if a judged goal is missed."""
    record = {**record, "goals": [goal.record() for goal in goals]}
    if not as_json:
        print(text)
        for goal in goals:
            words = {True: "met", False: "MISSED", None: "not judged"}[goal.met]
            print(f"goal {words}: {goal.name} {goal.value:.3g} {goal.relation} {goal.target:g}")
    print(json.dumps(record, sort_keys=True), flush=True)
    return 1 if any(goal.met is False for goal in goals) else 0

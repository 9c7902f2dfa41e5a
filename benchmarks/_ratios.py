"""From what variants cost to what is reported: ratios with their goals, and results as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from _common import Goal, table
from _measure import Cost, Ratio, ratio


@dataclass(frozen=True)
class Quotient:
    """cost(over) / cost(under); with a goal, what it should be."""

    name: str
    over: str
    under: str
    relation: str = ""
    target: float = 0.0


@dataclass
class Part:
    """One comparison: what its variants cost, which ratios are read off, and how far their results are apart."""

    name: str
    costs: dict[str, Cost]
    quotients: list[Quotient]
    differences: dict[str, float] = field(default_factory=dict)  # largest difference over the rms of the reference


def figures(parts: Sequence[Part], clock: str) -> dict[str, dict[str, Any]]:
    """By name: each quotient with its interval, that of wall time and of FLOPs; and each difference."""
    found: dict[str, dict[str, Any]] = {}
    for part in parts:
        for quotient in part.quotients:
            over, under = part.costs[quotient.over], part.costs[quotient.under]
            judged = ratio(getattr(over, clock), getattr(under, clock))
            found[f"{part.name}.{quotient.name}"] = {
                "of": f"{quotient.over} / {quotient.under}",
                "clock": clock,
                **{key: round(value, 4) for key, value in asdict(judged).items()},
                "wall": round(ratio(over.wall_s, under.wall_s).value, 4),
                "flops": round(over.flops / under.flops, 4),
                "repetitions": len(over.cpu_s),
            }
        for name, value in part.differences.items():
            found[f"{part.name}.{name}.difference"] = {"of": "largest difference / rms", "value": value}
    return found


def goals_of(parts: Sequence[Part], found: dict[str, dict[str, Any]], tolerance: float, judged: bool) -> list[Goal]:
    """A goal per quotient that has one, and per difference: a wrong result is wrong in a quick run, too."""
    goals = [
        Goal(name, found[name]["value"], quotient.relation, quotient.target, judged)
        for part in parts
        for quotient in part.quotients
        if quotient.relation and (name := f"{part.name}.{quotient.name}")
    ]
    return goals + [
        Goal(f"{part.name}.{name}.difference", value, "<", tolerance)
        for part in parts
        for name, value in part.differences.items()
    ]


def report(parts: dict[str, dict[str, Any]]) -> str:
    """The record of each part, by "device.part", as Markdown."""
    text = """# What the methods cost

Random weights. Ratios are medians of paired, interleaved repetitions, in brackets the 95 % bootstrap interval of the
median: of CPU-seconds of the process on a CPU, of wall time on a GPU. FLOPs are counted, not timed.
"""
    words = {True: "met", False: "MISSED", None: "not judged"}
    for name, part in parts.items():
        goals = {goal["name"]: f"{goal['goal']}: {words[goal['met']]}" for goal in part["goals"]}
        rows, apart = [], []
        for key, figure in part["figures"].items():
            if "flops" not in figure:
                apart.append([key, f"{figure['value']:.1e}", goals.get(key, "")])
                continue
            value = str(Ratio(figure["value"], figure["low"], figure["high"]))
            rows.append(
                [key, figure["of"], value, f"{figure['wall']:.3f}", f"{figure['flops']:.3f}", goals.get(key, "")]
            )
        costs = [
            [key, f"{cost['cpu_s']:.4g}", f"{cost['wall_s']:.4g}", f"{cost['gflop']:.4g}"]
            for key, cost in part["medians"].items()
        ]
        machine = ", ".join(f"{key} {value}" for key, value in part["machine"].items())
        clock = "CPU-s" if name.startswith("cpu") else "wall"
        sizes = ", ".join(f"{key} {value}" for key, value in part["sizes"].items())
        text += f"""
## {name}

    {part["command"]}

{machine}; {part["dtype"]}.
{sizes}.

{table(["figure", "cost of", clock, "wall", "FLOPs", "goal"], rows)}

{table(["ways to one result", "difference / rms", "goal"], apart)}

{table(["median of one run", "CPU-seconds", "wall seconds", "GFLOP"], costs)}
"""
    return text

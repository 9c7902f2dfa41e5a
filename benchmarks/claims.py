"""The papers' claims, measured again on ToyWorld: `python benchmarks/claims.py`, or a part of it with `--only`.

fvdm, tic_ft, lct, aid, fca  the table of claims: each paper's ablation at equal training compute, judged on the same
          held-out prompts. `cells=[full] seeds=[0]` makes one cell. Finished cells are kept in results/claims/ and
          skipped; `run=false` makes none. Either way claims.json and claims.md are compiled of what is finished.
lct-demo  Fine-tuned with LCT, a single-shot model keeps who is in a scene better from shot to shot than it does alone
          (Long Context Tuning, 2503.10589). Same held-out storyboards, same start noise, same number of steps.

Without --only: the five papers. The last line printed is one JSON object of figures and goals; the exit code is 1 if a
goal is missed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import _common
from _common import Goal
from claim_cells import aid, fca, fvdm, lct, tic_ft
from claim_cells.cell import Paper, TableConfig
from claim_cells.lct_demo import LctDemoClaim, lct_demo
from claim_cells.runner import run_cells, small
from claim_cells.table import compile_paper, goals, text_of

from infra.config import load_config
from infra.storage import atomic_write_text

PAPERS: dict[str, Paper] = {one.PAPER.name: one.PAPER for one in (fvdm, tic_ft, lct, aid, fca)}
CLAIMS: dict[str, tuple[type, Callable[[Any, bool, str], tuple[dict[str, Any], list[Goal], str]]]] = {
    "lct-demo": (LctDemoClaim, lct_demo),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _common.parser(__doc__.splitlines()[0])
    parser.add_argument("--only", choices=sorted([*PAPERS, *CLAIMS]), help="which claim; the five papers unless told")
    given = parser.parse_intermixed_args(arguments)
    config_class, measure = CLAIMS.get(given.only, (TableConfig, None))
    with _common.refusing(parser):
        config = load_config(config_class, None, given.overrides)
        if measure is None:
            chosen_cells(given.only, config)  # raises now, not after the first paper
    only = ["--only", given.only] if given.only else []
    command = " ".join(["python benchmarks/claims.py", *only, *["--quick"] * given.quick, *given.overrides])
    if measure is None:
        record, found, text = table(config, given.only, given.quick, command)
    else:
        record, found, text = measure(config, given.quick, command)
        if not given.quick:
            _write(config, given.only.replace("-", "_"), record, found, text)
    return _common.finish(record, found, text, as_json=given.json)


def table(config: TableConfig, only: str | None, quick: bool, command: str) -> tuple[dict[str, Any], list[Goal], str]:
    """Make the cells asked for that are not finished; compile the table of all papers."""
    if quick:
        config = small(config)
    if config.run:
        for name, cells in chosen_cells(only, config).items():
            run_cells(PAPERS[name], cells, config, command)
    figures = {name: compile_paper(paper, config) for name, paper in PAPERS.items()}
    found = [goal for name, paper in figures.items() for goal in goals(name, paper, not quick)]
    record, text = {"claim": "table", "quick": quick, "papers": figures}, text_of(figures)
    _write(config, "claims", record, found, text)
    return record, found, text


def chosen_cells(only: str | None, config: TableConfig) -> dict[str, list[Any]]:
    """{paper: cells to make}. Raises ValueError for a cell that none of the papers has."""
    papers = {only: PAPERS[only]} if only else PAPERS
    known = {cell.name for paper in papers.values() for cell in paper.cells}
    if unknown := sorted(set(config.cells) - known):
        raise ValueError(f"cells={config.cells}: there is no {', '.join(unknown)}; choose among {sorted(known)}")
    return {
        name: [cell for cell in paper.cells if not config.cells or cell.name in config.cells]
        for name, paper in papers.items()
    }


def _write(config: Any, name: str, record: dict[str, Any], found: Sequence[Goal], text: str) -> None:
    whole = {**record, "goals": [goal.record() for goal in found]}
    config.results.mkdir(parents=True, exist_ok=True)
    atomic_write_text(config.results / f"{name}.json", json.dumps(whole, indent=2, sort_keys=True) + "\n")
    atomic_write_text(config.results / f"{name}.md", text)


if __name__ == "__main__":
    sys.exit(main())

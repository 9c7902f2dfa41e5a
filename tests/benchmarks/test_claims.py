"""Claims: unsaid identity per scene equals the judge's own, goals, command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from _bootstrap import pooled
from _common import Goal, finish, table
from claims import main

from models.tiny import build_tiny_folder
from pipelines.demo_stages import held_out_storyboards
from pipelines.evaluate import read_storyboard
from toyworld.judge import unsaid_identity, unsaid_sums
from toyworld.render import render_scene
from toyworld.world import sample_scene


@pytest.fixture(scope="module")
def readings() -> list:
    """Rendered truth of four held-out scenes, as the judge reads it."""
    found = []
    for index, board in enumerate(held_out_storyboards(4, seed=5)):
        scene = sample_scene("small", seed=5, index=index, split="test", num_shots=3)
        found.append(read_storyboard(render_scene(scene, 64)[0], scene.cuts, board))
    return found


def test_bootstrap_pools_unsaid_sums_as_the_judge_does(readings: list) -> None:
    sums = unsaid_sums(readings)
    theirs = unsaid_identity(readings)["identity_unsaid"]
    assert pooled(sums) == pytest.approx(theirs.value)
    assert sums[..., 1].sum() == theirs.count
    assert theirs.value < 0.5  # the truth keeps its traits


def test_what_nobody_can_read_has_no_memory() -> None:
    boards = held_out_storyboards(2, seed=5)
    blank = [read_storyboard(np.zeros((51, 64, 64, 3), np.uint8), [17, 34], board) for board in boards]
    sums = unsaid_sums(blank)
    assert sums[..., 1].sum() > 0 and pooled(sums) == 1.0


def test_goals_decide_the_exit_code_and_the_last_line_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert finish({"a": 1}, [Goal("g", 0.2, ">", 0.0), Goal("h", -0.1, "<", 0.0)], "text", as_json=False) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["goals"][0]["met"] is True
    assert finish({}, [Goal("g", 0.0, ">", 0.0)], "text", as_json=True) == 1
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert finish({}, [Goal("g", 0.0, ">", 0.0, judged=False)], "text", as_json=True) == 0


def test_table_is_markdown() -> None:
    assert table(["a", "long"], [["1", "2"]]).splitlines() == ["| a | long |", "|---|------|", "| 1 | 2    |"]


def test_unknown_keys_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--only", "lct-demo", "pair=3"])
    assert "nearest is 'pairs'" in capsys.readouterr().err


def test_sums_are_per_scene(readings: list) -> None:
    assert unsaid_sums(readings).shape[0] == len(readings)
    assert np.isfinite(unsaid_sums(readings)).all()


def test_whole_claim_with_tiny_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Random weights: nothing is legible, no goal is met, and everything is written down all the same."""
    for name, method in (("base", "fvdm"), ("tuned", "lct")):
        build_tiny_folder(tmp_path / name, method=method, text_length=300, height=64, width=64)
    keys = {"model": "tuned", "demo.model": "base", "out": "out", "results": "results"}
    overrides = [f"{key}={tmp_path / value}" for key, value in keys.items()]
    assert main(["--only", "lct-demo", "pairs=3", "demo.sample_steps=1", "workers=1", *overrides]) == 1
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [goal["met"] for goal in record["goals"]] == [False, False, False]
    assert record["pairs"] == 3 and record["trained"]["method"] == "lct"
    others = {"single-shot, sentences", "LCT, shots alone", "LCT, only text guided"}
    assert set(record["against_other_sides"]) == others
    made = {
        name: {p.name: p.read_bytes() for p in (tmp_path / "out/videos" / name).glob("*.mp4")}
        for name in ("LCT", "LCT-only-text-guided")
    }
    assert made["LCT"] != made["LCT-only-text-guided"] and all(len(videos) == 3 for videos in made.values())
    assert record["metrics"]["identity_unsaid"]["before"] == 1.0
    assert set(record["drawn_through_the_vae"]) == set(record["metrics"])
    assert json.loads((tmp_path / "results" / "lct_demo.json").read_text())["metrics"] == record["metrics"]
    assert "| identity_said" in (tmp_path / "results" / "lct_demo.md").read_text()

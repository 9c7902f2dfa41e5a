"""Claims: unsaid identity per scene equals the judge's own, goals, command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from _bootstrap import pooled
from _common import Goal, finish, table
from claims import main, unsaid_sums

from pipelines.demo_stages import held_out_storyboards
from pipelines.evaluate import read_storyboard
from toyworld.judge import unsaid_identity
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


def test_unsaid_identity_per_scene_pools_to_the_judges_own(readings: list) -> None:
    sums = unsaid_sums(readings)
    theirs = unsaid_identity(readings)["identity_unsaid"]
    assert pooled(sums) == pytest.approx(theirs.value)
    assert sums[..., 1].sum() == theirs.count
    assert theirs.value < 0.5  # the truth keeps its traits


def test_unsaid_identity_needs_comparable_scenes(readings: list) -> None:
    with pytest.raises(ValueError, match="cannot be measured"):
        unsaid_sums(readings[:1])


def test_goals_decide_the_exit_code_and_the_last_line_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert finish({"a": 1}, [Goal("g", 0.2, ">", 0.0), Goal("h", -0.1, "<", 0.0)], "text", as_json=False) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["goals"][0]["met"] is True
    assert finish({}, [Goal("g", 0.0, ">", 0.0)], "text", as_json=True) == 1
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert finish({}, [Goal("g", 0.0, ">", 0.0, judged=False)], "text", as_json=True) == 0


def test_table_is_markdown() -> None:
    assert table(["a", "long"], [["1", "2"]]).splitlines() == ["| a | long |", "|---|------|", "| 1 | 2    |"]


def test_unknown_keys_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "lct-demo", "pair=3"]) == 2
    assert "nearest is 'pairs'" in capsys.readouterr().err


def test_sums_are_per_scene(readings: list) -> None:
    assert unsaid_sums(readings).shape[0] == len(readings)
    assert np.isfinite(unsaid_sums(readings)).all()

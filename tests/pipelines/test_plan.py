"""`shotloom plan`: every task of every method has a table and a picture that say what its plan says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from models.methods import METHODS
from pipelines import cli
from pipelines.plan import PlanConfig, make_plan, plan_table, plot_plan

TASKS = [(name, task) for name, method in METHODS.items() for task in method.tasks]


def run(*arguments: str):
    return CliRunner().invoke(cli.main, ["plan", *arguments])


@pytest.mark.parametrize(("method", "task"), TASKS)
def test_every_task_has_a_plan_without_being_told_more(method: str, task: str) -> None:
    layout, plan = make_plan(method, task, PlanConfig(steps=4))
    lines = plan_table(layout, plan).splitlines()
    assert len(lines) == 3 + len(plan) and lines[-1].split()[0] == "end"
    printed = [[float(level) for level in line.split()[1:]] for line in lines[3:]]
    assert np.abs(np.array(printed) - plan.numpy()).max() <= 5e-4
    assert lines[1].split()[1:] == [role[:4] for role in layout.roles]


def test_the_table_is_printed_with_what_it_was_told() -> None:
    done = run("fvdm", "diagonal", "shots=[4]", "steps=2", "shift=1", "givens={head: 1}", "options={lag: 1}")
    assert done.exit_code == 0
    assert done.output.splitlines() == [
        "fvdm diagonal: 4 steps x 4 latent frames, levels before each step",
        "frame     0     1     2     3",
        "role   cond  targ  targ  targ",
        "shot      0     0     0     0",
        "   0  0.000 1.000 1.000 1.000",
        "   1  0.000 0.500 1.000 1.000",
        "   2  0.000 0.000 0.500 1.000",
        "   3  0.000 0.000 0.000 0.500",
        " end  0.000 0.000 0.000 0.000",
    ]


def test_the_level_of_given_shots_is_an_option() -> None:
    done = run("lct", "shot_conditioned", "shots=[1, 1]", "steps=1", "options={context_level: 0.5}")
    assert [line.split()[1:] for line in done.output.splitlines()[4:]] == [["0.500", "1.000"], ["0.500", "0.000"]]


def test_the_picture_darkens_with_the_level(tmp_path: Path) -> None:
    """Steps downwards, frames to the right: the last frame of a diagonal plan stays dark longest."""
    layout, plan = make_plan("fvdm", "diagonal", PlanConfig(shots=[5], steps=3))
    plot_plan(layout, plan, tmp_path / "plan.png", "a plan")
    pixels = np.asarray(Image.open(tmp_path / "plan.png").convert("RGB")).astype(int)
    blue = (pixels[..., 2] > pixels[..., 0] + 40) & (pixels[..., 0] < 30)  # the dark end of the colours: level 1
    left = blue[:, : int(np.nonzero(blue.any(axis=0))[0].min()) + 40]
    frames = blue[:, : int(blue.shape[1] * 0.75)]  # without the colour bar
    heights = frames.sum(axis=0)
    columns = np.nonzero(heights)[0]
    assert left.any() and heights[columns[-5]] > 3 * heights[columns[5]]
    for suffix in ("svg", "pdf"):
        plot_plan(layout, plan, tmp_path / f"plan.{suffix}")
        assert (tmp_path / f"plan.{suffix}").stat().st_size > 1000


def test_the_command_draws_beside_printing(tmp_path: Path) -> None:
    done = run("lct", "shot_conditioned", "--plot", str(tmp_path / "lct.png"))
    assert done.exit_code == 0 and done.output.endswith("lct.png\n") and (tmp_path / "lct.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["fdvm", "i2v"], 1, "unknown method 'fdvm'; choose one of fvdm"),
        (["fvdm", "joint"], 1, "no task 'joint'; it has t2v"),
        (["fvdm", "i2v", "stepz=2"], 2, "unknown key 'stepz'; nearest is 'steps'"),
        (["fvdm", "i2v", "givens={head: 2}"], 1, "takes no givens"),
        (["lct", "joint", "options={context_level: 0.3}"], 1, "task 'joint' takes no context_level"),
        (["lct", "joint", "options={lag: 2}"], 1, "lct joint with givens {} and options {'lag': 2}: "),
        (["fvdm", "i2v", "--plot", "plan.xyz"], 1, "plan.xyz: Format 'xyz' is not supported"),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], code: int, message: str) -> None:
    done = run(*arguments)
    assert done.exit_code == code and message in done.output


def test_without_a_picture_no_drawing_library_is_loaded(repo_root: Path) -> None:
    code = (
        "import sys; from pipelines.cli import main\n"
        "try: main(['plan', 'fvdm', 'i2v'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'matplotlib', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_pages_show_the_pictures_that_make_docs_figures_draws(repo_root: Path) -> None:
    [line] = [line for line in (repo_root / "Makefile").read_text().splitlines() if line.startswith("PLANS := ")]
    drawn = [tuple(plan.split("/")) for plan in line.removeprefix("PLANS := ").split()]
    assert set(drawn) <= set(TASKS)
    folder = repo_root / "docs" / "methods"
    shown = {
        picture: page.stem
        for page in folder.glob("*.md")
        for picture in re.findall(r"\]\(plans/([\w.-]+)\)", page.read_text())
    }
    assert shown == {f"{method}-{task}.png": method.replace("_", "-") for method, task in drawn}
    assert {file.name for file in (folder / "plans").iterdir()} == set(shown)

"""Evaluation from files: truth scores high, another scene's pixels score low, and what cannot be judged is listed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from pipelines.evaluate import EvaluateConfig, run_evaluate, toy_storyboard
from sample.video_io import enlarge, write_video
from toyworld.render import render_scene
from toyworld.world import ToyScene, sample_scene

SCENES = [sample_scene("small", seed=3, index=index, split="test", num_shots=3) for index in range(4)]


def write_run(folder: Path, shown: list[ToyScene]) -> None:
    """A folder as `shotloom sample` leaves it, whose videos show `shown` under the storyboards of SCENES."""
    lines = []
    for index, (scene, pixels) in enumerate(zip(SCENES, shown, strict=True)):
        name = f"scene-{index}"
        write_video(enlarge(render_scene(pixels)[0], 256), folder / f"{name}.mp4", scene.fps)
        board = asdict(toy_storyboard(scene, name))
        lines.append(
            {"name": name, "status": "completed", "file": f"{name}.mp4", "cuts": scene.cuts, "storyboard": board}
        )
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_truth_scores_high_and_the_wrong_scenes_low(tmp_path: Path) -> None:
    for name, shown in (("right", SCENES), ("wrong", SCENES[1:] + SCENES[:1])):
        (tmp_path / name).mkdir()
        write_run(tmp_path / name, shown)
    right = run_evaluate(EvaluateConfig(videos=tmp_path / "right"))
    wrong = run_evaluate(EvaluateConfig(videos=tmp_path / "wrong"))
    for metric in ("legibility", "colour", "shape", "action", "place", "identity_said"):
        assert right.metrics[metric]["value"] > 0.95, metric
    assert wrong.metrics["identity_said"]["value"] < 0.5
    assert wrong.metrics["attributes"]["value"] < right.metrics["attributes"]["value"] - 0.2
    assert right.failed == {} and len(right.videos) == 4
    written = json.loads(right.path.read_text())
    assert written["metrics"] == right.metrics and right.path.parent == tmp_path / "right"


def test_what_cannot_be_judged_is_listed_with_its_reason(tmp_path: Path) -> None:
    write_run(tmp_path, SCENES)
    manifest = tmp_path / "manifest.jsonl"
    records = [json.loads(line) for line in manifest.read_text().splitlines()]
    records[1] |= {"status": "failed", "error": "out of memory"}
    (tmp_path / records[2]["file"]).write_bytes(b"cut short")
    records[3]["storyboard"]["story"] = "A dog walks."
    manifest.write_text("".join(json.dumps(record) + "\n" for record in records))
    report = run_evaluate(EvaluateConfig(videos=tmp_path))
    assert set(report.videos) == {"scene-0"} and set(report.failed) == {"scene-1", "scene-2", "scene-3"}
    assert "out of memory" in report.failed["scene-1"] and "scene-2.mp4" in report.failed["scene-2"]


def test_an_empty_folder_says_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shotloom sample"):
        run_evaluate(EvaluateConfig(videos=tmp_path))


def test_storyboards_of_scenes_carry_every_word() -> None:
    board = toy_storyboard(SCENES[0])
    board.validate(max_shots=3)
    assert all(shot.prompt and shot.sentence and shot.frames == 17 for shot in board.shots)
    assert np.unique([board.name for board in map(toy_storyboard, SCENES)]).size == 4

"""Evaluation from files: truth scores high, another scene's pixels score low, and what cannot be judged is listed."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from models.tiny import build_tiny_folder
from pipelines.evaluate import EvaluateConfig, EvaluateReport, run_evaluate, toy_storyboard
from pipelines.sample import SampleConfig, run_sample
from pipelines.storyboards import load_storyboards
from pipelines.toyworld_pairs import PairsConfig, run_pairs
from sample.storyboard import Storyboard
from sample.video_io import enlarge, write_video
from toyworld.pairs import PAIR_TASKS, ToyPair, sample_pair
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


def write_pairs(folder: Path) -> tuple[list[Storyboard], list[ToyPair]]:
    """One pair per task: the storyboards that ask for their shots, from the files that `toyworld pairs` writes."""
    boards, pairs = [], []
    for task in PAIR_TASKS:
        run_pairs(PairsConfig(out=folder / task, task=task, count=1, first=1, size=64))
        boards += load_storyboards([folder / task / "storyboards.json"])
        pairs.append(sample_pair(task, index=1))
    return boards, pairs


def write_made(folder: Path, boards: list[Storyboard], clips: list[np.ndarray]) -> None:
    folder.mkdir()
    lines = []
    for board, clip in zip(boards, clips, strict=True):
        write_video(enlarge(clip, 256), folder / f"{board.name}.mp4", 8)
        lines.append({"name": board.name, "status": "completed", "file": f"{board.name}.mp4", "cuts": []})
        lines[-1]["storyboard"] = board.to_dict()
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_pairs_are_judged_by_what_was_given(tmp_path: Path) -> None:
    boards, pairs = write_pairs(tmp_path / "pairs")
    truth = [render_scene(pair.target)[0] for pair in pairs]
    write_made(tmp_path / "truth", boards, truth)
    # the first frame, at rest, in other colours
    write_made(tmp_path / "degraded", boards, [np.repeat(clip[:1], len(clip), 0)[..., [1, 2, 0]] for clip in truth])
    for task in PAIR_TASKS:  # the videos' own files are all that is read
        shutil.rmtree(tmp_path / "pairs" / task)
    right = run_evaluate(EvaluateConfig(videos=tmp_path / "truth"))
    wrong = run_evaluate(EvaluateConfig(videos=tmp_path / "degraded"))
    assert not right.failed and set(right.videos) == {pair.pair_id for pair in pairs} == set(wrong.videos)

    def value(report: EvaluateReport, name: str) -> float:
        return report.metrics[name]["value"]

    for name in ("identity", "condition_fidelity", "action"):
        assert value(right, name) >= 0.95 and value(wrong, name) <= 0.75, name
    assert value(right, "motion_error") < 0.03 < 0.1 < value(wrong, "motion_error")
    assert value(right, "frame_psnr") > 30 > 20 > value(wrong, "frame_psnr")
    assert value(right, "unsaid_hue") < 0.3 < 0.9 < value(wrong, "unsaid_hue")
    shown = {name: score["frame_psnr"]["count"] for name, score in right.videos.items() if "frame_psnr" in score}
    assert shown == {pairs[2].pair_id: 3, pairs[4].pair_id: 1}, "key frames; the first frame of a transfer"


def test_the_records_of_sample_are_all_that_is_needed(tmp_path: Path) -> None:
    build_tiny_folder(tmp_path / "model", method="tic_ft", frames_per_shot=17)
    run_pairs(PairsConfig(out=tmp_path / "pairs", task="multi_image", count=2, size=64))
    storyboards = tmp_path / "pairs" / "storyboards.json"
    run_sample(SampleConfig(model=tmp_path / "model", storyboards=storyboards, out=tmp_path / "made", steps=1))
    report = run_evaluate(EvaluateConfig(videos=tmp_path / "made"))
    assert set(report.videos) == {sample_pair("multi_image", index=index).pair_id for index in range(2)}
    assert not report.failed and report.metrics["identity"] == {"value": 0.0, "count": 2}, "an untrained model"


def test_a_storyboard_that_is_no_pair_is_not_judged_as_one(tmp_path: Path) -> None:
    boards, pairs = write_pairs(tmp_path / "pairs")
    good, renamed, other, reworded, _ = boards
    renamed = replace(renamed, name="mine")
    other = replace(other, name=other.name.replace("small", "full"))
    reworded = replace(reworded, story="[CONDITION] A film.")
    write_made(tmp_path / "made", [good, renamed, other, reworded], [render_scene(p.target)[0] for p in pairs[:4]])
    report = run_evaluate(EvaluateConfig(videos=tmp_path / "made"))
    assert set(report.videos) == {good.name} and len(report.failed) == 3
    assert "'mine' is no pair of `shotloom toyworld pairs`" in report.failed["mine"]
    assert all("something else than the pair" in report.failed[board.name] for board in (other, reworded))

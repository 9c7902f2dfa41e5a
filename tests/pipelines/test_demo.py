"""The demo: its own folder only, storyboards from footage, the whole way with a tiny model, failures named."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models.scene import EncodedSpan, Scene, Shot, Source, link_shots
from models.tiny import build_tiny_folder
from pipelines.demo import MARKER, run_demo
from pipelines.demo_stages import footage_storyboards, held_out_storyboards, storyboards
from pipelines.demo_types import DemoConfig, DemoResult
from sample.video_io import read_video, write_video


def scene(name: str, lengths: list[int], told: bool = True) -> Scene:
    """A scene whose shots have `lengths` encoded frames, 0 for a shot without latents."""
    shots, start = [], 0
    for number, length in enumerate(lengths):
        end = start + max(length, 3)
        span = EncodedSpan(start, length, 8.0, list(range(start, start + length)), 32, 32) if length else None
        words = f"shot {number}" if told else ""
        shots.append(Shot("", 0, start, end, start, end, [1, 8], encoded=span, prompt=words))
        start = end
    return Scene(name, name, Source(f"{name}.mp4", "0" * 64, 9), 8.0, 32, 32, 1.0, link_shots(shots, name), story="s")


def test_footage_storyboards_take_the_scenes_with_most_shots_and_their_lengths() -> None:
    boards = footage_storyboards([scene("a", [5]), scene("b", [9, 0, 21, 5, 5]), scene("c", [5, 5])], 17)
    assert [board.name for board in boards] == ["b", "c"]
    assert [shot.frames for shot in boards[0].shots] == [9, 17, 5]  # the shot without latents is passed over
    for board in boards:
        board.validate()


def test_footage_storyboards_need_words() -> None:
    with pytest.raises(ValueError, match="caption"):
        footage_storyboards([scene("a", [5], told=False)], 17)


def test_fewer_shots_than_wanted_are_said(tmp_path: Path) -> None:
    build_tiny_folder(tmp_path / "model")
    notes: list[str] = []
    config = DemoConfig(videos=tmp_path, model=tmp_path / "model")
    assert len(storyboards(config, [scene("a", [5, 5])], notes)) == 1
    assert "one of 2 shots" in notes[0]


def test_held_out_storyboards_are_a_function_of_their_seed() -> None:
    assert held_out_storyboards(2, 1) == held_out_storyboards(2, 1) != held_out_storyboards(2, 2)
    assert all(len(board.shots) == 3 for board in held_out_storyboards(2, 1))


def test_never_empties_a_folder_that_is_not_the_demos(tmp_path: Path) -> None:
    build_tiny_folder(tmp_path / "model")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not an earlier demo's folder"):
        run_demo(DemoConfig(out=tmp_path / "mine", model=tmp_path / "model"))
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_missing_model_is_found_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARKER).touch()
    (tmp_path / "out" / "report.html").touch()
    with pytest.raises(ValueError, match=r"no-model.*make toy-models"):
        run_demo(DemoConfig(out=tmp_path / "out", model=tmp_path / "no-model"))
    assert (tmp_path / "out" / "report.html").exists()  # the last good demo is still there


def test_a_failing_stage_is_named(tmp_path: Path) -> None:
    build_tiny_folder(tmp_path / "model")
    (tmp_path / "videos").mkdir()
    with pytest.raises(ValueError, match="stage 'collect' failed.*no video in it"):
        run_demo(DemoConfig(videos=tmp_path / "videos", out=tmp_path / "out", model=tmp_path / "model"))


# ------------------------------------------------------------------------- the whole way, with real Ray


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    build_tiny_folder(folder, method="fvdm", text_length=300, height=64, width=64)  # the judge reads from 64 up
    return folder


def small(model: Path, out: Path, **more: object) -> DemoConfig:
    return DemoConfig(model=model, out=out, count=3, steps=4, batch_size=2, sample_steps=2, **more)  # type: ignore[arg-type]


def check_outputs(result: DemoResult) -> dict:
    """What every demo leaves: a summary whose paths exist, a self-contained report, a served video that plays."""
    out = result.config.out
    summary = json.loads((out / "summary.json").read_text())
    assert all(Path(summary[name]).exists() for name in ("model", "dataset", "report"))
    assert all(stage.keys() == {"seconds", "items", "set_aside"} for stage in summary["stages"].values())
    html = Path(summary["report"]).read_text(encoding="utf-8")
    assert all(load.startswith("data:") for load in re.findall(r'\b(?:src|href)="([^"]*)"', html))
    assert len(read_video(out / "served.mp4")[0]) > 0
    return summary


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_toyworld_demo_twice(model: Path, tmp_path: Path) -> None:
    for _ in range(2):  # the second clears what the first left
        result = run_demo(small(model, tmp_path / "demo"))
    summary = check_outputs(result)
    assert list(summary["stages"]) == ["render", "prepare", "train", "generate", "judge", "serve", "report"]
    assert summary["stages"]["render"]["items"] == 3 and summary["stages"]["train"]["items"] == 4
    for side in ("before", "after"):
        assert summary["judge"][side]["identity_said"]["count"] > 0
    report = result.report.read_text(encoding="utf-8")
    assert report.count("<video") == 5 and "polyline" in report  # two scenes before and after, and the served one
    from diffusers import WanPipeline

    assert WanPipeline.from_pretrained(result.model).transformer is not None


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_demo_with_own_videos_lists_broken_files(model: Path, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    rng = np.random.default_rng(0)
    for name in ("one", "two"):  # three shots of one colour each
        colours = rng.integers(0, 255, (3, 1, 1, 1, 3))
        frames = np.concatenate([np.broadcast_to(c, (12, 64, 64, 3)) for c in colours]).astype(np.uint8)
        frames = np.clip(frames + rng.integers(-9, 9, frames.shape), 0, 255).astype(np.uint8)
        write_video(frames, videos / f"{name}.mp4", 8)
    (videos / "broken.mp4").write_bytes(b"not a video")
    before = sorted(path.name for path in videos.iterdir())
    result = run_demo(small(model, tmp_path / "demo", videos=videos))
    summary = check_outputs(result)
    assert summary["judge"] is None and summary["stages"]["prepare"]["set_aside"] >= 1
    report = result.report.read_text(encoding="utf-8")
    assert "broken.mp4" in report and "ToyWorld only" in report
    assert sorted(path.name for path in videos.iterdir()) == before


@pytest.mark.slow
def test_command_line_fails_with_a_message_and_a_code(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    shutil.copy(__file__, tmp_path / "videos" / "notes.txt")
    build_tiny_folder(tmp_path / "model")
    command = [sys.executable, "-m", "pipelines.cli", "demo", f"videos={tmp_path / 'videos'}", f"out={tmp_path / 'o'}"]
    done = subprocess.run([*command, f"model={tmp_path / 'model'}"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "stage 'collect' failed" in done.stderr and "Traceback" not in done.stderr

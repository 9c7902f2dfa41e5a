"""Storyboard files to videos: what a run leaves, what a second one skips, and that Ray makes the same files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from infra.config import ConfigError, load_config
from infra.ray_session import RaySession
from models.scene import Reference
from models.tiny import build_tiny_folder
from pipelines import cli
from pipelines.sample import SampleConfig, run_sample
from pipelines.storyboards import load_storyboards
from sample.storyboard import Storyboard, StoryboardShot
from sample.video_io import read_video, write_video

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "storyboards"
BOARDS = [
    Storyboard(
        f"b{i}", f"[Story] Walk {i}.", [StoryboardShot("One goes.", frames=frames), StoryboardShot("One comes.")]
    )
    for i, frames in enumerate((5, 9, 5))
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "lct"
    build_tiny_folder(path, method="lct")
    return path


def config_for(model: Path, out: Path, **changes: Any) -> SampleConfig:
    return replace(SampleConfig(model=model, out=out, steps=2, min_side=64), **changes)


def test_a_run_leaves_videos_records_and_a_manifest(model: Path, tmp_path: Path) -> None:
    seen = []
    report = run_sample(config_for(model, tmp_path), BOARDS, on_video=lambda record: seen.append(record["name"]))
    assert (report.made, report.skipped, report.failed) == (3, 0, 0) and sorted(seen) == ["b0", "b1", "b2"]
    records = [json.loads(line) for line in report.manifest.read_text().splitlines()]
    assert records == report.records and [record["name"] for record in records] == ["b0", "b1", "b2"]
    for record, cut in zip(records, (5, 9, 5), strict=True):
        frames, fps = read_video(tmp_path / record["file"])
        assert record["cuts"] == [cut] and len(frames) == record["frames"] == cut + 5 and fps == record["fps"] == 8
        assert frames.shape[1:3] == (record["height"], record["width"]) == (64, 64)
        assert json.loads((tmp_path / f"{record['name']}.json").read_text()) == record
    assert len({record["seed"] for record in records}) == 3


def test_a_second_run_makes_only_what_is_missing_or_changed(model: Path, tmp_path: Path) -> None:
    config = config_for(model, tmp_path)
    run_sample(config, BOARDS)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.mp4")}
    assert run_sample(config, BOARDS).skipped == 3
    (tmp_path / "b0.mp4").unlink()
    changed = [*BOARDS[:2], replace(BOARDS[2], story="[Story] Another walk.")]
    made: list[str] = []
    report = run_sample(config, changed, on_video=lambda record: made.append(record["name"]))
    assert sorted(made) == ["b0", "b2"] and report.skipped == 1 and len(report.records) == 3
    assert (tmp_path / "b0.mp4").read_bytes() == before["b0.mp4"], "the same seed repeats the file"
    for again in (replace(config, guidance=2.0), replace(config, seed=1), replace(config, independent=True)):
        assert run_sample(again, changed).made == 3
    assert (tmp_path / "b0.mp4").read_bytes() != before["b0.mp4"]


def test_one_bad_storyboard_stops_no_other_and_is_tried_again(model: Path, tmp_path: Path) -> None:
    bad = replace(BOARDS[0], name="bad", shots=[StoryboardShot("x" * 600), StoryboardShot("y")])
    config = config_for(model, tmp_path, batch_size=4)
    report = run_sample(config, [BOARDS[0], bad, BOARDS[2]])
    assert (report.made, report.failed, report.exit_code) == (2, 1, 1)
    assert report.records[1]["status"] == "failed" and "shot 0" in report.records[1]["error"]
    again = run_sample(config, [BOARDS[0], bad, BOARDS[2]])
    assert (again.made, again.skipped, again.failed) == (0, 2, 1)


def test_the_command_keeps_the_good_ones_and_exits_1(model: Path, tmp_path: Path) -> None:
    bad = "{name: bad, shots: [{prompt: " + "x" * 600 + "}]}"
    (tmp_path / "some.yaml").write_text(f"storyboards: [{{name: good, shots: [{{prompt: One goes.}}]}}, {bad}]")
    arguments = [f"model={model}", f"out={tmp_path / 'out'}", f"storyboards={tmp_path / 'some.yaml'}", "steps=1"]
    for counts in ("1 made, 0 were there, 1 failed", "0 made, 1 were there, 1 failed"):
        result = CliRunner().invoke(cli.main, ["sample", *arguments])
        *_, reason, last = result.output.splitlines()
        assert result.exit_code == 1 and reason.startswith("bad failed: ") and "shot 0" in reason
        assert last.startswith(f"{counts} (reasons above and in the manifest") and last.endswith("manifest.jsonl")
        assert (tmp_path / "out" / "good.mp4").is_file() and not (tmp_path / "out" / "bad.mp4").exists()
    (tmp_path / "some.yaml").write_text("{name: good, shots: [{prompt: One goes.}]}")
    result = CliRunner().invoke(cli.main, ["sample", *arguments])
    assert result.exit_code == 0 and result.output.splitlines()[-1].startswith("0 made, 1 were there, 0 failed; ")


def test_ray_actors_make_the_same_videos(model: Path, tmp_path: Path, ray_module: RaySession) -> None:
    here = run_sample(config_for(model, tmp_path / "here"), BOARDS)
    bad = replace(BOARDS[0], name="bad", shots=[StoryboardShot("x" * 600), StoryboardShot("y")])
    there = run_sample(config_for(model, tmp_path / "there", num_workers=2, cpus_per_worker=0.5), [*BOARDS, bad])
    assert (there.made, there.failed) == (3, 1)
    assert [record["cuts"] for record in there.records[:3]] == [record["cuts"] for record in here.records]
    for board in BOARDS:
        one, other = ((tmp_path / run / f"{board.name}.mp4") for run in ("here", "there"))
        difference = read_video(one)[0].astype(float) - read_video(other)[0]
        # another process rounds otherwise; H.264 spreads a grey level of that over a block of these noisy frames
        assert abs(difference).mean() < 0.5
    assert run_sample(config_for(model, tmp_path / "there", num_workers=2), BOARDS).skipped == 3


def test_the_examples_load_and_one_is_made(model: Path, tmp_path: Path) -> None:
    boards = load_storyboards([EXAMPLES])
    assert [len(board.shots) for board in boards] == [1, 3, 3] and boards[0].name == "one_shot"
    file = EXAMPLES / "one_shot.yaml"
    config = load_config(SampleConfig, None, [f"model={model}", f"out={tmp_path}", "steps=1", f"storyboards={file}"])
    assert run_sample(config).records[0]["frames"] == 5


def test_storyboard_files_say_what_is_wrong(tmp_path: Path) -> None:
    def message(text: str, name: str = "a.yaml") -> str:
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_storyboards([tmp_path / name])
        return str(caught.value)

    assert "nearest is 'shots[0].prompt'" in message("shots: [{promt: x}]")
    assert "a.yaml" in message("shots: []") and "no shots" in message("shots: []")
    assert "nearest is 5" in message("shots: [{prompt: x, frames: 4}]")
    assert load_storyboards([tmp_path / "a.yaml"], frame_step=1)[0].shots[0].frames == 4, "of an image VAE"
    assert "given_frames.0.path: no such file" in message("shots: [{prompt: x, given_frames: [{path: a.png}]}]")
    assert "nearest is 'shots[0].given_frames[0].at'" in message("shots: [{prompt: x, given_frames: [{att: 1}]}]")
    assert "no such file" in message("shots: [{prompt: x, given: a.png}, {prompt: y}]")
    assert "taken by" in message("storyboards: [{name: x, shots: [{prompt: a}]}, {name: x, shots: [{prompt: b}]}]")
    assert "holds no storyboards" in message("storyboards: []")
    with pytest.raises(ConfigError, match="no such storyboard file"):
        load_storyboards([tmp_path / "none.yaml"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no storyboard files"):
        load_storyboards([tmp_path / "empty"])


def test_media_paths_are_relative_to_their_file(tmp_path: Path) -> None:
    import numpy as np

    write_video(np.zeros((5, 32, 32, 3), np.uint8), tmp_path / "media" / "a.mp4", 8)
    (tmp_path / "a.json").write_text(json.dumps({"shots": [{"prompt": "x", "given": "media/a.mp4"}, {"prompt": "y"}]}))
    (board,) = load_storyboards([tmp_path / "a.json"])
    assert board.name == "a" and board.shots[0].given == str(tmp_path / "media" / "a.mp4")

    pair = "shots: [{sentence: x, references: [{role: source, path: media/a.mp4}]}]"
    (tmp_path / "pair.yaml").write_text(pair)
    (board,) = load_storyboards([tmp_path / "pair.yaml"])
    assert board.shots[0].references == [Reference("source", str(tmp_path / "media" / "a.mp4"))]
    for old, new, message in (
        ("a.mp4", "b.mp4", r"shots\.0\.references\.0\.path: no such file"),
        ("role: source", "role: sauce", "role"),
    ):
        (tmp_path / "pair.yaml").write_text(pair.replace(old, new))
        with pytest.raises(ConfigError, match=message):
            load_storyboards([tmp_path / "pair.yaml"])


def test_nothing_to_do_and_clashing_names_are_errors(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no storyboards"):
        run_sample(config_for(model, tmp_path))
    with pytest.raises(ValueError, match="must differ"):
        run_sample(config_for(model, tmp_path), [BOARDS[0], BOARDS[0]])
    with pytest.raises(FileNotFoundError, match="not a model folder"):
        run_sample(config_for(tmp_path / "nowhere", tmp_path), BOARDS)


def test_task_and_history_come_from_the_storyboard_or_the_run(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "walk.yaml"
    text = "task: {}\nhistory: 2\nshots: [{{prompt: One goes.}}, {{prompt: One comes., history: [0]}}]\n"
    file.write_text(text.format("autoregressive"))
    (board,) = load_storyboards([file])
    assert (board.task, board.history, board.shots[1].history) == ("autoregressive", 2, [0])
    file.write_text(text.format("autoregresive"))
    with pytest.raises(ConfigError, match=r"(?s)walk\.yaml.*task.*autoregressive"):
        load_storyboards([file])
    file.write_text("history: 9\nshots: [{prompt: One goes.}]\n")
    with pytest.raises(ConfigError, match=r"walk\.yaml: .*history=9; a shot sees 1 to 8"):
        load_storyboards([file])

    out = tmp_path / "out"
    with pytest.raises(ValueError, match="task=autoregressive: .*group_causal, this one's is full"):
        run_sample(config_for(model, out, task="autoregressive"), BOARDS)
    assert not list(out.glob("*.json")), "refused before anything is made"
    report = run_sample(config_for(model, out), [replace(BOARDS[0], task="extension")])
    assert report.failed == 1 and "this one's is full" in report.records[0]["error"]
    for changes, word in (
        ({"history": 0}, "history=0; a shot sees 1 to 8"),
        ({"task": "extension", "independent": True}, "task=extension with independent=true"),
    ):
        with pytest.raises(ValueError, match=word):
            config_for(model, out, **changes)

    causal = tmp_path / "causal"
    build_tiny_folder(causal, method="lct", method_params={"attention_rule": "group_causal"})
    boards = [replace(BOARDS[0], name="cut"), replace(BOARDS[0], name="on", task="extension")]
    config = config_for(causal, out, task="autoregressive", history=1)
    report = run_sample(config, boards)
    assert (report.made, report.failed) == (2, 0) and [record["cuts"] for record in report.records] == [[5], []]
    assert run_sample(config, boards).skipped == 2
    assert run_sample(replace(config, history=2), boards).made == 2, "another history is another video"

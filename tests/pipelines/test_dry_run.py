"""`dry_run=true`: the plan, what the probe sets aside, an estimate from videos really processed; nothing is written."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

import pipelines.dry_run as module
from pipelines.captioner import CaptionerConfig
from pipelines.dry_run import DryRun, dry_run
from pipelines.prepare import PrepareConfig, make_settings, run_prepare
from preprocess.settings import PrepareSettings
from tests.preprocess.runs import run_here
from tests.preprocess.videos import three_shots, write, write_unusable


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for k in range(3):
        write(folder / f"good{k}.mp4", three_shots(17))
    write_unusable(folder)
    return folder


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_plan_names_what_is_set_aside_and_estimates_the_rest(
    videos: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAMPLE", 2)
    before = everything(videos)
    found = run_prepare(PrepareConfig(sources=[str(videos)], output=tmp_path / "out", model=model, dry_run=True))
    assert isinstance(found, DryRun)
    assert not (tmp_path / "out").exists() and everything(videos) == before
    assert (found.sources, found.unchanged, found.probed, found.frames) == (6, 0, 6, 3 * 51)
    assert found.video_seconds == pytest.approx(3 * 51 / 8, abs=0.1)
    ends = {words.split(" ")[0]: status for status, words in found.set_aside}
    assert ends == {"empty.mp4": "failed", "text.mp4": "failed", "short.mp4": "filtered"}
    # the sample went through all stages, and what it took is scaled by its frames
    assert len(found.sampled) == 2 and found.sample_frames == 2 * 51
    assert found.sample_shots == 6 and found.sample_encoded_shots == 6
    assert set(found.sample_seconds) == {"probe", "decode", "captions", "encode"}
    assert found.work["decode"] == pytest.approx(found.sample_seconds["decode"] * 1.5) and found.seconds > 0
    assert found.dataset_bytes == pytest.approx(1.5 * found.sample_bytes) and found.sample_bytes > 10_000
    # a video's frames wait as raw pixels for the encoder
    assert found.scratch_bytes == 51 * found.settings.height * found.settings.width * 3
    assert found.waiting_bytes == 3 * found.scratch_bytes  # all three; there is room for them
    assert found.disk_bytes == 2 * found.dataset_bytes + found.waiting_bytes
    assert found.memory["encoding"] >= found.memory["decoding"] > 2**20
    text = found.summary()
    for words in ("nothing is written", "empty.mp4 (probe): the file is empty", "max_blur=0.72", "time: about", "GB"):
        assert words in text


def test_more_videos_than_are_probed_are_scaled_to(
    videos: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROBED", 1)
    sources = [str(videos / f"good{k}.mp4") for k in range(3)]
    monkeypatch.setattr(module, "SECONDS", 2.0)
    found = dry_run(PrepareConfig(sources=sources, output=tmp_path / "out", model=model, max_seconds_per_video=3))
    assert (found.sources, found.probed, found.sampled) == (3, 1, ["good1.mp4"])
    assert found.frames == 3 * 24 and found.sample_frames == 16  # of 3 seconds each; 2 of them are processed
    assert "probed 1 of 3" in found.summary() and "about 9.0 s of video" in found.summary()


def test_a_sample_that_fails_says_why(videos: Path, model: Path, tmp_path: Path) -> None:
    sources = [str(videos / f"good{k}.mp4") for k in range(2)]
    found = dry_run(PrepareConfig(sources=sources, output=tmp_path / "out", model=model, captions="sidecar"))
    assert len(found.ended) == 2 and found.sample_frames == 0
    assert "so nothing is estimated:\n  failed good0.mp4 (captions): " in found.summary()


def test_models_are_not_asked_and_what_is_missing_is_said(videos: Path, model: Path, tmp_path: Path) -> None:
    config = PrepareConfig(
        sources=[str(videos / "empty.mp4"), str(videos / "good0.mp4")], output=tmp_path / "out", model=model,
        captions="endpoint", captioner=CaptionerConfig(url="http://127.0.0.1:9/v1", model="none"),
    )  # fmt: skip
    found = dry_run(config)
    assert found.sampled == ["good0.mp4"] and "not in the estimate: captions=endpoint (none" in found.summary()
    only_bad = dry_run(dataclasses.replace(config, sources=[str(videos / "empty.mp4")]))
    assert only_bad.frames == 0 and "nothing to estimate" in only_bad.summary()


def test_scenes_that_are_kept_are_written_again_into_the_new_shards(videos: Path, model: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    for k in range(2):
        shutil.copy2(videos / f"good{k}.mp4", folder)
    config = PrepareConfig(sources=[str(folder)], output=output, model=model)
    run_here(folder, output, model, make_settings(config))
    nothing = dry_run(config)
    assert (nothing.unchanged, nothing.kept_bytes, nothing.disk_bytes) == (2, 0, 0)
    shutil.copy2(videos / "good2.mp4", folder)
    found = dry_run(config)
    assert (found.unchanged, found.sampled) == (2, ["good2.mp4"])
    shards = sum(path.stat().st_size for path in (output / "shards").glob("*.tar"))
    assert 0.5 * shards < found.kept_bytes <= shards  # a tar ends in zeros
    assert found.dataset_bytes == found.kept_bytes + found.sample_bytes
    assert found.disk_bytes == found.kept_bytes + 2 * found.sample_bytes + found.waiting_bytes
    assert "of it unchanged, and written again" in found.summary()


def test_frames_that_wait_are_bounded_by_their_room() -> None:
    found = DryRun(Path("out"), PrepareSettings(), decoding=3, encoders=2, cores=4, frames=1000, sample_frames=10)
    found.scratch_bytes, found.scratch_sum, found.scratch_room = 7.0, 8.0, 100.0
    assert found.waiting_bytes == 100 + 3 * 7
    found.scratch_room = 10**9
    assert found.waiting_bytes == 800


def test_the_clock_follows_the_workers() -> None:
    found = DryRun(Path("out"), PrepareSettings(), decoding=3, encoders=2, cores=4, frames=1000, sample_frames=10)
    found.sample_seconds = {"probe": 0.1, "decode": 0.8, "captions": 0.0, "encode": 0.1}
    assert found.limits == pytest.approx({"decoding": 90 / 3, "encoding": 10 / 2, "all cores": 100 / 4})
    assert found.seconds == pytest.approx(30)
    found.sample_seconds["encode"] = 1.0
    assert max(found.limits, key=lambda name: found.limits[name]) == "encoding"


def test_two_questions_at_once_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dry_run and what_if"):
        PrepareConfig(sources=["x"], output=tmp_path, model=model, dry_run=True, what_if=True)

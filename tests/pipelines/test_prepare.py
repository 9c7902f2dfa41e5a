"""`shotloom prepare` on a real Ray session: the whole chain, second runs, changed input, workers that die."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from safetensors.torch import load

import pipelines.stage_policy
import preprocess.rows
from infra.ray_session import RaySession
from models.scene import Scene
from pipelines.prepare import PrepareConfig, make_settings, prepare
from pipelines.states import StatesConfig
from preprocess.filters import NO_FILTERS
from preprocess.report import PrepareReport
from preprocess.run import lock
from preprocess.watch import MAX_ATTEMPTS, Attempts
from preprocess.workplace import Workplace
from tests.preprocess.videos import moving_square, three_shots, write, write_unusable
from toyworld.video import write_video
from toyworld.world import sample_scene

SCENES = [sample_scene("small", seed=21, index=i, num_shots=2) for i in range(3)]


@pytest.fixture(scope="module", autouse=True)
def session(ray_module: RaySession) -> Iterator[RaySession]:
    yield ray_module


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three ToyWorld videos, an empty file, a text, and a clip that is too short."""
    folder = tmp_path_factory.mktemp("videos")
    for i, scene in enumerate(SCENES):
        write_video(scene, folder / f"toy{i}.mp4", size=64)
    write_unusable(folder)
    return folder


@pytest.fixture(scope="module")
def first(videos: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PrepareConfig, PrepareReport]:
    config = PrepareConfig(sources=[str(videos)], output=tmp_path_factory.mktemp("out") / "dataset", model=model)
    return config, prepare(config)


def shard_bytes(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((output / "shards").glob("*.tar"))}


def table(output: Path, name: str) -> list[dict]:
    return pq.read_table(output / f"{name}.parquet").to_pylist()


def test_every_source_ends_and_the_totals_reconcile(first: tuple[PrepareConfig, PrepareReport]) -> None:
    config, report = first
    assert (report.sources, report.written, report.filtered, report.failed) == (6, 3, 1, 2)
    ends = {row["name"]: (row["status"], row["stage"]) for row in table(config.output, "sources")}
    assert ends == {
        "empty.mp4": ("failed", "probe"),
        "short.mp4": ("filtered", "filters"),
        "text.mp4": ("failed", "probe"),
        **{f"toy{i}.mp4": ("written", "") for i in range(3)},
    }
    totals = json.loads((config.output / "dataset.json").read_text())["totals"]
    assert totals["scenes"] == report.scenes == 3
    assert totals["shots"] == len(table(config.output, "manifest")) == sum(len(s.shots) for s in SCENES)
    assert 1.0 <= report.decodes_per_frame <= 1.15
    assert report.stages["decode"].items == 3 and report.stages["probe"].set_aside == 2
    assert "empty.mp4" in report.summary() and "0 bytes" in report.summary()
    left = {path.name for path in config.output.iterdir()}
    assert left == {
        "shards",
        "index.parquet",
        "manifest.parquet",
        "sources.parquet",
        "dataset.json",
        "report.json",
        ".lock",
    }


def test_shards_open_with_plain_webdataset(first: tuple[PrepareConfig, PrepareReport]) -> None:
    config, _ = first
    urls = [str(path) for path in sorted((config.output / "shards").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    records = [Scene.from_json(sample["json"]) for sample in samples]
    assert [record.source.path for record in records] == ["toy0.mp4", "toy1.mp4", "toy2.mp4"]
    for truth, record, sample in zip(SCENES, records, samples, strict=True):
        assert [shot.start_frame for shot in record.shots] == [0, *truth.cuts]
        assert record.captions is not None and record.captions.backend == "sidecar"
        tensors = load(sample["safetensors"])
        assert tensors["s001.latent_mean"].shape == (4, 5, 4, 4)
    rows = table(config.output, "manifest")
    assert {row["key"] for row in rows} == {sample["__key__"] for sample in samples}
    assert {row["shard"] for row in rows} == {Path(url).name for url in urls}


def test_training_reads_the_dataset(first: tuple[PrepareConfig, PrepareReport]) -> None:
    from train.shards import encoded_runs, read_shard

    config, _ = first
    records = [r for path in sorted((config.output / "shards").glob("*.tar")) for r in read_shard(path)]
    assert [len(run) for record in records for run in encoded_runs(record, 2)] == [2, 2, 2]


def test_a_second_run_does_nothing(first: tuple[PrepareConfig, PrepareReport]) -> None:
    config, report = first
    before = {
        path: path.stat().st_mtime_ns for path in config.output.rglob("*") if path.is_file() and path.suffix != ".json"
    }
    began = time.monotonic()
    again = prepare(config)
    assert time.monotonic() - began < 20
    assert again.reused == 6 and again.stages == {} and "6 unchanged" in again.summary()
    assert (again.written, again.filtered, again.failed, again.scenes) == (3, 1, 2, report.scenes)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_another_run_elsewhere_gives_the_same_bytes(first: tuple[PrepareConfig, PrepareReport], tmp_path: Path) -> None:
    config, _ = first
    folder = tmp_path / "moved"
    shutil.copytree(config.sources[0], folder)
    other = PrepareConfig(sources=[str(folder)], output=tmp_path / "other", model=config.model, decode_cpus=0.3)
    prepare(other)
    assert shard_bytes(other.output) == shard_bytes(config.output)
    assert table(other.output, "manifest") == table(config.output, "manifest")


def test_other_shard_size_moves_samples_without_work(
    first: tuple[PrepareConfig, PrepareReport], tmp_path: Path
) -> None:
    config, _ = first
    output = tmp_path / "out"
    shutil.copytree(config.output, output)
    small = PrepareConfig(sources=config.sources, output=output, model=config.model, shard_mb=1e-6)
    report = prepare(small)
    assert report.reused == 6 and report.shards == 3 and set(report.stages) == {"shards"}


def test_parts_of_a_killed_run_are_used(
    first: tuple[PrepareConfig, PrepareReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that dies before its commit leaves parts; the next one takes them and gives the same dataset."""
    config, _ = first
    killed = PrepareConfig(sources=config.sources, output=tmp_path / "out", model=config.model)
    with monkeypatch.context() as patch:
        patch.setattr("preprocess.run.dataset.build", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(killed)
    assert len(list((killed.output / "parts").glob("*.tar"))) == 6
    report = prepare(killed)
    assert report.reused == 6 and set(report.stages) == {"shards"}
    assert shard_bytes(killed.output) == shard_bytes(config.output)


@pytest.mark.timeout(600)
def test_a_file_that_kills_or_hangs_its_worker_is_set_aside(
    first: tuple[PrepareConfig, PrepareReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = first
    real = preprocess.rows.decode_row

    def decode(row: dict[str, str], place: Workplace, **options: object) -> dict[str, str]:
        with Attempts(place.parts / "attempts").attempt(row["video_id"], "decode", 3.0):
            if row["video_id"].startswith("toy1"):
                os.kill(os.getpid(), signal.SIGKILL)
            if row["video_id"].startswith("toy2"):
                time.sleep(600)
        return real(row, place, **options)

    monkeypatch.setattr(preprocess.rows, "decode_row", decode)
    config = PrepareConfig(sources=config.sources, output=tmp_path / "out", model=config.model)
    report = prepare(config)
    ends = {row["name"]: row for row in table(config.output, "sources")}
    assert ends["toy0.mp4"]["status"] == "written"  # everything else is written
    assert (report.written, report.filtered, report.failed) == (1, 1, 4)
    for name, cause in (("toy1.mp4", "its worker process died"), ("toy2.mp4", "it hung")):
        assert ends[name]["status"] == "failed" and ends[name]["stage"] == "decode"
        assert ends[name]["attempts"] == MAX_ATTEMPTS and cause in ends[name]["reason"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("name", "stage"), [("EncodeRow", "encode"), ("CaptionRow", "captions")])
def test_a_row_that_kills_its_actor_each_time_is_set_aside(
    name: str, stage: str, videos: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default Ray starts the actor and gives it the row for ever."""
    real: type = getattr(preprocess.rows, name)

    class Killed(real):
        def __call__(self, row: dict[str, str]) -> dict[str, str]:
            if row["video_id"].startswith("toy1"):
                with Attempts(self.place.parts / "attempts").attempt(row["video_id"], stage, 600.0):
                    os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(row)

    Killed.__name__ = name
    monkeypatch.setattr(preprocess.rows, name, Killed)
    asked = {"states": StatesConfig(backend="toyworld")} if name == "CaptionRow" else {}
    report = prepare(PrepareConfig(sources=[str(videos)], output=tmp_path / "out", model=model, **asked))
    ends = {row["name"]: row for row in table(tmp_path / "out", "sources")}
    assert (report.written, report.filtered, report.failed) == (2, 1, 3)  # everything else is written
    assert (ends["toy1.mp4"]["status"], ends["toy1.mp4"]["stage"]) == ("failed", stage)
    assert ends["toy1.mp4"]["attempts"] == MAX_ATTEMPTS and "its worker process died" in ends["toy1.mp4"]["reason"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("bounded", [True, False])
def test_decode_waits_for_the_encoder_where_scratch_is_full(
    bounded: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for less than a video one waits, and at most one is being decoded; without the bound, most of them."""
    for k in range(8):
        write(tmp_path / "videos" / f"{k}.mp4", three_shots(17))
    real = preprocess.rows.EncodeRow
    waiting = tmp_path / "waiting"

    class EncodeRow(real):
        def __call__(self, row: dict[str, str]) -> dict[str, str]:
            time.sleep(3)  # decoding a video takes less
            with waiting.open("a") as file:
                file.write(f"{len(list(self.place.scratch.glob('*.frames')))}\n")
            return super().__call__(row)

    monkeypatch.setattr(preprocess.rows, "EncodeRow", EncodeRow)
    room = 1e-5 if bounded else None
    config = PrepareConfig(
        sources=[str(tmp_path / "videos")], output=tmp_path / "out", model=model, scratch_gb=room, filters=NO_FILTERS,
        decode_cpus=0.5,
    )  # fmt: skip
    report = prepare(config)
    assert report.written == 8
    counts = [int(line) for line in waiting.read_text().split()]
    assert len(counts) == 8
    # of the video being encoded, of the one before (the driver drops them), and of decodes begun before it was full
    assert max(counts) <= 4 if bounded else max(counts) >= 6


def test_the_stages_are_shown_while_they_run(
    videos: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int, int]] = []
    real = pipelines.stage_policy.stage_states

    def states(*args: object) -> list[pipelines.stage_policy.StageState]:
        found = real(*args)
        seen.extend((one.name, one.done, one.total) for one in found)
        return found

    monkeypatch.setattr(pipelines.stage_policy, "stage_states", states)
    monkeypatch.setattr(pipelines.stage_policy, "_INTERVAL", 0.0)  # the run is a short one
    report = prepare(PrepareConfig(sources=[str(videos)], output=tmp_path / "out", model=model))
    assert {name for name, _, _ in seen} == {"probe, decode, captions", "encode"}  # Ray runs the first three as one
    assert max(done for name, done, _ in seen if name != "encode") >= 1
    assert max(total for name, _, total in seen if name != "encode") == 6
    assert [pool.stages for pool in report.pools] == [["probe", "decode", "captions"], ["encode"]]
    assert len(report.speeds()) == 2 and "slowest: " in report.summary()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_long_video_in_units_gives_the_bytes_of_one(model: Path, tmp_path: Path) -> None:
    """Two units, decoded as tasks of their own and encoded by two actors."""
    looks = np.random.default_rng(3).integers(30, 225, (4, 2, 3)).tolist()
    images = []
    for shot in range(70):
        ground, square = looks[shot % 4]
        images += moving_square(60, tuple(ground), tuple(square), size=48, step=0.2, y=0.1 * (shot % 7))
    (tmp_path / "videos").mkdir()
    write(tmp_path / "videos" / "film.mp4", images, fps=8)
    write(tmp_path / "videos" / "short.mp4", three_shots(17))
    found = {}
    for minutes in (1.0, 1000.0):
        output = tmp_path / f"{minutes}"
        config = PrepareConfig(
            sources=[str(tmp_path / "videos")], output=output, model=model, unit_minutes=minutes, encoders=2,
            encoder_cpus=0.3, decode_cpus=0.3, filters=NO_FILTERS,
        )  # fmt: skip
        report = prepare(config)
        assert report.written == 2 and report.stages["decode"].items == report.stages["encode"].items == 2
        facts = json.loads((output / "dataset.json").read_text())
        found[minutes] = shard_bytes(output), table(output, "manifest"), facts
        assert (1.03 if minutes == 1 else 1.0) < report.decodes_per_frame <= 1.15
    assert found[1.0] == found[1000.0]


def test_two_runs_on_one_output_are_refused(tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(ValueError, match="another `shotloom prepare` is writing there"), lock(tmp_path):
        pass


def test_sizes_come_from_the_model_unless_given(model: Path, tmp_path: Path) -> None:
    base = {"sources": ["x"], "output": tmp_path, "model": model}
    assert make_settings(PrepareConfig(**base)).height == 32
    assert make_settings(PrepareConfig(**base, height=64, shot_frames=9)).shot_frames == 9
    with pytest.raises(ValueError, match="sources is empty"):
        PrepareConfig(**base | {"sources": []})
    with pytest.raises(FileNotFoundError, match="is not a model folder"):
        make_settings(PrepareConfig(**base | {"model": tmp_path}))

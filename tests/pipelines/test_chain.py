"""The chain of prepare guards against the traps of Ray Data. Its plan is looked at; no session is started.

What each guard is for was reproduced with Ray 2.60: see the numbers in the tests' words.
"""

from __future__ import annotations

import ast
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray.data
from ray.data import ActorPoolStrategy, DataContext

from pipelines.captioner import CaptionerConfig
from pipelines.prepare import PrepareConfig, run_stages, worker_pools
from pipelines.stage_policy import StagePolicy
from pipelines.states import StatesConfig
from preprocess.decode import DecodeCount, _decord
from preprocess.probe import open_video, probe
from preprocess.rows import CaptionRow, EncodeRow, caption_row, decode_row, probe_row, spread_row
from preprocess.run import write_manifest
from preprocess.scratch import ScratchRoom
from preprocess.settings import PrepareSettings
from preprocess.sources import list_sources
from preprocess.unit import Unit
from preprocess.watch import MAX_ATTEMPTS
from preprocess.workplace import Workplace
from tests.preprocess.videos import three_shots, write

SWITCHES = {
    "execution_no_progress_timeout_s": -1,  # 7: after 30 minutes without a row, Ray would fail the whole job
    "max_errored_blocks": -1,  # 5: else a video that kills its worker ends the run
    "target_max_block_size": 1,  # 5: a block is dropped whole, so it holds one row
    "checkpoint_config": None,  # 1 to 3: it loses and doubles rows, and says nothing
}


class Plan:
    """Takes the calls that build a dataset, and says at the end which switches were set."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.switches: dict[str, Any] = {}
        self.policies: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        if name not in ("repartition", "map", "flat_map"):
            raise AssertionError(f"the chain calls Dataset.{name}")

        def call(*args: Any, **kwargs: Any) -> Plan:
            self.calls.append((name, args, kwargs))
            return self

        return call

    def iter_rows(self) -> Iterator[dict[str, str]]:  # 15: take_all would hold all rows in the driver
        context = DataContext.get_current()
        self.switches = {name: getattr(context, name) for name in SWITCHES}
        self.policies = context.get_config("backpressure_policies.enabled", [])
        yield {}

    @property
    def stages(self) -> dict[Any, dict[str, Any]]:
        """The arguments of each map, by its function."""
        return {args[0]: kwargs for name, args, kwargs in self.calls if name in ("map", "flat_map")}


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(PrepareSettings(height=32, width=32), tmp_path / "parts", tmp_path / "parts" / "scratch" / "x", "")


def planned(monkeypatch: pytest.MonkeyPatch, place: Workplace, **options: Any) -> Plan:
    plan = Plan()

    def read_parquet(path: str, override_num_blocks: int) -> Plan:  # 2: from_items is another way in, for other code
        assert path == str(manifest) and override_num_blocks == 1
        return plan

    monkeypatch.setattr(ray.data, "read_parquet", read_parquet)
    manifest = write_manifest(place.parts / "todo.parquet", [])
    config = PrepareConfig(sources=["x"], output=place.parts.parent, model=place.parts / "model", **options)
    before = {name: getattr(DataContext.get_current(), name) for name in SWITCHES}
    room = ScratchRoom((place.scratch,), 100)
    assert list(run_stages(config, place, manifest, room, lambda stages: None)) == [{}]
    assert {name: getattr(DataContext.get_current(), name) for name in SWITCHES} == before
    assert DataContext.get_current().get_config("backpressure_policies.enabled") is None
    return plan


ASKED = {"captions": "endpoint", "captioner": CaptionerConfig(url="http://localhost:9/v1", model="m")}
OPTIONS: list[dict[str, Any]] = [{}, ASKED, {"states": StatesConfig(backend="toyworld")}]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_switches_are_set_for_the_run_and_put_back(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, place: Workplace
) -> None:
    plan = planned(monkeypatch, place, **options)
    assert plan.switches == SWITCHES
    assert plan.calls[0] == ("repartition", (), {"target_num_rows_per_block": 1})  # 5: a row is a block from the start
    assert plan.policies[-1].func is StagePolicy and plan.policies[-1].keywords["decode"] == "decode_row"


@pytest.mark.parametrize("options", OPTIONS)
def test_each_stage_is_bounded_in_attempts_and_says_what_it_takes(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, place: Workplace
) -> None:
    stages = planned(monkeypatch, place, **options).stages
    words = [CaptionRow] if options else [caption_row]
    assert set(stages) == {probe_row, decode_row, spread_row, EncodeRow, *words}
    for function, arguments in stages.items():
        actor = function in (CaptionRow, EncodeRow)
        # 4: a row that kills its worker is tried again for ever by default
        assert arguments["max_task_retries" if actor else "max_retries"] == MAX_ATTEMPTS - 1
        assert 0 < arguments["num_cpus"] < 1
        # 14: `concurrency` and `ray_remote_args` are deprecated
        assert not {"concurrency", "ray_remote_args", "ray_remote_args_fn"} & set(arguments)
        assert isinstance(arguments.get("compute"), ActorPoolStrategy) == actor


@pytest.mark.parametrize("options", OPTIONS)
def test_actors_are_told_where_things_lie_and_not_given_them(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, place: Workplace
) -> None:
    """13: an actor whose arguments lie in the object store cannot be started again safely."""
    for function, arguments in planned(monkeypatch, place, **options).stages.items():
        given = {name: arguments.get(name) for name in ("fn_args", "fn_kwargs", "fn_constructor_kwargs")}
        assert len(pickle.dumps(given)) < 8000, function
    assert isinstance(arguments["fn_constructor_kwargs"]["model"], str)


def test_no_frame_travels_in_a_row(place: Workplace, tmp_path: Path) -> None:
    """10: each column goes through every operator."""
    write(tmp_path / "videos" / "a.mp4", three_shots(17))
    (file,) = list_sources([tmp_path / "videos"]).files
    row = {"video_id": file.video_id, "unit": Unit(file).to_json()}
    rows = [row := probe_row(row, place), row := decode_row(row, place), caption_row(row, place)]
    frames = place.scratch_file(Unit(file)).stat().st_size
    assert frames == 51 * 32 * 32 * 3
    for row in rows:
        assert set(row) == {"video_id", "unit"} and all(isinstance(value, str) for value in row.values())
        assert len(row["unit"]) < frames / 8 and not json.loads(row["unit"])["status"]


def test_a_decoder_takes_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """11: more would take the CPUs that are counted for others."""
    import decord

    path = write(tmp_path / "a.mp4", three_shots(17))
    with open_video(str(path)) as (_, stream):
        assert stream.codec_context.thread_count == 1
    asked: list[int] = []
    reader = decord.VideoReader

    def spied(*args: Any, **options: Any) -> Any:
        asked.append(options["num_threads"])
        return reader(*args, **options)

    monkeypatch.setattr(decord, "VideoReader", spied)
    frames = _decord(str(path), probe(str(path)), (32, 32), DecodeCount(), 0)
    assert frames is not None and len(list(frames)) == 51 and asked == [1]


def test_pools_follow_the_session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})
    base = {"sources": ["x"], "output": tmp_path, "model": tmp_path, "encoders": 2}
    decode, encode = worker_pools(PrepareConfig(**base))
    assert (decode.stages, decode.at_once) == (["probe", "decode", "captions"], 9) and "decode_cpus" in decode.knob
    assert (encode.stages, encode.at_once) == (["encode"], 2) and "encoders" in encode.knob
    decode, captions, encode = worker_pools(PrepareConfig(**base, **ASKED))
    assert decode.stages == ["probe", "decode"] and captions.at_once == 16 and "side_by_side" in captions.knob


def test_calls_that_lose_rows_are_nowhere(repo_root: Path) -> None:
    traps = {
        "from_items", "take_all", "read_videos", "write_webdataset", "HttpRequestProcessor", "CheckpointConfig",
        "checkpoint_config", "materialize",
    }  # fmt: skip
    found = []
    for path in [repo_root / "pipelines" / "prepare.py", *sorted((repo_root / "preprocess").glob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = {getattr(node, "attr", None), getattr(node, "id", None), getattr(node, "name", None)}
            found += [f"{path.name}: {name}" for name in names & traps]
            if isinstance(node, ast.keyword) and node.arg == "concurrency":
                found.append(f"{path.name}: concurrency=")
    assert found == []


def test_an_address_as_output_is_refused(tmp_path: Path) -> None:
    """A Path of it would be the folder `s3:` here."""
    base = {"sources": ["x"], "model": tmp_path}
    for address in ("s3://bucket/x", "gs://bucket", "http://host/x", "file:///tmp/x"):
        with pytest.raises(ValueError, match="is an address, and datasets are written to folders") as told:
            PrepareConfig(**base, output=Path(address))
        assert f"output={address.partition('://')[0]}://" in str(told.value)
    for folder in ("a/b", "/a:b", "C:/data", "a.b/c"):
        PrepareConfig(**base, output=Path(folder))
    with pytest.raises(ValueError, match="scratch_gb=0 must be positive"):
        PrepareConfig(**base, output=tmp_path, scratch_gb=0)

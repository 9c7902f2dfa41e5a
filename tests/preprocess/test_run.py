"""A run over an output folder, without Ray: what still holds, what is done again, what other captions cost."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from models.tiny import build_tiny_folder
from preprocess import unit
from preprocess.dataset import known_hashes
from preprocess.encode import Encoder
from preprocess.rows import EncodeRow, caption_row, decode_row, probe_row
from preprocess.run import plan_work
from preprocess.sources import list_sources
from preprocess.watch import MAX_ATTEMPTS
from tests.preprocess.runs import SETTINGS, SHARD_BYTES, Predictor, count_calls, records, run_here
from tests.preprocess.videos import three_shots, write


@pytest.fixture
def videos(videos: Path) -> Path:
    """Two toy videos, and a file that is none."""
    (videos / "empty.mp4").touch()
    return videos


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    return count_calls(monkeypatch, (unit, "read_shots"), (Encoder, "encode_shots"), (Encoder, "encode_texts"))


def test_a_run_and_its_repetition(videos: Path, tmp_path: Path, model: Path, calls: Counter[str]) -> None:
    assert run_here(videos, tmp_path / "out", model)[1] == 3
    assert calls["read_shots"] == 2
    shards = (tmp_path / "out" / "shards" / "scenes-000000.tar").read_bytes()
    calls.clear()
    assert run_here(videos, tmp_path / "out", model)[1] == 0
    assert not calls and (tmp_path / "out" / "shards" / "scenes-000000.tar").read_bytes() == shards


def test_other_captions_cost_no_decode(videos: Path, tmp_path: Path, model: Path, calls: Counter[str]) -> None:
    run_here(videos, tmp_path / "out", model)
    before = records(tmp_path / "out")
    sidecar = json.loads((videos / "toy1.json").read_text())
    sidecar["shots"][0]["prompt"] = "[SHOT CUT] Close shot. Something else."
    sidecar["label"] = 2
    (videos / "toy1.json").write_text(json.dumps(sidecar))
    calls.clear()
    assert run_here(videos, tmp_path / "out", model)[1] == 1
    assert calls == {"encode_texts": 1}
    after = records(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, (scene, tensors) in after.items():
        old_scene, old_tensors = before[key]
        changed = scene.source.path == "toy1.mp4"
        assert (scene.shots[0].prompt != old_scene.shots[0].prompt) == changed
        assert {shot.label for shot in scene.shots} == {2 if changed else None}
        assert tensors.keys() == old_tensors.keys()
        assert (tensors["s000.text"].shape != old_tensors["s000.text"].shape) == changed
        for name in tensors:
            if "latent" in name or "first" in name or "last" in name:
                assert (tensors[name] == old_tensors[name]).all()
        assert scene.shots[1].states == old_scene.shots[1].states  # state frames find the same encoded frames

    told = pq.read_table(tmp_path / "out" / "manifest.parquet", columns=["source", "label"]).to_pylist()
    assert all(row["label"] == (2 if row["source"] == "toy1.mp4" else None) for row in told)

    calls.clear()  # the same result as a run from nothing
    run_here(videos, tmp_path / "fresh", model)
    name = "shards/scenes-000000.tar"
    assert (tmp_path / "fresh" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_captions_that_come_or_go_group_the_shots_anew(tmp_path: Path, model: Path, calls: Counter[str]) -> None:
    """A caption file keeps shots together that pictures would part; the bytes are those of a run from nothing."""
    video = write(tmp_path / "videos" / "a.mp4", three_shots(17))

    def shards(name: str) -> list[bytes]:
        calls.clear()
        run_here(video.parent, tmp_path / name, model)
        return [path.read_bytes() for path in sorted((tmp_path / name / "shards").glob("*.tar"))]

    apart = shards("out")
    assert len(records(tmp_path / "out")) > 1
    video.with_suffix(".json").write_text('{"story": "All in one.", "shots": []}')
    together = shards("out")
    assert len(records(tmp_path / "out")) == 1 and calls["read_shots"] == 1, "other batches give other last bits"
    assert shards("fresh") == together
    video.with_suffix(".json").unlink()
    assert shards("out") == apart


def test_another_caption_backend_keeps_the_pictures(
    videos: Path, tmp_path: Path, model: Path, calls: Counter[str]
) -> None:
    run_here(videos, tmp_path / "out", model)
    calls.clear()
    assert run_here(videos, tmp_path / "out", model, replace(SETTINGS, captions="describe"))[1] == 2
    assert calls == {"encode_texts": 2}
    scenes = [scene for scene, _ in records(tmp_path / "out").values()]
    assert {scene.captions.backend for scene in scenes if scene.captions} == {"describe"}
    assert not any(shot.states or "caption_overlap" in shot.scores for scene in scenes for shot in scene.shots)


def test_states_of_another_predictor_are_asked_for_anew(
    videos: Path, tmp_path: Path, model: Path, calls: Counter[str]
) -> None:
    """Also where the one before failed, or there was none; and only for scenes that are written."""
    settings = replace(SETTINGS, max_shots=1, min_shot_frames=9)
    for number, predictor in enumerate([None, Predictor(2, "refused"), Predictor(2), Predictor(3), None]):
        key = predictor.key if predictor else ""
        calls.clear()
        work, todo = run_here(videos, tmp_path / "out", model, replace(settings, states_key=key), states=predictor)
        assert todo == (2 if number else 3)
        ends = [(one.part.source["status"], one.part.source["stage"]) for one in work.finished.values()]
        assert sorted(ends)[-1] == (("failed", "states") if predictor and predictor.error else ("written", ""))
        found = records(tmp_path / "out").values()
        assert calls["read_shots"] == (2 if key or number == 0 else 0), "a predictor looks at frames"
        for scene, tensors in found:
            shots = [shot for shot in scene.shots if shot.encoded]
            assert [len(shot.predicted_states) for shot in shots] == [predictor.count if predictor else 0] * len(shots)
            said = [tensors[name].shape[0] for name in sorted(tensors) if name.endswith("states_text")]
            assert said == [predictor.count if predictor else 0] * (len(shots) if predictor else 0)
        if predictor and not predictor.error:
            assert predictor.calls == sum(shot.encoded is not None for scene, _ in found for shot in scene.shots)
        repeated = run_here(videos, tmp_path / "out", model, replace(settings, states_key=key), states=predictor)
        assert repeated[1] == 0


def test_another_size_does_all_again_but_not_what_never_got_there(
    videos: Path, tmp_path: Path, model: Path, calls: Counter[str]
) -> None:
    run_here(videos, tmp_path / "out", model)
    calls.clear()
    assert run_here(videos, tmp_path / "out", model, replace(SETTINGS, height=48))[1] == 3
    assert calls["read_shots"] == 2
    scenes = [scene for scene, _ in records(tmp_path / "out").values()]
    assert {shot.encoded.height for scene in scenes for shot in scene.shots if shot.encoded} == {48}


def test_other_weights_encode_again_but_leave_failures(videos: Path, tmp_path: Path, model: Path) -> None:
    run_here(videos, tmp_path / "out", model)
    other = tmp_path / "other"
    build_tiny_folder(other, seed=1)
    work, todo = run_here(videos, tmp_path / "out", other)
    assert todo == 2
    assert len({scene.latents.vae_hash for scene, _ in records(tmp_path / "out").values() if scene.latents}) == 1
    assert work.finished[work.files[0].video_id].part.source["status"] == "failed"


def test_a_touched_or_moved_file_with_the_same_content_is_not_done_again(
    videos: Path, tmp_path: Path, model: Path
) -> None:
    run_here(videos, tmp_path / "out", model)
    moved = tmp_path / "moved"
    shutil.copytree(videos, moved, copy_function=shutil.copy)  # other place, other time stamps
    assert run_here(moved, tmp_path / "out", model)[1] == 0
    write(moved / "toy0.mp4", three_shots(17))
    assert run_here(moved, tmp_path / "out", model)[1] == 1


def test_sources_that_went_and_came(videos: Path, tmp_path: Path, model: Path, calls: Counter[str]) -> None:
    run_here(videos, tmp_path / "out", model)
    (videos / "toy0.mp4").rename(tmp_path / "kept.mp4")
    assert run_here(videos, tmp_path / "out", model)[1] == 0
    assert {scene.source.path for scene, _ in records(tmp_path / "out").values()} == {"toy1.mp4"}
    (tmp_path / "kept.mp4").rename(videos / "toy0.mp4")
    assert run_here(videos, tmp_path / "out", model)[1] == 1


def test_a_lost_shard_is_made_again(videos: Path, tmp_path: Path, model: Path) -> None:
    run_here(videos, tmp_path / "out", model)
    shard = tmp_path / "out" / "shards" / "scenes-000000.tar"
    data = shard.read_bytes()
    shard.unlink()
    assert run_here(videos, tmp_path / "out", model)[1] == 2
    assert shard.read_bytes() == data
    shard.write_bytes(data[: len(data) // 2])
    assert run_here(videos, tmp_path / "out", model)[1] >= 1
    assert shard.read_bytes() == data


def test_failed_sources_are_tried_again_where_asked(videos: Path, tmp_path: Path, model: Path) -> None:
    run_here(videos, tmp_path / "out", model)
    assert run_here(videos, tmp_path / "out", model, retry_failed=True)[1] == 1


def test_bad_rows_of_a_list_are_accounted_for(videos: Path, tmp_path: Path, model: Path, calls: Counter[str]) -> None:
    """Set aside by line, field and value; the rest is written, and a corrected list costs only its corrections."""
    listing = videos / "list.csv"
    listing.write_text("path,place\ntoy0.mp4,meadow\n,\n../up.mp4,\ntoy9.mp4,\n")
    run_here(listing, tmp_path / "out", model)
    rows = {row["name"]: row for row in pq.read_table(tmp_path / "out" / "sources.parquet").to_pylist()}
    assert {name: (row["status"], row["stage"]) for name, row in rows.items()} == {
        "toy0.mp4": ("written", ""), "list.csv:3": ("failed", "sources"), "list.csv:4": ("failed", "sources"),
        "toy9.mp4": ("failed", "probe"),
    }  # fmt: skip
    assert (
        "field 'path' is '../up.mp4'" in rows["list.csv:4"]["reason"] and rows["toy9.mp4"]["reason"] == "no such file"
    )
    (scene, _) = next(iter(records(tmp_path / "out").values()))
    assert scene.extra["fields"] == {"place": "meadow"}
    calls.clear()
    assert run_here(listing, tmp_path / "out", model)[1] == 0
    listing.write_text("path,place\ntoy0.mp4,desert\n,\n../up.mp4,\ntoy1.mp4,\n")
    calls.clear()
    assert run_here(listing, tmp_path / "out", model)[1] == 2
    assert calls["read_shots"] == 1  # of toy1; another field of toy0 costs no decode
    found = {scene.source.path: scene for scene, _ in records(tmp_path / "out").values()}
    assert found["toy0.mp4"].extra["fields"] == {"place": "desert"} and "fields" not in found["toy1.mp4"].extra


def test_ids_of_the_content_keep_what_is_done(videos: Path, tmp_path: Path, model: Path, calls: Counter[str]) -> None:
    """A run that goes on hashes nothing again; a renamed file is done again, under the same id and so the same keys."""

    def prepare(known: dict | None = None) -> int:
        files = list_sources([videos], ids="content", known=known).files
        work = plan_work(files, tmp_path / "out", SETTINGS, model)
        todo = len(work.todo)
        encode = EncodeRow(work.place, str(model), "cpu", 1)
        for manifest in work.rounds():
            for row in pq.read_table(manifest).to_pylist():
                for stage in (probe_row, decode_row, caption_row):
                    row = stage(row, work.place)
                encode(row)
        work.compact(SHARD_BYTES)
        return todo

    assert prepare() == 3
    keys = set(records(tmp_path / "out"))
    known = known_hashes(tmp_path / "out")
    here = {(f.name, f.path, f.bytes, f.mtime_ns) for f in list_sources([videos]).files}
    assert set(known) == here  # the empty file has a hash, too
    assert prepare(known) == 0
    (videos / "toy0.mp4").rename(videos / "new.mp4"), (videos / "toy0.json").rename(videos / "new.json")
    assert prepare(known) == 1 and set(records(tmp_path / "out")) == keys


def test_rows_that_never_come_back_end_as_failed(videos: Path, tmp_path: Path, model: Path) -> None:
    """Ray drops a row whose worker died too often; the run must not wait for it, nor lose it."""
    work = plan_work(list_sources([videos]).files, tmp_path / "out", SETTINGS, model)
    assert sum(1 for _ in work.rounds()) == MAX_ATTEMPTS
    ends = [one.part.source for one in work.finished.values()]
    assert [row["status"] for row in ends] == ["failed"] * 3
    assert all("worker process died, 3 attempts" in row["reason"] for row in ends)
    totals = work.compact(SHARD_BYTES)["totals"]
    assert totals["sources"] == totals["failed"] == 3

"""Shards: stable bytes, a size target, readable by plain webdataset; datasets reconcile and change in one step."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import webdataset

from preprocess import dataset
from preprocess.dataset import Earlier, Finished, ReconcileError, build, commit, recover
from preprocess.parts import Part, part_path, part_samples, read_part, write_part
from preprocess.shards import ShardReader, ShardWriter, read_samples


def samples(count: int, size: int = 1000) -> dict[str, dict[str, bytes]]:
    return {f"v-{i:04d}": {"json": b'{"n": %d}' % i, "safetensors": bytes([i % 256]) * size} for i in range(count)}


def write(folder: Path, items: dict[str, dict[str, bytes]], target: int = 3000) -> list[str]:
    with ShardWriter(folder, target) as writer:
        for key, files in items.items():
            writer.write(key, files)
    return writer.names


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.tar"))}


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "a", samples(10)) == [f"scenes-{i:06d}.tar" for i in range(4)]
    write(tmp_path / "b", {k: dict(reversed(v.items())) for k, v in samples(10).items()})
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_shards_end_at_the_target_and_hold_whole_samples(tmp_path: Path) -> None:
    names = write(tmp_path, samples(5), target=1)
    assert len(names) == 5
    assert [key for name in names for key, _ in read_samples(tmp_path / name)] == list(samples(5))


def test_plain_webdataset_reads_them(tmp_path: Path) -> None:
    names = write(tmp_path, samples(7))
    read = list(webdataset.WebDataset([str(tmp_path / name) for name in names], shardshuffle=False))
    assert [s["__key__"] for s in read] == list(samples(7))
    assert {s["__key__"]: {"json": s["json"], "safetensors": s["safetensors"]} for s in read} == samples(7)


def test_random_access(tmp_path: Path) -> None:
    write(tmp_path, samples(9))
    reader = ShardReader(tmp_path)
    assert reader.sample("scenes-000002.tar", "v-0007") == samples(9)["v-0007"]
    with pytest.raises(KeyError):
        reader.sample("scenes-000000.tar", "v-0007")


def test_a_failed_write_leaves_no_half_shard(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, 10**9) as writer:
        writer.write("v-0000", samples(1)["v-0000"])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- parts and datasets


def row(video_id: str, status: str = "written", scenes: int = 0, **more) -> dict:
    blank = {f.name: None for f in dataset.SOURCE_SCHEMA}
    return blank | {"video_id": video_id, "name": video_id, "status": status, "scenes": scenes, "stage": ""} | more


def make_part(folder: Path, video_id: str, scenes: int) -> Finished:
    items = {f"{video_id}-{i:04d}": {"json": b"{}", "safetensors": video_id.encode()} for i in range(scenes)}
    shots = [
        {"video_id": video_id, "key": key, "shard": "", "encoded_frames": 17, "index": i}
        for key in items
        for i in range(2)
    ]
    path = write_part(folder, Part(row(video_id, scenes=scenes), shots), iter(items.items()))
    part = read_part(path)
    assert part is not None
    return Finished(part, path)


def test_a_part_is_whole_or_not_there(tmp_path: Path) -> None:
    made = make_part(tmp_path, "a", 2)
    assert made.path is not None
    assert made.part.keys == ["a-0000", "a-0001"]
    assert [key for key, _ in part_samples(made.path)] == made.part.keys

    def broken():
        yield "b-0000", {"json": b"{}"}
        raise OSError("disk full")

    with pytest.raises(OSError):
        write_part(tmp_path, Part(row("b")), broken())
    assert not part_path(tmp_path, "b").exists() and read_part(part_path(tmp_path, "b")) is None
    part_path(tmp_path, "c").write_bytes(made.path.read_bytes()[:100])
    assert read_part(part_path(tmp_path, "c")) is None


def test_datasets_follow_the_source_order_whatever_the_order_of_work(tmp_path: Path) -> None:
    out = {}
    for name, order in (("x", "abc"), ("y", "cab")):
        parts = {v: make_part(tmp_path / name / "parts", v, 2) for v in order}
        record = build(tmp_path / name, [parts[v] for v in "abc"], Earlier(tmp_path / name), 100, {})
        commit(tmp_path / name)
        out[name] = (digest(tmp_path / name / "shards"), (tmp_path / name / "manifest.parquet").read_bytes(), record)
    assert out["x"] == out["y"]
    assert out["x"][2]["totals"]["scenes"] == 6 and out["x"][2]["totals"]["shots"] == 12


def test_a_new_dataset_takes_samples_from_the_old_one(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    build(tmp_path, [make_part(parts, v, 2) for v in "ab"], Earlier(tmp_path), 10**6, {})
    commit(tmp_path)
    before = digest(tmp_path / "shards")
    earlier = Earlier(tmp_path)
    assert earlier.whole(earlier.parts["a"])
    finished = [Finished(earlier.parts["b"], None), make_part(parts, "c", 1), Finished(earlier.parts["a"], None)]
    record = build(tmp_path, finished, earlier, 10**6, {})
    assert digest(tmp_path / "shards") == before  # the old one stands until the commit
    commit(tmp_path)
    keys = [key for name in record["shards"] for key, _ in read_samples(tmp_path / "shards" / name)]
    assert keys == ["b-0000", "b-0001", "c-0000", "a-0000", "a-0001"]
    assert not (tmp_path / "next").exists() and not (tmp_path / "old-shards").exists()


@pytest.mark.parametrize("moved", [0, 1, 2, 3])
def test_a_commit_that_was_killed_is_completed(tmp_path: Path, moved: int, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path, [make_part(tmp_path / "parts", "a", 1)], Earlier(tmp_path), 10**6, {})
    commit(tmp_path)
    build(tmp_path, [make_part(tmp_path / "parts", "b", 2)], Earlier(tmp_path), 10**6, {})
    order = dataset._ORDER
    monkeypatch.setattr(dataset, "_ORDER", order[:moved])
    monkeypatch.setattr(dataset.shutil, "rmtree", lambda *a, **k: None)  # killed before the clean-up
    commit(tmp_path)
    monkeypatch.undo()
    recover(tmp_path)
    assert [key for key, _ in read_samples(tmp_path / "shards" / "scenes-000000.tar")] == ["b-0000", "b-0001"]
    assert list(Earlier(tmp_path).parts) == ["b"]
    assert json.loads((tmp_path / "dataset.json").read_text())["totals"]["scenes"] == 2


def test_a_build_that_was_killed_leaves_the_old_dataset(tmp_path: Path) -> None:
    build(tmp_path, [make_part(tmp_path / "parts", "a", 1)], Earlier(tmp_path), 10**6, {})
    commit(tmp_path)
    build(tmp_path, [make_part(tmp_path / "parts", "b", 2)], Earlier(tmp_path), 10**6, {})
    recover(tmp_path)
    assert list(Earlier(tmp_path).parts) == ["a"] and not (tmp_path / "next").exists()


def test_lost_doubled_and_unknown_ends_stop_the_run(tmp_path: Path) -> None:
    good = make_part(tmp_path, "a", 2)
    with pytest.raises(ReconcileError, match="lost \\['a-0001'\\]"):
        dataset.reconcile([good.part], {"a-0000": "s"})
    with pytest.raises(ReconcileError, match="unexpected \\['x'\\]"):
        dataset.reconcile([good.part], {"a-0000": "s", "a-0001": "s", "x": "s"})
    with pytest.raises(ReconcileError, match="ended as \\[''\\]"):
        dataset.reconcile([Part(row("b", status=""))], {})
    with pytest.raises(ReconcileError, match="count 3 scenes, the shards hold 2"):
        dataset.reconcile([Part(row("a", scenes=3), good.part.shots)], {"a-0000": "s", "a-0001": "s"})
    with pytest.raises(ReconcileError, match="written twice"):
        build(tmp_path / "out", [good, good], Earlier(tmp_path / "out"), 100, {})

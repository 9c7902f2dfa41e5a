"""Duplicates over the dataset: found among videos, dropped at compaction, made again when what they doubled goes.

And what stands on the same records: other thresholds replayed without a decode, and the check of a whole dataset.
"""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load, save

from models.scene import Scene
from preprocess import unit
from preprocess.duplicates import find_duplicates
from preprocess.filters import FilterSettings, rule_of
from preprocess.index import index_rows, sample_places
from preprocess.letterbox import find_bars
from preprocess.parts import Part
from preprocess.probe import probe
from preprocess.replay import make_waterfall, recorded_waterfall, replay
from preprocess.report import PrepareReport
from preprocess.settings import PrepareSettings
from preprocess.shards import ShardWriter, read_samples
from preprocess.signature import HASH_BITS, hash_signs, make_signature, read_signatures
from preprocess.spans import read_shots
from preprocess.verify import verify
from tests.preprocess.runs import SETTINGS, run_here
from tests.preprocess.videos import pan, write


def loosened(**filters: object) -> PrepareSettings:
    return replace(SETTINGS, filters=replace(SETTINGS.filters, **filters))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[Path, Path]:
    """(videos, dataset): a clip, its re-encoding, its copy, a still, and the clip again before another shot."""
    folder = tmp_path_factory.mktemp("made")
    videos = folder / "videos"
    write(videos / "a.mp4", pan(1))
    write(videos / "b.mkv", pan(1), codec="mpeg4")
    shutil.copy(videos / "a.mp4", videos / "c.mp4")
    write(videos / "d.mp4", [pan(2)[0]] * 17)
    write(videos / "e.mp4", [*pan(1), *pan(3)])
    (videos / "e.json").write_text('{"story": "Two pans.", "shots": []}')  # one story, so one scene
    run_here(videos, folder / "out", model, SETTINGS)
    return videos, folder / "out"


@pytest.fixture
def copy(tmp_path: Path, made: tuple[Path, Path]) -> tuple[Path, Path]:
    """(videos, dataset) to change."""
    for source, name in zip(made, ("videos", "out"), strict=True):
        shutil.copytree(source, tmp_path / name)
    return tmp_path / "videos", tmp_path / "out"


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files that were decoded."""
    paths: list[str] = []
    real = unit.read_shots

    def counted(path, *args, **kwargs):
        paths.append(Path(path).name)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(unit, "read_shots", counted)
    return paths


def shot_table(output: Path) -> dict[str, list[str]]:
    """Why the shots of each video were left out."""
    found: dict[str, list[str]] = {}
    for row in pq.read_table(output / "manifest.parquet").to_pylist():
        found.setdefault(row["source"], []).append(row["filtered"])
    return found


def test_duplicates_of_earlier_videos_go_and_the_first_stays(made: tuple[Path, Path]) -> None:
    _, out = made
    rows = pq.read_table(out / "manifest.parquet").to_pylist()
    reasons = {name: [rule_of(reason) for reason in found] for name, found in shot_table(out).items()}
    assert reasons["a.mp4"] == [""] and reasons["d.mp4"] == ["static"]
    assert reasons["c.mp4"] == ["same_file"]
    assert reasons["e.mp4"][1:] == [""]
    assert {reasons["b.mkv"][0], reasons["e.mp4"][0]} <= {"hash_duplicate", "near_duplicate"}
    first = {row["source"]: row["shot_id"] for row in reversed(rows)}
    doubled = {row["duplicate_of"] for row in rows if row["duplicate_of"]}
    assert doubled <= {first["a.mp4"], rows[0]["video_id"]}
    sources = {row["name"]: row for row in pq.read_table(out / "sources.parquet").to_pylist()}
    assert sources["c.mp4"]["status"] == "filtered" and "same_file" in sources["c.mp4"]["reason"]
    assert sources["e.mp4"]["status"] == "written" and sources["e.mp4"]["encoded_shots"] == 1
    # in the shards: no latents of what went, all of what stayed, texts and record of both
    samples = {key: files for path in (out / "shards").glob("*.tar") for key, files in read_samples(path)}
    (key,) = {row["key"] for row in rows if row["source"] == "e.mp4"}
    scene, tensors = Scene.from_json(samples[key]["json"]), load(samples[key]["safetensors"])
    assert [shot.encoded is None for shot in scene.shots] == [True, False]
    assert scene.shots[0].filtered == shot_table(out)["e.mp4"][0]
    assert "s001.latent_mean" in tensors and not any(name.startswith("s000.l") for name in tensors)
    assert "s000.text" in tensors


def test_scores_of_every_shot_are_columns(made: tuple[Path, Path]) -> None:
    table = pq.read_table(made[1] / "manifest.parquet")
    for name in ("movement", "frozen", "shake", "black", "blur", "brightness", "clipped", "text", "frames", "bars"):
        assert table.schema.field(f"score_{name}").type == pa.float64()
        assert table[f"score_{name}"].null_count == 0, name
    rows = table.to_pylist()
    for name in ("similarity", "hash_distance"):  # of copies and of what other filters took, too
        assert [row["source"] for row in rows if row[f"score_{name}"] is None] == ["a.mp4"], "nothing comes before it"
    (copy,) = [row for row in rows if row["source"] == "c.mp4"]
    assert (copy["score_similarity"], copy["score_hash_distance"]) == (1.0, 0.0)


def test_the_same_run_again_changes_nothing(copy: tuple[Path, Path], model: Path, decodes: list[str]) -> None:
    videos, out = copy
    before = {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    run_here(videos, out, model, SETTINGS)
    assert decodes == []
    assert {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_duplicate_is_made_again_when_what_it_doubled_goes(
    copy: tuple[Path, Path], model: Path, decodes: list[str], tmp_path: Path
) -> None:
    videos, out = copy
    (videos / "a.mp4").unlink()
    run_here(videos, out, model, SETTINGS)
    assert decodes and "d.mp4" not in decodes
    run_here(videos, tmp_path / "fresh", model, SETTINGS)
    for name in ("shards/scenes-000000.tar", "index.parquet", "manifest.parquet"):
        assert (out / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes(), name
    assert verify(out).faults == []


def test_a_threshold_redoes_only_what_it_changes(
    copy: tuple[Path, Path], model: Path, decodes: list[str], tmp_path: Path
) -> None:
    videos, out = copy
    settings = loosened(min_movement=None, max_frozen=None)
    run_here(videos, out, model, settings)
    assert "d.mp4" in decodes and "a.mp4" not in decodes
    assert shot_table(out)["d.mp4"] == [""]
    run_here(videos, tmp_path / "fresh", model, settings)
    name = "shards/scenes-000000.tar"
    assert (out / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_the_shots_of_one_video_are_not_compared() -> None:
    row = {"filtered": "", "signature": make_signature([np.asarray(image)[:27, :48] for image in pan(4)])}
    rows = [row | {"shot_id": f"v-0000/s00{i}"} for i in range(3)]
    part = Part({"sha256": "1", "video_id": "v", "status": "written"}, rows)
    assert not any(verdict.reason for verdict in find_duplicates([part], FilterSettings()).values())
    other = Part({"sha256": "2", "video_id": "w", "status": "written"}, [row | {"shot_id": "w-0000/s000"}])
    (verdict,) = find_duplicates([part, other], FilterSettings()).values()
    assert rule_of(verdict.reason) == "hash_duplicate" and verdict.scores == {"similarity": 1.0, "hash_distance": 0.0}
    off = FilterSettings(max_similarity=None, min_hash_distance=None)
    assert find_duplicates([part, other], off) == {}


def test_a_shot_that_went_is_no_reason_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a plain loop over pairs, with more shots than are compared at once."""
    monkeypatch.setattr("preprocess.duplicates._CHUNK", 7)
    rng = np.random.default_rng(0)
    base = [[np.asarray(image)[:27, :48] for image in pan(seed)] for seed in range(4)]
    parts = []
    for i in range(30):
        noisy = [np.clip(image + rng.normal(0, 8, image.shape), 0, 255).astype(np.uint8) for image in base[i % 4]]
        row = {"filtered": "", "shot_id": f"v{i}-0000/s000", "signature": make_signature(noisy)}
        parts.append(Part({"sha256": str(i), "video_id": f"v{i}", "status": "written"}, [row]))
    limit = 0.995
    found = find_duplicates(parts, FilterSettings(max_similarity=limit, min_hash_distance=None))
    vectors = read_signatures([part.shots[0]["signature"] for part in parts])
    kept: list[int] = []
    for i in range(len(parts)):
        best = max((float(vectors[i] @ vectors[k]) for k in kept), default=-1.0)
        said = found.get(f"v{i}-0000/s000")
        assert bool(said and said.reason) == (round(best, 4) > limit)
        if round(best, 4) <= limit:
            kept.append(i)
    assert 4 <= len(kept) < len(parts)


def test_signatures_know_real_duplicates(shared_data: Path) -> None:
    """Re-encoded and grey copies are near; other takes of the same person in the same room are not."""

    def signature(name: str) -> str:
        path, settings = str(shared_data / "clips" / name), replace(SETTINGS, height=64, width=64, max_seconds=4.0)
        info = probe(path)
        shots, _ = read_shots(path, info, settings, io.BytesIO(), bars=find_bars(path, info)[0])
        return next(shot.signature for shot in shots if shot.scores["frames"] >= 5)

    def near(one: str, other: str) -> bool:
        vectors = read_signatures([signature(one), signature(other)])
        signs = hash_signs(vectors)
        likeness, distance = vectors[0] @ vectors[1], (HASH_BITS - signs[0] @ signs[1]) / 2
        return bool(likeness > SETTINGS.filters.max_similarity) or bool(distance < SETTINGS.filters.min_hash_distance)

    pairs = {
        ("mdn/flower.mp4", "mdn/flower.webm"): True,
        ("mdnlearn/crystal.mp4", "mdnlearn/crystal.webm"): True,
        ("tmk/chair-orig-22-sd-bar.mp4", "tmk/chair-22-sd-grey-bar.mp4"): True,
        ("intel/milk.mkv", "intel/sorry.mkv"): False,
        ("intel/milk.mkv", "intel/thanks.mkv"): False,
        ("intel/book.mkv", "intel/walk.mkv"): False,
        ("ticft/custom_3DAnimation_1.mp4", "ticft/custom_Cartoon_1.mp4"): False,
    }
    for (one, other), same in pairs.items():
        assert near(one, other) == same, (one, other)


# ---------------------------------------------------------------- what if


def test_a_replay_says_what_the_run_did(made: tuple[Path, Path], decodes: list[str]) -> None:
    videos, out = made
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*") if path.is_file()}
    found = replay(out, SETTINGS)
    taken = Counter(rule_of(reason) for reasons in shot_table(out).values() for reason in reasons if reason)
    assert {step.name: step.shots for step in found.steps if step.shots} == dict(taken)
    assert found.shots == 6 and found.steps[-1].left == found.kept_now == 6 - taken.total()
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before and not decodes


def test_a_replay_with_other_thresholds_says_what_a_run_would_do(
    made: tuple[Path, Path], tmp_path: Path, model: Path
) -> None:
    videos, out = made
    settings = loosened(min_movement=None, max_frozen=None, max_blur=0.05, same_file=False, max_similarity=None)
    found = replay(out, settings)
    text = found.summary()
    run_here(videos, tmp_path / "out", model, settings)
    taken = Counter(
        rule_of(reason) for reasons in shot_table(tmp_path / "out").values() for reason in reasons if reason
    )
    assert {step.name: step.shots for step in found.steps if step.shots} == dict(taken)
    assert any(line.split()[:2] == ["static", "off"] for line in text.splitlines()) and "nothing was changed" in text
    again = recorded_waterfall(
        [Part({"status": "filtered"}, pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist())],
        json.loads((tmp_path / "out" / "dataset.json").read_text())["settings"],
    )
    assert {step.name: step.shots for step in again if step.shots} == dict(taken)


def test_a_replay_needs_scores_measured_alike(made: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fps=12.0, but the scores .* measured with fps=8.0"):
        replay(made[1], replace(SETTINGS, fps=12.0))
    with pytest.raises(ValueError, match="no dataset to try thresholds on"):
        replay(tmp_path, SETTINGS)


def test_videos_that_were_never_decoded_are_told_apart() -> None:
    facts = {"width": 20, "height": 20, "fps": 8.0, "source_frames": 17, "duration_s": 2.0}
    parts = [Part({"status": "filtered", **facts}), Part({"status": "failed"})]
    now, then = make_waterfall(parts, SETTINGS), make_waterfall(parts, replace(SETTINGS, min_side=8))
    assert (now.taken, now.undecoded, now.failed) == (1, 0, 1)
    assert (then.taken, then.undecoded, then.undecoded_seconds) == (0, 1, 2.0)


def test_shots_without_a_score_are_said_to_be_kept() -> None:
    source = {"status": "written", "sha256": "1", "video_id": "v", "width": 64, "height": 64, "fps": 8.0}
    source |= {"source_frames": 17, "duration_s": 2.0}
    scores = json.dumps({"frames": 17.0, "movement": 9.0})
    row = {"shot_id": "v-0000/s000", "filtered": "", "duration_s": 2.0, "encoded_frames": 17, "signature": ""}
    found = make_waterfall([Part(source, [row | {"scores": scores}])], loosened(max_text=None))
    unscored = {step.name: step.unscored for step in found.steps}
    assert (unscored["static"], unscored["blurred"], unscored["near_duplicate"]) == (0, 1, 1)
    assert unscored["text"] == unscored["aesthetic"] == 0, "they are off"
    assert "blurred: 1 shots have no such score and are counted as kept" in found.summary().splitlines()


# ---------------------------------------------------------------- index and verify


def test_the_index_leads_to_every_sample_and_leaves_the_shards_alone(tmp_path: Path) -> None:
    import tarfile

    items = {f"v-{i:04d}": {"json": b"{}" * i, "safetensors": bytes([i]) * (700 * i)} for i in range(1, 6)}
    with ShardWriter(tmp_path, 4000) as writer:
        for key, files in items.items():
            writer.write(key, files)
    found = {}
    for name in writer.names:
        data = (tmp_path / name).read_bytes()
        places = list(sample_places(tmp_path / name))
        assert places[0][1] == 0 and all(a[1] + a[2] == b[1] for a, b in zip(places, places[1:], strict=False))
        for row in index_rows(tmp_path / name):
            piece = tmp_path / "piece.tar"  # a stretch is a tar of its own
            piece.write_bytes(data[row["offset"] : row["offset"] + row["length"]])
            with tarfile.open(piece) as tar:
                found[row["key"]] = {m.name.partition(".")[2]: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
        assert (tmp_path / name).read_bytes() == data
    assert found == items


def rewrite(table: Path, change: Callable[[list[dict]], None]) -> None:
    read = pq.read_table(table)
    rows = read.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, read.schema), table)


def reshard(out: Path, change: Callable[[Scene, dict], None]) -> None:
    """Write the shard again with a changed first sample, and an index that agrees: only the content is wrong."""
    shard = out / "shards" / "scenes-000000.tar"
    samples = list(read_samples(shard))
    key, files = samples[0]
    scene, tensors = Scene.from_json(files["json"]), load(files["safetensors"])
    change(scene, tensors)
    samples[0] = (key, {"json": scene.to_json().encode(), "safetensors": save(tensors)})
    with ShardWriter(out / "shards", 10**9) as writer:
        for name, content in samples:
            writer.write(name, content)
    read = pq.read_table(out / "index.parquet")
    pq.write_table(pa.Table.from_pylist(index_rows(shard), read.schema), out / "index.parquet")


def test_a_whole_dataset_has_no_fault(made: tuple[Path, Path]) -> None:
    verdict = verify(made[1])
    assert verdict.faults == [] and verdict.exit_code == 0
    assert verdict.scenes >= 2 and verdict.shots >= 2 and verdict.frames >= 2 * 17 and "is whole" in verdict.summary()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("byte", "are not those of index.parquet"),
        ("cut", "sha256"),
        ("shard", "scenes-000000.tar is missing"),
        ("index", "of manifest.parquet is not in it"),
        ("offset", "does not lie where index.parquet says"),
        ("frames", "manifest.parquet says 13"),
        ("total", "dataset.json: totals.scenes is 99"),
        ("latent", "s000.latent_mean is missing"),
        ("latent_frames", "4 latent frames for 17 encoded frames"),
        ("caption", "prompt of shot 0"),
        ("text", "s000.text is missing: a text without its embedding"),
        ("nan", "s000.first_mean has values that are not finite"),
        ("extra", "s009.text belongs to nothing"),
        ("reason", "without a reason"),
    ],
)
def test_every_fault_is_named(copy: tuple[Path, Path], damage: str, said: str) -> None:
    _, out = copy
    shard = out / "shards" / "scenes-000000.tar"
    data = bytearray(shard.read_bytes())
    if damage == "byte":
        data[len(data) // 3] ^= 1
        shard.write_bytes(data)
    elif damage == "cut":
        shard.write_bytes(data[: len(data) // 2])
    elif damage == "shard":
        shard.unlink()
    elif damage == "index":
        rewrite(out / "index.parquet", lambda rows: rows.pop())
    elif damage == "offset":
        rewrite(out / "index.parquet", lambda rows: rows[0].update(offset=512))
    elif damage == "frames":
        rewrite(out / "manifest.parquet", lambda rows: rows[0].update(encoded_frames=13))
    elif damage == "reason":
        rewrite(out / "sources.parquet", lambda rows: rows[2].update(reason=""))
    elif damage == "total":
        facts = json.loads((out / "dataset.json").read_text())
        facts["totals"]["scenes"] = 99
        (out / "dataset.json").write_text(json.dumps(facts))
    elif damage == "latent":
        reshard(out, lambda scene, tensors: tensors.pop("s000.latent_mean"))
    elif damage == "latent_frames":
        reshard(
            out, lambda scene, tensors: tensors.update({"s000.latent_mean": tensors["s000.latent_mean"][:, :4].clone()})
        )
    elif damage == "caption":
        reshard(out, lambda scene, tensors: setattr(scene.shots[0], "prompt", ""))
    elif damage == "text":
        reshard(out, lambda scene, tensors: tensors.pop("s000.text"))
    elif damage == "nan":
        reshard(out, lambda scene, tensors: tensors["s000.first_mean"].fill_(float("nan")))
    elif damage == "extra":
        reshard(out, lambda scene, tensors: tensors.update({"s009.text": tensors["s000.text"].clone()}))
    verdict = verify(out)
    assert verdict.exit_code == 1 and any(said in fault for fault in verdict.faults), verdict.faults


def test_a_folder_without_a_dataset_is_said_to_be_none(tmp_path: Path) -> None:
    assert "no whole dataset" in verify(tmp_path).faults[0]


def test_the_report_counts_what_filters_left_out(made: tuple[Path, Path]) -> None:
    report = PrepareReport(made[1])
    report.count_shots(pq.read_table(made[1] / "manifest.parquet").to_pylist())
    assert report.filtered_shots["static"] == report.filtered_shots["same_file"] == 1
    assert "filters left out 4 shots" in report.summary()

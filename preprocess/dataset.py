"""The finished dataset folder: what an earlier run left in it, and how a new run takes its place in one step.

    shards/scenes-000000.tar ...   index.parquet   manifest.parquet   sources.parquet   answers.parquet   dataset.json

Parts are compacted in the order of the source list, never by arrival, so equal input gives equal shards. A new dataset
is built whole in `next/` and moved over the old one; a run killed in between is completed by the next.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.storage import atomic_path, atomic_write_json
from preprocess.answers import ANSWERS, Answers
from preprocess.duplicates import is_duplicate
from preprocess.filters import SCORES, judge
from preprocess.index import INDEX, index_rows
from preprocess.parts import Part, Row, part_path, part_samples, read_part
from preprocess.references import references_hold
from preprocess.remote import is_address, sha256_at
from preprocess.shards import ShardReader, ShardWriter
from preprocess.sources import SourceFile, fields_text

Sample = dict[str, bytes]  # {extension: bytes}
KeysFor = Callable[[Row], dict[str, str]]
FORMAT = "shotloom-dataset-1"
_FILES = (INDEX, "manifest.parquet", "sources.parquet", ANSWERS, "dataset.json")
_ORDER = ("shards", *_FILES)


class ReconcileError(RuntimeError):
    """What was written is not what was prepared; nothing was replaced."""


@dataclass
class Finished:
    """A source whose work is done: its rows, and where its samples lie (a part, or a shard of the older dataset)."""

    part: Part
    path: Path | None  # of the part; None: samples are in the older dataset's shards


class Earlier:
    """The dataset that an earlier run left in the folder; empty where there is none or it cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.parts: dict[str, Part] = {}
        self.reader = ShardReader(folder / "shards")
        self.facts: dict[str, Any] = {}
        try:
            facts = json.loads((folder / "dataset.json").read_text())
            sources = pq.read_table(folder / "sources.parquet").to_pylist()
            shots = pq.read_table(folder / "manifest.parquet").to_pylist()
        except (OSError, ValueError, pa.ArrowInvalid):
            return
        if facts.get("format") != FORMAT:
            return
        self.facts = facts
        self.parts = {row["video_id"]: Part(row, []) for row in sources}
        for row in shots:
            self.parts[row["video_id"]].shots.append(row)

    def whole(self, part: Part) -> bool:
        """Whether all samples of a part are still in the shards."""
        return all(self.reader.whole(row["shard"], row["key"]) for row in part.shots if row["key"])

    def samples(self, part: Part) -> Iterator[tuple[str, Sample]]:
        for key, shard in {row["key"]: row["shard"] for row in part.shots if row["key"]}.items():
            yield key, self.reader.sample(shard, key)


def find_finished(
    file: SourceFile,
    keys_for: KeysFor,
    parts: Path,
    earlier: Earlier,
    retry_failed: bool,
    limits: dict[str, float | None],
) -> Finished | None:
    """The finished work on a source that still holds: same settings, same file. None: it has to be done.

    `keys_for` is `Workplace.keys_for`: what a row depends on is known only with the size that its video takes.
    """
    part = read_part(part_path(parts, file.video_id))
    if part is not None and _still_holds(part, file, keys_for, retry_failed, limits):
        return Finished(part, part_path(parts, file.video_id))
    part = earlier.parts.get(file.video_id)
    if part is not None and _still_holds(part, file, keys_for, retry_failed, limits) and earlier.whole(part):
        return Finished(part, None)
    return None


# what the end of a source depends on, by the stage in which it ended
_DEPENDS = {
    "captions": ("vision_key", "caption_key"),
    "states": ("vision_key", "caption_key"),  # a key of captions names the state predictor, too
    "encode": ("vision_key", "caption_key", "encoder_key"),
    "": ("vision_key", "caption_key", "encoder_key"),  # written
}


def _still_holds(
    part: Part, file: SourceFile, keys_for: KeysFor, retry_failed: bool, limits: dict[str, float | None]
) -> bool:
    row = part.source
    if row["name"] != file.name:
        return False
    unfinished = row["status"] == "failed" or row.get("lost") or any(shot.get("set_aside") for shot in part.shots)
    if retry_failed and unfinished:
        return False
    stage = row["stage"]
    depends = _DEPENDS.get(stage, ("vision_key",))
    keys = keys_for(row)
    if any(row.get(name) != keys.get(name) for name in depends):
        return False
    if stage == "sources":
        return row["reason"] == file.error
    if file.error or not _same_video(row, file):
        return False
    if not _same_verdicts(part, limits):
        return False
    if "caption_key" in depends and not _same_words(row, file):
        return False
    return "encoder_key" not in depends or references_hold(row)


def _same_verdicts(part: Part, limits: dict[str, float | None]) -> bool:
    """Whether the filters say of the recorded scores what they said when the shots were decoded."""
    return all(
        judge(json.loads(row["scores"]), limits) == ("" if is_duplicate(row) else row["filtered"]) for row in part.shots
    )


def find_pictures(
    file: SourceFile, keys_for: KeysFor, parts: Path, earlier: Earlier, limits: dict[str, float | None]
) -> tuple[Row, dict[str, str]]:
    """Where only captions changed: the earlier row, and key -> tar of its samples; empty where pictures changed too."""
    part = read_part(part_path(parts, file.video_id))
    places = dict.fromkeys(part.keys, str(part_path(parts, file.video_id))) if part is not None else {}
    if part is None and (part := earlier.parts.get(file.video_id)) is not None and earlier.whole(part):
        places = {row["key"]: str(earlier.reader.folder / row["shard"]) for row in part.shots if row["key"]}
    if part is None or part.source["status"] != "written" or not all(row["key"] for row in part.shots):
        return {}, {}
    if not _same_verdicts(part, limits) or any(row["duplicate_of"] for row in part.shots):
        return {}, {}  # of a shot that was left out the latents are gone
    row, keys = part.source, keys_for(part.source)
    same = row["name"] == file.name and not file.error
    same = same and all(row[name] == keys.get(name) for name in ("vision_key", "encoder_key"))
    if not same or not _same_video(row, file):
        return {}, {}
    return row, places


def _same_video(row: Row, file: SourceFile) -> bool:
    if row["bytes"] != file.bytes or (row.get("frames_fps") or 0.0) != (file.fps or 0.0):
        return False
    return _same_content(row, "path", file.path, file.span, "mtime_ns", file.mtime_ns, "sha256")


def _same_words(row: Row, file: SourceFile) -> bool:
    """The caption file and the fields of its list."""
    if (row.get("fields") or "") != fields_text(file):
        return False
    place = file.captions or "", file.captions_span
    if is_address(place[0]) and not file.captions_mtime_ns:  # its store does not tell a changed file: it is read
        return row["captions"] == place[0] and _sha256(*place) == row["captions_sha256"]
    return _same_content(row, "captions", *place, "captions_mtime_ns", file.captions_mtime_ns, "captions_sha256")


def _same_content(
    row: Row, path_name: str, path: str, span: list[int] | None, time_name: str, mtime_ns: int, hash_name: str
) -> bool:
    """Same file by its time stamp; by content where only the time stamp or the place differs."""
    if row[time_name] == mtime_ns and row[path_name] == path:
        return True
    if mtime_ns == 0 or not row[hash_name]:  # gone, or never read
        return False
    return _sha256(path, span) == row[hash_name]


def _sha256(path: str, span: list[int] | None) -> str:
    """Of what lies there now; "" where it cannot be read, which the stages will say by name."""
    try:
        return sha256_at(path, span)
    except Exception:  # each driver has exceptions of its own
        return ""


def known_hashes(folder: Path) -> dict[tuple[str, str, int, int], str]:
    """SHA-256 of the sources of an earlier run, by name, path, bytes and mtime_ns; empty where there was none."""
    columns = ["name", "path", "bytes", "mtime_ns", "sha256"]
    try:
        rows = pq.read_table(folder / "sources.parquet", columns=columns).to_pylist()
    except (OSError, ValueError, pa.ArrowException):
        return {}
    return {(row["name"], row["path"], row["bytes"], row["mtime_ns"]): row["sha256"] for row in rows if row["sha256"]}


def build(
    folder: Path,
    finished: Sequence[Finished],
    earlier: Earlier,
    shard_bytes: int,
    facts: dict[str, Any],
    clean: Callable[[str, Sample], Sample | None] = lambda key, files: files,
    answers: Answers | None = None,
) -> dict[str, Any]:
    """Write the whole dataset into `folder`/next and check it against the parts; returns dataset.json.

    `clean` gives what is written of a sample, None for nothing; the parts say the same. `answers` are taken along.

    Raises ReconcileError where a scene would be lost, doubled or unaccounted for. Then, or where there is no room,
    nothing is left of it.
    """
    staging = folder / "next"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        return _build(folder, staging, finished, earlier, shard_bytes, facts, clean, answers)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _build(
    folder: Path,
    staging: Path,
    finished: Sequence[Finished],
    earlier: Earlier,
    shard_bytes: int,
    facts: dict[str, Any],
    clean: Callable[[str, Sample], Sample | None],
    answers: Answers | None,
) -> dict[str, Any]:
    places: dict[str, str] = {}
    with ShardWriter(staging / "shards", shard_bytes) as writer:
        for one in finished:
            for key, files in part_samples(one.path) if one.path else earlier.samples(one.part):
                if key in places:
                    raise ReconcileError(f"scene {key} would be written twice; remove {folder} and prepare again")
                cleaned = clean(key, files)
                if cleaned is not None:
                    places[key] = writer.write(key, cleaned)
    (staging / "shards").mkdir(exist_ok=True)
    sources = [one.part.source for one in finished]
    shots = [row | {"shard": places.get(row["key"], "")} for one in finished for row in one.part.shots]
    totals = reconcile([one.part for one in finished], places)
    index = [row for name in writer.names for row in index_rows(staging / "shards" / name)]
    _write_table(staging / INDEX, index, INDEX_SCHEMA)
    _write_table(staging / "sources.parquet", sources, SOURCE_SCHEMA)
    _write_table(staging / "manifest.parquet", shots, SHOT_SCHEMA)
    if answers is not None:
        answers.write_table(staging / ANSWERS)
    record = {"format": FORMAT, **facts, "totals": totals, "shards": writer.names, "shard_bytes": shard_bytes}
    atomic_write_json(staging / "dataset.json", record)
    return record


def reconcile(parts: Sequence[Part], places: dict[str, str]) -> dict[str, int]:
    """Totals of a dataset. Raises ReconcileError unless every source ended and every scene lies in one shard."""
    status = Counter(part.source["status"] for part in parts)
    unknown = set(status) - {"written", "filtered", "failed"}
    if unknown:
        raise ReconcileError(f"sources ended as {sorted(unknown)}, expected written, filtered or failed")
    keys = [key for part in parts for key in part.keys]
    lost, extra = set(keys) - set(places), set(places) - set(keys)
    if lost or extra or len(keys) != len(set(keys)):
        raise ReconcileError(
            f"{len(keys)} scenes were prepared and {len(places)} written: lost {sorted(lost)[:5]}, unexpected "
            f"{sorted(extra)[:5]}; remove the parts folder and prepare again"
        )
    scenes = sum(part.source["scenes"] for part in parts)
    if scenes != len(places):
        raise ReconcileError(f"the sources count {scenes} scenes, the shards hold {len(places)}")
    return {
        "sources": len(parts),
        "written": status["written"],
        "filtered": status["filtered"],
        "failed": status["failed"],
        "scenes": len(places),
        "set_aside_scenes": len(
            scenes_aside([part.source for part in parts], (row for part in parts for row in part.shots))
        ),
        "shots": sum(len(part.shots) for part in parts),
        "encoded_shots": sum(row["encoded_frames"] > 0 for part in parts for row in part.shots),
        "encoded_frames": sum(row["encoded_frames"] for part in parts for row in part.shots),
    }


def scenes_aside(sources: Sequence[Row], shots: Iterable[Row]) -> dict[str, str]:
    """Scenes that are not written though others of their source are, by the rows of both: id -> "stage: reason"."""
    written = {row["video_id"] for row in sources if row["status"] == "written"}
    return {row["scene_id"]: row["set_aside"] for row in shots if row.get("set_aside") and row["video_id"] in written}


def commit(folder: Path) -> None:
    """Move `next/` over the dataset. Safe to repeat: a commit that was interrupted goes on where it stopped."""
    staging, marker = folder / "next", folder / "next" / "complete"
    marker.touch()
    for name in _ORDER:
        source, target = staging / name, folder / name
        if not source.exists():
            continue
        old = folder / "old-shards"
        if name == "shards" and target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        source.rename(target)
    shutil.rmtree(folder / "old-shards", ignore_errors=True)
    shutil.rmtree(staging, ignore_errors=True)


def recover(folder: Path) -> None:
    """Complete a commit that was interrupted; drop a dataset that was never whole."""
    if (folder / "next" / "complete").exists():
        commit(folder)
    shutil.rmtree(folder / "next", ignore_errors=True)


def _schema(**columns: str) -> pa.Schema:
    kinds = {
        "str": pa.string(),
        "int": pa.int64(),
        "float": pa.float64(),
        "bool": pa.bool_(),
        "ints": pa.list_(pa.int64()),
    }
    return pa.schema([(name, kinds[kind]) for name, kind in columns.items()])


INDEX_SCHEMA = _schema(key="str", shard="str", offset="int", length="int", sha256="str")
SOURCE_SCHEMA = _schema(
    video_id="str", name="str", path="str", status="str", stage="str", reason="str", lost="str", attempts="int",
    scenes="int", shots="int", encoded_shots="int", encoded_frames="int", source_frames="int", used_frames="int",
    decoded_frames="int", damaged_packets="int", decoder="str", decoder_reason="str", container="str", codec="str",
    pix_fmt="str", width="int", height="int", fps="float", variable_rate="bool", duration_s="float", rotation="int",
    hdr="bool", interlaced="bool", audio="bool", mirrored="bool", truncated="str", colour="str",
    picture_height="int", picture_width="int", encoded_height="int", encoded_width="int",
    bytes="int", mtime_ns="int", sha256="str", captions="str", captions_mtime_ns="int", captions_sha256="str",
    frames_fps="float", fields="str", references="str", vision_key="str", caption_key="str", encoder_key="str",
)  # fmt: skip
SHOT_SCHEMA = _schema(
    video_id="str", source="str", scene_id="str", shot_id="str", index="int", key="str", shard="str", start_s="float",
    duration_s="float", start_pts="int", end_pts="int", time_base_num="int", time_base_den="int", start_frame="int",
    end_frame="int", transition="str", confidence="float", blend_frames="ints", blend_pts="ints", encoded_frames="int",
    encoded_start_frame="int", encoded_height="int", encoded_width="int", prompt="str", sentence="str", camera="str",
    label="int", references="str", captions="str", scores="str", filtered="str", set_aside="str", duplicate_of="str",
    signature="str", **{f"score_{name}": "float" for name in SCORES},
)  # fmt: skip


def _write_table(path: Path, rows: list[Row], schema: pa.Schema) -> None:
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema), temporary)

"""Check a dataset against itself: every hash of the index, every record, the counts of frames, latents and captions.

Reads all bytes once. Faults are collected, not raised: the list names each with its file and what is wrong.
"""

from __future__ import annotations

import json
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from models.scene import (
    IMAGE_TENSOR,
    LATENT_TENSORS,
    STORY_TEXT,
    Scene,
    SceneError,
    Shot,
    reference_tensor_key,
    shot_tensor_key,
)
from preprocess.dataset import FORMAT, scenes_aside
from preprocess.encode import scene_texts
from preprocess.index import INDEX, sample_places, sha256_of
from preprocess.parts import Row
from preprocess.shards import ShardReader
from preprocess.sizes import in_words


@dataclass
class Verdict:
    """What was read, and every fault found."""

    folder: Path
    faults: list[str] = field(default_factory=list)
    shards: int = 0
    scenes: int = 0
    shots: int = 0  # encoded
    frames: int = 0  # encoded

    @property
    def exit_code(self) -> int:
        return 1 if self.faults else 0

    def summary(self) -> str:
        read = f"{self.shards} shards, {self.scenes} scenes, {self.shots} encoded shots, {self.frames} encoded frames"
        if not self.faults:
            return f"{self.folder} is whole: {read}"
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        return "\n".join([*self.faults, f"{self.folder}: {count} in {read}"])


def verify(folder: Path) -> Verdict:
    """All checks on the dataset in `folder`."""
    verdict = Verdict(folder)
    try:
        facts = json.loads((folder / "dataset.json").read_text())
        sources, shots, index = (
            pq.read_table(folder / name).to_pylist() for name in ("sources.parquet", "manifest.parquet", INDEX)
        )
    except (OSError, ValueError, pa.ArrowInvalid) as error:
        verdict.faults.append(f"{folder}: no whole dataset: {error}; run `shotloom prepare` again")
        return verdict
    if facts.get("format") != FORMAT:
        verdict.faults.append(f"dataset.json: format is {facts.get('format')!r}, this version reads {FORMAT!r}")
        return verdict
    rows: dict[str, list[Row]] = defaultdict(list)
    for row in shots:
        if row["key"]:
            rows[row["key"]].append(row)
    verdict.faults += _check_tables(facts, sources, shots, rows, index)
    check = _Samples(facts["settings"])
    by_shard: dict[str, list[Row]] = defaultdict(list)
    for row in index:
        by_shard[row["shard"]].append(row)
    present = {path.name for path in (folder / "shards").glob("*.tar")}
    for name in sorted(set(facts["shards"]) | set(by_shard) | present):
        if name not in present:
            verdict.faults.append(f"shards/{name} is missing")
        elif name not in facts["shards"]:
            verdict.faults.append(f"shards/{name} is not in dataset.json")
        else:
            verdict.shards += 1
            verdict.faults += _check_shard(folder / "shards" / name, by_shard[name], rows, check, verdict)
    return verdict


def _check_tables(
    facts: Row, sources: list[Row], shots: list[Row], rows: dict[str, list[Row]], index: list[Row]
) -> Iterator[str]:
    """What the tables say of each other."""
    keys = [row["key"] for row in index]
    if len(keys) != len(set(keys)):
        yield f"{INDEX}: keys occur twice: {sorted({key for key in keys if keys.count(key) > 1})[:3]}"
    for key in sorted(set(rows) - set(keys)):
        yield f"{INDEX}: scene {key} of manifest.parquet is not in it"
    for key in sorted(set(keys) - set(rows)):
        yield f"manifest.parquet: scene {key} of {INDEX} is not in it"
    of_source: dict[str, list[Row]] = defaultdict(list)
    for row in shots:
        of_source[row["video_id"]].append(row)
    for source in sources:
        name = source["name"]
        if source["status"] not in ("written", "filtered", "failed"):
            yield f"sources.parquet: {name} ended as {source['status']!r}"
        if source["status"] != "written" and not source["reason"]:
            yield f"sources.parquet: {name} was {source['status']} without a reason"
        mine = of_source.pop(source["video_id"], [])
        counted = {
            "scenes": len({row["key"] for row in mine if row["key"]}),
            "encoded_shots": sum(row["encoded_frames"] > 0 for row in mine),
            "encoded_frames": sum(row["encoded_frames"] for row in mine),
        }
        if source["status"] == "written":
            for what, count in counted.items():
                if source[what] != count:
                    yield f"sources.parquet: {name} has {what} {source[what]}, manifest.parquet counts {count}"
            for side, row in product(("encoded_height", "encoded_width"), mine):
                if row.get(side) and row[side] != source.get(side):
                    said = f"{side} {source.get(side)}, its shot {row['shot_id']} in manifest.parquet {row[side]}"
                    yield f"sources.parquet: {name} has {said}"
        elif counted["scenes"]:
            yield f"manifest.parquet: {name} was {source['status']}, but {counted['scenes']} scenes of it are written"
    for video in sorted(of_source):
        yield f"manifest.parquet: shots of {video}, which sources.parquet does not know"
    totals = {
        "sources": len(sources),
        "scenes": len(rows),
        "set_aside_scenes": len(scenes_aside(sources, shots)),
        "shots": len(shots),
        "encoded_shots": sum(row["encoded_frames"] > 0 for row in shots),
        "encoded_frames": sum(row["encoded_frames"] for row in shots),
        **{status: sum(row["status"] == status for row in sources) for status in ("written", "filtered", "failed")},
    }
    for what, count in totals.items():
        said = facts["totals"].get(what, 0)
        if said != count:
            yield f"dataset.json: totals.{what} is {said}, the tables count {count}"


def _check_shard(
    path: Path, index: list[Row], rows: dict[str, list[Row]], check: _Samples, verdict: Verdict
) -> list[str]:
    """Hashes and samples of one shard."""
    faults = []
    name = f"shards/{path.name}"
    with path.open("rb") as file:
        damaged = {row["key"] for row in index if sha256_of(file, row["offset"], row["length"]) != row["sha256"]}
    faults += [f"{name}: the bytes of {key} are not those of {INDEX} (sha256)" for key in sorted(damaged)]
    try:
        places = {key: (offset, length) for key, offset, length in sample_places(path)}
    except (OSError, tarfile.TarError) as error:
        return [*faults, f"{name} is no readable tar: {error}"]
    for row in index:
        if row["key"] not in places:
            faults.append(f"{name}: {row['key']} of {INDEX} is not in it")
        elif places[row["key"]] != (row["offset"], row["length"]):
            faults.append(f"{name}: {row['key']} does not lie where {INDEX} says")
    faults += [f"{name}: {key} is not in {INDEX}" for key in places.keys() - {row["key"] for row in index}]
    reader = ShardReader(path.parent)
    for key in places:
        try:
            files = reader.sample(path.name, key)
        except (OSError, KeyError) as error:
            faults.append(f"{name}: {key} cannot be read: {error}")
            continue
        verdict.scenes += 1
        for row in rows.get(key, []):
            if row["shard"] != path.name:
                faults.append(f"manifest.parquet: {row['shot_id']} is said to lie in {row['shard']}, it lies in {name}")
        found = list(check.sample(key, files, rows.get(key, [])))
        faults += [f"{name}: {key}: {fault}" for fault in found]
        verdict.shots += sum(row["encoded_frames"] > 0 for row in rows.get(key, []))
        verdict.frames += sum(row["encoded_frames"] for row in rows.get(key, []))
    return faults


class _Samples:
    """Checks samples one by one; what must be the same in all is taken from the first."""

    def __init__(self, settings: Row) -> None:
        self.settings = settings
        self.dtype = getattr(torch, settings["dtype"])
        self.sizes = settings.get("sizes") or [[settings["height"], settings["width"]]]
        self.common: dict[str, Any] = {}

    def sample(self, key: str, files: dict[str, bytes], rows: list[Row]) -> Iterator[str]:
        missing = {"json", "safetensors"} - set(files)
        if missing:
            yield f"has no {' and no '.join(sorted(missing))}"
            return
        try:
            scene, tensors = Scene.from_json(files["json"]), load(files["safetensors"])
        except (SceneError, SafetensorError, ValueError) as error:
            yield f"cannot be read: {error}"
            return
        if scene.scene_id != key:
            yield f"its record is of {scene.scene_id}"
        yield from _check_rows(scene, rows)
        yield from self._tensors(scene, tensors)

    def _tensors(self, scene: Scene, tensors: dict[str, Tensor]) -> Iterator[str]:
        expected = set()
        apart = bool(self.settings.get("texts_apart"))
        for name in scene_texts(scene, apart):
            expected.add(name)
            yield from self._text(name, tensors)
        for i in range(len(scene.references)):
            expected.add(reference_tensor_key(i))
            if reference_tensor_key(i) not in tensors:
                yield f"reference {i} has no latents"
            else:
                yield from self._reference(i, scene, tensors)
        for shot in scene.shots:
            if shot.encoded is not None:
                expected |= {shot_tensor_key(shot.index, name) for name in LATENT_TENSORS}
                yield from self._latents(shot, tensors)
                if scene.latents is not None and scene.latents.image_hash:
                    expected.add(shot_tensor_key(shot.index, IMAGE_TENSOR))
                    yield from self._image(shot_tensor_key(shot.index, IMAGE_TENSOR), tensors)
            if shot.predicted_states:
                name = shot_tensor_key(shot.index, "states_text")
                expected.add(name)
                count = len(tensors[name]) if name in tensors else 0
                if count != len(shot.predicted_states):
                    yield f"{name} holds {count} states, the record {len(shot.predicted_states)}"
        for name in sorted(set(tensors) - expected - {STORY_TEXT}):
            yield f"{name} belongs to nothing in the record"
        for name, tensor in tensors.items():
            if tensor.dtype != self.dtype:
                yield f"{name} is {tensor.dtype}, dataset.json says {self.settings['dtype']}"
            if not torch.isfinite(tensor).all():
                yield f"{name} has values that are not finite"

    def _text(self, name: str, tensors: dict[str, Tensor]) -> Iterator[str]:
        if name not in tensors:
            yield f"{name} is missing: a text without its embedding"
        elif tensors[name].ndim != 2 or not len(tensors[name]):
            yield f"{name} is {list(tensors[name].shape)}, expected [tokens, width]"
        else:
            yield from self._same("the width of texts", name, tensors[name].shape[1])

    def _image(self, name: str, tensors: dict[str, Tensor]) -> Iterator[str]:
        if name not in tensors:
            yield f"{name} is missing: a shot without the embedding of its first frame"
        elif tensors[name].ndim != 2 or len(tensors[name]) != 1:
            yield f"{name} is {list(tensors[name].shape)}, expected [1, width]"
        else:
            yield from self._same("the width of image embeddings", name, tensors[name].shape[1])

    def _latents(self, shot: Shot, tensors: dict[str, Tensor]) -> Iterator[str]:
        """Latent frames fit the encoded frames: n frames give 1 + (n - 1) / stride, the same stride in all shots."""
        assert shot.encoded is not None
        named = {name: tensors.get(shot_tensor_key(shot.index, name)) for name in LATENT_TENSORS}
        for name, tensor in named.items():
            if tensor is None:
                yield f"{shot_tensor_key(shot.index, name)} is missing"
            elif tensor.ndim != 4:
                yield f"{shot_tensor_key(shot.index, name)} is {list(tensor.shape)}, expected [C,F,H,W]"
        if any(tensor is None or tensor.ndim != 4 for tensor in named.values()):
            return
        span, at = shot.encoded, f"s{shot.index:03d}"
        shapes = {name: tuple(tensor.shape) for name, tensor in named.items() if tensor is not None}
        channels, count, height, width = shapes["latent_mean"]
        yield from self._same("latent channels", at, channels)
        if [span.height, span.width] not in self.sizes:
            known = ", ".join(map(in_words, self.sizes))
            yield f"{at} is encoded at {in_words((span.height, span.width))}, dataset.json knows {known}"
        yield from self._same("pixels per latent", at, (span.height / height, span.width / width))
        if (count > 1) != (span.num_frames > 1) or (count > 1 and (span.num_frames - 1) % (count - 1)):
            yield f"{at} has {count} latent frames for {span.num_frames} encoded frames"
        elif count > 1:
            yield from self._same("frames per latent frame", at, (span.num_frames - 1) // (count - 1))
        for name, shape in shapes.items():
            wanted = (channels, count if name.startswith("latent") else 1, height, width)
            if shape != wanted:
                yield f"{shot_tensor_key(shot.index, name)} is {list(shape)}, expected {list(wanted)}"

    def _reference(self, index: int, scene: Scene, tensors: dict[str, Tensor]) -> Iterator[str]:
        """It stands before the shots of its scene, so it is as large."""
        sizes = {
            tuple(tensors[key].shape[2:])
            for shot in scene.shots
            if shot.encoded and (key := shot_tensor_key(shot.index, "latent_mean")) in tensors
        }
        found = tuple(tensors[reference_tensor_key(index)].shape[2:])
        if found not in sizes:
            yield f"reference {index} has latents of {list(found)}, the shots of its scene {sorted(sizes)}"

    def _same(self, what: str, name: str, value: Any) -> Iterator[str]:
        known = self.common.setdefault(what, value)
        if value != known:
            yield f"{name}: {what} {value}, in the samples before it {known}"


def _check_rows(scene: Scene, rows: list[Row]) -> Iterator[str]:
    """The record against manifest.parquet."""
    if [row["shot_id"] for row in rows] != [shot.shot_id for shot in scene.shots]:
        yield f"has {len(scene.shots)} shots, manifest.parquet {len(rows)}, or others"
        return
    if not any(shot.encoded for shot in scene.shots):
        yield "no shot of it is encoded"
    for shot, row in zip(scene.shots, rows, strict=True):
        said = {
            "encoded_frames": shot.encoded.num_frames if shot.encoded else 0,
            "start_pts": shot.start_pts, "end_pts": shot.end_pts, "start_frame": shot.start_frame,
            "end_frame": shot.end_frame, "prompt": shot.prompt, "filtered": shot.filtered,
        }  # fmt: skip
        if row.get("encoded_height") is not None:  # an earlier version did not say
            said["encoded_height"] = shot.encoded.height if shot.encoded else 0
            said["encoded_width"] = shot.encoded.width if shot.encoded else 0
        for name, value in said.items():
            if row[name] != value:
                yield f"{name} of shot {shot.index} is {value!r}, manifest.parquet says {row[name]!r}"
        if shot.encoded is not None and not (shot.prompt or scene.story):
            yield f"shot {shot.index} has no caption"
        if shot.encoded is None and not shot.filtered:
            yield f"shot {shot.index} is not encoded and no filter says why"

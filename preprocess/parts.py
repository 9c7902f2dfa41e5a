"""A part: all that one source became, in one tar that is whole or absent. "Done" means its part is there.

Its first member `part.json` holds the rows for sources.parquet and manifest.parquet; the samples of its scenes follow.
Failed and filtered sources have a part too, with rows only.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from infra.storage import atomic_path
from models.scene import Scene
from preprocess.filters import SCORES
from preprocess.shards import add_member, first_json, new_tar, read_samples

Row = dict[str, Any]


@dataclass
class Part:
    """`source` is the row of sources.parquet, `shots` the rows of manifest.parquet (their `shard` still empty)."""

    source: Row
    shots: list[Row] = field(default_factory=list)

    @property
    def keys(self) -> list[str]:
        """Keys of the samples, in order."""
        return list(dict.fromkeys(row["key"] for row in self.shots if row["key"]))


def part_path(folder: Path, video_id: str) -> Path:
    return folder / f"{video_id}.tar"


def write_part(folder: Path, part: Part, samples: Iterator[tuple[str, dict[str, bytes]]]) -> Path:
    """Write a part in one step. `samples` are taken one at a time, so memory holds one scene."""
    path = part_path(folder, part.source["video_id"])
    with atomic_path(path) as temporary, new_tar(temporary) as tar:
        add_member(tar, "part.json", json.dumps({"source": part.source, "shots": part.shots}).encode())
        for key, files in samples:
            for extension in sorted(files):
                add_member(tar, f"{key}.{extension}", files[extension])
    return path


def read_part(path: Path) -> Part | None:
    """The rows of a part; None where there is no whole part (it is then made again)."""
    try:
        return Part(**first_json(path))  # type: ignore[arg-type]
    except (OSError, tarfile.TarError, ValueError, TypeError):
        return None


def part_samples(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Samples of a part, in order."""
    return ((key, files) for key, files in read_samples(path) if key != "part")


_SUMMED = (
    "scenes", "shots", "encoded_shots", "encoded_frames", "source_frames", "used_frames", "decoded_frames",
    "damaged_packets",
)  # fmt: skip


def join_parts(paths: Sequence[Path], folder: Path) -> Row | None:
    """One part from those of the scenes of one source, in order; its row. None where some are not there yet.

    If any scene is written, those of a part that failed are set aside. Joined twice, they give the same bytes.
    """
    parts = [part for path in paths if (part := read_part(path)) is not None]
    if len(parts) < len(paths):
        return None
    written = [part for part in parts if part.source["scenes"]]
    if written:
        for part in parts:
            if part.source["status"] == "failed":
                for row in part.shots:
                    row["set_aside"] = row["set_aside"] or f"{part.source['stage']}: {part.source['reason']}"
                part.source |= {"encoded_shots": 0, "encoded_frames": 0}
    first = next(iter(written or [part for part in parts if part.source["stage"]]), parts[0]).source
    source = parts[0].source | {name: first[name] for name in ("status", "stage", "reason")}
    source |= {name: sum(part.source[name] for part in parts) for name in _SUMMED}
    source["attempts"] = max(part.source["attempts"] for part in parts)
    rows = [row for part in parts for row in part.shots]
    write_part(folder, Part(source, rows), (sample for path in paths for sample in part_samples(path)))
    return source


def shot_rows(scene: Scene, written: bool, aside: str = "") -> list[Row]:
    """Rows of manifest.parquet: one per shot, with an empty key where the scene is not written.

    `aside`: why a scene of a source that is written is not, "stage: reason".
    """
    return [
        {
            "video_id": scene.video_id,
            "source": scene.source.path,
            "scene_id": scene.scene_id,
            "shot_id": shot.shot_id,
            "index": shot.index,
            "key": scene.scene_id if written else "",
            "shard": "",
            "start_s": shot.start_s,
            "duration_s": shot.duration_s,
            "start_pts": shot.start_pts,
            "end_pts": shot.end_pts,
            "time_base_num": shot.time_base[0],
            "time_base_den": shot.time_base[1],
            "start_frame": shot.start_frame,
            "end_frame": shot.end_frame,
            "transition": shot.transition,
            "confidence": shot.confidence,
            "blend_frames": shot.blend_frames,
            "blend_pts": shot.blend_pts,
            "encoded_frames": shot.encoded.num_frames if written and shot.encoded else 0,
            "encoded_start_frame": shot.encoded.start_frame if written and shot.encoded else -1,
            "encoded_height": shot.encoded.height if written and shot.encoded else 0,
            "encoded_width": shot.encoded.width if written and shot.encoded else 0,
            "prompt": shot.prompt,
            "sentence": shot.sentence,
            "camera": shot.camera,
            "label": shot.label,
            "references": json.dumps([asdict(one) for one in scene.references]) if scene.references else "",
            "captions": scene.captions.backend if scene.captions else "",
            "scores": json.dumps(shot.scores, sort_keys=True),
            "filtered": shot.filtered,
            "set_aside": aside,
            "duplicate_of": "",
            "signature": shot.signature,
            **{f"score_{name}": shot.scores.get(name) for name in SCORES},
        }
        for shot in scene.shots
    ]

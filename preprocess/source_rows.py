"""What sources.parquet says of a video: how it ended, what it is, and what its result depends on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from preprocess.parts import Row
from preprocess.references import references_text
from preprocess.sources import fields_text, readable

if TYPE_CHECKING:
    from preprocess.unit import Unit
    from preprocess.workplace import Workplace


def source_row(unit: Unit, place: Workplace) -> Row:
    """The row of sources.parquet."""
    info, count, file = unit.info, unit.count, unit.file
    scenes = [scene for scene in unit.scenes if scene.scene_id not in unit.aside]
    encoded = [shot.encoded for scene in scenes for shot in scene.shots if shot.encoded]
    return {
        "video_id": file.video_id,
        "name": file.name,
        "path": readable(file.path),
        "status": unit.status,
        "stage": unit.stage,
        "reason": unit.reason,
        "attempts": unit.attempts,
        "lost": json.dumps(unit.lost) if unit.lost else "",
        "scenes": sum(any(s.encoded for s in scene.shots) for scene in scenes) if unit.status == "written" else 0,
        "shots": len(unit.shots),
        "encoded_shots": len(encoded),
        "encoded_frames": sum(span.num_frames for span in encoded),
        "source_frames": len(info.pts) if info else 0,
        "used_frames": count.shown if count else 0,
        "decoded_frames": (count.decoded if count else 0) + (info.probe_frames if info else 0),
        "damaged_packets": count.damaged if count else 0,
        "decoder": count.decoder if count else "",
        "decoder_reason": (count.reason if count else "") or (info.decoder_reason if info else ""),
        **({name: getattr(info, name) if info else default for name, default in _INFO.items()}),
        "colour": str(info.colour) if info else "",
        **dict(zip(("picture_height", "picture_width"), unit.picture or (0, 0), strict=True)),
        **dict(zip(("encoded_height", "encoded_width"), unit.size or (0, 0), strict=True)),
        "bytes": file.bytes,
        "mtime_ns": file.mtime_ns,
        "sha256": unit.sha256,
        "captions": readable(file.captions or ""),
        "captions_mtime_ns": file.captions_mtime_ns,
        "captions_sha256": unit.captions_sha256,
        "frames_fps": file.fps or 0.0,
        "fields": fields_text(file),
        "references": references_text(unit.references),
        **place.keys(unit.size),
    }


_INFO: dict[str, Any] = {
    "container": "", "codec": "", "pix_fmt": "", "width": 0, "height": 0, "fps": 0.0, "variable_rate": False,
    "duration_s": 0.0, "rotation": 0, "hdr": False, "interlaced": False, "audio": False, "mirrored": False,
    "truncated": "",
}  # fmt: skip

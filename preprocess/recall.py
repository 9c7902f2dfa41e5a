"""Other captions, same pictures: shots and latents of an earlier result are kept; words and scenes are made anew."""

from __future__ import annotations

import tarfile
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load
from torch import Tensor

from models.scene import PIXEL_TENSORS, Scene, SceneError, shot_tensor_key
from preprocess.decode import DecodeCount
from preprocess.probe import VideoInfo
from preprocess.shards import ShardReader
from preprocess.spans import RawShot


def read_sample(path: str, key: str) -> dict[str, bytes]:
    """One sample of a shard or part."""
    file = Path(path)
    return ShardReader(file.parent).sample(file.name, key)


def recall_shots(places: dict[str, str], info: VideoInfo) -> list[RawShot] | None:
    """The shots of samples `{key: tar}` as they were found; None where they cannot be taken over."""
    try:
        scenes = [Scene.from_json(read_sample(path, key)["json"]) for key, path in places.items()]
    except (OSError, KeyError, tarfile.TarError, SceneError):
        return None
    shots = []
    for scene in scenes:
        for shot in scene.shots:
            pts = shot.encoded.pts if shot.encoded else []
            frames = [bisect_left(info.pts, at) for at in pts]
            first = bisect_left(info.pts, shot.start_pts)
            if first != shot.start_frame or [info.pts[i] for i in frames if i < len(info.pts)] != pts:
                return None  # the index lists frames that are never shown: only a decode knows their numbers
            shots.append(
                RawShot(
                    shot.start_frame,
                    shot.end_frame,
                    shot.start_pts,
                    shot.end_pts,
                    shot.transition,
                    shot.confidence,
                    list(shot.blend_frames),
                    list(shot.blend_pts),
                    span_frames=frames,
                    span_pts=list(pts),
                    scores={name: value for name, value in shot.scores.items() if name != "caption_overlap"},
                    filtered=shot.filtered,
                    signature=shot.signature,
                    recalled=(scene.scene_id, shot.index),
                )
            )
    return shots


def recall_latents(places: dict[str, str], shots: Sequence[RawShot]) -> dict[str, Tensor]:
    """The tensors of recalled shots that do not depend on captions, by their full names in a scene of these shots."""
    found: dict[str, Tensor] = {}
    samples: dict[str, dict[str, Tensor]] = {}
    for i, shot in enumerate(shots):
        assert shot.recalled is not None
        key, index = shot.recalled
        if key not in samples:
            samples[key] = load(read_sample(places[key], key)["safetensors"])
        earlier = {name: samples[key].get(shot_tensor_key(index, name)) for name in PIXEL_TENSORS}
        found |= {shot_tensor_key(i, name): value for name, value in earlier.items() if value is not None}
    return found


def recalled_count(row: dict[str, object], info: VideoInfo) -> DecodeCount:
    """What the earlier run counted, for the source's row; nothing is decoded now."""
    return DecodeCount(
        decoded=int(str(row["decoded_frames"])) - info.probe_frames,
        shown=int(str(row["used_frames"])),
        damaged=int(str(row["damaged_packets"])),
        decoder=str(row["decoder"]),
        reason=str(row["decoder_reason"] or ""),
    )

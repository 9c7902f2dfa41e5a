"""Other captions, same pictures: shots and latents of an earlier result are kept, only the words are made anew."""

from __future__ import annotations

import tarfile
from bisect import bisect_left
from pathlib import Path

from safetensors.torch import load
from torch import Tensor

from models.scene import PIXEL_TENSORS, Scene, SceneError
from preprocess.decode import DecodeCount
from preprocess.probe import VideoInfo
from preprocess.shards import ShardReader
from preprocess.spans import RawShot


def read_sample(path: str, key: str) -> dict[str, bytes]:
    """One sample of a shard or part."""
    file = Path(path)
    return ShardReader(file.parent).sample(file.name, key)


def recall_scenes(places: dict[str, str], info: VideoInfo) -> tuple[list[Scene], list[RawShot]] | None:
    """Scenes without captions, and their shots, of samples `{key: tar}`; None where they cannot be taken over."""
    try:
        scenes = [Scene.from_json(read_sample(path, key)["json"]) for key, path in places.items()]
    except (OSError, KeyError, tarfile.TarError, SceneError):
        return None
    shots = []
    for scene in scenes:
        scene.story, scene.entities, scene.references, scene.captions = "", [], [], None
        for shot in scene.shots:
            shot.prompt = shot.sentence = shot.camera = ""
            shot.label, shot.entities, shot.states, shot.predicted_states = None, [], [], []
            shot.scores.pop("caption_overlap", None)
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
                    scores=dict(shot.scores),
                    filtered=shot.filtered,
                    signature=shot.signature,
                )
            )
    return scenes, shots


def recall_latents(path: str, key: str) -> dict[str, Tensor]:
    """The tensors of an earlier sample that do not depend on captions, by their full names."""
    tensors = load(read_sample(path, key)["safetensors"])
    shots = {name: value for name, value in tensors.items() if name.startswith("s")}  # references are read anew
    return {name: value for name, value in shots.items() if name.partition(".")[2] in PIXEL_TENSORS}


def recalled_count(row: dict[str, object], info: VideoInfo) -> DecodeCount:
    """What the earlier run counted, for the source's row; nothing is decoded now."""
    return DecodeCount(
        decoded=int(str(row["decoded_frames"])) - info.probe_frames,
        shown=int(str(row["used_frames"])),
        damaged=int(str(row["damaged_packets"])),
        decoder=str(row["decoder"]),
    )

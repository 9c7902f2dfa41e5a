"""Write ToyWorld scenes as real H.264 mp4 files, with their truth and the captions a captioner would give.

`X.mp4` comes with `X.truth.json` (everything that is true of it) and, unless declined, `X.json` (story, entities, shot
prompts, sentences, states: what prepare reads as a sidecar). The same arguments give the same bytes with the same
version of the encoder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np

from toyworld.render import render_scene, states
from toyworld.text import describe, sentence, shot_prompt, state_sentences, story, story_attributes
from toyworld.world import ToyScene

TIME_BASE = Fraction(1, 90_000)


@dataclass(frozen=True)
class Footage:
    """How real footage differs from the bare world: test material for prepare.

    fps: None keeps the scene's; another rate repeats or drops frames. variable_rate: frame times jitter and one frame
    in six is missing. rotation: stored turned, with metadata that turns it back (degrees clockwise). letterbox: black
    bars above and below, each this share of the picture's height. noise: standard deviation, of 255. logo: a still,
    half-transparent mark in the lower right corner.
    """

    fps: float | None = None
    variable_rate: bool = False
    rotation: Literal[0, 90, 180, 270] = 0
    letterbox: float = 0.0
    noise: float = 0.0
    logo: bool = False


@dataclass(frozen=True)
class VideoFiles:
    video: Path
    truth: Path
    captions: Path | None
    num_frames: int
    sha256: str  # of the video file


def write_video(
    scene: ToyScene,
    path: Path | str,
    *,
    size: int = 256,
    fps: float | None = None,
    crf: int = 12,
    footage: Footage | None = None,
    captions: bool = True,
    phrasing_seed: int | None = None,
) -> VideoFiles:
    """Render `scene` to `path` (must end in .mp4), `size` pixels square and even, with its truth and captions.

    `fps` is short for Footage(fps=...). `phrasing_seed` varies the wording of prompts and sentences; None gives the
    canonical one. Raises ValueError for an odd size or another suffix.
    """
    path = Path(path)
    look = footage or Footage()
    rate = fps or look.fps or scene.fps
    if path.suffix != ".mp4":
        raise ValueError(f"{path}: ToyWorld writes .mp4 files; give a path that ends in .mp4")
    if size % 2 or size < 32:
        raise ValueError(f"size={size}: H.264 yuv420p needs an even size; give 32 or more")
    drawn, truth = render_scene(scene, size)
    source, pts = _timing(scene, rate, look)
    frames = _dress(drawn[source], look, scene)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    _encode(frames, pts, rate, partial, crf)
    if look.rotation:
        _set_rotation(partial, look.rotation, frames.shape[2], frames.shape[1])
    os.replace(partial, path)

    shots = _shots(scene, source, pts, rate, phrasing_seed)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    bar = _bar(look, size)
    record = {
        "format": "toyworld-truth-1",
        "scene_id": scene.scene_id,
        "scene": scene.to_dict(),
        "video": {
            "file": path.name, "sha256": digest, "width": size, "height": size + 2 * bar, "fps": float(rate),
            "crf": crf, "num_frames": len(frames), "time_base": [TIME_BASE.numerator, TIME_BASE.denominator],
            "pts": pts, "content_box": [0, bar, size, bar + size], "footage": asdict(look),
        },
        "story": story(scene),
        "cuts": [{"frame": s["start_frame"], "pts": s["start_pts"], "transition": s["transition"]} for s in shots[1:]],
        "shots": shots,
        "frames": [truth[k] for k in source],
    }  # fmt: skip
    truth_path = path.with_suffix(".truth.json")
    _write_json(truth_path, record)
    captions_path = path.with_suffix(".json") if captions else None
    if captions_path:
        _write_json(captions_path, _captions(scene, shots))
    return VideoFiles(path, truth_path, captions_path, len(frames), digest)


def _write_json(path: Path, record: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(record, sort_keys=True, separators=(",", ":")) + "\n", encoding="ascii")
    os.replace(partial, path)


def _timing(scene: ToyScene, rate: float, look: Footage) -> tuple[list[int], list[int]]:
    """Which drawn frame each written frame shows, and its PTS in TIME_BASE. Every shot keeps its first frame."""
    step = Fraction(rate).limit_denominator(1001)
    count = math.ceil(scene.num_frames * step / scene.fps)
    times = [Fraction(n) / step for n in range(count)]
    source = [min(int(t * scene.fps), scene.num_frames - 1) for t in times]
    if look.variable_rate:
        rng = np.random.default_rng([scene.seed, scene.index, 1])
        first = {0, *scene.cuts}
        keep = [
            n for n, s in enumerate(source) if (s in first and source[n - 1] != s) or n == 0 or rng.random() > 1 / 6
        ]
        times = [times[n] + (Fraction(int(rng.integers(-25, 26)), 100) / step if n else 0) for n in keep]
        source = [source[n] for n in keep]
    return source, [round(t / TIME_BASE) for t in times]


def _bar(look: Footage, size: int) -> int:
    return 2 * round(look.letterbox * size / 2)


def _dress(frames: np.ndarray, look: Footage, scene: ToyScene) -> np.ndarray:
    """Noise, logo, bars and rotation on uint8 frames [T,H,W,3]."""
    if look.noise > 0:
        rng = np.random.default_rng([scene.seed, scene.index, 2])
        noisy = frames + look.noise * rng.standard_normal(frames.shape, dtype=np.float32)
        frames = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
    if look.logo:
        frames = frames.copy()
        side = max(frames.shape[1] // 12, 4)
        corner = frames[:, -2 * side : -side, -2 * side : -side]
        corner[:] = corner // 2 + 127
    bar = _bar(look, frames.shape[1])
    if bar:
        frames = np.pad(frames, ((0, 0), (bar, bar), (0, 0), (0, 0)))
    return np.rot90(frames, k=look.rotation // 90, axes=(1, 2)) if look.rotation else frames


def _to_yuv420(image: np.ndarray) -> np.ndarray:
    """RGB uint8 [H,W,3] -> planar Y, U, V [H*3/2, W], BT.601 in studio range: the same on every platform."""
    height, width = image.shape[:2]
    rgb = image.astype(np.float64) / 255.0
    y = rgb @ (65.481, 128.553, 24.966) + 16.0
    coarse = rgb.reshape(height // 2, 2, width // 2, 2, 3).mean((1, 3))
    u = coarse @ (-37.797, -74.203, 112.0) + 128.0
    v = coarse @ (112.0, -93.786, -18.214) + 128.0
    planes = np.concatenate([y.ravel(), u.ravel(), v.ravel()])
    return np.rint(planes).astype(np.uint8).reshape(height * 3 // 2, width)


def _encode(frames: np.ndarray, pts: list[int], rate: float, path: Path, crf: int) -> None:
    """H.264 yuv420p in one thread with fixed metadata, so that the same frames give the same file."""
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact", "movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1001))
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt = "yuv420p"
        stream.time_base = TIME_BASE
        stream.codec_context.time_base = TIME_BASE
        # mbtree off: on pictures a few macroblocks wide x264's reads memory that it never wrote, so files differ by run
        stream.options = {
            "crf": str(crf),
            "preset": "medium",
            "x264-params": "threads=1:mbtree=0:keyint=48:log-level=none",
        }
        for image, at in zip(frames, pts, strict=True):
            frame = av.VideoFrame.from_ndarray(_to_yuv420(image), format="yuv420p")
            frame.pts, frame.time_base = at, TIME_BASE
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _set_rotation(path: Path, degrees: int, width: int, height: int) -> None:
    """Write the display matrix of the track header (ISO 14496-12, 8.3.2): players turn by `degrees` clockwise."""
    data = bytearray(path.read_bytes())
    box = data.index(b"tkhd")
    start = box + 8 + (32 if data[box + 4] == 1 else 20) + 16  # version and times, then 16 bytes to the matrix
    one = 1 << 16
    turn = {
        90: (0, one, -one, 0, height * one, 0),
        180: (-one, 0, 0, -one, width * one, height * one),
        270: (0, -one, one, 0, 0, width * one),
    }[degrees]
    a, b, c, d, x, y = turn
    struct.pack_into(">9i", data, start, a, b, 0, c, d, 0, x, y, 1 << 30)
    path.write_bytes(data)


def _shots(
    scene: ToyScene, source: list[int], pts: list[int], rate: float, phrasing_seed: int | None
) -> list[dict[str, Any]]:
    """Per shot: where it lies in written frames and PTS, how it begins, what is said of it and its states."""
    shown = np.asarray(source)
    end_pts = pts[-1] + round(1 / (Fraction(rate).limit_denominator(1001) * TIME_BASE))
    starts = [0, *scene.cuts, scene.num_frames]

    def written(drawn_frame: int) -> int:
        return int(np.searchsorted(shown, drawn_frame))  # first written frame that shows it or a later one

    def when(frame: int) -> int:
        return pts[frame] if frame < len(pts) else end_pts

    shots = []
    for k, shot in enumerate(scene.shots):
        rng = None if phrasing_seed is None else np.random.default_rng([phrasing_seed, scene.seed, scene.index, k])
        begin, end = written(starts[k]), written(starts[k + 1])
        before = shot.transition_frames // 2 if shot.transition == "fade" else 0
        after = before if shot.transition == "fade" else shot.transition_frames
        blend = [written(starts[k] - before), written(starts[k] + after)]
        said = state_sentences(scene, k)
        shots.append({
            "index": k, "start_frame": begin, "end_frame": end, "start_pts": when(begin), "end_pts": when(end),
            "transition": shot.transition, "transition_frames": blend, "transition_pts": [when(f) for f in blend],
            "prompt": shot_prompt(scene, k, rng), "sentence": sentence(scene, k, rng),
            "style": shot.style, "camera": shot.camera, "shot_size": shot.shot_size, "action": shot.action,
            "states": [
                {"name": name, "text": text, "frame": written(starts[k] + frame) - begin}
                for (name, frame), (text, _) in zip(states(shot), said, strict=True)
            ],
        })  # fmt: skip
    return shots


def _captions(scene: ToyScene, shots: list[dict[str, Any]]) -> dict[str, Any]:
    """What a captioner would say of the video: no unsaid trait, no truth per frame."""
    cast = story_attributes(scene).characters
    return {
        "story": story(scene),
        "entities": [
            {"id": f"character_{k + 1}", "name": f"Character {k + 1}", "description": describe(who)}
            for k, who in enumerate(cast)
        ],
        "shots": [
            {
                **{key: shot[key] for key in ("start_frame", "end_frame", "prompt", "sentence", "camera")},
                "states": [{"text": s["text"], "frame": s["frame"]} for s in shot["states"]],
            }
            for shot in shots
        ],
    }

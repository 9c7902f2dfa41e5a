"""Pictures and videos of the report as data URIs: contact sheets of prepared shots, generated scenes with strips."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from models.scene import Scene, Shot
from pipelines.report import SceneSheet, ShotSheet, Take
from preprocess.parts import Row

KEY_SIZE = 96  # pixels of the longer side of a picture


def image_uri(frame: np.ndarray, side: int = KEY_SIZE) -> str:
    """uint8 [H,W,3] as a data URI: JPEG, scaled down to fit `side` where it is larger."""
    buffer = io.BytesIO()
    image = Image.fromarray(frame)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    image.save(buffer, "JPEG", quality=86)
    return _uri("image/jpeg", buffer.getvalue())


def video_uri(path: Path) -> str:
    """An mp4 file as a data URI."""
    return _uri("video/mp4", path.read_bytes())


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def take(path: Path, cuts: list[int], label: str, note: str) -> Take:
    """A generated video with a strip of three frames per shot, first, middle and last."""
    from sample.video_io import read_video

    frames, _ = read_video(path)
    edges = [0, *cuts, len(frames)]
    strip = [[image_uri(frames[k]) for k in _spread(begin, end)] for begin, end in zip(edges, edges[1:], strict=False)]
    return Take(label, note, video_uri(path), frames.shape[2], strip)


def scene_sheet(scene: Scene, source: Path, max_shots: int = 9) -> SceneSheet:
    """Contact sheet of a prepared scene: of each shot when it begins, how, its caption and three of its frames.

    A source that can no longer be read leaves the pictures out.
    """
    shots = [shot for shot in scene.shots if shot.encoded is not None][:max_shots]
    wanted = [_key_pts(shot) for shot in shots]
    pictures = frames_at(source, sorted({pts for row in wanted for pts in row}))
    return SceneSheet(
        source.name,
        scene.story,
        [
            ShotSheet(
                begins=shot.transition,
                when=f"{shot.start_s:.1f} s, lasts {shot.duration_s:.1f} s",
                caption=shot.prompt or shot.sentence,
                images=[image_uri(pictures[pts]) for pts in row if pts in pictures],
            )
            for shot, row in zip(shots, wanted, strict=True)
        ],
    )


def _key_pts(shot: Shot) -> list[int]:
    assert shot.encoded is not None
    pts = shot.encoded.pts
    return [pts[k] for k in _spread(0, len(pts))]


def _spread(begin: int, end: int) -> list[int]:
    """First, middle and last of begin..end-1; fewer where there are fewer."""
    return sorted({begin, (begin + end - 1) // 2, end - 1})


def frames_at(source: Path, wanted: list[int], fps: float | None = None) -> dict[int, np.ndarray]:
    """Frames of a video by PTS, upright, at least KEY_SIZE on each side; with `fps` of a folder of numbered images."""
    from preprocess.decode import DecodeCount, frames
    from preprocess.outcome import SetAside
    from preprocess.probe import probe
    from preprocess.stills import probe_images

    found: dict[int, np.ndarray] = {}
    try:
        info = probe_images(source, fps) if fps else probe(str(source))
        for frame in frames(str(source), info, KEY_SIZE, KEY_SIZE, count=DecodeCount()):
            if frame.pts in wanted:
                found[frame.pts] = frame.image
            if wanted and frame.pts >= wanted[-1]:
                break
    except SetAside:
        pass  # a contact sheet without pictures is better than no report
    return found


@contextmanager
def source_here(row: Row) -> Iterator[Path | None]:
    """The source of a row of sources.parquet as a local path, a member of a tar as a temporary copy.

    None where it is gone, is of another size by now, or lies at an address: nothing is fetched for a page.
    """
    from preprocess.remote import copy_here, is_address
    from preprocess.tars import find_member

    path, size = Path(row["path"]), row["bytes"]
    if is_address(row["path"]) or not path.exists():
        yield None
    elif path.suffix.lower() == ".tar":
        name = row["name"].rpartition(f"{path.name}/")[2]
        span = find_member(str(path), name)
        if span is None or span[1] != size:
            yield None
            return
        with TemporaryDirectory() as folder:
            copy = Path(folder) / f"source{Path(name).suffix}"
            copy_here(str(path), span, copy)
            yield copy
    else:
        yield path if path.is_dir() or path.stat().st_size == size else None

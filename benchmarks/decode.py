"""Decoders on the same files: frames per CPU second and agreement of PyAV and the installed decord.

    python benchmarks/decode.py folder=my_videos

Both decode every frame to about 64x64, one thread, the way prepare does. `--quick` makes its own small files.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from _common import Goal, finish, parser, table

from preprocess.decode import DecodeCount, frames
from preprocess.outcome import SetAside
from preprocess.probe import VideoInfo, probe
from preprocess.sources import list_sources

SIZE = 64
FRAMES = 150  # of each file at most


@dataclass
class Reading:
    decoder: str
    pts: list[int]
    images: list[np.ndarray]
    cpu_s: float
    error: str = ""


def read(path: str, info: VideoInfo, decoder: str) -> Reading:
    count, pts, images = DecodeCount(), [], []
    began = time.process_time()
    try:
        for frame in frames(path, replace(info, decoder=decoder), SIZE, SIZE, count=count):  # type: ignore[arg-type]
            pts.append(frame.pts)
            images.append(frame.image)
            if len(pts) == FRAMES:
                break
    except SetAside as error:
        return Reading(count.decoder, pts, images, time.process_time() - began, error.reason)
    return Reading(count.decoder, pts, images, time.process_time() - began)


def main() -> int:
    import decord  # noqa: F401  its import is not part of the measurement

    arguments = parser(__doc__.splitlines()[0]).parse_args()
    options = dict(item.split("=", 1) for item in arguments.overrides)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.get("folder") or _own_files(Path(scratch)))
        rows, speeds, disagree, refused = [], {"pyav": [0, 0.0], "decord": [0, 0.0]}, 0, 0
        for file in list_sources([folder]).files:
            if file.span or file.error:
                continue  # a member of a tar is no file that both can open
            try:
                info = probe(file.path)
            except SetAside as error:
                refused += 1
                rows.append([file.name, "-", "-", "-", error.reason[:60]])
                continue
            pyav, decord = read(file.path, info, "pyav"), read(file.path, info, "decord")
            note = info.decoder_reason
            if decord.decoder != "decord":
                note = f"decord does not see these frames; {note}"
            else:
                same = pyav.pts == decord.pts
                difference = max(
                    (_difference(a, b) for a, b in zip(pyav.images, decord.images, strict=False)), default=0
                )
                if info.decoder == "decord":
                    disagree += not same or difference > 4.0
                    for name, got in (("pyav", pyav), ("decord", decord)):
                        speeds[name][0] += len(got.pts)
                        speeds[name][1] += got.cpu_s
                note = f"{'same times' if same else 'OTHER TIMES'}, differs by {difference:.1f}; {note}".rstrip("; ")
            speed = [f"{len(r.pts) / max(r.cpu_s, 1e-9):.0f}" for r in (pyav, decord)]
            rows.append([file.name, info.decoder, *speed, note])
    rate = {name: count / seconds if seconds else 0.0 for name, (count, seconds) in speeds.items()}
    version = importlib.metadata.version("decord2")
    record = {
        "benchmark": "decode",
        "decord2": version,
        "files": len(rows),
        "refused": refused,
        "frames_per_cpu_s": {name: round(value, 1) for name, value in rate.items()},
        "disagree": disagree,
    }
    goals = [Goal("plain files on which the decoders disagree", disagree, "<", 1, not arguments.quick)]
    header = ["file", "chosen", "PyAV frames/CPU-s", f"decord2 {version}", "note"]
    return finish(record, goals, table(header, rows), as_json=arguments.json)


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b).mean()) if a.shape == b.shape else 255.0


def _own_files(folder: Path) -> Path:
    from toyworld.video import Footage, write_video
    from toyworld.world import sample_scene

    for index, look in enumerate((Footage(), Footage(fps=24), Footage(variable_rate=True), Footage(rotation=90))):
        scene = sample_scene("small", seed=1, index=index, num_shots=2)
        write_video(scene, folder / f"{index}.mp4", size=128, footage=look, captions=False)
    return folder


if __name__ == "__main__":
    sys.exit(main())

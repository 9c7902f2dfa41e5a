"""Decode: decord and PyAV give the same frames and times; odd files come out right; damage is bounded and named."""

from __future__ import annotations

import csv
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from preprocess.decode import DecodeCount, Frame, cover_size, frames
from preprocess.outcome import Failed
from preprocess.probe import VideoInfo, probe
from tests.preprocess.videos import moving_square, write
from toyworld.render import render_scene
from toyworld.video import Footage, write_video
from toyworld.world import sample_scene


def read(path: Path, height: int = 64, width: int = 64, **options) -> tuple[list[Frame], DecodeCount, VideoInfo]:
    info = probe(str(path))
    if "decoder" in options:
        info = replace(info, decoder=options.pop("decoder"))
    count = DecodeCount()
    return list(frames(str(path), info, height, width, count=count, **options)), count, info


def test_frames_have_their_pts_and_are_counted_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", moving_square(20, (0, 0, 0), (255, 255, 255)), pts=[i * i * 10 for i in range(20)])
    got, count, info = read(path)
    assert [frame.pts for frame in got] == info.pts
    assert [frame.index for frame in got] == list(range(20))
    assert count.decoded == count.shown == 20 and count.decoder == "decord"


@pytest.mark.parametrize("size", [(64, 64), (32, 48), (48, 32), (96, 96), (40, 16)])
def test_both_decoders_give_the_same_picture(tmp_path: Path, size: tuple[int, int]) -> None:
    """Also at widths where decord2 pads its rows."""
    path = write(tmp_path / "a.mp4", moving_square(12, (200, 100, 50), (20, 60, 220), size=160))
    a, _, info = read(path, *size)
    b, _, _ = read(path, *size, decoder="pyav")
    assert a[0].image.shape == b[0].image.shape == (*cover_size(info, *size), 3)
    assert [f.pts for f in a] == [f.pts for f in b]
    for x, y in zip(a, b, strict=True):
        assert np.abs(x.image.astype(int) - y.image).mean() < 2.0


def test_decoders_agree_on_real_clips(shared_data: Path) -> None:
    """Every clip that the probe gives to decord: same number of frames, same times, same pictures."""
    rows = [row for row in csv.DictReader((shared_data / "catalog.csv").open()) if row["kind"] != "broken"]
    shared, wrong = 0, []
    for row in rows:
        path = shared_data / row["file"]
        if probe(str(path)).decoder != "decord":
            continue
        a, count, _ = read(path, 32, 32, max_seconds=0.25)
        b, _, _ = read(path, 32, 32, max_seconds=0.25, decoder="pyav")
        shared += count.decoder == "decord"
        difference = max(np.abs(x.image.astype(int) - y.image).mean() for x, y in zip(a, b, strict=False))
        if [f.pts for f in a] != [f.pts for f in b] or difference > 4.0:
            wrong.append(f"{row['file']}: {len(a)} and {len(b)} frames, difference {difference:.1f}")
    assert shared > 60 and not wrong


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotated_files_stand_upright(tmp_path: Path, degrees: int) -> None:
    scene = sample_scene("small", seed=3, num_shots=1)
    files = write_video(scene, tmp_path / "a.mp4", size=64, footage=Footage(rotation=degrees))
    truth, _ = render_scene(scene, 64)
    got, _, _ = read(files.video)
    for frame, true in zip(got, truth, strict=True):
        assert np.abs(frame.image.astype(int) - true).mean() < 6.0


def test_wide_pictures_are_covered_and_cropped_in_the_middle(tmp_path: Path) -> None:
    image = np.zeros((90, 160, 3), np.uint8)
    image[:, 70:90] = 255  # a bar in the middle
    got, _, _ = read(write(tmp_path / "a.mp4", [image] * 4))
    assert got[0].image.shape == (64, 114, 3)
    crop = got[0].cropped(64, 64)
    assert crop.shape == (64, 64, 3)
    assert crop[:, 30:34].mean() > 200 and crop[:, :15].mean() < 60 and crop[:, -15:].mean() < 60
    assert got[0].small().shape == (27, 48, 3)


def test_a_cap_on_seconds_stops_the_decode(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", moving_square(80, (0, 0, 0), (255, 0, 0)), fps=20)
    got, count, _ = read(path, max_seconds=1.0)
    assert len(got) == 20 and count.decoded <= 21


def test_a_damaged_end_keeps_the_good_part(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", moving_square(60, (90, 30, 0), (255, 0, 0), size=128), fps=20)
    data = path.read_bytes()
    path.write_bytes(data[: int(0.7 * len(data))])
    got, count, _ = read(path)
    assert 20 < len(got) < 60
    assert [f.pts for f in got] == sorted({f.pts for f in got})


def test_the_deadline_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", moving_square(20, (0, 0, 0), (255, 0, 0)))
    with pytest.raises(Failed, match="took too long: given up after 1 frames"):
        read(path, deadline=time.monotonic() - 1)


def test_garbage_in_the_middle_is_counted_or_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ts", moving_square(100, (90, 30, 0), (255, 0, 0), size=128), fps=25)
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    start = len(data) // 3
    data[start : start + len(data) // 4] = rng.integers(0, 256, len(data) // 4, dtype=np.uint8).tobytes()
    path.write_bytes(bytes(data))
    try:
        got, count, info = read(path)
    except Failed as error:
        assert error.stage in ("probe", "decode")
    else:
        assert 10 < len(got) <= len(info.pts)

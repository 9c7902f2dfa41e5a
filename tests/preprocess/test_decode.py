"""Decode: decord and PyAV give the same frames and times; odd files come out right; damage is bounded and named."""

from __future__ import annotations

import csv
import io
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from preprocess import decode
from preprocess.decode import DecodeCount, Frame, cover_size, frames
from preprocess.letterbox import find_bars
from preprocess.outcome import Failed
from preprocess.probe import VideoInfo, probe
from preprocess.settings import PrepareSettings
from preprocess.spans import read_shots
from preprocess.stills import probe_images
from tests.preprocess.videos import damage_packet, moving_square, to_yuv, write, write_planes
from toyworld.render import render_scene
from toyworld.video import Footage, write_video
from toyworld.world import sample_scene


def read(path: Path, height: int = 64, width: int = 64, **options) -> tuple[list[Frame], DecodeCount, VideoInfo]:
    info = probe(str(path))
    info = replace(info, **{name: options.pop(name) for name in ("decoder", "interlaced") if name in options})
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


@pytest.mark.parametrize("seconds", [0.25, pytest.param(None, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_decoders_agree_on_real_clips(shared_data: Path, seconds: float | None) -> None:
    """Every clip that the probe gives to decord: same number of frames, same times, same pictures."""
    rows = [row for row in csv.DictReader((shared_data / "catalog.csv").open()) if row["kind"] != "broken"]
    shared, wrong = 0, []
    for row in rows:
        path = shared_data / row["file"]
        if probe(str(path)).decoder != "decord":
            continue
        a, count, _ = read(path, 32, 32, max_seconds=seconds)
        b, _, _ = read(path, 32, 32, max_seconds=seconds, decoder="pyav")
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


def marked(height: int = 48, width: int = 64) -> np.ndarray:
    """A picture of which no turn or mirror image looks the same: its corners differ."""
    image = np.full((height, width, 3), 120, np.uint8)
    image[:12, :12] = (230, 30, 30)
    image[:12, -12:] = (30, 220, 30)
    image[-12:, :12] = (30, 30, 230)
    image[-12:, -12:] = (230, 230, 30)
    return image


def write_still(path: Path, image: np.ndarray, **options) -> Path:
    """Four frames of one picture in H.264, colours and all as stated."""
    planes = [p[:: 1 + (i > 0), :: 1 + (i > 0)] for i, p in enumerate(to_yuv(image / 255, "bt601"))]
    return write_planes(
        path, planes, "yuv420p", "libx264", {"crf": "2", "preset": "ultrafast"}, matrix=6, color_range=1, **options
    )


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_all_eight_orientations(tmp_path: Path, degrees: int, mirrored: bool) -> None:
    """Stored as the display matrix will undo it: counter-clockwise by `degrees`, then left to right."""
    upright = marked()
    stored = np.rot90(upright[:, ::-1] if mirrored else upright, -degrees // 90)
    path = write_still(tmp_path / "a.mp4", stored, orient={"degrees": degrees, "hflip": mirrored})
    got, _, info = read(path, 48, 64)
    assert (info.rotation, info.mirrored, info.width, info.height) == (degrees, mirrored, 64, 48)
    assert got[0].image.shape == upright.shape
    assert np.abs(got[0].image.astype(int) - upright).mean() < 4.0


@pytest.mark.parametrize("degrees", [0, 90])
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_bar_is_where_it_is_seen(tmp_path: Path, degrees: int, mirrored: bool) -> None:
    """One bar, at the left of the upright picture; the same from a folder of images."""
    upright = np.full((96, 160, 3), 180, np.uint8)
    upright[:, :40] = 0
    stored = np.rot90(upright[:, ::-1] if mirrored else upright, -degrees // 90)
    path = write_still(tmp_path / "a.mp4", stored, orient={"degrees": degrees, "hflip": mirrored})
    bars, looked_at = find_bars(str(path), probe(str(path)))
    assert looked_at == 1 and bars.left == pytest.approx(0.25, abs=0.02)
    assert (bars.top, bars.bottom, bars.right) == (0.0, 0.0, 0.0)
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        Image.fromarray(upright).save(folder / f"{number}.png")
    assert find_bars(str(folder), probe_images(folder, 8))[0].left == pytest.approx(bars.left, abs=0.01)


@pytest.mark.parametrize(("decoder", "degrees"), [("decord", 0), ("pyav", 0), ("pyav", 90)])
def test_pixels_that_are_not_square(tmp_path: Path, decoder: str, degrees: int) -> None:
    """Pixels twice as wide as high: 32 of them show 64. A turn comes after that."""
    upright = marked(48, 64) if not degrees else marked(64, 48)
    stored = np.rot90(upright, -degrees // 90)[:, ::2]
    path = write_still(tmp_path / "a.mp4", stored, aspect=Fraction(2, 1), orient={"degrees": degrees})
    got, count, info = read(path, *upright.shape[:2], decoder=decoder)
    assert info.sample_aspect == [2, 1] and (info.height, info.width) == upright.shape[:2]
    assert count.decoder == decoder and got[0].image.shape == upright.shape
    assert np.abs(got[0].image.astype(int) - upright).mean() < 6.0


def moving_bar(time: float, size: int = 96) -> np.ndarray:
    image = np.full((size, size, 3), 30, np.uint8)
    left = int(6 * time)
    image[size // 4 : -size // 4, left : left + 20] = 220
    return image


def interlaced(count: int) -> list[np.ndarray]:
    """Bottom field first, as the encoders mark it: odd rows at t, even rows half a frame later."""
    frames = [moving_bar(t + 0.5) for t in range(count)]
    for t, frame in enumerate(frames):
        frame[1::2] = moving_bar(t)[1::2]
    return frames


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"crf": "4", "preset": "ultrafast", "flags": "+ilme+ildct", "x264-params": "threads=1"}),
        ("a.mkv", "mpeg4", {"flags": "+ilme+ildct", "b": "8M"}),
    ],
)
def test_interlaced_video_comes_out_progressive(tmp_path: Path, name: str, codec: str, options: dict) -> None:
    """One frame per coded frame at its own time, without the comb; the times vary, and stay."""
    times = [0, 40, 80, 160, 200, 240, 280, 400, 440, 480]
    path = write(tmp_path / name, interlaced(10), fps=25, pts=times, codec=codec, options=options)
    got, count, info = read(path, 96, 96)
    assert info.interlaced and info.decoder == "pyav" and "interlaced" in info.decoder_reason
    assert [f.pts for f in got] == info.pts and len(got) == count.decoded == 10
    combed, _, _ = read(path, 96, 96, interlaced=False)
    for t in range(1, 9):
        true = moving_bar(t).astype(int)
        error, before = (np.abs(one[t].image.astype(int) - true).mean() for one in (got, combed))
        assert error < 0.25 * before, f"frame {t}: {error:.2f}, with comb {before:.2f}"


def test_progressive_video_is_not_touched(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", moving_square(8, (0, 0, 0), (255, 0, 0)))
    plain, _, info = read(path, decoder="pyav")
    filtered, _, _ = read(path, decoder="pyav", interlaced=True)
    assert not info.interlaced
    assert all((a.image == b.image).all() and a.pts == b.pts for a, b in zip(plain, filtered, strict=True))


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


SMALL = PrepareSettings(height=32, width=32)


@pytest.mark.parametrize("number", [3, 60, 199])
def test_one_bad_packet_costs_its_frame_and_no_more(tmp_path: Path, number: int) -> None:
    """In a plain file, where decord raises, somewhere: the result is that of PyAV from the beginning, to the byte."""
    path = write(tmp_path / "a.mp4", moving_square(200, (90, 30, 0), (255, 0, 0), step=0.5), fps=25)
    info = probe(str(damage_packet(path, number)))
    assert info.decoder == "decord" and not info.decoder_reason
    scratch, expected = io.BytesIO(), io.BytesIO()
    shots, count = read_shots(str(path), info, SMALL, scratch)
    by_pyav, alone = read_shots(str(path), replace(info, decoder="pyav"), SMALL, expected)
    assert shots == by_pyav and scratch.getvalue() == expected.getvalue() != b""
    assert (count.shown, count.damaged, count.decoder) == (199, 1, "pyav")
    assert count.reason == "decord cannot decode all of it" and not alone.reason
    assert alone.decoded <= count.decoded < alone.decoded + 200, "what decord gave before is counted, too"


def test_a_file_with_too_many_bad_packets_still_fails(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", moving_square(60, (90, 30, 0), (255, 0, 0)), fps=25)
    for number in range(20, 30):
        damage_packet(path, number)
    with pytest.raises(Failed, match=r"\d+ of \d+ packets are damaged"):
        read_shots(str(path), probe(str(path)), SMALL, io.BytesIO())


def test_why_decord_is_not_taken_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import decord

    path = write(tmp_path / "a.mp4", moving_square(20, (0, 0, 0), (255, 0, 0)))
    info = probe(str(path))
    _, count, _ = read(path)
    assert (count.decoder, count.reason) == ("decord", "")
    count = DecodeCount()
    short = replace(info, pts=info.pts[:-1])
    list(frames(str(path), short, 32, 32, count=count))
    assert (count.decoder, count.reason) == ("pyav", "decord counts 20 frames, the index 19")

    def refuses(*args: object, **options: object) -> None:
        raise decord.DECORDError("no")

    monkeypatch.setattr(decord, "VideoReader", refuses)
    _, count, _ = read(path)
    assert (count.decoder, count.reason) == ("pyav", "decord cannot open it")


def test_a_cap_before_the_first_frame_names_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first frames cannot be decoded, and the cap lies among them."""
    path = write(tmp_path / "a.mp4", moving_square(40, (0, 0, 0), (255, 0, 0)), fps=20)
    real = decode._decoded

    def late(container, stream, info, count, first):
        return (frame for frame in real(container, stream, info, count, first) if frame.pts >= info.pts[30])

    monkeypatch.setattr(decode, "_decoded", late)
    with pytest.raises(Failed, match=r"no frame can be decoded in the first 0\.5 s \(max_seconds\)"):
        read(path, decoder="pyav", max_seconds=0.5)
    info = replace(probe(str(path)), decoder="pyav")
    with pytest.raises(Failed, match=r"in the first 0\.5 s \(max_seconds\)"):
        read_shots(str(path), info, replace(SMALL, max_seconds=0.5), io.BytesIO())
    assert len(read(path, decoder="pyav", max_seconds=1.6)[0]) == 2

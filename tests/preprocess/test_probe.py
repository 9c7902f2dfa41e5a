"""Probe: facts from the index, on files made here and on real clips with known facts."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from preprocess.outcome import Failed
from preprocess.probe import probe
from tests.preprocess.videos import moving_square, write
from toyworld.video import Footage, write_video
from toyworld.world import sample_scene


def test_facts_of_a_plain_file(tmp_path: Path) -> None:
    info = probe(str(write(tmp_path / "a.mp4", moving_square(24, (0, 0, 0), (255, 0, 0)), fps=24)))
    assert (info.width, info.height, info.codec, info.rotation) == (96, 96, "h264", 0)
    assert len(info.pts) == 24 and info.pts[0] == 0
    assert info.fps == pytest.approx(24, rel=0.01) and info.duration_s == pytest.approx(1.0, abs=0.01)
    assert not info.variable_rate and info.decoder == "decord" and info.decoder_reason == ""


def test_variable_rate_keeps_every_timestamp(tmp_path: Path) -> None:
    times = [0, 33, 66, 200, 233, 400, 900, 933, 966, 1000]
    info = probe(str(write(tmp_path / "a.mkv", moving_square(10, (0, 0, 0), (255, 0, 0)), fps=30, pts=times)))
    assert info.variable_rate
    assert [round(1000 * t * info.seconds_per_tick) for t in info.pts] == times


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_and_displayed_size(tmp_path: Path, degrees: int) -> None:
    scene = sample_scene("small", seed=1, num_shots=1)
    files = write_video(scene, tmp_path / "a.mp4", size=64, footage=Footage(rotation=degrees, letterbox=0.25))
    info = probe(str(files.video))
    assert info.rotation == (360 - degrees) % 360  # counter-clockwise
    assert (info.width, info.height) == (64, 96)
    assert "rotation" in info.decoder_reason


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("text.mp4", b"this is no video", "not a readable video container"),
        ("cut.mp4", b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00mp42isom", "probe"),
    ],
)
def test_not_a_video(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(Failed, match=reason):
        probe(str(tmp_path / name))
    with pytest.raises(Failed, match="no such file"):
        probe(str(tmp_path / "missing.mp4"))


def test_real_clips_as_catalogued(shared_data: Path) -> None:
    """Frames, rotation, variable rate and duration as measured independently when the clips were collected."""
    wrong = []
    rows = [row for row in csv.DictReader((shared_data / "catalog.csv").open()) if row["kind"] != "broken"]
    assert len(rows) > 100
    for row in rows:
        info = probe(str(shared_data / row["file"]))
        frames = int(row["frames_pyav"]) if row["frames_pyav"].isdigit() else len(info.pts)
        hidden = row["codec"] == "vp9" and len(info.pts) > frames  # the index also lists frames that are never shown
        facts = {
            "frames": (frames if hidden else len(info.pts), frames),
            "rotation": (info.rotation, int(row["rotation"] or 0) % 360),
            "seconds": (round(info.duration_s), round(float(row["duration_s"] or info.duration_s))),
        }
        wrong += [f"{row['file']} {name}: {got} is not {true}" for name, (got, true) in facts.items() if got != true]
        if int(row["vfr"] or 0) and not info.variable_rate:
            wrong.append(f"{row['file']} varies")
    assert not wrong


def test_bad_files_are_refused_by_name(shared_data: Path) -> None:
    bad = sorted(path for path in (shared_data / "broken" / "bad").rglob("*") if path.is_file())
    reasons = {}
    for path in bad:
        try:
            info = probe(str(path))
            assert len(info.pts) <= 2, f"{path} was taken"  # too short: filtered later
        except Failed as error:
            reasons[path.name] = error.reason
    assert "no video stream; the file holds audio" in reasons["sample_opus.mp4"]
    assert "no frame can be decoded" in reasons["invalid-bitstream.webm"]
    assert "not a readable video container" in reasons["sample_fragmented_clearkey.mp4"]
    assert all("/" not in reason for reason in reasons.values())  # the path is in the record already

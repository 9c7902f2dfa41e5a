"""Probe: facts from the index, on files made here and on real clips with known facts."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from models.records import decode
from preprocess.outcome import Failed, Filtered
from preprocess.probe import VideoInfo, probe
from tests.preprocess.videos import moving_square, to_yuv, write, write_planes
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


def noise(count: int = 50) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(count)]


def test_key_frames_have_their_times(tmp_path: Path) -> None:
    options = {"g": "10", "keyint_min": "10", "sc_threshold": "0", "preset": "ultrafast", "bf": "2"}
    info = probe(str(write(tmp_path / "a.mp4", noise(25), fps=25, options=options)))
    assert info.key_frames == 3 and info.key_pts == [info.pts[i] for i in (0, 10, 20)]


def test_sound_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        video, audio = container.add_stream("mpeg4", rate=10), container.add_stream("pcm_s16le", rate=8000)
        video.width = video.height = 64
        for index in range(10):
            picture = av.VideoFrame.from_ndarray(noise(1)[0], format="rgb24")
            picture.pts = index
            container.mux(video.encode(picture))
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout=audio.layout.name)
        sound.sample_rate = 8000
        container.mux([*video.encode(), *audio.encode(sound), *audio.encode()])
    assert probe(str(path)).audio
    assert not probe(str(write(tmp_path / "b.mkv", noise(5)))).audio


@pytest.mark.parametrize("name", ["a.avi", "a.mkv", "a.webm", "a.mp4"])
def test_a_file_that_is_cut_off_says_so(tmp_path: Path, name: str) -> None:
    """By its own header; what is there is decoded, to the last whole frame, by PyAV."""
    codec = {".avi": "mpeg4", ".webm": "libvpx"}.get(Path(name).suffix, "libx264")
    path = write(tmp_path / name, noise(), fps=25, codec=codec, container={"movflags": "faststart"})
    whole = probe(str(path))
    assert whole.truncated == "" and len(whole.pts) == 50
    data = path.read_bytes()
    path.write_bytes(data[: int(0.6 * len(data))])
    cut = probe(str(path))
    assert " of " in cut.truncated and cut.decoder == "pyav" and "truncated" in cut.decoder_reason
    assert 15 < len(cut.pts) < 45 and cut.pts == whole.pts[: len(cut.pts)]


def test_an_mp4_without_its_index_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", noise(), fps=25)  # the index is the last thing written
    data = path.read_bytes()
    path.write_bytes(data[: int(0.6 * len(data))])
    with pytest.raises(Failed, match=r"an MP4 without its index \(no moov box\): cut off, or never finished"):
        probe(str(path))


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{}'\n",
    ],
)
def test_a_playlist_opens_no_other_file(tmp_path: Path, text: str) -> None:
    """Under the name of a video it would lead out of a tar or a list, to any path or address."""
    other = write(tmp_path / "other.ts", noise(5), fps=25)
    (tmp_path / "a.mp4").write_text(text.format(other.name))
    with pytest.raises(Failed, match="not a readable video container"):
        probe(str(tmp_path / "a.mp4"))


def test_other_angles_are_left_out(tmp_path: Path) -> None:
    planes = to_yuv(noise(1)[0] / 255, "bt601")
    path = write_planes(tmp_path / "a.mov", planes, "yuv444p", "libx264", orient={"degrees": 30.0})
    with pytest.raises(Filtered, match="angle of 30 degrees"):
        probe(str(path))


def test_dolby_vision_without_a_base_layer_is_left_out(tmp_path: Path) -> None:
    """Its pixels are IPT, which everybody else shows green and purple; the sample entry `dvh1` says so."""
    planes = [plane[:: 1 + (i > 0), :: 1 + (i > 0)] for i, plane in enumerate(to_yuv(noise(1)[0] / 255, "bt2020"))]
    path = write_planes(
        tmp_path / "a.mp4", planes, "yuv420p", "libx265", {"x265-params": "log-level=none"}, count=3
    )  # fmt: skip
    assert probe(str(path)).codec == "hevc"
    data = path.read_bytes()
    tag = b"hev1" if b"hev1" in data else b"hvc1"
    path.write_bytes(data.replace(tag, b"dvh1"))
    with pytest.raises(Filtered, match="Dolby Vision without a base layer"):
        probe(str(path))


def test_facts_survive_json(tmp_path: Path) -> None:
    """As between two stages."""
    info = probe(str(write(tmp_path / "a.mp4", noise(5))))
    assert decode(VideoInfo, json.loads(json.dumps(asdict(info))), "info") == info


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
        facts |= {
            "hdr": (info.hdr, row["hdr"] == "1"),
            "interlaced": (info.interlaced, row["interlaced"] == "1"),
            "audio": (info.audio, int(row["audio_streams"] or info.audio) > 0),
            "video streams": (info.video_streams, int(row["video_streams"] or info.video_streams)),
            "truncated": (info.truncated, ""),
            "key frames": (set(info.key_pts) <= set(info.pts), True),
        }
        if row["sar"]:
            facts["pixel aspect"] = (Fraction(*info.sample_aspect), Fraction(row["sar"].replace(":", "/")))
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
    assert "the video is encrypted" in reasons["sample_fragmented_clearkey.mp4"]
    assert "without their initialisation" in reasons["sample_fragmented_sideloaded_track.mp4"]
    assert all("/" not in reason for reason in reasons.values())  # the path is in the record already

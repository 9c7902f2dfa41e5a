"""Sources that are no local video files, through the stages: members of tars, addresses, image folders, GIFs."""

from __future__ import annotations

import io
import json
import os
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from preprocess.decode import DecodeCount, frames
from preprocess.outcome import Failed
from preprocess.probe import probe
from preprocess.settings import PrepareSettings
from preprocess.sources import SourceFile, list_sources
from preprocess.stills import frame_times, probe_images, rate
from preprocess.unit import Unit, caption_stage, close_stage, decode_stage, probe_stage, run_stage
from preprocess.workplace import Workplace
from tests.preprocess.runs import records, run_here
from tests.preprocess.videos import moving_square, three_shots, write

SETTINGS = PrepareSettings(height=32, width=32)


def stages(file: SourceFile, folder: Path) -> Unit:
    """Probe, decode and captions, as rows of the pipeline do them: each begins from JSON."""
    place = Workplace(SETTINGS, folder / "parts", folder / "scratch", "")
    unit = Unit(file)
    for name, stage in (("probe", probe_stage), ("decode", decode_stage), ("captions", caption_stage)):
        unit = Unit.from_json(run_stage(name, lambda u, stage=stage: stage(u, place), unit).to_json())
        if name == "decode" and not unit.status:  # what was copied for it is gone, the spans are not
            left = [path.suffix for path in place.scratch.iterdir()]
            assert left.count(".frames") == 1 and set(left) <= {".frames", ".json"}
    close_stage(unit, place)
    assert not any(place.scratch.iterdir()) if place.scratch.exists() else True
    return unit


def outcome(unit: Unit) -> tuple:
    """What must not depend on where the video lies."""
    return unit.status, unit.sha256, unit.info, [(s.start_frame, s.end_frame, s.span_pts) for s in unit.shots]


def captions() -> bytes:
    shots = [{"start_frame": 17 * i, "end_frame": 17 * i + 17, "prompt": f"shot {i}"} for i in range(3)]
    return json.dumps({"story": "told", "shots": shots}).encode()


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = write(tmp_path / "videos" / "a.mp4", three_shots())
    path.with_suffix(".json").write_bytes(captions())
    return path


@pytest.fixture
def direct(video: Path, tmp_path: Path) -> Unit:
    unit = stages(list_sources([video]).files[0], tmp_path / "direct")
    assert unit.status == "" and unit.scenes[0].story == "told" and len(unit.shots) == 3
    return unit


def test_a_member_of_a_tar_is_as_the_file(video: Path, direct: Unit, tmp_path: Path) -> None:
    tar = tmp_path / "x.tar"
    with tarfile.open(tar, "w") as out:
        for name, data in (("k.mp4", video.read_bytes()), ("k.json", captions()), ("k.txt", b"words")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    unit = stages(list_sources([tar]).files[0], tmp_path / "tar")
    assert outcome(unit) == outcome(direct) and unit.captions_sha256 == direct.captions_sha256
    assert unit.scenes[0].story == "told" and unit.scenes[0].extra["fields"] == {"txt": "words"}


def test_a_file_at_an_address_is_as_the_file(video: Path, direct: Unit, tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/places/a.mp4", video.read_bytes())
    fs.pipe("/places/a.json", captions())
    file = list_sources(["memory://places"]).files[0]
    assert outcome(stages(file, tmp_path / "memory")) == outcome(direct)
    fs.rm("/places/a.mp4")
    unit = stages(file, tmp_path / "gone")
    assert (unit.status, unit.stage, unit.reason) == ("failed", "probe", "no such file")


class Counting(SimpleHTTPRequestHandler):
    asked: list[str] = []

    def log_message(self, *args: object) -> None:
        self.asked.append(f"{self.command} {self.path}")


@contextmanager
def serving(folder: Path, handler: type[SimpleHTTPRequestHandler]) -> Iterator[str]:
    """The address of a folder, while the block runs."""
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def server(video: Path) -> Iterator[str]:
    with serving(video.parent, Counting) as address:
        yield address


def test_http(server: str, video: Path, direct: Unit, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    listing = tmp_path / "list.txt"
    listing.write_text(f"{server}/a.mp4\n{server}/missing.mp4\n")
    Counting.asked.clear()
    here, missing = list_sources([listing]).files
    (signed,) = list_sources([f"{server}/a.mp4?signature=1"]).files
    assert signed.name == "a.mp4" and signed.path.endswith("?signature=1")
    assert not any(asked.startswith("GET /a.mp4") for asked in Counting.asked)  # listing reads no video
    assert here.bytes == video.stat().st_size and here.captions == f"{server}/a.json"
    assert outcome(stages(here, tmp_path / "http")) == outcome(direct)
    unit = stages(missing, tmp_path / "missing")
    assert (unit.status, unit.reason) == ("failed", "no such file")


class Silent(Counting):
    """A server that does not say when a file was changed."""

    def send_header(self, keyword: str, value: str) -> None:
        if keyword != "Last-Modified":
            super().send_header(keyword, value)


@pytest.mark.parametrize("handler", [Counting, Silent])
def test_captions_that_change_at_an_http_address_are_noticed(
    handler: type[Counting], video: Path, tmp_path: Path, model: Path
) -> None:
    """By the Last-Modified that a server without ETags gives, or else by what they say."""
    pytest.importorskip("aiohttp")
    told = {"label": 3, "shots": []}
    captions = video.with_suffix(".json")
    captions.write_text(json.dumps(told))
    with serving(video.parent, handler) as address:
        (tmp_path / "list.txt").write_text(f"{address}/a.mp4\n")
        (file,) = list_sources([tmp_path / "list.txt"]).files
        assert (file.captions_mtime_ns > 0) == (handler is Counting)
        for label, todo in ((3, 1), (3, 0), (4, 1), (4, 0)):
            if label != told["label"]:
                told["label"] = label
                captions.write_text(json.dumps(told))  # of as many bytes
                os.utime(captions, (1, 1))
            assert run_here(tmp_path / "list.txt", tmp_path / "out", model)[1] == todo
        assert {shot.label for scene, _ in records(tmp_path / "out").values() for shot in scene.shots} == {4}


@pytest.mark.parametrize("kind", ["folder", "tar", "address"])
def test_a_json_file_without_captions_holds_fields_wherever_it_lies(kind: str, video: Path, tmp_path: Path) -> None:
    metadata = {"url": "x", "label": "cat"}
    video.with_suffix(".json").write_text(json.dumps(metadata))
    source = str(video.parent)
    if kind == "tar":
        source = str(tmp_path / "x.tar")
        with tarfile.open(source, "w") as tar:
            for path in video.parent.iterdir():
                tar.add(path, path.name)
    elif kind == "address":
        source = "memory://fields"
        for path in video.parent.iterdir():
            fsspec.filesystem("memory").pipe(f"/fields/{path.name}", path.read_bytes())
    unit = stages(list_sources([source]).files[0], tmp_path / "parts")
    assert unit.status == "" and unit.captions_sha256
    assert all(scene.extra["fields"] == metadata for scene in unit.scenes)
    assert all(scene.captions and scene.captions.backend == "describe" for scene in unit.scenes)
    video.with_suffix(".json").unlink()
    without = stages(list_sources([video]).files[0], tmp_path / "without")
    assert [len(scene.shots) for scene in unit.scenes] == [len(scene.shots) for scene in without.scenes]


def test_an_entry_with_an_error_fails_by_it(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("../up.mp4\na.mp4\n")
    unit = stages(list_sources([tmp_path / "list.txt"]).files[0], tmp_path)
    assert (unit.status, unit.stage) == ("failed", "sources") and "leads out of" in unit.reason


def write_images(
    folder: Path, pictures: list[np.ndarray], numbers: list[int] | None = None, suffix: str = "png"
) -> Path:
    folder.mkdir(parents=True)
    for number, picture in zip(numbers or range(1, len(pictures) + 1), pictures, strict=True):
        Image.fromarray(picture).save(folder / f"frame_{number:04d}.{suffix}")
    return folder


def test_a_folder_of_images_is_a_video(tmp_path: Path) -> None:
    """Its pixels are those of the files, its times those of the rate; shots are found in it."""
    pictures = three_shots(17, 96)
    folder = write_images(tmp_path / "videos" / "clip", pictures)
    folder.with_suffix(".json").write_bytes(captions())
    (file,) = list_sources([folder.parent], frames_fps=8).files
    info = probe_images(folder, 8)
    assert info.time_base == [1, 8] and info.pts == list(range(51)) and not info.variable_rate
    assert info.duration_s == pytest.approx(51 / 8) and info.fps == pytest.approx(8)
    got = list(frames(str(folder), info, 96, 96, count=DecodeCount()))
    assert all((frame.image == picture).all() for frame, picture in zip(got, pictures, strict=True))
    unit = stages(file, tmp_path)
    assert unit.status == "" and [shot.start_frame for shot in unit.shots] == [0, 17, 34]
    assert unit.count is not None and unit.count.decoder == "images" and unit.scenes[0].story == "told"
    before = unit.sha256
    Image.fromarray(pictures[0]).save(folder / "frame_0002.png")
    assert stages(list_sources([folder.parent], frames_fps=8).files[0], tmp_path).sha256 != before


def test_a_missing_image_is_a_longer_frame(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "clip", moving_square(6, (0, 0, 0), (255, 0, 0), 32), [10, 12, 14, 18, 20, 22])
    info = probe_images(folder, 29.97)
    assert info.pts == [0, 1, 2, 4, 5, 6] and info.variable_rate and info.time_base == [1001, 30000]
    assert frame_times([7]) == [0] and frame_times([0, 5, 10]) == [0, 1, 2]
    assert [str(rate(fps)) for fps in (24, 23.976, 59.94, 12.5)] == ["24", "24000/1001", "60000/1001", "25/2"]


def test_images_that_do_not_fit(tmp_path: Path) -> None:
    pictures = moving_square(20, (0, 0, 0), (255, 0, 0), 32)
    folder = write_images(tmp_path / "a", [*pictures[:3], np.zeros((16, 32, 3), np.uint8)])
    with pytest.raises(Failed, match="frame_0004.png is 32x16, the first 32x32"):
        list(frames(str(folder), probe_images(folder, 8), 32, 32, count=DecodeCount()))
    folder = write_images(tmp_path / "b", pictures)
    (folder / "frame_0003.png").write_bytes(b"no image")
    count = DecodeCount()
    got = list(frames(str(folder), probe_images(folder, 8), 32, 32, count=count))
    assert count.damaged == 1 and [frame.pts for frame in got] == [0, 1, *range(3, 20)]
    (folder / "frame_0001.png").write_bytes(b"no image")
    with pytest.raises(Failed, match="frame_0001.png is no readable image"):
        probe_images(folder, 8)
    sixteen = tmp_path / "c"
    sixteen.mkdir()
    Image.fromarray(np.full((32, 32), 257 * 100, np.uint16)).save(sixteen / "1.png")
    (one,) = frames(str(sixteen), probe_images(sixteen, 8), 32, 32, count=DecodeCount())
    assert (one.image == 100).all()


def test_gifs_keep_their_times_and_pictures(tmp_path: Path) -> None:
    """Frames of different duration; each differs from the one before in a part of the picture only."""
    pictures = [Image.fromarray(picture) for picture in moving_square(6, (0, 0, 0), (255, 0, 0), 32)]
    times = [100, 200, 50, 100, 300, 100]
    path = tmp_path / "a.gif"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=times, loop=0)
    info = probe(str(path))
    assert [round(1000 * t * info.seconds_per_tick) for t in info.pts] == [0, 100, 300, 350, 450, 750]
    assert info.variable_rate
    got = list(frames(str(path), info, 32, 32, count=DecodeCount()))
    for frame, picture in zip(got, pictures, strict=True):
        assert np.abs(frame.image.astype(int) - np.asarray(picture)).max() <= 8

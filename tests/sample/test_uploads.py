"""Uploads: what is shown arrives without loss, and nothing else is opened, however the bytes are made."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from sample import uploads
from sample.uploads import Upload, UploadError, read_upload
from sample.video_io import fit_frames, read_image, read_video, write_video

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)


def image_bytes(kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, format=kind, **options)
    return buffer.getvalue()


def film_bytes(path: Path, frames: int = 9) -> bytes:
    write_video(np.stack([np.roll(PIXELS, 8 * t, axis=1) for t in range(frames)]), path, 8)
    return path.read_bytes()


def coded(codec: str, container: str, pix_fmt: str = "yuv420p", frames: int = 3) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = *PIXELS.shape[:2], pix_fmt
        for _ in range(frames):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(PIXELS, format="rgb24")))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def unpacked(upload: Upload, folder: Path) -> np.ndarray:
    path = folder / upload.name
    path.write_bytes(upload.data)
    return read_image(path)[None] if upload.is_image else read_video(path)[0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_image_is_kept_as_it_looks_at_the_models_size(kind: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    data = image_bytes(kind, exif=exif)
    (tmp_path / "file").write_bytes(data)
    upload = read_upload(data, 24, 32)
    assert upload.is_image and upload.num_frames == 1
    expected = fit_frames(read_image(tmp_path / "file")[None], 24, 32)
    assert np.array_equal(unpacked(upload, tmp_path), expected)
    assert read_upload(data, 24, 32) == upload, "a name is its pixels'"
    assert read_upload(image_bytes(kind), 24, 32).name != upload.name


def test_a_video_is_kept_whole_and_without_loss(tmp_path: Path) -> None:
    data = film_bytes(tmp_path / "film.mp4")
    upload = read_upload(data, 24, 32)
    assert not upload.is_image and upload.num_frames == 9
    expected = fit_frames(read_video(tmp_path / "film.mp4")[0], 24, 32)
    assert np.array_equal(unpacked(upload, tmp_path), expected)
    assert read_upload(data, 24, 32).name == upload.name != read_upload(data, 24, 16).name


@pytest.mark.parametrize(("name", "most"), [("MAX_VIDEO_FRAMES", 8), ("MAX_DECODED_PIXELS", 9 * 48 * 80 - 1)])
def test_a_video_that_is_too_long_is_refused(
    name: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = film_bytes(tmp_path / "film.mp4")
    monkeypatch.setattr(uploads, name, most + 1)
    assert read_upload(data, 24, 32).num_frames == 9
    monkeypatch.setattr(uploads, name, most)
    with pytest.raises(UploadError, match="more than .* frames and .* pixels; cut or scale it down"):
        read_upload(data, 24, 32)


def test_packed_frames_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_KEPT_BYTES", 10_000)
    with pytest.raises(UploadError, match="at the model's size"):
        read_upload(film_bytes(tmp_path / "film.mp4"), 48, 80)


@pytest.mark.parametrize(("codec", "container"), [("libvpx-vp9", "webm"), ("mpeg4", "mov"), ("libx264", "matroska")])
def test_other_containers_and_codecs(codec: str, container: str) -> None:
    assert read_upload(coded(codec, container), 24, 32).num_frames == 3


def png_header(side: int) -> bytes:
    """A PNG that says it is side x side, and holds no pixels."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", b""))
    packed = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "not a readable"),
        (b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", "not a readable"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "not a readable"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a readable"),
        (b"\0\0\0\x18ftypisom" + b"\0" * 40, "not a readable"),
        (b"\x1aE\xdf\xa3" + b"\0" * 40, "not a readable"),
        (image_bytes("GIF"), "taken are PNG, JPEG, WEBP"),
        (image_bytes("TIFF"), "not a readable"),
        (image_bytes()[:60], "not a readable"),
        (png_header(9000), "9000x9000 pixels; at most 64 million"),
        (png_header(60000), "exceeds limit"),  # Pillow's own
        (coded("mjpeg", "matroska", "yuvj420p"), "coded as mjpeg; taken are h264"),
        (coded("mjpeg", "avi", "yuvj420p"), "not a readable"),
    ],
)  # fmt: skip
def test_what_is_not_taken_is_said(data: bytes, word: str) -> None:
    with pytest.raises(UploadError, match=word):
        read_upload(data, 24, 32)


def test_sizes_are_checked_before_pixels_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film = film_bytes(tmp_path / "film.mp4")
    monkeypatch.setattr(uploads, "MAX_VIDEO_PIXELS", 48 * 80 - 1)
    with pytest.raises(UploadError, match="80x48 pixels"):
        read_upload(film, 24, 32)
    with monkeypatch.context() as blind, pytest.raises(UploadError, match="max_pixels"):  # the decoder checks, too
        blind.setattr(uploads, "_check_size", lambda width, height, most: None)
        read_upload(film, 24, 32)
    sliver = io.BytesIO()
    Image.new("RGB", (1, 100)).save(sliver, format="PNG")
    with pytest.raises(UploadError, match="at most 8 times"):
        read_upload(sliver.getvalue(), 24, 32)


def test_a_file_of_sound_alone_is_no_video() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        file.mux(stream.encode(sound))
        file.mux(stream.encode(None))
    with pytest.raises(UploadError, match="without a video stream"):
        read_upload(buffer.getvalue(), 24, 32)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "mp4", "webm"])
def test_damaged_files_are_read_or_refused_and_nothing_else(kind: str, tmp_path: Path) -> None:
    whole = {"mp4": lambda: film_bytes(tmp_path / "f.mp4", 3), "webm": lambda: coded("libvpx-vp9", "webm")}
    data = whole[kind]() if kind in whole else image_bytes(kind)
    rng, refused = np.random.default_rng(1), 0
    for _ in range(60):
        damaged = bytearray(data[: int(rng.integers(len(data) // 2, len(data) + 1))])
        for at in rng.integers(12, len(damaged), int(rng.integers(1, 6))):
            damaged[at] = int(rng.integers(256))
        try:
            assert 1 <= read_upload(bytes(damaged), 24, 32).num_frames <= 3
        except UploadError:
            refused += 1
    assert refused > 0

"""Frames to H.264 files and back."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from sample.video_io import enlarge, fit_frames, read_image, read_video, write_video


def clip(frames: int = 9, height: int = 48, width: int = 64) -> np.ndarray:
    """A square that moves over a slope of grey: smooth enough for 4:2:0."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    video[:] = np.linspace(40, 200, width, dtype=np.uint8)[None, None, :, None]
    for t in range(frames):
        video[t, 16:32, 4 * t : 4 * t + 16] = (200, 30, 40)
    return video


def test_round_trip_keeps_frames_rate_and_codec(tmp_path: Path) -> None:
    video = clip()
    path = write_video(video, tmp_path / "deep" / "a.mp4", 8)
    back, fps = read_video(path)
    assert back.shape == video.shape and fps == 8
    assert np.abs(back.astype(int) - video).mean() < 4
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        times = [float(frame.pts * frame.time_base) for frame in container.decode(stream)]
    np.testing.assert_allclose(times, np.arange(9) / 8, atol=1e-3)
    assert list(path.parent.iterdir()) == [path], "no partial file is left"


def test_fractional_rates_are_exact(tmp_path: Path) -> None:
    path = write_video(clip(), tmp_path / "a.mp4", 24000 / 1001)
    assert read_video(path)[1] == pytest.approx(24000 / 1001, abs=1e-9)


def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    one = write_video(clip(), tmp_path / "a.mp4", 8).read_bytes()
    assert one == write_video(clip(), tmp_path / "b.mp4", 8).read_bytes()
    assert one != write_video(255 - clip(), tmp_path / "c.mp4", 8).read_bytes()


@pytest.mark.parametrize(
    ("frames", "fps", "word"),
    [
        (clip().astype(np.float32), 8, "uint8"),
        (clip()[..., :1], 8, "uint8"),
        (clip()[:0], 8, "T >= 1"),
        (clip(height=47), 8, "odd side"),
        (clip(), 0, "fps is 0"),
    ],
)
def test_frames_that_make_no_file_are_refused(tmp_path: Path, frames: np.ndarray, fps: float, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        write_video(frames, tmp_path / "a.mp4", fps)
    assert list(tmp_path.iterdir()) == []


def test_unreadable_media_name_the_file(tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    with pytest.raises(ValueError, match="broken.mp4"):
        read_video(broken)
    with pytest.raises(ValueError, match="broken.mp4"):
        read_image(broken)


def test_fit_covers_then_cuts_the_centre() -> None:
    wide = np.zeros((1, 40, 120, 3), np.uint8)
    wide[:, :, 40:80] = 255
    assert (fit_frames(wide, 20, 20)[:, 2:-2, 2:-2] >= 250).all()
    same = clip()
    assert fit_frames(same, 48, 64) is same


def test_enlarged_pixels_keep_their_colour_in_the_file(tmp_path: Path) -> None:
    video = np.full((5, 16, 24, 3), 128, np.uint8)
    video[:, 8, 3:20] = (220, 30, 30)  # a line one pixel wide
    errors = {}
    for min_side in (0, 64):
        large = enlarge(video, min_side)
        factor = large.shape[1] // 16
        assert large.shape[1:3] == (16 * factor, 24 * factor) and factor == (4 if min_side else 1)
        back = read_video(write_video(large, tmp_path / f"{min_side}.mp4", 8))[0].astype(float)
        small = back.reshape(5, 16, factor, 24, factor, 3).mean((2, 4))
        errors[min_side] = np.abs(small - video)[:, 8, 4:19].mean()
    assert errors[64] < errors[0] / 3, errors
    assert enlarge(video, 16) is video

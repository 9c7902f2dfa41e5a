"""Encoded spans: exact frames and times at the training rate, 4k+1, gap-free shots, one decode, bounded memory."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from preprocess.probe import VideoInfo, probe
from preprocess.settings import PrepareSettings
from preprocess.spans import RawShot, read_shots
from tests.preprocess.videos import moving_square, three_shots, write
from toyworld.video import Footage, write_video
from toyworld.world import sample_scene

SETTINGS = PrepareSettings(height=32, width=32, fps=8.0, shot_frames=17)


def read(path: Path, settings: PrepareSettings = SETTINGS) -> tuple[list[RawShot], np.ndarray, VideoInfo]:
    info, scratch = probe(str(path)), io.BytesIO()
    shots, count = read_shots(str(path), info, settings, scratch)
    assert count.decoded <= len(info.pts)
    frames = np.frombuffer(scratch.getvalue(), np.uint8).reshape(-1, settings.height, settings.width, 3)
    assert len(frames) == sum(len(shot.span_pts) for shot in shots)
    assert [shot.start_frame for shot in shots[1:]] == [shot.end_frame for shot in shots[:-1]]
    assert [shot.start_pts for shot in shots[1:]] == [shot.end_pts for shot in shots[:-1]]
    for shot in shots:
        assert not shot.span_pts or (len(shot.span_pts) - 1) % settings.frame_step == 0 and len(shot.span_pts) >= 5
        assert [info.pts[i] for i in shot.span_frames] == shot.span_pts
        assert all(shot.start_frame <= i < shot.end_frame for i in shot.span_frames)
    return shots, frames, info


def test_a_source_at_the_training_rate_is_taken_frame_by_frame(tmp_path: Path) -> None:
    shots, frames, _ = read(write(tmp_path / "a.mp4", three_shots(17)))
    assert [(s.start_frame, s.end_frame, s.transition) for s in shots] == [
        (0, 17, "start"),
        (17, 34, "cut"),
        (34, 51, "cut"),
    ]
    assert [s.span_frames for s in shots] == [list(range(i, i + 17)) for i in (0, 17, 34)]
    corners = frames.reshape(3, 17, 32, 32, 3)[:, :, -1, 0].astype(int)  # the background of each shot
    assert np.abs(corners - np.array([(30, 120, 40), (200, 190, 120), (40, 40, 90)])[:, None]).max() < 8


def test_a_faster_source_is_sampled_at_even_times(tmp_path: Path) -> None:
    shots, _, info = read(write(tmp_path / "a.mp4", moving_square(90, (30, 120, 40), (220, 40, 40), step=0.5), fps=30))
    times = np.array(shots[0].span_pts) * info.seconds_per_tick
    assert len(shots) == 1 and len(times) == 17
    assert np.abs(times - np.arange(17) / 8).max() <= 0.5 / 30 + 1e-3  # nearest frame


def test_variable_rate_is_sampled_by_time_not_by_index(tmp_path: Path) -> None:
    fast, slow = [i * 20 for i in range(50)], [1000 + i * 100 for i in range(16)]
    images = moving_square(66, (30, 120, 40), (220, 40, 40), step=0.5)
    shots, _, info = read(write(tmp_path / "a.mkv", images, fps=50, pts=fast + slow))
    times = 1000 * np.array(shots[0].span_pts) * info.seconds_per_tick
    assert np.abs(times[:8] - np.arange(8) * 125).max() <= 11
    assert np.abs(times[8:] - np.arange(8, 17) * 125).max() <= 51


def test_short_shots_are_recorded_but_not_encoded(tmp_path: Path) -> None:
    images = three_shots(17)
    path = write(tmp_path / "a.mp4", images[:17] + images[17:21] + images[34:44])
    shots, _, _ = read(path)
    assert [s.end_frame - s.start_frame for s in shots] == [17, 4, 10]
    assert [len(s.span_pts) for s in shots] == [17, 0, 9]
    assert [s.offset for s in shots if s.span_pts] == [0, 17]


@pytest.mark.parametrize(("available", "encoded"), [(4, 0), (5, 5), (8, 5), (9, 9), (16, 13), (17, 17), (40, 17)])
def test_spans_are_the_longest_4k_plus_1_up_to_the_limit(tmp_path: Path, available: int, encoded: int) -> None:
    shots, _, _ = read(write(tmp_path / "a.mp4", moving_square(available, (30, 120, 40), (220, 40, 40), step=1)))
    assert [len(s.span_pts) for s in shots] == [encoded]


def test_dissolves_stay_out_of_the_spans(tmp_path: Path) -> None:
    a, b = (
        moving_square(40, (30, 120, 40), (90, 40, 40), step=0.3),
        moving_square(40, (220, 210, 190), (40, 60, 200), step=0.3),
    )
    mixed = [((1 - s) * a[-1].astype(float) + s * b[0]).astype(np.uint8) for s in np.linspace(0, 1, 10)[1:-1]]
    long = PrepareSettings(height=32, width=32, fps=8.0, shot_frames=81)
    shots, _, info = read(write(tmp_path / "a.mp4", a + mixed + b), long)
    assert [s.transition for s in shots] == ["start", "dissolve"]
    assert 40 < shots[0].end_frame < 48  # the shot itself has no gap
    assert shots[0].span_frames[-1] <= 40 and shots[1].span_frames[0] >= 47
    start, end = shots[1].blend_frames
    assert abs(start - 40) <= 2 and abs(end - 48) <= 2 and shots[0].blend_frames == shots[0].blend_pts == []
    assert shots[1].blend_pts == [info.pts[start], info.pts[end]]


@pytest.mark.parametrize(("step", "fps"), [(4, 8.0), (8, 8.0), (4, 6.0), (1, 8.0)])
def test_no_cut_and_no_transition_falls_inside_a_latent_frame(tmp_path: Path, step: int, fps: float) -> None:
    """A causal VAE makes a latent of the first frame alone, then one of each `step` frames: all of one shot."""
    scene = sample_scene("full", seed=6, index=3, num_shots=4)
    settings = PrepareSettings(height=32, width=32, fps=fps, frame_step=step, shot_frames=8 * 2 + 1)
    path = write_video(scene, tmp_path / "a.mp4", size=64, captions=False).video
    shots, _, _ = read(path, settings)
    blends = [range(*shot.blend_frames) for shot in shots if shot.blend_frames]
    assert len(shots) > 1
    for shot in shots:
        frames = shot.span_frames
        latents = [frames[:1], *(frames[k : k + step] for k in range(1, len(frames), step))] if frames else []
        assert all(len(latent) == step for latent in latents[1:])
        for latent in latents:
            assert shot.start_frame <= latent[0] and latent[-1] < shot.end_frame
            assert not any(frame in blend for frame in latent for blend in blends)


def test_toyworld_variable_rate_and_rotation_keep_their_cuts(tmp_path: Path) -> None:
    scene = sample_scene("small", seed=5, index=2, num_shots=3)
    plain = read(write_video(scene, tmp_path / "a.mp4", size=64).video)[0]
    look = Footage(fps=24, variable_rate=True, rotation=90)
    odd, _, info = read(write_video(scene, tmp_path / "b.mp4", size=64, footage=look).video)
    assert info.variable_rate and info.rotation == 270
    starts = [round(8 * s.start_pts * info.seconds_per_tick) for s in odd]
    assert starts == [s.start_frame for s in plain]


def test_memory_holds_a_window_whatever_the_length(tmp_path: Path) -> None:
    import tracemalloc

    peaks = []
    for count in (120, 480):
        path = write(tmp_path / f"{count}.mp4", moving_square(count, (30, 120, 40), (220, 40, 40), step=0.1), fps=25)
        info = probe(str(path))
        tracemalloc.start()
        with (tmp_path / "scratch").open("wb") as scratch:
            read_shots(str(path), info, SETTINGS, scratch)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.15 * peaks[0]

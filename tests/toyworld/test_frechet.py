"""The Frechet distance against closed forms, and its floor and interval."""

import numpy as np
import pytest

from toyworld.frechet import FEATURES, clip_features, frechet, gaussian_distance, sample_distance
from toyworld.judge import read
from toyworld.render import render_shot
from toyworld.world import sample_scene


def test_closed_forms():
    rng = np.random.default_rng(0)
    root = rng.standard_normal((6, 6))
    cov = root @ root.T
    mean = rng.standard_normal(6)
    assert gaussian_distance(mean, cov, mean, cov) == pytest.approx(0.0, abs=1e-9)
    assert gaussian_distance(mean, cov, mean + 2.0, cov) == pytest.approx(24.0)
    # diagonal: sum of (s1 - s2)^2
    one, two = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 1.0])
    zero = np.zeros(3)
    assert gaussian_distance(zero, np.diag(one), zero, np.diag(two)) == pytest.approx(1.0 + 0.0 + 4.0)
    # scaling a covariance by c^2 costs (c - 1)^2 of its trace, in any basis
    assert gaussian_distance(zero, cov[:3, :3], zero, 9 * cov[:3, :3]) == pytest.approx(4 * np.trace(cov[:3, :3]))


def test_singular_covariances_and_symmetry():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((4, 10)), rng.standard_normal((5, 10))  # fewer samples than dimensions
    assert sample_distance(a, b) == pytest.approx(sample_distance(b, a), rel=1e-6)
    assert sample_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    turn = np.linalg.qr(rng.standard_normal((10, 10)))[0]
    assert sample_distance(a @ turn, b @ turn) == pytest.approx(sample_distance(a, b), rel=1e-6)
    with pytest.raises(ValueError, match="at least 2"):
        sample_distance(a[:1], b)


def test_floor_and_interval():
    rng = np.random.default_rng(2)
    reference = rng.standard_normal((400, 5))
    same = frechet(rng.standard_normal((100, 5)), reference, rounds=60)
    assert same.low <= same.value <= same.high
    assert same.value < 3 * same.floor
    shifted = [frechet(rng.standard_normal((100, 5)) + s, reference, rounds=60) for s in (0.5, 1.0, 2.0)]
    values = [f.value for f in shifted]
    assert values == sorted(values)
    assert values[0] > 3 * shifted[0].floor
    assert values[2] == pytest.approx(20.0, rel=0.25)
    assert same == frechet(np.random.default_rng(2).standard_normal((500, 5))[400:], reference, rounds=60)


def test_features_of_clips():
    frames = [render_shot(sample_scene("small", index=k, num_shots=1), 0, 64) for k in range(16)]
    real = np.stack([clip_features(read(f)) for f in frames])
    assert real.shape == (16, len(FEATURES))
    assert np.isfinite(real).all()
    frozen = np.stack([clip_features(read(np.repeat(f[:1], len(f), 0))) for f in frames])
    empty = np.stack([clip_features(read(np.full_like(f, 128))) for f in frames])
    result = frechet(real[:8], real[8:], rounds=20)
    assert sample_distance(frozen[:8], real[8:]) > result.value
    assert sample_distance(empty[:8], real[8:]) > 2 * result.value

"""Fixtures of several files: a tiny model folder, its encoder, and two toy videos to prepare."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.tiny import build_tiny_folder
from preprocess.encode import Encoder
from toyworld.video import write_video
from toyworld.world import sample_scene


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Wan with random weights."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    build_tiny_folder(path)
    return path


@pytest.fixture(scope="module")
def encoder(model: Path) -> Encoder:
    """The VAE and the text encoder of `model`."""
    return Encoder.from_folder(model)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """A folder of two ToyWorld videos with sidecars, toy0.mp4 and toy1.mp4, two shots each."""
    folder = tmp_path / "videos"
    for i in range(2):
        write_video(sample_scene("small", seed=31, index=i, num_shots=2), folder / f"toy{i}.mp4", size=64)
    return folder

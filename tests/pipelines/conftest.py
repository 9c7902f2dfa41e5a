"""Fixtures of several files: the folder of a tiny model to prepare videos for."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.tiny import build_tiny_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan with random weights that makes shots of 17 frames."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    build_tiny_folder(path, frames_per_shot=17)
    return path

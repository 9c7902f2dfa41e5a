"""Fixtures of the training tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.tiny import TEXT_DIM
from tests.train.tiny import CHANNELS, SIZE, TEXT_LENGTH, write_dataset
from train.batches import LatentCache, write_cache


@pytest.fixture(scope="session")
def cache_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 clips of 3 latent frames with 5 texts; the clips' mean follows their text."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 5, (37,), generator=generator)
    latents = torch.randn(37, CHANNELS, 3, SIZE, SIZE, generator=generator) * 0.3 + ids[:, None, None, None, None] - 2.0
    texts = [torch.randn(3 + i, TEXT_DIM, generator=generator) for i in range(5)]
    path = tmp_path_factory.mktemp("cache") / "clips.safetensors"
    write_cache(path, latents, texts, ids)
    return path


@pytest.fixture
def cache(cache_file: Path) -> Callable[..., LatentCache]:
    """Opens the cache with a method's layout."""

    def open_cache(layout_for, **options) -> LatentCache:
        options = {
            "batch_size": 4,
            "text_length": TEXT_LENGTH,
            "null_text": torch.zeros(TEXT_LENGTH, TEXT_DIM),
        } | options
        return LatentCache([cache_file], layout_for=layout_for, **options)

    return open_cache


@pytest.fixture
def dataset(tmp_path: Path) -> Callable[..., Path]:
    """Writes a prepared dataset under this test's folder."""
    return lambda scenes, **options: write_dataset(tmp_path / "dataset", scenes, **options)

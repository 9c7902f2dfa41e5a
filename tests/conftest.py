"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.ray_session import RaySession, ray_session

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where torch sees no accelerator; torch is only asked where there are such tests."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The folder that holds pyproject.toml."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real video clips with known cuts, kept beside the repository; a test that needs them is skipped without."""
    folder = ROOT.parent / "shared" / "data"
    if not (folder / "catalog.csv").is_file():
        pytest.skip("the real clips (../shared/data) are not on this machine")
    return folder


@pytest.fixture(scope="module")
def ray_module() -> Iterator[RaySession]:
    """A Ray session of two CPUs for one test module."""
    with ray_session(num_cpus=2) as session:
        yield session

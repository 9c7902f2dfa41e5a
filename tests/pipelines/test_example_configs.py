"""The example configs load: every key is known, every value of its type."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.config import load_config
from pipelines.prepare import PrepareConfig
from pipelines.sample import SampleConfig
from pipelines.train import TrainConfig

FOLDER = Path(__file__).resolve().parents[2] / "pipelines" / "configs"
KINDS = {"prepare": PrepareConfig, "train": TrainConfig, "sample": SampleConfig}


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.yaml")))
def test_loads(name: str) -> None:
    load_config(KINDS[name.removesuffix(".yaml").split("_")[0]], FOLDER / name)

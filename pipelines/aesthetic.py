"""Which model scores how good a shot looks: open_clip weights and a linear head, both by path; none by default."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from infra.knobs import knob

if TYPE_CHECKING:
    from preprocess.aesthetic import AestheticScorer


@dataclass(kw_only=True)
class AestheticConfig:
    """The aesthetic filter is on where both files are given; its threshold is `filters.min_aesthetic`."""

    architecture: str = knob("ViT-B-32", "name of the model in open_clip, such as ViT-L-14")
    clip: Path | None = knob(None, "file with its weights, .safetensors or .pt")
    head: Path | None = knob(None, "file with the linear head: weight [1,D] and bias [1]")

    def __post_init__(self) -> None:
        if (self.clip is None) != (self.head is None):
            raise ValueError("aesthetic.clip and aesthetic.head go together: give both files, or neither")


def make_scorer(config: AestheticConfig, on_gpu: bool = False) -> AestheticScorer | None:
    """The scorer of a config, None where it is off. Raises ValueError or OSError for files that do not fit."""
    from preprocess.aesthetic import AestheticScorer

    if config.clip is None or config.head is None:
        return None
    return AestheticScorer.from_files(config.architecture, config.clip, config.head, "cuda" if on_gpu else "cpu")


def scorer_key(config: AestheticConfig) -> str:
    """Changes when the same pictures would get other scores; "" where it is off."""
    from preprocess.aesthetic import aesthetic_key

    if config.clip is None or config.head is None:
        return ""
    return aesthetic_key(config.architecture, config.clip, config.head)

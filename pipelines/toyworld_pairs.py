"""`shotloom toyworld pairs`: what is given and the shot that should come of it, for training and for sampling.

    (task, level, split, seed, index) -> out/videos/PAIR.mp4 + truth and captions, out/references/PAIR-N.png or .mp4,
                                         out/storyboards.json

Prepare `out/videos` to train method tic_ft on the pairs; `storyboards.json` asks a trained model for the same shots.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infra.knobs import knob
from infra.log import progress


@dataclass(kw_only=True)
class PairsConfig:
    """All that `shotloom toyworld pairs` can be told."""

    out: Path = knob(Path("runs/pairs"), "folder for videos/, references/ and storyboards.json")
    task: Literal["i2v_in_context", "multi_image", "keyframes", "v2v_style", "action_transfer"] = knob(
        "i2v_in_context", "what is given: a portrait; with its place; key frames; a source clip; an action"
    )
    count: int = knob(20, "number of pairs")
    first: int = knob(0, "index of the first pair; with the same seed, other indices are other pairs")
    level: Literal["small", "medium", "full"] = knob("small", "how much of the world's vocabulary is used")
    split: Literal["train", "test"] = knob("train", "test = only characters and deeds that training never shows")
    seed: int = knob(0, "of the world")
    size: int = knob(256, "width and height in pixels, even")

    def __post_init__(self) -> None:
        if self.count < 1 or self.first < 0 or self.seed < 0:
            raise ValueError(f"count={self.count} must be 1 or more, first={self.first} and seed={self.seed} 0 or more")


@dataclass(frozen=True)
class PairsReport:
    """What was written."""

    videos: list[Path]
    storyboards: Path

    def summary(self) -> str:
        """Two lines for a person."""
        return f"{len(self.videos)} pairs in {self.videos[0].parent}\nTo sample the same shots: {self.storyboards}"


def run_pairs(config: PairsConfig) -> PairsReport:
    """Writes the pairs one after the other. Raises ValueError where the world refuses a size."""
    from infra.storage import atomic_write_text
    from toyworld.pairs import pair_texts, sample_pair, write_pair
    from toyworld.text import sentence

    videos, boards = [], []
    with progress("pairs", config.count) as shown:
        for index in range(config.first, config.first + config.count):
            pair = sample_pair(config.task, config.level, seed=config.seed, index=index, split=config.split)
            files = write_pair(pair, config.out, size=config.size)
            story, prompt = pair_texts(pair)
            references = [
                {"role": one.role, "path": path.relative_to(config.out).as_posix()}
                for one, path in zip(pair.references, files.references, strict=True)
            ]
            shot = {"prompt": prompt, "sentence": sentence(pair.target, 0), "references": references}
            boards.append({"name": pair.pair_id, "story": story, "shots": [shot]})
            videos.append(files.target.video)
            shown.advance()
    atomic_write_text(config.out / "storyboards.json", json.dumps({"storyboards": boards}, indent=1) + "\n")
    return PairsReport(videos, config.out / "storyboards.json")

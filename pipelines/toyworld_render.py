"""`shotloom toyworld render`: ToyWorld scenes as H.264 files, each with its ground truth and the captions beside it.

    (level, split, seed, index) -> out/SCENE.mp4 + SCENE.truth.json + SCENE.json

The same keys give the same files, byte for byte, with the same version of the encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infra.knobs import knob
from infra.log import progress


@dataclass(kw_only=True)
class RenderConfig:
    """All that `shotloom toyworld render` can be told."""

    out: Path = knob(Path("runs/toyworld"), "folder for the videos and their JSON files")
    count: int = knob(24, "number of scenes")
    first: int = knob(0, "index of the first scene; with the same seed, other indices are other scenes")
    level: Literal["small", "medium", "full"] = knob("small", "how much of the world's vocabulary is used")
    split: Literal["train", "test"] = knob("train", "test = only characters and deeds that training never shows")
    seed: int = knob(0, "of the world")
    dressed: float = knob(0.0, "share of the scenes in which a character has a pattern, whatever the level; train only")
    shots: int | tuple[int, int] = knob((1, 9), "shots per scene: a count, or a range such as [2,4]")
    size: int = knob(256, "width and height in pixels, even")
    fps: float | None = knob(None, "frames per second; null = the world's own 8, others repeat or drop frames")
    captions: bool = knob(True, "write the captions that prepare reads beside the video; the truth is always written")
    vary_wording: bool = knob(False, "word the captions differently from scene to scene")

    def __post_init__(self) -> None:
        if self.count < 1 or self.first < 0 or self.seed < 0:
            raise ValueError(f"count={self.count} must be 1 or more, first={self.first} and seed={self.seed} 0 or more")
        if not 0 <= self.dressed <= 1 or (self.dressed and self.split != "train"):
            raise ValueError(f"dressed={self.dressed} is a share from 0 to 1, of scenes of split=train")


@dataclass(frozen=True)
class RenderReport:
    """What was rendered."""

    videos: list[Path]
    num_frames: int
    num_shots: int

    def summary(self) -> str:
        """One line for a person."""
        folder = self.videos[0].parent
        return f"{len(self.videos)} videos, {self.num_shots} shots, {self.num_frames} frames in {folder}"


def run_render(config: RenderConfig) -> RenderReport:
    """Renders the scenes one after the other. Raises ValueError where the world refuses a count, range or size."""
    from toyworld.video import write_video
    from toyworld.world import dressed, sample_scene

    videos, num_frames, num_shots = [], 0, 0
    with progress("render", config.count) as shown:
        for index in range(config.first, config.first + config.count):
            scene = sample_scene(
                config.level, seed=config.seed, index=index, split=config.split, num_shots=config.shots
            )
            if int((index + 1) * config.dressed) > int(index * config.dressed):  # evenly spread
                scene = dressed(scene)
            files = write_video(
                scene,
                config.out / f"{scene.scene_id}.mp4",
                size=config.size,
                fps=config.fps,
                captions=config.captions,
                phrasing_seed=config.seed * 1_000_003 + index if config.vary_wording else None,
            )
            videos.append(files.video)
            num_frames += files.num_frames
            num_shots += len(scene.shots)
            shown.advance(shots=num_shots)
    return RenderReport(videos, num_frames, num_shots)

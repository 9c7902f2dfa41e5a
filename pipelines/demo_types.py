"""What `shotloom demo` can be told, and what its stages and the whole of it leave behind."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.knobs import knob
from pipelines.shipped import SHIPPED_WAN


@dataclass(kw_only=True)
class DemoConfig:
    """All that `shotloom demo` can be told."""

    videos: Path | None = knob(None, "folder of your own videos; null = rendered ToyWorld scenes")
    out: Path = knob(Path("runs/demo"), "folder of all that the demo makes; an earlier demo's is removed first")
    model: Path = knob(SHIPPED_WAN, "model folder to start from, of a model that makes single shots")
    count: int = knob(24, "ToyWorld videos to render")
    max_seconds: float = knob(5.0, "seconds taken of each of your own videos")
    steps: int = knob(300, "fine-tuning steps")
    batch_size: int = knob(4, "scenes per fine-tuning step")
    learning_rate: float = knob(3e-4, "peak learning rate of fine-tuning")
    compile: bool = knob(False, "torch.compile the fine-tuning's blocks: pays from about 1,000 steps on")
    sample_steps: int = knob(20, "denoising steps of each generated video")
    guidance: float = knob(3.0, "guidance scale of the text")
    scene_guidance: float = knob(3.0, "guidance scale of a scene's other shots, of the fine-tuned model")
    seed: int = knob(0, "of scenes, training and noise")

    def __post_init__(self) -> None:
        if self.count < 1 or self.steps < 1 or self.max_seconds <= 0:
            raise ValueError(
                f"count={self.count}, steps={self.steps} and max_seconds={self.max_seconds}: all must be positive"
            )


@dataclass
class Stage:
    """What one stage took and gave; `what` says it in words."""

    name: str
    seconds: float = 0.0
    items: int = 0
    set_aside: int = 0
    what: str = ""


@dataclass
class DemoResult:
    """What a finished demo leaves behind."""

    config: DemoConfig
    dataset: Path
    model: Path
    report: Path
    stages: list[Stage] = field(default_factory=list)
    seconds: float = 0.0  # of the clock, with what lies between the stages, such as starting Ray
    judge: dict[str, dict[str, dict[str, float]]] | None = None  # {"before"/"after": {metric: {"value", "count"}}}
    notes: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """The content of summary.json."""
        return {
            "stages": {
                stage.name: {"seconds": round(stage.seconds, 1), "items": stage.items, "set_aside": stage.set_aside}
                for stage in self.stages
            },
            "seconds": round(self.seconds, 1),
            "judge": self.judge,
            "notes": self.notes,
            "model": str(self.model),
            "dataset": str(self.dataset),
            "report": str(self.report),
        }

    def summary(self) -> str:
        """Last words on the terminal."""
        from infra.log import duration

        lines = [f"{stage.name:9} {duration(stage.seconds):>9}  {stage.what}" for stage in self.stages]
        return "\n".join([*lines, *self.notes, f"took {duration(self.seconds)}; now open {self.report}"])

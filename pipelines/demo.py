"""`shotloom demo`: the whole way on one machine, from videos to generated multi-shot scenes and a report to look at.

    render | collect -> prepare -> train -> generate (before, after) -> judge -> serve -> report

Every stage is the product's own command with its own configuration; this file only strings them together.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.knobs import knob
from pipelines.shipped import SHIPPED_WAN

MARKER = "made-by-shotloom-demo"  # says that the folder is the demo's own, to be emptied by the next one


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
    sample_steps: int = knob(20, "denoising steps of each generated video")
    guidance: float = knob(3.0, "guidance scale of the text")
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


def run_demo(config: DemoConfig) -> DemoResult:
    """Run every stage, write summary.json and report.html under `config.out`, and say where they are.

    Raises ValueError, naming the stage, when one cannot do its work; what earlier stages made stays to be looked at.
    """
    from infra.ray_session import ray_session
    from infra.storage import atomic_write_json
    from pipelines import demo_stages as work
    from pipelines.demo_page import build_report
    from pipelines.report import write_report

    began = time.monotonic()
    _quiet_libraries()
    work.check_model(config.model)  # before the last demo's folder goes
    out = _fresh(config.out)
    result = DemoResult(config, out / "dataset", out / "train" / "model", out / "report.html")
    if config.videos is None:
        with _stage(result, "render") as stage:
            videos = work.render(config, out / "videos", stage)
    else:
        with _stage(result, "collect") as stage:
            videos = work.collect(config, stage)
    with ray_session():
        with _stage(result, "prepare") as stage:
            prepared = work.prepare_dataset(config, videos, result.dataset, stage)
        with _stage(result, "train") as stage:
            work.finetune(config, result.dataset, out / "train", stage)
        with _stage(result, "generate") as stage:
            boards = work.storyboards(config, prepared.scenes, result.notes)
            takes = work.generate(config, boards, {"before": config.model, "after": result.model}, out, stage)
        if config.videos is None:
            with _stage(result, "judge") as stage:
                result.judge = work.judge(takes, stage)
        with _stage(result, "serve") as stage:
            served = work.serve_one(config, result.model, boards[0], out, stage)
    result.seconds = time.monotonic() - began
    with _stage(result, "report") as stage:
        page = build_report(result, prepared, takes, served)
        write_report(result.report, page)
        stage.items, stage.what = 1, "report.html"
    atomic_write_json(out / "summary.json", result.record())
    return result


@contextmanager
def _stage(result: DemoResult, name: str) -> Iterator[Stage]:
    """Times a stage and says on the terminal when it begins and what came out; a failure carries the stage's name."""
    from infra.log import duration, get_logger

    log = get_logger("demo")
    log.info("%s ...", name)
    stage, began = Stage(name), time.monotonic()
    try:
        yield stage
    except Exception as error:
        words = f"stage '{name}' failed after {duration(time.monotonic() - began)}: {type(error).__name__}: {error}"
        raise ValueError(words) from error
    stage.seconds = time.monotonic() - began
    result.stages.append(stage)
    log.info("%s: %s (%s)", name, stage.what, duration(stage.seconds))


def _quiet_libraries() -> None:
    """No progress bars of loaders between our own progress lines."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _fresh(out: Path) -> Path:
    """An empty folder with the demo's mark; refuses to empty one that the demo did not make."""
    if out.exists():
        if not out.is_dir() or (any(out.iterdir()) and not (out / MARKER).exists()):
            raise ValueError(f"out={out}: exists and is not an earlier demo's folder; choose another `out`")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARKER).touch()
    return out

"""`shotloom demo`: the whole way on one machine, from videos to generated multi-shot scenes and a report to look at.

    render | collect -> prepare -> train -> generate (before, after) -> judge -> serve -> report

Every stage is the product's own command with its own configuration; this file only strings them together.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.demo_types import DemoConfig, DemoResult, Stage

MARKER = "made-by-shotloom-demo"  # says that the folder is the demo's own, to be emptied by the next one


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

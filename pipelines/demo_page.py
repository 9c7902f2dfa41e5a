"""From what the demo did to what its report shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from infra.log import duration
from pipelines.report import Entry, GeneratedScene, Report, SetAside, StageRow, judge_rows, loss_curve
from pipelines.report_media import scene_sheet, take, video_uri

if TYPE_CHECKING:
    from models.scene import Scene
    from pipelines.demo_stages import Prepared, Served, Takes
    from pipelines.demo_types import DemoResult
    from pipelines.report import Take

SHEETS = 6  # scenes with a contact sheet
TAKES = {
    "before": ("Before", "The single-shot model, every shot made alone."),
    "after": ("After", "Fine-tuned with LCT: all shots made together, each attending to the others."),
}


def build_report(result: DemoResult, prepared: Prepared, takes: Sequence[Takes], served: Served) -> Report:
    """Gather figures, pictures and words; reads the loss log, the source videos and the generated ones."""
    config, toy = result.config, result.config.videos is None
    dataset, scenes = prepared.report, prepared.scenes
    losses = [json.loads(line) for line in (result.model.parent / "metrics.jsonl").read_text().splitlines()]
    total = duration(result.seconds)
    files = f"{dataset.sources} ToyWorld videos" if toy else f"{dataset.sources} of your files"
    said = {name: _percent(scores, "identity_said") for name, scores in (result.judge or {}).items()}
    headline = [
        Entry("files in", str(dataset.sources)),
        Entry(f"shots in {dataset.scenes} scenes", str(dataset.shots)),
        Entry("training loss, first and last", f"{losses[0]['loss']:.2f} → {losses[-1]['loss']:.2f}"),
        Entry("from start to report", total),
    ]
    if said:
        headline.insert(3, Entry("identity across shots, before and after", f"{said['before']} → {said['after']}"))
    return Report(
        title="Shotloom: from videos to multi-shot scenes",
        happened=f"{files} were cut into shots, captioned and encoded as scenes; a small single-shot video model was "
        "fine-tuned on them to make scenes whose shots know one another (LCT); the same storyboards were generated "
        "before and after; the fine-tuned model was served over HTTP."
        + (
            ""
            if toy
            else " The starting model knows only ToyWorld, a drawn world of shapes: with real footage this "
            "shows that the whole way works on your files, not what a large model would make of them."
        ),
        notes=result.notes,
        headline=headline,
        flow=_flow(result),
        compared=f"Same storyboards, same start noise, {config.sample_steps} steps, guidance {config.guidance:g}. "
        + (
            "The storyboards are held out: training never showed these characters, or never in this action. "
            if toy
            else "The storyboards are captions of your own scenes. "
        )
        + "Below each video: first, middle and last frame of each shot, a line at each cut.",
        generated=_generated(takes),
        judge=judge_rows(result.judge["before"], result.judge["after"]) if result.judge else [],
        no_judge="The judge reads ToyWorld only; with your own videos there is nothing it could compare.",
        dataset=_dataset(result.dataset, prepared),
        num_sources=dataset.sources,
        set_aside=[SetAside(row["name"], row["status"], row["stage"], row["reason"]) for row in dataset.set_aside],
        num_scenes=dataset.scenes,
        sheets=[scene_sheet(scene, prepared.videos / scene.source.path) for scene in _shown(scenes)],
        training=f"Method LCT on windows of neighbouring shots, all weights, batch {config.batch_size}, "
        f"{config.steps} steps, peak learning rate {config.learning_rate:g}, seed {config.seed}.",
        curve=loss_curve(losses),
        served=_served(served),
        stages=[
            StageRow(stage.name, stage.what, stage.items, stage.set_aside, duration(stage.seconds))
            for stage in result.stages
        ],
        total_time=total,
        next_steps=_next_steps(result),
    )


def _percent(scores: dict[str, dict[str, float]], name: str) -> str:
    return f"{100 * scores[name]['value']:.0f} %"


def _flow(result: DemoResult) -> list[Entry]:
    times = {stage.name: duration(stage.seconds) for stage in result.stages}
    steps = {
        "render": "videos rendered",
        "collect": "videos found",
        "prepare": "scenes in shards",
        "train": "LCT fine-tuning",
        "generate": "before and after",
        "judge": "pixels read back",
        "serve": "one video over HTTP",
    }
    return [Entry(name, f"{what}, {times[name]}") for name, what in steps.items() if name in times]


def _generated(takes: Sequence[Takes]) -> list[GeneratedScene]:
    scenes = []
    for number, records in enumerate(zip(*(each.records for each in takes), strict=True), 1):
        board = records[0]["storyboard"]
        made = [
            take(each.folder / record["file"], record["cuts"], *TAKES[each.name])
            for each, record in zip(takes, records, strict=True)
        ]
        prompts = [shot["prompt"] or shot["sentence"] for shot in board["shots"]]
        scenes.append(GeneratedScene(f"Scene {number}", board["story"], prompts, made))
    return scenes


def _dataset(folder: Path, prepared: Prepared) -> list[Entry]:
    report = prepared.report
    shards = sum(path.stat().st_size for path in (folder / "shards").glob("*.tar"))
    taken = sum({scene.video_id: scene.source.bytes for scene in prepared.scenes}.values())
    return [
        Entry("sources written, filtered, failed", f"{report.written}, {report.filtered}, {report.failed}"),
        Entry("scenes", str(report.scenes)),
        Entry("shots, of them encoded", f"{report.shots}, {report.encoded_shots}"),
        Entry("frames encoded", str(report.encoded_frames)),
        Entry("decodes per source frame", f"{report.decodes_per_frame:.2f}"),
        Entry("source videos", _bytes(taken)),
        Entry(f"in {report.shards} shard{'s' * (report.shards != 1)}", _bytes(shards)),
    ]


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _shown(scenes: Sequence[Scene]) -> list[Scene]:
    """The scenes with most shots, in dataset order."""
    most = sorted(range(len(scenes)), key=lambda k: -len(scenes[k].shots))[:SHEETS]
    return [scenes[k] for k in sorted(most)]


def _served(served: Served) -> Take:
    from pipelines.report import Take

    width, _, height = served.video["size"].partition("x")
    asked = " / ".join(shot["prompt"] for shot in served.video["shots"])
    return Take(
        label=f"{width}×{height}, {served.video['seconds']} s, {len(served.video['shots'])} shots: {asked}",
        note=f"The fine-tuned model behind Ray Serve, asked with POST /v1/videos and fetched from "
        f"/v1/videos/{served.video['id']}/content {served.seconds:.1f} s later.",
        video=video_uri(served.path),
        width=int(width),
    )


def _next_steps(result: DemoResult) -> list[Entry]:
    out = result.config.out
    return [
        Entry("The same with your own videos:", "make demo VIDEOS=my_videos"),
        Entry("Look into the dataset, with nothing of ours installed:", f"tar -tvf {result.dataset}/shards/*.tar"),
        Entry("Step by step, with a model and keys of your own:",
              "shotloom prepare sources=[my_videos] output=runs/mine model=MODEL\n"
              "shotloom train dataset=runs/mine model=MODEL run_dir=runs/mine-lct\n"
              "shotloom sample model=runs/mine-lct/model storyboards=[my_storyboard.yaml]"),
        Entry("Serve the model that was just made:",
              f"shotloom serve model={result.model}\n"
              "curl http://127.0.0.1:8000/v1/videos -H 'content-type: application/json' \\\n"
              "  -d '{\"prompt\": \"a red circle moves from left to right in a meadow, filled style\"}'"),
        Entry("Follow the training in TensorBoard:", f"tensorboard --logdir {out / 'train' / 'tensorboard'}"),
    ]  # fmt: skip

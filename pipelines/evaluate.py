"""`shotloom evaluate`: read generated ToyWorld videos back and score them against the words they were made from.

The folder is one that `shotloom sample` wrote. The judge sees the decoded mp4 and nothing else; what it should have
seen is parsed from the storyboard's text. A shot with references is judged against the pair of `shotloom toyworld
pairs` whose name its storyboard has: the name says how the pair was drawn, so no other file is needed. Videos that
could not be made are listed, and count for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from infra.knobs import knob, required

if TYPE_CHECKING:
    import numpy as np

    from sample.storyboard import Storyboard
    from toyworld.judge import SceneReading
    from toyworld.pairs import ToyPair
    from toyworld.world import ToyScene


@dataclass(kw_only=True)
class EvaluateConfig:
    """All that `shotloom evaluate` can be told."""

    videos: Path = required("folder that `shotloom sample` wrote: videos and manifest.jsonl")
    out: Path | None = knob(None, "file for the scores; null = evaluation.json in the folder of videos")


@dataclass(frozen=True)
class EvaluateReport:
    """`metrics`: {name: {"value", "count"}} over all videos; `videos`: the same per video; `failed`: {name: why}."""

    metrics: dict[str, dict[str, float]]
    videos: dict[str, dict[str, dict[str, float]]]
    failed: dict[str, str]
    path: Path

    def summary(self) -> str:
        lines = [f"{name:24s} {score['value']:7.3f}   n = {score['count']:g}" for name, score in self.metrics.items()]
        lines += [f"{name} was not judged: {why}" for name, why in self.failed.items()]
        return "\n".join([*lines, f"{len(self.videos)} videos judged; {self.path}"])


def run_evaluate(config: EvaluateConfig, on_video: Callable[[str], None] | None = None) -> EvaluateReport:
    """Judge every video of the folder's manifest and write the scores as JSON.

    A video that is missing, unreadable or whose text is not ToyWorld's is listed in `failed` with its reason.
    Raises ValueError when the folder holds no manifest or nothing in it could be judged.
    """
    from infra.log import progress
    from infra.storage import atomic_write_json, safe_join
    from sample.storyboard import Storyboard
    from sample.video_io import read_video
    from toyworld.judge import score_cuts, score_scene_reading, summarise, unsaid_identity
    from toyworld.judge_pairs import score_pair

    manifest = config.videos / "manifest.jsonl"
    if not manifest.is_file():
        raise ValueError(f"{manifest}: no such file; give a folder that `shotloom sample` wrote")
    records = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    scores, readings, failed = {}, [], {}
    with progress("evaluate", len(records)) as bar:
        for record in records:
            name = record["name"]
            try:
                if record["status"] != "completed":
                    raise ValueError(f"was not made: {record['error']}")
                frames, _ = read_video(safe_join(config.videos, record["file"]))
                board = Storyboard.from_dict(record["storyboard"])
                if any(shot.references for shot in board.shots):
                    scores[name] = score_pair(frames, pair_of_storyboard(board))
                else:
                    reading = read_storyboard(frames, record["cuts"], board)
                    readings.append(reading)
                    scores[name] = {**score_scene_reading(reading), **score_cuts(frames, record["cuts"])}
            except ValueError as error:
                failed[name] = str(error)
            bar.advance(1)
            if on_video is not None:
                on_video(name)
    if not scores:
        raise ValueError(
            f"{manifest}: none of {len(records)} videos could be judged: {failed}. The judge reads ToyWorld only; for "
            "other videos, held-out scenes tell whether training helps (docs/train.md)"
        )
    metrics = summarise([*scores.values(), unsaid_identity(readings)])
    videos = {name: summarise([score]) for name, score in scores.items()}
    path = config.out or config.videos / "evaluation.json"
    atomic_write_json(path, {"metrics": metrics, "videos": videos, "failed": failed})
    return EvaluateReport(metrics, videos, failed, path)


def read_storyboard(frames: np.ndarray, cuts: list[int], storyboard: Storyboard) -> SceneReading:
    """What the judge reads in a video, beside what the storyboard's text asks of each shot.

    Raises ValueError when the text is not ToyWorld's or the video has another number of shots.
    """
    from toyworld.judge import SceneReading, read
    from toyworld.judge_score import split_shots
    from toyworld.text import parse_sentence, parse_shot_prompt, parse_story

    clips = split_shots(frames, cuts)
    if len(clips) != len(storyboard.shots):
        raise ValueError(f"the video has {len(clips)} shots, its storyboard {len(storyboard.shots)}")
    if storyboard.story:
        story = parse_story(storyboard.story)
        wanted = [parse_shot_prompt(shot.prompt).resolve(story) for shot in storyboard.shots]
    else:
        wanted = [parse_sentence(shot.sentence or shot.prompt) for shot in storyboard.shots]
    places = list(dict.fromkeys(shot.place for shot in wanted))
    return SceneReading(
        tuple(wanted), tuple(places.index(shot.place) for shot in wanted), tuple(read(clip) for clip in clips)
    )


def pair_of_storyboard(storyboard: Storyboard) -> ToyPair:
    """The ToyWorld pair whose shot a storyboard asks for. Raises ValueError where name, roles or text are not its."""
    from toyworld.pairs import pair_of_id, pair_texts

    pair, (shot, *others) = pair_of_id(storyboard.name), storyboard.shots
    roles = [one.role for one in shot.references]
    if others or roles != [one.role for one in pair.references] or (storyboard.story, shot.prompt) != pair_texts(pair):
        raise ValueError(f"the storyboard asks for something else than the pair {pair.pair_id}, whose name it has")
    return pair


def toy_storyboard(scene: ToyScene, name: str = "") -> Storyboard:
    """A ToyWorld scene in words: story, shot prompts and self-contained sentences, one per shot."""
    from sample.storyboard import Storyboard, StoryboardShot
    from toyworld.text import sentence, shot_prompt, story

    shots = [
        StoryboardShot(shot_prompt(scene, index), sentence(scene, index), frames=shot.num_frames)
        for index, shot in enumerate(scene.shots)
    ]
    return Storyboard(name or scene.scene_id, story(scene), shots)

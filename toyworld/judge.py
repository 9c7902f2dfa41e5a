"""The judge of ToyWorld: reads RGB frames and nothing else, and scores them against a prompt or a scene.

    reading = read(frames)                    # one shot: place, characters, action, states
    scores = score_clip(frames, scene, 0)     # one shot against what was asked
    scores = score_scene(frames, cuts, scene) # several shots, with the agreement between them
    table = summarise([scores, ...])          # {metric: {"value", "count"}}

Seeing is in judge_pixels, judge_shape, judge_pattern, judge_action and judge_read; scoring in judge_score and
judge_scenes; the distance between sets of clips in frechet.
"""

from toyworld.frechet import FEATURES, FrechetDistance, clip_features, frechet
from toyworld.judge_read import Reading, Track, read
from toyworld.judge_scenes import (
    SceneReading,
    continuity,
    find_cuts,
    psnr,
    read_scene,
    score_cuts,
    score_scene,
    score_scene_reading,
    unsaid_identity,
    unsaid_sums,
)  # fmt: skip
from toyworld.judge_score import (
    UNSAID_TRAITS,
    Score,
    Scores,
    assign,
    score_clip,
    score_reading,
    split_shots,
    summarise,
)

__all__ = [
    "UNSAID_TRAITS",
    "FEATURES",
    "FrechetDistance",
    "Reading",
    "SceneReading",
    "Score",
    "Scores",
    "Track",
    "assign",
    "clip_features",
    "continuity",
    "find_cuts",
    "frechet",
    "psnr",
    "read",
    "read_scene",
    "score_clip",
    "score_cuts",
    "score_reading",
    "score_scene",
    "score_scene_reading",
    "split_shots",
    "summarise",
    "unsaid_identity",
    "unsaid_sums",
]

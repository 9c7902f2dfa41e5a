"""What the judge reads in made shots that papers share: the shot against its prompt, and against given frames."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from claim_cells.cell import Judged
from toyworld.judge import Score, clip_features, continuity, psnr, read, score_reading
from toyworld.judge_score import Scores
from toyworld.words import shot_attributes
from toyworld.world import ToyScene

LARGEST_PSNR = 60.0  # dB; equal frames have no finite one
LEAST_STEP = 1e-3  # of `continuity`, before its logarithm


def add_shot(judged: Judged, name: str, frames: np.ndarray, scene: ToyScene, more: Scores | None = None) -> None:
    """The next prompt of set `name`: how the shot follows its words, `more`, and its features."""
    reading = read(frames)
    scores = score_reading(reading, shot_attributes(scene, 0))
    kept = {key: scores[key] for key in ("attributes", "action", "state_order", "legibility")}
    judged.add(name, kept | (more or {}))
    judged.add_features(name, clip_features(reading))


def given_scores(frames: np.ndarray, truth: np.ndarray, given: Sequence[bool]) -> Scores:
    """Against the true shot [T,H,W,3], of which the frames where `given` [T] were known.

    given_psnr, made_psnr: dB, of the given and of the other frames. seam: |ln continuity| at the borders of the given
    frames; 0 is seamless.
    """
    known = np.asarray(given)
    values = np.array([min(psnr(true, made), LARGEST_PSNR) for true, made in zip(truth, frames, strict=True)])
    step = max(continuity(frames, list(known)), LEAST_STEP)
    return {
        "given_psnr": Score(float(values[known].mean()), 1),
        "made_psnr": Score(float(values[~known].mean()), 1),
        "seam": Score(abs(math.log(step)), 1),
    }


def given_pixels(latent_frames: Sequence[int], num_frames: int, stride: int = 4) -> list[bool]:
    """Which video frames the latent frames stand for: the first for one, every other for `stride`."""
    return [(0 if t == 0 else (t - 1) // stride + 1) in latent_frames for t in range(num_frames)]

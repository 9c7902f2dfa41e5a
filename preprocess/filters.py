"""Rules that leave a sound source out. Each names itself and the measured value, so a reader can disagree."""

from __future__ import annotations

from preprocess.outcome import Filtered
from preprocess.probe import VideoInfo
from preprocess.settings import PrepareSettings
from preprocess.spans import RawShot


def check_video(info: VideoInfo, settings: PrepareSettings) -> None:
    """Rules on what the index shows, before anything is decoded. Raises Filtered."""
    side = min(info.width, info.height)
    if side < settings.min_side:
        raise Filtered("filters", f"too small: {info.width}x{info.height}, shorter side under {settings.min_side}")
    needed = settings.min_rate * settings.fps
    if len(info.pts) > 1 and info.fps < needed:
        raise Filtered("filters", f"frame rate too low: {info.fps:.2f} frames/s, under {needed:g}")
    shortest = (settings.min_shot_frames - 1) / settings.fps
    if info.duration_s <= shortest or len(info.pts) < 2:
        raise Filtered(
            "filters",
            f"too short: {info.duration_s:.2f} s, {len(info.pts)} frames; a shot needs {settings.min_shot_frames} "
            f"frames at {settings.fps:g} frames/s",
        )


def check_shots(shots: list[RawShot], settings: PrepareSettings) -> None:
    """Rules on what was decoded. Raises Filtered."""
    if not any(shot.span_pts for shot in shots):
        longest = max(shot.end_frame - shot.start_frame for shot in shots)
        raise Filtered(
            "captions" if settings.cuts == "captions" else "filters",  # other captions, another outcome
            f"no shot is long enough: the longest of {len(shots)} has {longest} source frames, and a shot needs "
            f"{settings.min_shot_frames} at {settings.fps:g} frames/s",
        )

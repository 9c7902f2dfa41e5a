"""Long videos in pieces: what is found is what one pass finds, wherever the borders lie; what is broken costs itself."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
import pytest

from preprocess import pieces
from preprocess.decode import DecodeCount
from preprocess.pieces import WARM_UP, Job, cut_at, decode_piece, in_turn, make_jobs, plan_pieces, read_pieces
from preprocess.letterbox import NO_BARS
from preprocess.outcome import Failed
from preprocess.probe import VideoInfo, probe
from preprocess.settings import PrepareSettings
from preprocess.shots import LOOKAHEAD, ShotDetector
from preprocess.spans import Piece, PieceShots, RawShot, read_shots
from tests.preprocess.test_shots import texture
from tests.preprocess.videos import moving_square, write
from toyworld.render import render_scene
from toyworld.world import sample_scene

SETTINGS = PrepareSettings(height=32, width=32, fps=8.0, shot_frames=17)
RATE = 24


@dataclass
class Film:
    path: Path
    info: VideoInfo
    shots: list[RawShot]  # of one pass
    spans: dict[int, bytes]  # by start of the shot


def spans_of(shots: Sequence[RawShot], files: dict[int, bytes], settings: PrepareSettings = SETTINGS) -> dict[int, bytes]:
    size = settings.height * settings.width * 3
    return {
        shot.start_frame: files[shot.piece][shot.offset * size : (shot.offset + len(shot.span_pts)) * size]
        for shot in shots
    }


def one_pass(path: Path, settings: PrepareSettings = SETTINGS, cuts: list[int] | None = None) -> Film:
    info, scratch = probe(str(path)), io.BytesIO()
    shots, _ = read_shots(str(path), info, settings, scratch, cuts=cuts)
    return Film(path, info, shots, spans_of(shots, {0: scratch.getvalue()}, settings))


def in_pieces(
    film: Film,
    firsts: Sequence[int],
    folder: Path,
    settings: PrepareSettings = SETTINGS,
    cuts: list[int] | None = None,
    info: VideoInfo | None = None,
) -> tuple[list[RawShot], dict[int, bytes], DecodeCount, list[str]]:
    jobs = make_jobs(
        str(film.path), info or film.info, settings, cut_at(firsts), folder, folder / "attempts", cuts, NO_BARS
    )
    shots, count, lost = read_pieces(jobs, in_turn)
    files = {int(path.stem): path.read_bytes() for path in folder.glob("*.frames")}
    return shots, spans_of(shots, files, settings), count, lost


def plain(shots: Sequence[RawShot]) -> list[RawShot]:
    """Without where their frames wait."""
    return [replace(shot, piece=0, offset=0) for shot in shots]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Film:
    """ToyWorld at 24 frames/s with cuts, dissolves and fades, and a key frame every 20 frames."""
    images: list[np.ndarray] = []
    for index in range(40):
        images += list(render_scene(sample_scene("full", seed=77, index=index, num_shots=4), 64)[0])
        if len(images) > 900:
            break
    options = {"crf": "18", "preset": "ultrafast", "g": "20", "x264-params": "threads=1:log-level=none:scenecut=0"}
    path = write(tmp_path_factory.mktemp("film") / "toy.mp4", images, fps=RATE, options=options)
    return one_pass(path)


def test_shots_found_in_pieces_are_those_of_one_pass(toy: Film, tmp_path: Path) -> None:
    """With borders in shots, on cuts, and inside of dissolves and fades: shots, scores, spans, all of it."""
    keys = [toy.info.pts.index(pts) for pts in toy.info.key_pts]
    assert keys[:3] == [0, 20, 40]
    kinds = {shot.transition for shot in toy.shots}
    assert {"cut", "dissolve", "fade"} <= kinds, kinds
    borders = [[key for key in keys[1:] if key + WARM_UP < len(toy.info.pts)]]
    blends = [shot.blend_frames for shot in toy.shots if shot.blend_frames]
    inside = [k for k in borders[0] if any(start < k + WARM_UP < end for start, end in blends)]
    assert inside, "a border lies inside of a transition"
    for number, firsts in enumerate(([0, *inside[:3]], [0, 180, 380, 600])):
        shots, spans, count, lost = in_pieces(toy, firsts, tmp_path / str(number))
        assert plain(shots) == plain(toy.shots) and spans == toy.spans and not lost
        assert count.shown == len(toy.info.pts)
        assert len(list((tmp_path / str(number)).glob("*.frames"))) == len(firsts), "no second pass was needed"

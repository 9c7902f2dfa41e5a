"""Long videos in pieces: the shots of one pass wherever the borders lie; what is broken costs itself, no more."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from preprocess import pieces
from preprocess import spans as spans_module
from preprocess.decode import DecodeCount
from preprocess.letterbox import NO_BARS
from preprocess.outcome import Failed
from preprocess.pieces import WARM_UP, Job, cut_at, decode_piece, in_turn, make_jobs, plan_pieces, read_pieces
from preprocess.probe import VideoInfo, probe
from preprocess.settings import PrepareSettings
from preprocess.shots import LOOKAHEAD, ShotDetector
from preprocess.spans import Piece, PieceShots, RawShot, read_shots
from tests.preprocess.test_shots import texture
from tests.preprocess.videos import damage_packet, write
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


def spans_of(
    shots: Sequence[RawShot], files: dict[int, bytes], settings: PrepareSettings = SETTINGS
) -> dict[int, bytes]:
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
        if len(images) >= 760:
            break
    options = {"crf": "18", "preset": "ultrafast", "g": "20", "x264-params": "threads=1:log-level=none:scenecut=0"}
    path = write(tmp_path_factory.mktemp("film") / "toy.mp4", images[:760], fps=RATE, options=options)
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
    for number, firsts in enumerate(([0, *inside[:3]], [0, 180, 380])):
        shots, spans, count, lost = in_pieces(toy, firsts, tmp_path / str(number))
        assert plain(shots) == plain(toy.shots) and spans == toy.spans and not lost
        assert count.shown == len(toy.info.pts)
        assert len(list((tmp_path / str(number)).glob("*.frames"))) == len(firsts), "no second pass was needed"


def test_known_cuts_in_pieces(toy: Film, tmp_path: Path) -> None:
    settings, cuts = replace(SETTINGS, cuts="captions"), [5, 130, WARM_UP + 200, WARM_UP + 230, 700]
    whole = one_pass(toy.path, settings, cuts)
    shots, spans, _, lost = in_pieces(toy, [0, 200, 440], tmp_path, settings, cuts)
    assert plain(shots) == plain(whole.shots) and spans == whole.spans and not lost


@pytest.mark.parametrize(
    ("name", "decoder"),
    [
        ("ffmpegconcat/example.mp4", "decord"),
        ("ffmpegconcat/example.mp4", "pyav"),
        pytest.param("mdn/tears-of-steel-battle-clip-medium.webm", "decord", marks=pytest.mark.slow),
        pytest.param("mdn/tears-of-steel-battle-clip-medium.webm", "pyav", marks=pytest.mark.slow),
    ],
)
def test_a_real_clip_in_pieces(shared_data: Path, tmp_path: Path, name: str, decoder: str) -> None:
    path = shared_data / "clips" / name
    info = replace(probe(str(path)), decoder=decoder)
    scratch = io.BytesIO()
    shots, _ = read_shots(str(path), info, SETTINGS, scratch)
    film = Film(path, info, shots, spans_of(shots, {0: scratch.getvalue()}))
    keys = [info.pts.index(pts) for pts in info.key_pts if info.pts.index(pts) + WARM_UP < len(info.pts)]
    firsts = [0, *keys[1:][:: max(1, len(keys) // 3)]]
    assert len(firsts) > 1
    found, spans, _, lost = in_pieces(film, firsts, tmp_path)
    assert plain(found) == plain(film.shots) and spans == film.spans and not lost
    assert len(list(tmp_path.glob("*.frames"))) == len(firsts), "no second pass was needed"


def test_a_detector_forgets_what_lies_before_its_warm_up() -> None:
    film = sum((texture(seed, 40 + 7 * seed, 0.4) for seed in range(8)), [])
    whole, states = ShotDetector(), []
    for picture in film:
        states.append(whole.state())
        whole.push(picture)
        whole.take()
    for begin in (1, 90, 260):
        late = ShotDetector()
        for k, picture in enumerate(film[begin : begin + 2 * WARM_UP]):
            late.push(picture)
            late.take()
            if k + 1 >= WARM_UP:
                assert late.state() == states[begin + k + 1]
        late.push(255 - film[0])
        assert late.state() not in states


def synthetic(frames: int, fps: float = 25.0, every: int = 50, **changes: object) -> VideoInfo:
    """What a probe says of a file of even frames, which is not there."""
    path_info = dict.fromkeys(VideoInfo.__dataclass_fields__)
    pts = list(range(frames))
    return VideoInfo(**path_info | {
        "pts": pts, "key_pts": pts[::every], "fps": fps, "time_base": [1, round(fps)], "frame_ticks": 1,
        "decoder": "pyav", **changes})  # fmt: skip


@pytest.mark.parametrize(("minutes", "fps", "every"), [(30, 25, 50), (30, 60, 250), (120, 24, 12), (400, 1, 10)])
def test_pieces_cover_a_video_and_little_is_decoded_twice(minutes: int, fps: int, every: int) -> None:
    info = synthetic(60 * minutes * fps, fps, every)
    for settings in (SETTINGS, replace(SETTINGS, shot_frames=81, fps=16.0), replace(SETTINGS, unit_seconds=1.0)):
        plan = plan_pieces(info, settings)
        assert [piece.number for piece in plan] == list(range(1, len(plan) + 1)) and len(plan) > 1
        assert plan[0].first == plan[0].begin == 0 and plan[-1].end is None
        assert all(one.end == two.begin for one, two in zip(plan, plan[1:], strict=False))
        assert all(piece.first % every == 0 and piece.begin - piece.first == WARM_UP for piece in plan[1:])
        overrun = 2 * LOOKAHEAD + settings.shot_frames / settings.fps * fps
        assert (len(plan) - 1) * (WARM_UP + overrun) / len(info.pts) < 0.1
        seconds = [((piece.end or len(info.pts)) - piece.begin) / fps for piece in plan]
        if settings.unit_seconds == 300 and fps > 1:
            assert 150 - every / fps <= min(seconds) and max(seconds) <= 450 + every / fps


def test_what_cannot_be_cut_is_one_piece() -> None:
    long = 60 * 25 * 60
    assert plan_pieces(synthetic(7 * 60 * 25), SETTINGS) == [Piece()]
    assert plan_pieces(synthetic(long, decoder="images"), SETTINGS) == [Piece()]
    assert plan_pieces(synthetic(long), replace(SETTINGS, cuts="transnet")) == [Piece()]
    assert plan_pieces(synthetic(long), replace(SETTINGS, max_seconds=400.0)) == [Piece()]
    assert plan_pieces(synthetic(long, every=long), SETTINGS) == [Piece()], "one key frame"


def test_borders_that_do_not_agree_cost_a_second_pass(
    toy: Film, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a key frame is none, so that what is decoded from it differs."""
    real = decode_piece

    def odd(job: Job) -> PieceShots:
        found = real(job)
        return replace(found, begin_state="another", shots=[]) if job.piece.begin else found

    monkeypatch.setattr(pieces, "decode_piece", odd)
    shots, spans, count, lost = in_pieces(toy, [0, 400], tmp_path)
    assert plain(shots) == plain(toy.shots) and spans == toy.spans and not lost
    assert count.decoded > 2 * len(toy.info.pts), "both passes are counted"


def test_a_stretch_that_cannot_be_decoded_costs_itself_and_is_named(
    toy: Film, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    firsts, bad = [0, 200, 440], 400
    real = spans_module.frames

    def broken(*args: object, **options: object):
        for frame in real(*args, **options):
            if frame.index == bad:
                raise Failed("decode", f"frame {bad} cannot be decoded")
            yield frame

    monkeypatch.setattr(spans_module, "frames", broken)
    shots, spans, count, lost = in_pieces(toy, firsts, tmp_path)
    begin, end = bad, 440 + WARM_UP
    kept = [shot for shot in toy.shots if shot.end_frame <= begin or shot.start_frame >= end]
    assert [shot for shot in plain(shots) if shot.end_frame < begin or shot.start_frame >= end] == plain(kept)
    assert all(spans[shot.start_frame] == toy.spans[shot.start_frame] for shot in kept)
    following = min(shot.start_frame for shot in kept if shot.start_frame >= end)
    seconds = [round(frame / RATE) for frame in (begin, following)]
    assert lost == [f"0:00:{seconds[0]:02d} to 0:00:{seconds[1]:02d}: frame {bad} cannot be decoded"]
    assert count.shown == bad + len(toy.info.pts) - end

    monkeypatch.setattr(spans_module, "frames", lambda *args, **options: iter(()))
    with pytest.raises(Failed):
        in_pieces(toy, firsts, tmp_path / "none")


def test_a_piece_is_not_decoded_twice_and_one_that_dies_is_lost(toy: Film, tmp_path: Path) -> None:
    jobs = make_jobs(
        str(toy.path), toy.info, SETTINGS, cut_at([0, 200, 440]), tmp_path, tmp_path / "attempts", None, NO_BARS
    )
    decode_piece(jobs[0])
    before = jobs[0].frames.stat().st_mtime_ns
    work = pieces.Attempts(tmp_path / "attempts")

    def side_by_side(work_on, jobs):
        for _ in range(3):  # as a worker that dies leaves it
            work._note(jobs[1].frames.parent.name + jobs[1].frames.stem, "begin decode")
        return [work_on(jobs[0]), None, work_on(jobs[2])]

    shots, _, lost = read_pieces(jobs, side_by_side)
    assert jobs[0].frames.stat().st_mtime_ns == before
    (said,) = lost
    assert said.startswith("0:00:13 to ") and said.endswith("its worker process died, 3 attempts")
    assert {shot.piece for shot in shots} == {1, 3}
    assert decode_piece(jobs[1]).lost.endswith("3 attempts"), "it is not tried again"


def test_one_bad_packet_in_pieces_is_as_in_one_pass(toy: Film, tmp_path: Path) -> None:
    """decord raises in one piece; the others are decoded by PyAV, too, as in one pass all frames are."""
    path = damage_packet(Path(shutil.copy(toy.path, tmp_path)), 310)
    film = one_pass(path)
    shown = film.shots[-1].end_frame
    assert film.info.decoder == "decord" and 740 < shown < 760
    shots, spans, count, lost = in_pieces(film, [0, 200, 440], tmp_path / "pieces")
    assert plain(shots) == plain(film.shots) and spans == film.spans and not lost
    assert (count.decoder, count.reason, count.shown) == ("pyav", "decord cannot decode all of it", shown)
    done = sorted(path.stem for path in (tmp_path / "pieces").glob("*.frames"))
    assert done == ["0001", "0002", "0003", "0006"], "only the piece that decord could decode is decoded again"
    assert count.decoded > 760 + 2 * WARM_UP + 320, "what was decoded twice is counted twice"
    again = in_pieces(film, [0, 200, 440], tmp_path / "pieces")  # all pieces are done: nothing is decoded
    assert plain(again[0]) == plain(shots) and again[1] == spans and again[2] == count

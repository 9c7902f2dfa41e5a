"""Cuts taken from the caption file: exact, gap-free, and errors that name the file."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from preprocess.filters import NO_FILTERS
from preprocess.known_cuts import caption_cuts
from preprocess.outcome import Failed
from preprocess.probe import probe
from preprocess.settings import PrepareSettings
from preprocess.sources import list_sources
from preprocess.spans import RawShot, read_shots
from preprocess.unit import Unit, decode_stage, probe_stage, run_stage
from preprocess.workplace import Workplace
from tests.preprocess.runs import run_here
from tests.preprocess.videos import moving_square, write
from toyworld.video import write_video
from toyworld.world import sample_scene

SETTINGS = PrepareSettings(height=32, width=32, cuts="captions")
ONE_PICTURE = moving_square(40, (30, 120, 40), (220, 40, 40), step=0.5)  # nothing to detect in it


def shots_of(path: Path, cuts: Sequence[int] | None) -> list[RawShot]:
    return read_shots(str(path), probe(str(path)), SETTINGS, io.BytesIO(), cuts=cuts)[0]


def captions(path: Path, *shots: tuple[int, int]) -> str:
    said = [{"start_frame": begin, "end_frame": end, "prompt": f"{begin} to {end}"} for begin, end in shots]
    path.write_text(json.dumps({"shots": said}))
    return str(path)


def decoded(path: Path, folder: Path) -> Unit:
    unit, place = Unit(list_sources([path]).files[0]), Workplace(SETTINGS, folder / "parts", folder / "scratch", "")
    for name, stage in (("probe", probe_stage), ("decode", decode_stage)):
        run_stage(name, lambda u, stage=stage: stage(u, place), unit)
    return unit


def test_known_cuts_change_nothing_but_where_shots_begin(tmp_path: Path) -> None:
    scene = sample_scene("small", seed=4, index=0, num_shots=3)
    path = write_video(scene, tmp_path / "toy.mp4", size=64).video
    found, known = shots_of(path, None), shots_of(path, scene.cuts)
    assert [shot.start_frame for shot in found] == [0, *scene.cuts], "what is detected here is right"
    for a, b in zip(found, known, strict=True):
        assert (a.start_frame, a.end_frame, a.span_frames, a.start_pts, a.end_pts, a.transition) == (
            b.start_frame, b.end_frame, b.span_frames, b.start_pts, b.end_pts, b.transition)  # fmt: skip
        assert b.confidence == 1.0 and b.scores == a.scores, "motion is measured alike"


def test_cuts_that_no_detector_sees_are_exact_and_gaps_become_shots(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", ONE_PICTURE)
    cuts = caption_cuts(captions(tmp_path / "a.json", (20, 31), (3, 12), (90, 99)))
    shots = shots_of(path, cuts)
    assert [(s.start_frame, s.end_frame) for s in shots] == [(0, 3), (3, 12), (12, 20), (20, 31), (31, 40)]
    assert [len(s.span_frames) for s in shots] == [0, 9, 5, 9, 9]
    assert len(shots_of(path, None)) == 1


def test_overlapping_shots_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"a\.json: shots 0\.\.9 and 8\.\.20 overlap"):
        caption_cuts(captions(tmp_path / "a.json", (8, 20), (0, 9)))
    with pytest.raises(Failed, match="cuts=detect"):
        caption_cuts(None)


def test_the_stage_takes_the_cuts_and_names_captions_that_leave_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", ONE_PICTURE)
    captions(tmp_path / "a.json", (0, 17), (17, 40))
    unit = decoded(path, tmp_path)
    assert unit.status == "" and [shot.start_frame for shot in unit.shots] == [0, 17]
    captions(tmp_path / "a.json", *((k, k + 2) for k in range(0, 40, 2)))
    unit = decoded(path, tmp_path)
    assert (unit.status, unit.stage) == ("filtered", "captions"), "so that other captions are tried again"
    assert "20 has 2 source frames" in unit.reason


def test_captions_whose_shots_are_all_filtered_are_tried_again_when_mended(tmp_path: Path, model: Path) -> None:
    """And so are those whose shots all double others: other captions may cut them otherwise."""
    still, videos, out = ONE_PICTURE[:1] * 10, tmp_path / "videos", tmp_path / "out"
    path = write(videos / "a.mp4", [*still, *moving_square(9, (30, 120, 40), (220, 40, 40)), *still])
    captions(videos / "a.json", (0, 7), (7, 14), (14, 21), (21, 29))
    settings = replace(SETTINGS, filters=replace(SETTINGS.filters, min_movement=1e6))
    work, _ = run_here(videos, out, model, settings)
    source = work.finished[work.files[0].video_id].part.source
    assert (source["status"], source["stage"]) == ("filtered", "captions") and "4 static" in source["reason"]
    assert run_here(videos, out, model, settings)[1] == 0
    captions(videos / "a.json", (0, 10), (10, 29))
    work, todo = run_here(videos, out, model, settings)
    assert todo == 1 and "2 static" in work.finished[work.files[0].video_id].part.source["reason"]
    (videos / "b.mp4").write_bytes(path.read_bytes())
    (videos / "b.json").write_bytes((videos / "a.json").read_bytes())
    copies = replace(SETTINGS, filters=replace(NO_FILTERS, same_file=True))
    work, _ = run_here(videos, tmp_path / "other", model, copies)
    ends = [work.finished[file.video_id].part.source["stage"] for file in work.files]
    assert ends == ["", "captions"]


def test_other_captions_are_not_recalled_with_old_cuts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", ONE_PICTURE)
    captions(tmp_path / "a.json", (0, 17))
    unit, place = Unit(list_sources([path]).files[0]), Workplace(SETTINGS, tmp_path, tmp_path / "scratch", "")
    probe_stage(unit, place)
    unit.recall = {"an-earlier-scene": str(tmp_path / "gone.tar")}
    decode_stage(unit, place)
    assert not unit.recall and [shot.start_frame for shot in unit.shots] == [0, 17]

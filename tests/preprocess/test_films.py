"""A long video through a whole run, without Ray: in units it gives the bytes that it gives in one."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from models.tiny import build_tiny_folder
from preprocess import pieces, rows
from preprocess import unit as unit_module
from preprocess.encode import Encoder
from preprocess.filters import NO_FILTERS
from preprocess.outcome import Failed
from preprocess.pieces import in_turn
from preprocess.report import PrepareReport
from preprocess.rows import EncodeRow, caption_row, decode_row, probe_row, spread_row
from preprocess.run import Work, plan_work
from preprocess.settings import PrepareSettings
from preprocess.sources import list_sources
from preprocess.unit import Unit
from preprocess.verify import verify
from preprocess.watch import MAX_ATTEMPTS, Attempts
from tests.preprocess.videos import moving_square, write

UNITS = PrepareSettings(height=32, width=32, unit_seconds=7.0, filters=NO_FILTERS)
WHOLE = replace(UNITS, unit_seconds=1e6)
SHARD = 10**7


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    build_tiny_folder(path)
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One film of 14 shots that come back in pairs, a key frame every 20 frames, and nothing to read beside it."""
    folder, images = tmp_path_factory.mktemp("videos"), []
    looks = np.random.default_rng(3).integers(30, 225, (8, 2, 3)).tolist()
    for shot in range(14):  # slow, so that the detector has little to do
        ground, square = looks[2 * (shot // 4) + shot % 2]
        images += moving_square(40, tuple(ground), tuple(square), size=48, step=0.2, y=0.1 * (shot % 7))
    options = {"crf": "18", "preset": "ultrafast", "g": "20", "x264-params": "threads=1:log-level=none:scenecut=0"}
    write(folder / "film.mp4", images, fps=24, options=options)
    return folder


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "LEAST", 0)


def run_here(
    videos: Path, output: Path, model: Path, settings: PrepareSettings, retry_failed: bool = False, die_at: int = -1
) -> tuple[Work, Counter[str]]:
    """The chain of `pipelines.prepare.run_stages` in this process; dies before the row `die_at` is encoded."""
    work = plan_work(list_sources([videos]).files, output, settings, model, retry_failed)
    encode, ended = EncodeRow(work.place, str(model), "cpu", 1), Counter()
    for manifest in work.rounds():
        for row in pq.read_table(manifest).to_pylist():
            row = caption_row(decode_row(probe_row(row, work.place), work.place), work.place)
            for number, one in enumerate(spread_row(row, work.place)):
                if number == die_at:
                    raise KeyboardInterrupt
                ended[encode(one)["status"]] += 1
    work.compact(SHARD)
    work.clean()
    return work, ended


_PEAK = """
import sys
from pathlib import Path
from infra.machine import peak_memory
from preprocess.encode import Encoder
from preprocess.filters import NO_FILTERS
from preprocess.settings import PrepareSettings
from preprocess.sources import list_sources
from preprocess.unit import prepare_video
model, video, parts = map(Path, sys.argv[1:])
settings = PrepareSettings(height=64, width=64, filters=NO_FILTERS)
row = prepare_video(list_sources([video]).files[0], settings, Encoder.from_folder(model), parts).source
assert row["status"] == "written", row
print(row["source_frames"], row["decoded_frames"], peak_memory())
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_is_flat_up_to_half_an_hour(model: Path, tmp_path: Path) -> None:
    """Peak of a process that prepares 3 and 30 minutes, within 15 %; half an hour is five units at 8 frames/s."""
    peaks, looks = {}, np.random.default_rng(5).integers(30, 225, (8, 2, 3)).tolist()
    for minutes in (3, 30):
        images = []
        for shot in range(minutes * 6):
            ground, square = looks[shot % 8]
            images += moving_square(80, tuple(ground), tuple(square), size=64, step=0.2, y=0.1 * (shot % 7))
        video = write(tmp_path / f"{minutes}.mp4", images, fps=8)
        command = [sys.executable, "-c", _PEAK, str(model), str(video), str(tmp_path / f"parts-{minutes}")]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
        frames, decoded, peaks[minutes] = (int(word) for word in done.stdout.split()[-3:])
        assert frames == minutes * 480 and decoded <= 1.15 * frames
    assert peaks[30] <= 1.15 * peaks[3], peaks


@pytest.fixture(scope="module")
def whole(videos: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    run_here(videos, output, model, WHOLE)
    return output


def shards(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((output / "shards").glob("*.tar"))}


def table(output: Path, name: str) -> list[dict]:
    return pq.read_table(output / f"{name}.parquet").to_pylist()


def test_a_film_in_units_gives_the_same_bytes(videos: Path, model: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    work, ended = run_here(videos, output, model, UNITS)
    assert ended == {"": 2, "written": 1}, "three units, of which the last makes the part"
    assert shards(output) == shards(whole) and table(output, "manifest") == table(whole, "manifest")
    assert verify(output).faults == [] and sorted(path.name for path in output.iterdir()) == sorted(
        path.name for path in whole.iterdir()
    )
    (one,), (other,) = table(output, "sources"), table(whole, "sources")
    assert one.pop("decoded_frames") > other.pop("decoded_frames") and one == other
    scenes = [row["scene_id"] for row in table(output, "manifest")]
    assert max(Counter(scenes).values()) > 1, "shots were grouped"
    report = PrepareReport(output)
    report.count_rows(table(output, "sources"), {work.files[0].video_id})
    assert 1 < report.decodes_per_frame < 1 + 2 * (pieces.WARM_UP + 110) / 560 and report.source_frames == 560
    assert plan_work(list_sources([videos]).files, output, WHOLE, model).todo == [], "other units, same result"


SIZES = replace(UNITS, height=64, width=64, sizes=((32, 32), (32, 64)))


@pytest.mark.parametrize("settings", [(UNITS, UNITS), (SIZES, replace(SIZES, sizes=((64, 32), *SIZES.sizes)))])
def test_a_killed_run_goes_on_with_what_is_done(
    settings: tuple[PrepareSettings, PrepareSettings],
    videos: Path,
    model: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also with a size more in the list, which is not this film's."""
    counts: Counter[str] = Counter()
    for module, name in ((pieces, "read_piece"), (Encoder, "encode_texts")):
        real = getattr(module, name)

        def counted(*args, real=real, name=name, **kwargs):
            counts[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_here(videos, output, model, settings[0], die_at=2)
    assert counts == {"read_piece": 3, "encode_texts": 2}
    run_here(videos, output, model, settings[1])
    assert counts == {"read_piece": 3, "encode_texts": 3}
    assert shards(output) == shards(whole) and table(output, "manifest") == table(whole, "manifest")


def test_a_unit_that_fails_sets_its_scenes_aside_and_no_other(
    videos: Path, model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, real = tmp_path / "out", rows.encode_stage

    def fails(unit, place, encoder):
        if unit.group == [1, 3]:
            raise Failed("encode", "no luck")
        real(unit, place, encoder)

    with monkeypatch.context() as patch:
        patch.setattr(rows, "encode_stage", fails)
        run_here(videos, output, model, UNITS)
    assert verify(output).faults == []
    (source,) = table(output, "sources")
    assert source["status"] == "written"
    aside = {row["scene_id"]: row["set_aside"] for row in table(output, "manifest") if row["set_aside"]}
    assert set(aside.values()) == {"encode: no luck"}
    before = {row["scene_id"] for row in table(whole, "manifest") if row["key"]}
    assert {row["scene_id"] for row in table(output, "manifest") if row["key"]} == before - set(aside)
    run_here(videos, output, model, UNITS, retry_failed=True)
    assert shards(output) == shards(whole)


def test_what_is_lost_of_a_film_is_named_and_tried_again(
    videos: Path, model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, real = tmp_path / "out", pieces.read_piece

    def fails(*args, **kwargs):
        if args[4].number == 2:
            raise Failed("decode", "frame 300 cannot be decoded")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pieces, "read_piece", fails)
        work, _ = run_here(videos, output, model, UNITS)
    assert verify(output).faults == []
    (source,) = table(output, "sources")
    (said,) = json.loads(source["lost"])
    assert source["status"] == "written" and said.endswith(": frame 300 cannot be decoded") and said[:7] == "0:00:08"
    report = PrepareReport(output)
    report.count_rows([source], set())
    assert f"lost of film.mp4: {said}" in report.summary()
    kept = {row["start_frame"] for row in table(output, "manifest")}
    assert kept < {row["start_frame"] for row in table(whole, "manifest")}
    assert plan_work(work.files, output, UNITS, model).todo == []
    run_here(videos, output, model, UNITS, retry_failed=True)
    assert shards(output) == shards(whole)
    assert table(output, "sources")[0]["lost"] == ""


def probed(videos: Path, output: Path, model: Path) -> tuple[Work, dict[str, str]]:
    work = plan_work(list_sources([videos]).files, output, UNITS, model)
    (row,) = pq.read_table(next(work.rounds())).to_pylist()
    return work, probe_row(row, work.place)


def status_within(seconds: float, work: Callable[[], object]) -> int | None:
    """How `work` ends in a process of its own; None where it has to be killed."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def test_what_hangs_before_the_pieces_is_ended_and_named(
    videos: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search for black bars, say, in a film of several pieces."""
    work, row = probed(videos, tmp_path / "out", model)
    real = faulthandler.dump_traceback_later
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda _, **options: real(0.3, **options))
    monkeypatch.setattr(unit_module, "find_bars", lambda *args: time.sleep(600))
    for _ in range(MAX_ATTEMPTS):
        assert status_within(60, lambda: decode_row(row, work.place)) == 1
    unit = Unit.from_json(decode_row(row, work.place)["unit"])
    assert (unit.status, unit.stage) == ("failed", "decode")
    assert unit.reason == "it hung and was ended at the time limit, 3 attempts"


def test_waiting_for_pieces_is_no_attempt(videos: Path, model: Path, tmp_path: Path) -> None:
    """It takes as long as they take, each of which has its own limit; what comes after it is under a limit again."""
    work, row = probed(videos, tmp_path / "out", model)
    attempts, seen = Attempts(work.place.parts / "attempts"), []

    def side_by_side(decode, jobs):
        seen.append((len(jobs), attempts.unfinished(row["video_id"])))
        return in_turn(decode, jobs)

    unit = Unit.from_json(decode_row(row, work.place, side_by_side)["unit"])
    assert unit.status == "" and seen == [(3, ("", 0))]
    lines = (work.place.parts / "attempts" / row["video_id"]).read_text().splitlines()
    assert lines == ["begin probe", "end probe", *["begin decode", "end decode"] * 2]

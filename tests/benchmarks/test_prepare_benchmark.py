"""benchmarks/prepare.py: its ways do the same work, its clocks count, a dry run sees what a bare loop has done."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import _peers_order
import prepare
import pytest

from pipelines.dry_run import dry_run
from pipelines.prepare import PrepareConfig
from preprocess.sources import list_sources
from tests.preprocess.videos import three_shots, write


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for k in range(2):
        write(folder / f"v{k}.mp4", three_shots(17 + k))
    return folder


def test_quick_run_of_the_parts_without_ray(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--quick", "--json", "parts=bc", "count=1"])
    monkeypatch.setattr(prepare, "have_scenedetect", lambda: False)
    assert prepare.main() == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["files"] == 1 and record["own_files"] and record["scenedetect"] is None
    (name,) = record["figures"]
    assert name.startswith("(b)") and 0 < record["figures"][name]["cpu"][0] < 1.5
    pieces = record["where_time_goes"]["64x64"]["ms_per_frame"]
    assert {"shot detector", "blur", "probe", "resize to 48x27"} <= set(pieces) and pieces["shot detector"] > 0
    assert all(goal["met"] is None for goal in record["goals"])


@pytest.mark.parametrize("key", ["part=b", "parts=bd", "count=few"])
def test_a_wrong_key_is_named_before_any_work(
    key: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare.py", key])
    with pytest.raises(SystemExit, match="2"):
        prepare.main()
    assert key.split("=")[0] in capsys.readouterr().err


def test_the_bare_loop_makes_a_dataset_and_a_dry_run_finds_it_done(videos: Path, tmp_path: Path) -> None:
    config = PrepareConfig(sources=[str(videos)], output=tmp_path / "out", model=prepare.MODEL)
    prepare.bare(config)
    record = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert record["totals"]["scenes"] >= 2 and list((tmp_path / "out" / "shards").glob("*.tar"))
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in (tmp_path / "out").rglob("*")}
    write(videos / "v9.mp4", three_shots(20))
    found = dry_run(config)
    assert (found.sources, found.unchanged, found.sampled) == (3, 2, ["v9.mp4"])
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in (tmp_path / "out").rglob("*")}
    (videos / "v9.mp4").unlink()


def test_the_peers_order_splits_at_the_cuts_and_leaves_frames(videos: Path, tmp_path: Path) -> None:
    (file, _) = list_sources([str(videos)]).files
    settings = prepare.SIZES["64x64"]
    clips = _peers_order.split(file.path, [17 / 8, 34 / 8], tmp_path)
    assert [len(list(_peers_order._sampled(clip, settings))) for clip in clips] == [17, 17, 17]
    assert set(_peers_order.quality(clips[0], settings)) >= {"blur", "text", "movement"}
    _peers_order.keep_frames(clips[0], settings, tmp_path / "frames")
    assert (tmp_path / "frames").stat().st_size == 17 * 64 * 64 * 3


def test_the_clock_counts_processes_that_have_ended() -> None:
    code = "import time\nwhile time.process_time() < 1: pass\ntime.sleep(0.5)"
    with prepare.TreeClock() as clock:
        subprocess.run([sys.executable, "-c", code], check=True)
    assert 0.9 < clock.seconds < 2.5

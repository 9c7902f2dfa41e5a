"""An output that cannot be written: an error that says so, no video blamed, and the next run goes on from there."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import av
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from models.tiny import build_tiny_folder
from pipelines.cli import main
from preprocess import rows, unit
from preprocess.parts import Part
from preprocess.remote import copy_here
from preprocess.room import OutputError, is_about, writing
from preprocess.run import lock
from preprocess.unit import Unit, Workplace, run_stage
from preprocess.verify import verify
from tests.preprocess.disturb import disturbed, fail
from tests.preprocess.runs import SETTINGS, records, run_here

ROOT = Path(__file__).resolve().parents[2]


def dataset(output: Path) -> dict[str, bytes]:
    """Every file of a dataset."""
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole(videos: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run makes of `videos` that nothing disturbs."""
    output = tmp_path_factory.mktemp("whole")
    run_here(videos, output, model)
    return dataset(output)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two toy videos, and a file that is none."""
    from toyworld.video import write_video
    from toyworld.world import sample_scene

    folder = tmp_path_factory.mktemp("videos")
    for i in range(2):
        write_video(sample_scene("small", seed=31, index=i, num_shots=2), folder / f"toy{i}.mp4", size=64)
    (folder / "empty.mp4").touch()
    return folder


def test_which_errors_are_about_the_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
        assert is_about(OSError(number, "x"), out)
    assert is_about(PermissionError(errno.EACCES, "x", str(out / "parts" / "a.tar")), out)
    assert is_about(PermissionError(errno.EPERM, "x", str(tmp_path / "from"), None, str(out / "to")), out)
    assert not is_about(PermissionError(errno.EACCES, "x", str(tmp_path / "video.mp4")), out)
    assert not is_about(OSError(errno.EIO, "x", str(out / "a")), out)
    assert not is_about(PermissionError(errno.EACCES, "x", 3), out)  # a descriptor
    damaged = av.error.FFmpegError(errno.ENOSPC, "no room in a packet's buffer", "video.mp4")
    odd = type("Odd", (av.error.FFmpegError, OSError), {})(errno.ENOSPC, "no room in a packet's buffer", "video.mp4")
    assert isinstance(odd, OSError) and not is_about(odd, out) and not isinstance(damaged, OutputError)


@pytest.mark.parametrize(
    "number, remedy",
    [(errno.ENOSPC, "make room"), (errno.EROFS, "mount it"), (errno.EFBIG, "ulimit"), (errno.EACCES, "get permission")],
)
def test_the_error_says_where_why_and_what_to_do(number: int, remedy: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught, writing(tmp_path):
        raise OSError(number, "words of a library", str(tmp_path / "x"))
    words = str(caught.value)
    assert words.startswith(f"{tmp_path} cannot be written ({os.strerror(number)})") and remedy in words
    assert "what is done is kept" in words and "start the same command again" in words
    assert caught.value.errno == number and str(pickle.loads(pickle.dumps(caught.value))) == words
    with pytest.raises(FileNotFoundError), writing(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "a bug", str(tmp_path / "x"))


def test_a_source_without_permission_is_its_own_fault(tmp_path: Path) -> None:
    """Only what lies in the output is the run's trouble."""
    place = Workplace(SETTINGS, tmp_path / "out" / "parts", tmp_path / "out" / "parts" / "scratch", "")

    @unit._writes
    def stage(_: Unit, place: Workplace) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "video.mp4"))

    one = Unit.from_json(json.dumps({"file": {"video_id": "v", "name": "video.mp4", "path": "video.mp4"}}))
    run_stage("decode", lambda u: stage(u, place), one)
    assert one.status == "failed" and "Permission denied" in one.reason


def test_a_copy_that_does_not_fit_is_no_fault_of_the_video(tmp_path: Path) -> None:
    source = tmp_path / "video.mp4"
    source.write_bytes(bytes(100))
    with disturbed(tmp_path / "out", 2, fail(errno.ENOSPC)), pytest.raises(OSError, match="No space left"):
        copy_here(str(source), None, tmp_path / "out" / "copy.mp4")
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file/out cannot be written .Not a directory.*name another output"):
        with lock(tmp_path / "file" / "out"):
            pass
    with disturbed(tmp_path / "out", 1, fail(errno.EACCES)):
        with pytest.raises(OutputError, match="out cannot be written .Permission denied"), lock(tmp_path / "out"):
            pass


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_wherever_writing_begins_to_fail_the_run_stops_and_goes_on(
    number: int, videos: Path, model: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """From the first, the second, the third, ... change to the output on, until a run does not get there."""
    output, at, stages = tmp_path / "out", 0, set()
    while True:
        at += 1
        before = {path.name for path in (output / "parts").glob("*.tar")}
        try:
            with disturbed(output, at, fail(number)) as count, writing(output), lock(output):
                work, _ = run_here(videos, output, model)
        except OutputError as error:
            assert str(output) in str(error) and os.strerror(number) in str(error)
            for path in (output / "parts").glob("*.tar"):
                before.discard(path.name)
                source = json.loads(rows_of(path))["source"]
                assert source["status"] == ("failed" if source["name"] == "empty.mp4" else "written"), source
            assert not before, "a part that was there is gone"
            continue
        assert count.seen < at
        break
    assert at > 30
    assert {name: data for name, data in dataset(output).items() if name != ".lock"} == whole
    assert stages == set()


def rows_of(path: Path) -> str:
    import tarfile

    with tarfile.open(path) as tar:
        file = tar.extractfile("part.json")
        assert file is not None
        return file.read().decode()

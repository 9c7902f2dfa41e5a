"""An output that cannot be written: an error that says so, no video blamed, and the next run goes on from there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path

import av
import pytest

from preprocess.parts import read_part
from preprocess.remote import copy_here
from preprocess.room import OutputError, is_about, writing
from preprocess.run import lock
from preprocess.unit import Unit, run_stage
from preprocess.workplace import Workplace, writes
from tests.preprocess.disturb import disturbed, fail
from tests.preprocess.runs import SETTINGS, run_here
from toyworld.video import write_video
from toyworld.world import sample_scene

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

    @writes
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


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_wherever_writing_begins_to_fail_the_run_stops_and_goes_on(
    number: int, videos: Path, model: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """From the first, the second, the third, ... change to the output on, until a run does not get there."""
    output, done = tmp_path / "out", set()
    for at in count(1):
        try:
            with disturbed(output, at, fail(number)), lock(output), writing(output):
                run_here(videos, output, model)
            break
        except OutputError as error:
            assert str(output) in str(error) and os.strerror(number) in str(error)
        parts = {path.name: read_part(path) for path in (output / "parts").glob("[!.]*.tar")}
        assert done <= parts.keys(), "a part that was there is gone"
        done = set(parts)
        for part in parts.values():
            assert part is not None
            assert part.source["status"] == ("failed" if part.source["name"] == "empty.mp4" else "written"), part.source
    assert at > 30
    files = dataset(output)
    assert files.pop(".lock") == b"" and files == whole


@pytest.mark.parametrize("how", ["tmpfs", "limit"])
def test_a_real_disk_that_is_too_small(
    how: str, videos: Path, model: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Ever more room, until it is enough; what a full disk leaves is what a large one does."""
    command = [sys.executable, "-m", "tests.preprocess.cramped", how, str(videos), str(model), str(tmp_path / "out")]
    if how == "tmpfs":
        own = ["unshare", "--mount", "--map-root-user"]
        if (
            shutil.which("unshare") is None
            or subprocess.run([*own, "mount", "-t", "tmpfs", "x", str(tmp_path)]).returncode
        ):
            pytest.skip("this user may not mount anything")
        command = [*own, *command]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    why = {"tmpfs": "No space left on device", "limit": "File too large"}[how]
    assert len(told["stops"]) > 3 and all(f"out cannot be written ({why})" in words for words in told["stops"])
    assert told["files"] == {name: hashlib.sha256(data).hexdigest() for name, data in (whole | {".lock": b""}).items()}
    if how == "tmpfs":
        for name, words in (("prepare", "cannot be written (Read-only file system)"), ("inspect", "with --out")):
            code, said = told[name]
            assert code == 1 and words in said and "Traceback" not in said and "Errno" not in said, said
        assert told["verify"][0] == 0, told["verify"][1]

"""A run in an output folder with little room, which gets more each time the run stops: prints what happened as JSON.

    python -m tests.preprocess.cramped tmpfs|limit VIDEOS MODEL OUTPUT

`tmpfs`: OUTPUT is a file system of its own, so this needs a mount namespace; at the end it is made read-only. `limit`:
files cannot grow beyond a size.
"""

from __future__ import annotations

import hashlib
import json
import resource
import subprocess
import sys
from itertools import count
from pathlib import Path

from click.testing import CliRunner

from pipelines.cli import main as shotloom
from preprocess import run
from preprocess.parts import read_part
from preprocess.room import OutputError, writing
from tests.preprocess.runs import run_here

KIB = {"tmpfs": (12, 24), "limit": (2, 14)}  # to begin with, and more each time


def give(how: str, output: Path, kib: int, first: bool) -> None:
    if how == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (kib * 1024, resource.RLIM_INFINITY))
    elif first:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(output)], check=True)
    else:
        subprocess.run(["mount", "-o", f"remount,size={kib}k", str(output)], check=True)


def main(how: str, videos: Path, model: Path, output: Path) -> None:
    run._ROOM = 4096  # so that writing stops in the middle of things, too
    output.mkdir(parents=True, exist_ok=True)
    stops: list[str] = []
    kept = 0
    for kib in count(*KIB[how]):
        give(how, output, kib, not stops)
        try:
            with run.lock(output), writing(output):
                run_here(videos, output, model)
            break
        except OutputError as error:
            stops.append(str(error))
        parts = [read_part(path) for path in (output / "parts").glob("[!.]*.tar")]
        ends = [(part.source["name"], part.source["status"]) for part in parts if part is not None]
        assert set(ends) <= {("toy0.mp4", "written"), ("toy1.mp4", "written"), ("empty.mp4", "failed")}, ends
        assert len(ends) >= kept and len(ends) == len(parts), "what was done is gone"
        kept = len(ends)
        assert not (output / "next").exists() and not (output / "parts" / "scratch").exists()
    files = {str(path.relative_to(output)): path for path in output.rglob("*") if path.is_file()}
    told = {"stops": stops, "files": {name: _hash(path) for name, path in files.items()}}
    if how == "tmpfs":
        subprocess.run(["mount", "-o", "remount,ro", str(output)], check=True)
        arguments = [f"sources=[{videos}]", f"output={output}", f"model={model}"]
        for command in (["prepare", *arguments], ["inspect", str(output)], ["verify", str(output)]):
            result = CliRunner().invoke(shotloom, command)
            told[command[0]] = [result.exit_code, result.output]
    print(json.dumps(told))


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))

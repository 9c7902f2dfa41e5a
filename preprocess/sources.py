"""Sources: folders, globs, list files and single videos become one ordered list of files, each with a stable id."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob, has_magic
from pathlib import Path

VIDEO_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .ts .m2ts .mts .gif .flv .3gp .3g2 .mpg .mpeg .wmv .ogv".split()
)
LIST_SUFFIXES = frozenset((".txt", ".csv", ".jsonl"))


class SourceError(ValueError):
    """The given sources cannot be read as a whole; the message says which and what to do."""


@dataclass(frozen=True)
class SourceFile:
    """One video to prepare. `name` is unique in the run and holds no path of this machine where it can be avoided."""

    video_id: str  # stable: made of the name, so it does not depend on other sources or on the order
    name: str  # path relative to the given folder, or the entry of a list
    path: str  # where the file is read from
    captions: str | None = None  # sidecar file; None where there is none
    bytes: int = -1  # -1: the file could not be read
    mtime_ns: int = 0
    captions_mtime_ns: int = 0


@dataclass
class SourceList:
    """What was found, in order; `repeated` lists entries that name a file already listed (taken once)."""

    files: list[SourceFile] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Entry:
    name: str
    path: Path
    captions: Path | None = None


def list_sources(sources: Sequence[str | Path], exclude: Path | None = None) -> SourceList:
    """All videos of folders (searched recursively), globs, list files and single files, in a stable order.

    List files: `.txt` one path a line (`#` comments), `.csv` and `.jsonl` with a `path` column and optionally
    `captions`; paths relative to the list. A file that a list names but that is missing stays in the result (it is
    set aside later, by name); `exclude` is a folder left out of the search (the output).

    Raises SourceError for a source that does not exist, holds no video, or a list that cannot be read.
    """
    found = SourceList()
    names: set[str] = set()
    seen: set[str] = set()
    for source in sources:
        entries = list(_expand(str(source), exclude))
        if not entries:
            raise SourceError(f"{source}: no video in it; known types: {' '.join(sorted(VIDEO_SUFFIXES))}")
        for entry in entries:
            real = os.path.realpath(entry.path)
            if real in seen:
                found.repeated.append(entry.name)
                continue
            seen.add(real)
            name, copy = readable(entry.name), 1
            while name in names:  # two folders may hold files of the same relative name
                copy += 1
                name = f"{readable(entry.name)}~{copy}"
            names.add(name)
            found.files.append(_stat(entry, name))
    if not found.files:
        raise SourceError("no sources given; name folders, globs, list files (.txt .csv .jsonl) or videos")
    return found


def video_id(name: str) -> str:
    """Readable and unique: the file's stem in safe characters, then eight hex digits of the whole name's hash."""
    stem = re.sub(r"[^A-Za-z0-9]+", "-", Path(name).name.rsplit(".", 1)[0]).strip("-")[:40] or "video"
    return f"{stem}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def readable(name: str) -> str:
    """A file name as text that any table can hold: bytes that are not UTF-8 are written out, as \\udce9."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _expand(source: str, exclude: Path | None) -> Iterator[_Entry]:
    path = Path(source)
    if path.is_dir():
        yield from _folder(path, exclude)
    elif path.is_file():
        yield from _list_file(path) if path.suffix.lower() in LIST_SUFFIXES else [_Entry(path.name, path)]
    elif has_magic(source):
        for match in sorted(glob(source, recursive=True)):
            if Path(match).is_dir():
                yield from _folder(Path(match), exclude)
            elif Path(match).suffix.lower() in VIDEO_SUFFIXES:
                yield _Entry(Path(match).name, Path(match))
    else:
        raise SourceError(f"{source}: no such file or folder")


def _folder(root: Path, exclude: Path | None) -> Iterator[_Entry]:
    skip = exclude.resolve() if exclude else None
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(d for d in subfolders if not d.startswith(".") and Path(folder, d).resolve() != skip)
        for file in sorted(files):
            if Path(file).suffix.lower() in VIDEO_SUFFIXES and not file.startswith("."):
                path = Path(folder, file)
                yield _Entry(path.relative_to(root).as_posix(), path)


def _list_file(path: Path) -> Iterator[_Entry]:
    try:
        rows = list(_rows(path))
    except (OSError, ValueError, csv.Error) as error:
        raise SourceError(f"{path}: cannot be read as a list of videos: {error}") from error
    for row in rows:
        video = row["path"]
        captions = row.get("captions")
        yield _Entry(Path(video).as_posix(), path.parent / video, path.parent / captions if captions else None)


def _rows(path: Path) -> Iterable[dict[str, str]]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(text.splitlines())
        if "path" not in (reader.fieldnames or []):
            raise ValueError(f"it needs a column 'path', has {reader.fieldnames}")
        return [row for row in reader if row["path"]]
    lines = [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1)]
    if path.suffix.lower() == ".txt":
        return [{"path": line} for _, line in lines if line and not line.startswith("#")]
    rows = []
    for i, line in lines:
        if line:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("path"), str):
                raise ValueError(f'line {i} is not an object with a "path": {line[:80]}')
            rows.append(row)
    return rows


def _stat(entry: _Entry, name: str) -> SourceFile:
    captions = entry.captions or entry.path.with_suffix(".json")
    try:
        video = entry.path.stat()
    except OSError:
        return SourceFile(video_id(name), name, str(entry.path), str(entry.captions) if entry.captions else None)
    try:
        captions_mtime = captions.stat().st_mtime_ns
    except OSError:
        captions_mtime = 0
    known = str(captions) if captions_mtime or entry.captions else None
    return SourceFile(video_id(name), name, str(entry.path), known, video.st_size, video.st_mtime_ns, captions_mtime)

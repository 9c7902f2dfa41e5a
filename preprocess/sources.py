"""Sources: folders, globs, lists, tars, addresses and single videos become one ordered list with stable ids."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from glob import glob, has_magic
from pathlib import Path, PurePosixPath
from typing import Any

from models.scene import ReferenceRole
from preprocess.lists import LIST_SUFFIXES, ListError, Row, read_list
from preprocess.outcome import short
from preprocess.remote import (
    RemoteError,
    bare,
    canonical,
    find,
    info_at,
    is_address,
    is_pattern,
    join,
    local_path,
    sha256_at,
    stamp,
)
from preprocess.settings import Ids
from preprocess.stills import numbered_images
from preprocess.tars import TarVideo, read_tar

VIDEO_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .ts .m2ts .mts .gif .flv .3gp .3g2 .mpg .mpeg .wmv .ogv".split()
)
_AT_ONCE = 16  # requests to a store, or files being hashed
_TAR = ".tar"


class SourceError(ValueError):
    """The given sources cannot be read as a whole; the message says which and what to do."""


@dataclass(frozen=True)
class ListedReference:
    """A reference that a row of a list names, and where it lies: a path, or an address."""

    role: ReferenceRole
    path: str  # as the list has it
    place: str


@dataclass(frozen=True)
class SourceFile:
    """One video to prepare. `name` is unique in the run and holds no path of this machine where it can be avoided."""

    video_id: str  # stable: made of the name or the content, so it does not depend on other sources or on the order
    name: str  # path relative to the given folder, member of a tar, or the entry of a list
    path: str  # where the file is read from: a path, an address, or the tar that `span` lies in
    captions: str | None = None  # sidecar file; None where there is none
    bytes: int = -1  # -1: the file could not be read
    mtime_ns: int = 0  # of a file at an address: a number that changes with it; 0 where its store tells nothing
    captions_mtime_ns: int = 0
    span: list[int] | None = None  # [offset, size] in a tar
    captions_span: list[int] | None = None
    member: str = ""  # its name in the tar
    fps: float | None = None  # of a folder of numbered images
    references: list[ListedReference] = field(default_factory=list)  # of its list
    label: int | None = None  # of its list
    fields: dict[str, Any] = field(default_factory=dict)  # other columns of its list, X.txt of its tar
    error: str = ""  # why it cannot be a video: it is set aside under its name


@dataclass
class SourceList:
    """What was found, in order; `repeated` lists entries that name a file already listed (taken once)."""

    files: list[SourceFile] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Entry:
    """Something found, still without an id; `file` is set where listing already told all about it."""

    name: str
    path: str
    captions: str | None = None
    fps: float | None = None
    references: list[ListedReference] = field(default_factory=list)
    label: int | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    file: SourceFile | None = None
    infos: dict[str, dict[str, Any]] = field(default_factory=dict)  # by address, where its store was asked already


@dataclass(frozen=True)
class _Search:
    exclude: Path | None
    frames_fps: float | None
    list_root: Path | None


def list_sources(
    sources: Sequence[str | Path],
    exclude: Path | None = None,
    *,
    ids: Ids = "path",
    frames_fps: float | None = None,
    list_root: Path | None = None,
    known: Mapping[tuple[str, str, int, int], str] | None = None,
) -> SourceList:
    """All videos of folders (searched recursively), globs, lists, tars and single files, in a stable order.

    A local path or an fsspec address each. Lists: `preprocess.lists`, paths relative to the list, inside of `list_root`
    (default: the list's folder). Tars: `preprocess.tars`. A bad row or member stays in the result with its `error`, a
    file that is missing stays without a size; both are set aside later, by name.

    Args:
        exclude: a folder left out of the search (the output).
        ids: "content" makes ids of the files' SHA-256; every file is read, but for those in `known`.
        frames_fps: take folders of numbered images for videos at this rate; None leaves them.
        known: SHA-256 by name, path, bytes and mtime_ns, of an earlier run.
    Raises:
        SourceError: a source does not exist, holds no video, is a list that cannot be read, or needs a driver; two
            sources would have one id.
    """
    found = SourceList()
    names: set[str] = set()
    seen: set[Any] = set()
    search = _Search(exclude, frames_fps, list_root)
    for source in sources:
        try:
            entries = list(_expand(str(source), search))
        except RemoteError as error:
            raise SourceError(str(error)) from error
        if all(entry.error for entry in entries):
            why = f"; the first of {len(entries)}: {entries[0].name} {entries[0].error}" if entries else ""
            raise SourceError(f"{source}: no video in it{why}; known types: {' '.join(sorted(VIDEO_SUFFIXES))}")
        for entry, file in zip(entries, _in_parallel(_stat, entries), strict=True):
            real = (file.path if is_address(file.path) else os.path.realpath(file.path), *(file.span or ()))
            if real in seen and not file.error:
                found.repeated.append(entry.name)
                continue
            if not file.error:
                seen.add(real)
            name, copy = readable(entry.name), 1
            while name in names:  # two folders may hold files of the same relative name
                copy += 1
                name = f"{readable(entry.name)}~{copy}"
            names.add(name)
            found.files.append(replace(file, name=name, video_id=video_id(name)))
    if not found.files:
        raise SourceError("no sources given; name folders, globs, list files, tars or videos")
    if ids == "content":
        found = _by_content(found, known or {})
    by_id: dict[str, str] = {}
    for file in found.files:
        if (other := by_id.setdefault(file.video_id, file.name)) != file.name:
            raise SourceError(
                f"{other} and {file.name} would have the same id {file.video_id!r}, and one would be lost; give one of "
                "them another name"
            )
    return found


def _by_content(found: SourceList, known: Mapping[tuple[str, str, int, int], str]) -> SourceList:
    """The same list with ids of the content; a file of the same content as one before it is taken once."""

    def digest(file: SourceFile) -> str:
        if file.error or file.bytes < 0:
            return ""
        try:
            return known.get((file.name, file.path, file.bytes, file.mtime_ns)) or sha256_at(file.path, file.span)
        except Exception:  # unreadable, or what a driver raises: the probe will say so by name
            return ""

    unique = SourceList(repeated=found.repeated)
    seen: set[str] = set()
    for file, content in zip(found.files, _in_parallel(digest, found.files), strict=True):
        if content in seen:
            unique.repeated.append(file.name)
            continue
        seen |= {content} - {""}
        unique.files.append(replace(file, video_id=content[:24]) if content else file)
    return unique


def _in_parallel(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(work, items))


def video_id(name: str) -> str:
    """Readable and unique: the file's stem in safe characters, then sixteen hex digits of the whole name's hash."""
    stem = re.sub(r"[^A-Za-z0-9]+", "-", Path(name).name.rsplit(".", 1)[0]).strip("-")[:40] or "video"
    return f"{stem}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def readable(name: str) -> str:
    """A file name as text that any table can hold: bytes that are not UTF-8 are written out, as \\udce9."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def fields_text(file: SourceFile) -> str:
    """What its list says of a file besides its place, as JSON, for tables; "" where it says nothing."""
    said = dict(file.fields)
    if file.references:
        said["references"] = [{"role": one.role, "path": readable(one.path)} for one in file.references]
    if file.label is not None:
        said["label"] = file.label
    return json.dumps(said, sort_keys=True) if said else ""


def _expand(source: str, search: _Search) -> Iterator[_Entry]:
    if is_address(source):
        local = local_path(source)
        if local is None:
            yield from _address(source, search)
            return
        source = local
    path = Path(source)
    if path.is_dir():
        yield from _folder(path, search)
    elif path.is_file():
        yield from _file(path.name, path, search)
    elif has_magic(source):
        root = Path(_fixed(source))
        for match in map(Path, sorted(glob(source, recursive=True))):
            if match.is_dir():
                yield from _folder(match, search, root)
            elif match.suffix.lower() in VIDEO_SUFFIXES | {_TAR}:
                yield from _file(match.relative_to(root).as_posix(), match, search)
    else:
        raise SourceError(f"{source}: no such file or folder")


def _fixed(pattern: str) -> str:
    """The folder that all matches of a pattern lie in: what comes before its first part with a wildcard."""
    parts = pattern.split("/")
    fixed = "/".join(parts[: next(i for i, part in enumerate(parts) if has_magic(part))])
    return fixed or "/" * pattern.startswith("/")


def _file(name: str, path: Path, search: _Search) -> Iterator[_Entry]:
    suffix = path.suffix.lower()
    if suffix in LIST_SUFFIXES:
        yield from _list_file(str(path), search)
    elif suffix == _TAR:
        yield from _tar(name, str(path), path.stat().st_mtime_ns)
    else:
        yield _Entry(name, str(path))


def _folder(root: Path, search: _Search, base: Path | None = None) -> Iterator[_Entry]:
    """All below `root`, named from `base` (default: from there)."""
    base = base or root
    skip = search.exclude.resolve() if search.exclude else None
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(d for d in subfolders if not d.startswith(".") and Path(folder, d).resolve() != skip)
        for file in sorted(files):
            path = Path(folder, file)
            if path.suffix.lower() in VIDEO_SUFFIXES | {_TAR} and not file.startswith("."):
                yield from _file(path.relative_to(base).as_posix(), path, search)
        if search.frames_fps:
            name = Path(folder).relative_to(base).as_posix()
            yield from _stills(base.resolve().name if name == "." else name, Path(folder), search.frames_fps)


def _stills(name: str, folder: Path, fps: float) -> Iterator[_Entry]:
    try:
        if len(numbered_images(folder)) > 1:
            yield _Entry(name, str(folder), fps=fps)
    except ValueError as error:
        yield _Entry(name, str(folder), error=str(error))


def _tar(name: str, path: str, mtime_ns: int) -> Iterator[_Entry]:
    try:
        videos = read_tar(path, VIDEO_SUFFIXES)
    except Exception as error:  # a driver's own, where the tar lies at an address
        videos = [TarVideo("(the tar)", error=f"cannot be read ({short(error)})")]
    for video in videos:
        full = f"{name}/{video.name}"
        captions = path if video.captions else None
        size, when = (video.span[1], mtime_ns) if video.span else (-1, 0)
        file = SourceFile(
            "", full, path, captions, size, when, when if captions else 0, video.span or None, video.captions,
            video.name, fields=video.fields, error=video.error,
        )  # fmt: skip
        yield _Entry(full, path, error=video.error, file=file)


def _address(given: str, search: _Search) -> Iterator[_Entry]:
    address = canonical(given)
    suffix, pattern = PurePosixPath(bare(address)).suffix.lower(), is_pattern(address)
    if suffix in LIST_SUFFIXES and not pattern:
        yield from _list_file(address, search)
        return
    try:
        found = find(address, one_file=suffix in VIDEO_SUFFIXES | {_TAR} and not pattern)
    except RemoteError:
        raise
    except Exception as error:  # each driver has exceptions of its own
        what = "no such file or folder" if isinstance(error, FileNotFoundError) else short(error)
        raise SourceError(f"{given}: {what}") from error
    root = (_fixed(address) if pattern else address.rstrip("/")) + "/"
    for path, info in found.items():
        name = path.removeprefix(root) if path.startswith(root) else PurePosixPath(bare(path)).name
        suffix = PurePosixPath(bare(path)).suffix.lower()
        hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
        if hidden or suffix not in VIDEO_SUFFIXES | {_TAR}:
            continue
        if suffix == _TAR:
            yield from _tar(name, path, stamp(info))
            continue
        beside = _sidecar(path)
        # below a folder all files are known, so a sidecar that was not found is not there
        known = path.startswith(root) and not pattern
        infos = {path: info, beside: found.get(beside, {})} if known else {path: info}
        yield _Entry(name, path, infos=infos)


def _list_file(path: str, search: _Search) -> Iterator[_Entry]:
    try:
        rows = read_list(path)
    except RemoteError:
        raise
    except Exception as error:
        what = str(error) if isinstance(error, ListError) else short(error)
        raise SourceError(f"{path}: cannot be read as a list of videos: {what}") from error
    for row in rows:
        yield _listed(path, row, search)


def _listed(list_path: str, row: Row, search: _Search) -> _Entry:
    """The entry of a row, or what is wrong with it."""
    at = f"{PurePosixPath(list_path).name}:{row.line}"
    if row.error:
        return _Entry(at, "", error=row.error)
    places: dict[str, str | None] = {}
    referred = {f"references[{i}].path": one.path for i, one in enumerate(row.references)}
    for name, given in {"path": row.path, "captions": row.captions, **referred}.items():
        try:
            places[name] = _place(list_path, given, search.list_root) if given else None
        except ValueError as error:
            if isinstance(error, RemoteError) and "not installed" in str(error):
                raise  # the whole list will want it
            return _Entry(at, "", error=f"field '{name}' is {given!r}, which {error}")
    path, captions = places["path"] or "", places["captions"]
    name, fps, fields = bare(row.path) if is_address(row.path) else Path(row.path).as_posix(), row.fps, row.fields
    if not is_address(path) and Path(path).is_dir():
        fps = fps or search.frames_fps
        if fps is None:
            return _Entry(at, "", error=f"field 'path' is {row.path!r}, a folder: give the rate of its images as 'fps'")
    elif fps is not None:  # of a video it is only what somebody wrote down
        fps, fields = None, {**fields, "fps": fps}
    references = [
        ListedReference(one.role, one.path, places[at] or "") for at, one in zip(referred, row.references, strict=True)
    ]
    return _Entry(name, path, captions, fps, references, row.label, fields)


def _place(list_path: str, given: str, list_root: Path | None) -> str:
    """The path or address that a row of a list means. Raises ValueError where it leads out of the list's folder."""
    if is_address(given):
        local = local_path(given)
        if local is None:
            return canonical(given)
        given = local
    if is_address(list_path):
        return join(list_path.rpartition("/")[0], given)
    folder = os.path.dirname(os.path.abspath(list_path))
    root = os.path.abspath(list_root) if list_root else folder
    target = os.path.normpath(os.path.join(folder, given))
    if os.path.commonpath([target, root]) != root:
        raise ValueError(f"leads out of {root}: set list_root to a folder that holds all that the list may name")
    return target


def _stat(entry: _Entry) -> SourceFile:
    if entry.error or entry.file:
        return entry.file or SourceFile("", entry.name, entry.path, error=entry.error)
    base = SourceFile(
        "", entry.name, entry.path, entry.captions, fps=entry.fps, references=entry.references, label=entry.label,
        fields=entry.fields,
    )  # fmt: skip
    if is_address(entry.path):
        beside = entry.captions or _sidecar(entry.path)
        video, words = (entry.infos[one] if one in entry.infos else info_at(one) for one in (entry.path, beside))
        size = video.get("size")
        return replace(
            base,
            captions=entry.captions or (beside if words else None),
            bytes=-1 if size is None else int(size),
            mtime_ns=stamp(video),
            captions_mtime_ns=stamp(words),
        )
    path = Path(entry.path)
    stem = path.name if path.is_dir() else path.stem
    captions = Path(entry.captions) if entry.captions else path.with_name(f"{stem}.json")
    try:
        stats = [one.stat() for one in path.iterdir() if one.is_file()] if path.is_dir() else [path.stat()]
        size, when = sum(one.st_size for one in stats), max((one.st_mtime_ns for one in stats), default=0)
    except OSError:
        return base
    try:
        captions_mtime = captions.stat().st_mtime_ns
    except OSError:
        captions_mtime = 0
    known = entry.captions or (str(captions) if captions_mtime else None)
    return replace(base, captions=known, bytes=size, mtime_ns=when, captions_mtime_ns=captions_mtime)


def _sidecar(address: str) -> str:
    address = bare(address)
    folder, _, name = address.rpartition("/")
    return f"{folder}/{name.rpartition('.')[0] or name}.json"

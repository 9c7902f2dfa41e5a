"""Files that are whole or absent, hashes, paths that stay inside their folder, and remote files through fsspec."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary path, with the same ending, that becomes `path` when the block ends well and goes when it does not.

    A reader never sees half a file, and a crash leaves what was there before. Missing parent folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # a rename may reach the disk before the data does
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def drop_temporaries(folder: Path | str, stem: str = "") -> None:
    """Removes what `atomic_path` left in `folder` when its process was killed; with `stem`, of files of that name."""
    mine = re.compile(rf"\.{re.escape(stem) or '.*'}\.\d+-[0-9a-f]{{8}}\.tmp(\.[^.]*)?")
    for path in Path(folder).glob(".*.tmp*"):
        if mine.fullmatch(path.name):
            path.unlink(missing_ok=True)


def atomic_write_bytes(path: Path | str, data: bytes) -> None:
    """Writes a file in one step: tmp, fsync, rename."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: Path | str, text: str) -> None:
    """Writes UTF-8 text in one step, with line ends as given."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: Path | str, value: Any) -> None:
    """Writes indented JSON in one step, keys in the given order. NaN and infinity are refused: they are not JSON."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: cannot be written as JSON: {error}") from error
    atomic_write_text(path, text + "\n")


def sha256_file(path: Path | str) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def safe_join(root: Path | str, name: str) -> Path:
    """The path of `name` under `root`. Raises ValueError where it would lie outside, symbolic links included."""
    base = Path(root).resolve()
    if not name or "\0" in name:
        raise ValueError(f"{name!r} is not a file name")
    target = (base / name).resolve()
    if target == base or not target.is_relative_to(base):
        raise ValueError(f"{name!r} points outside of {root}; only paths below that folder are allowed")
    return target


def open_uri(uri: str | Path, mode: str = "rb") -> contextlib.AbstractContextManager[IO[Any]]:
    """Opens a local path or any address that fsspec knows (s3://, gs://, memory://), for use in a `with` statement."""
    import fsspec

    return fsspec.open(str(uri), mode, encoding=None if "b" in mode else "utf-8")

"""Files at fsspec addresses and inside of tars: what is there, and its bytes as a local file.

Decoders want a local path, so a video that has none is copied once into the run's scratch folder, and goes after the
decode. A place is a path or address, and a span [offset, size] of it where it lies inside of a tar.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Iterator
from contextlib import AbstractContextManager
from glob import has_magic
from pathlib import Path
from typing import IO, Any

from infra.storage import atomic_path
from preprocess.outcome import Failed, short
from preprocess.room import is_about

_CHUNK = 2**20
# package behind each kind of address; fsspec's own messages differ from one to the next
_DRIVERS = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs",
    "adl": "adlfs", "http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub", "sftp": "paramiko",
}  # fmt: skip


class RemoteError(ValueError):
    """An address cannot be used at all: no such kind, or its driver is not installed."""


def is_address(text: str) -> bool:
    return "://" in text


def is_direct(path: str, span: list[int] | None) -> bool:
    """Whether decoders can open it as it is."""
    return span is None and not is_address(path)


def file_system(address: str) -> tuple[Any, str]:
    """(fsspec file system, path in it). Raises RemoteError saying what to install."""
    import fsspec

    scheme = address.split("://", 1)[0]
    if "::" in address:
        raise RemoteError(f"{address}: chained addresses are not taken; name the file itself")
    try:
        return fsspec.core.url_to_fs(address)
    except ImportError as error:
        package = _DRIVERS.get(scheme, "")
        how = f"pip install {package}" if package else str(error)
        raise RemoteError(f"{address}: {scheme}:// addresses need a driver that is not installed: {how}") from error
    except ValueError as error:
        known = ", ".join(sorted({*_DRIVERS, "file", "memory"}))
        raise RemoteError(f"{address}: {short(error)}; known kinds of addresses: {known}") from error


def local_path(address: str) -> str | None:
    """The path that a file:// address names; None for other addresses."""
    from fsspec.implementations.local import LocalFileSystem

    fs, path = file_system(address)
    return path if isinstance(fs, LocalFileSystem) else None


def info_at(address: str) -> dict[str, Any]:
    """What a store says of a file; nothing where it is not there, which the probe will say by name."""
    try:
        fs, path = file_system(address)
        return fs.info(path)
    except Exception:  # each driver has exceptions of its own
        return {}


# what drivers call it, without case, hyphens and underscores: HTTP has "Last-Modified", S3 "LastModified"
_STAMPS = ("etag", "md5", "md5hash", "contentmd5", "digest", "lastmodified", "mtime", "updated", "created")


def stamp(info: dict[str, Any]) -> int:
    """A number that changes when the file at an address does, as far as its store tells; 0 where it does not."""
    known = {name.lower().replace("-", "").replace("_", ""): value for name, value in info.items()}
    for name in _STAMPS:
        if value := known.get(name):
            value = value.timestamp() if hasattr(value, "timestamp") else value  # drivers give either
            return int(hashlib.sha256(f"{name} {value}".encode()).hexdigest()[:15], 16)
    return 0


def canonical(address: str) -> str:
    """One way to write an address; memory://a and memory:///a are the same place."""
    fs, path = file_system(address)
    return str(fs.unstrip_protocol(path))


def bare(address: str) -> str:
    """Without the query of an HTTP address, which may be a signature that changes."""
    return address.split("?", 1)[0] if address.startswith(("http://", "https://")) else address


def is_pattern(address: str) -> bool:
    return has_magic(bare(address))


def find(address: str, one_file: bool) -> dict[str, dict[str, Any]]:
    """Files below a folder or matching a glob, by address, in order; `one_file` says that it is neither.

    (Over HTTP the question whether something is a folder is a download of it.)
    """
    fs, path = file_system(address)
    if one_file:
        found = {path: fs.info(path)}
    elif is_pattern(address):
        found = fs.glob(path, detail=True)
    else:
        found = fs.find(path, detail=True)
        if not found:
            raise FileNotFoundError(address)
    return {fs.unstrip_protocol(name): info for name, info in sorted(found.items()) if info.get("type") != "directory"}


def join(folder: str, name: str) -> str:
    """The address of a name below a folder's address. Raises ValueError where it leaves the folder."""
    scheme, root = folder.split("://", 1)
    target = posixpath.normpath(posixpath.join(root, name))
    if not target.startswith(root.rstrip("/") + "/"):
        raise ValueError("points outside of the folder of its list")
    return f"{scheme}://{target}"


def beside(address: str, name: str) -> str:
    """The address of a path relative to a file's address. Raises ValueError where it leaves the store."""
    scheme, path = address.split("://", 1)
    store = path.split("/", 1)[0]  # bucket or host
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), name))
    if target.split("/", 1)[0] != store or ".." in target.split("/"):
        raise ValueError(f"{name!r} leads out of {scheme}://{store}")
    return f"{scheme}://{target}"


def chunks(path: str, span: list[int] | None) -> Iterator[bytes]:
    """The bytes at a place. Raises what the driver raises; EOFError where a tar ends too early."""
    with open_file(path) as file:
        left = None
        if span is not None:
            file.seek(span[0])
            left = span[1]
        while left is None or left > 0:
            data = file.read(_CHUNK if left is None else min(_CHUNK, left))
            if not data:
                if left:
                    raise EOFError(f"{path} ends {left} bytes before the member does")
                return
            left = left - len(data) if left is not None else None
            yield data


def sha256_at(path: str, span: list[int] | None = None) -> str:
    """Of the bytes at a place; of a folder, of the names and bytes of what is in it."""
    digest = hashlib.sha256()
    if is_direct(path, span) and Path(path).is_dir():
        for file in sorted(one for one in Path(path).iterdir() if one.is_file()):
            digest.update(f"{file.name}\0{sha256_at(str(file))}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()
    for data in chunks(path, span):
        digest.update(data)
    return digest.hexdigest()


def copy_here(path: str, span: list[int] | None, target: Path) -> None:
    """Copy what lies at a place to `target`, whole or not at all. Raises Failed; OSError where it cannot be written."""
    try:
        with atomic_path(target) as temporary, temporary.open("wb") as file:
            for data in chunks(path, span):
                file.write(data)
    except FileNotFoundError:
        raise Failed("probe", "no such file") from None
    except Exception as error:  # each driver has exceptions of its own
        if isinstance(error, OSError) and is_about(error, target.parent):
            raise
        raise Failed("probe", f"cannot be fetched ({short(error)})") from error


def open_file(path: str) -> AbstractContextManager[IO[bytes]]:
    """A seekable stream, for use in a `with` statement."""
    if not is_address(path):
        return open(path, "rb")
    fs, name = file_system(path)
    return fs.open(name, "rb")

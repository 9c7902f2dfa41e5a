"""WebDataset tars with stable bytes: sorted members, fixed times and owners, a size target, tmp + rename."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from infra.storage import atomic_path

SHARD_NAME = "scenes-{:06d}.tar"


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a file with nothing in its header that depends on when, where or by whom it is written."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = len(data), 0, 0o444
    tar.addfile(info, io.BytesIO(data))


def new_tar(path: Path) -> tarfile.TarFile:
    return tarfile.open(path, "w", format=tarfile.GNU_FORMAT)  # GNU: members over 8 GiB, and no time in extra headers


class ShardWriter:
    """Writes samples, in the order given, into `scenes-000000.tar` and on; a shard ends when it has `target` bytes.

    A shard holds whole samples and at least one. Use as a context manager; a shard appears when it is whole.
    """

    def __init__(self, folder: Path, target: int) -> None:
        self.folder, self.target = folder, target
        self.names: list[str] = []
        self.samples = 0
        self._written = 0
        self._tar: tarfile.TarFile | None = None

    def write(self, key: str, files: dict[str, bytes]) -> str:
        """Add one sample, `{extension: bytes}`; returns the name of its shard."""
        if self._tar is not None and self._written >= self.target:
            self._close()
        if self._tar is None:
            self.names.append(SHARD_NAME.format(len(self.names)))
            self.folder.mkdir(parents=True, exist_ok=True)
            self._path = atomic_path(self.folder / self.names[-1])
            self._tar = new_tar(self._path.__enter__())
            self._written = 0
        for extension in sorted(files):
            add_member(self._tar, f"{key}.{extension}", files[extension])
            self._written += len(files[extension])
        self.samples += 1
        return self.names[-1]

    def _close(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._tar = None
            self._path.__exit__(None, None, None)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._close()
        elif self._tar is not None:
            with contextlib.suppress(OSError):  # a full disk has no room for the end of a tar, either
                self._tar.close()
            self._path.__exit__(kind, value, trace)


def read_samples(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Samples of a shard or part in file order, (key, {extension: bytes})."""
    key = ""
    files: dict[str, bytes] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            stem, _, extension = member.name.partition(".")
            if stem != key and files:
                yield key, files
                files = {}
            key = stem
            files[extension] = _read(tar, member)
    if files:
        yield key, files


class ShardReader:
    """Random access to the samples of finished shards; each shard is indexed once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._index: dict[str, dict[str, dict[str, tuple[int, int]]]] = {}

    def sample(self, shard: str, key: str) -> dict[str, bytes]:
        """{extension: bytes} of one sample. Raises KeyError where the shard does not hold it, OSError where absent."""
        places = self._places(shard)[key]
        with (self.folder / shard).open("rb") as file:
            return {extension: _at(file, *place) for extension, place in places.items()}

    def whole(self, shard: str, key: str) -> bool:
        """Whether all bytes of a sample are there."""
        try:
            return set(self._places(shard).get(key, ())) >= {"json", "safetensors"}
        except (OSError, tarfile.TarError):
            return False

    def _places(self, shard: str) -> dict[str, dict[str, tuple[int, int]]]:
        if shard not in self._index:
            index: dict[str, dict[str, tuple[int, int]]] = {}
            end = (self.folder / shard).stat().st_size
            with tarfile.open(self.folder / shard, "r:") as tar:
                for member in tar:
                    if member.offset_data + member.size <= end:
                        stem, _, extension = member.name.partition(".")
                        index.setdefault(stem, {})[extension] = (member.offset_data, member.size)
            self._index[shard] = index
        return self._index[shard]


def first_json(path: Path) -> dict[str, object]:
    """The first member of a tar, which is JSON. Raises tarfile.TarError, OSError or ValueError where it is not."""
    with tarfile.open(path, "r:") as tar:
        member = tar.next()
        if member is None:
            raise tarfile.ReadError(f"{path} is empty")
        value = json.loads(_read(tar, member))
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {member.name} is not a JSON object")
    return value


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    if file is None:
        raise tarfile.ReadError(f"{tar.name!s}: {member.name} is not a file")
    return file.read()


def _at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise OSError(f"shard ends early: {size} bytes expected at {offset}, {len(data)} there")
    return data

"""The sidecar index of the shards: where each sample lies, and the hash of its bytes.

A sample's bytes are its members with their tar headers, one stretch of the shard, which is itself a tar: a reader of
object stores fetches a scene by one range request.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INDEX = "index.parquet"
_BLOCK = 512  # bytes of a tar header, and of what members are padded to
_CHUNK = 2**20


def sample_places(path: Path) -> Iterator[tuple[str, int, int]]:
    """(key, offset, length) of the samples of a shard, in order. Raises tarfile.TarError or OSError."""
    key, begin, end = "", 0, 0
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            stem = member.name.partition(".")[0]
            if stem != key and key:
                yield key, begin, end - begin
            if stem != key:
                key, begin = stem, end
            end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
    if key:
        yield key, begin, end - begin


def index_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of the index for one shard: key, shard, offset, length, sha256."""
    with path.open("rb") as file:
        return [
            {
                "key": key,
                "shard": path.name,
                "offset": offset,
                "length": length,
                "sha256": sha256_of(file, offset, length),
            }
            for key, offset, length in sample_places(path)
        ]


def sha256_of(file: Any, offset: int, length: int) -> str:
    """Hash of a stretch of an open file; of what is there, where the file ends early."""
    digest = hashlib.sha256()
    file.seek(offset)
    while length > 0 and (data := file.read(min(length, _CHUNK))):
        digest.update(data)
        length -= len(data)
    return digest.hexdigest()

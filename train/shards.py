"""Random access to scene shards: plain WebDataset tars, read by offset, never unpacked and never unpickled."""

from __future__ import annotations

import json
import math
import os
import struct
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from models.scene import shot_tensor_key

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
_LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself


def shards_of(dataset: Path) -> list[Path]:
    """The shards of a prepared dataset; ValueError where there is none."""
    if not (shards := sorted((dataset / "shards").glob("*.tar"))):
        raise ValueError(f"{dataset}: no shards/*.tar; prepare a dataset there first")
    return shards


@dataclass(frozen=True)
class TensorPlace:
    """Where one tensor lies inside a shard."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the start of the shard
    size: int  # bytes


@dataclass(frozen=True)
class Record:
    """One sample of a shard: the text of its KEY.json and the places of the tensors of its KEY.safetensors."""

    shard: Path
    key: str
    json: str
    tensors: dict[str, TensorPlace]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor, or None if the record has none of that name."""
        return self.tensors[name].shape if name in self.tensors else None

    def require(self, name: str) -> TensorPlace:
        """Where a tensor lies; ValueError if the record has none of that name."""
        if name not in self.tensors:
            raise ValueError(f"{self.shard}: {self.key} has no tensor {name}, only {sorted(self.tensors)}")
        return self.tensors[name]

    def read(self, name: str) -> Tensor:
        """Read one tensor; the rest of the record is not touched. ValueError if the record has none of that name."""
        place = self.require(name)
        with self.shard.open("rb", buffering=0) as file:
            data = bytearray(os.pread(file.fileno(), place.size, place.start))
        if len(data) != place.size:
            raise ValueError(f"{self.shard}: {self.key}: tensor {name} is cut short; prepare this shard again")
        return torch.frombuffer(data, dtype=place.dtype).reshape(place.shape) if data else torch.empty(place.shape)


def read_shard(path: Path) -> list[Record]:
    """Index one tar in file order; reads headers and JSON only.

    Raises ValueError naming the shard and the member for a damaged tar, or a sample without both of its files.
    """
    parts: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    folder, _, base = member.name.rpartition("/")
                    stem, _, extension = base.partition(".")  # WebDataset's rule: the key ends at the first dot
                    key = f"{folder}/{stem}" if folder else stem
                    parts.setdefault(key, {})[extension] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a whole tar file ({error}); prepare this shard again") from error
    records = []
    with path.open("rb") as file:
        for key, spans in parts.items():
            if not {"json", "safetensors"} <= set(spans):
                raise ValueError(f"{path}: sample {key} has {sorted(spans)}, needs json and safetensors")
            start, size = spans["json"]
            file.seek(start)
            text = file.read(size).decode()
            records.append(Record(path, key, text, _tensor_places(file, path, key, *spans["safetensors"])))
    return records


def _tensor_places(file: BinaryIO, path: Path, key: str, start: int, size: int) -> dict[str, TensorPlace]:
    """Parse a safetensors header (https://github.com/huggingface/safetensors#format) that begins at `start`."""
    file.seek(start)
    try:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, _LARGEST_HEADER):
            raise ValueError(f"header of {length} bytes in a file of {size}")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {name: _place(start + 8 + length, size - 8 - length, **entry) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, struct.error) as error:
        remedy = "prepare this shard again"
        raise ValueError(f"{path}: {key}.safetensors has a bad header ({error}); {remedy}") from error


def _place(base: int, room: int, dtype: str, shape: list[int], data_offsets: tuple[int, int]) -> TensorPlace:
    first, last = data_offsets
    place = TensorPlace(_DTYPES[dtype], tuple(shape), base + first, last - first)
    if not 0 <= first <= last <= room or place.size != math.prod(shape) * place.dtype.itemsize:
        raise ValueError(f"{dtype} tensor of shape {shape} at bytes {first}..{last} of {room}")
    return place


def latent_shape(record: Record, shot: int) -> tuple[int, ...]:
    """[C,F,H,W] of a shot's latents, () if the shot has none."""
    return record.shape(shot_tensor_key(shot, "latent_mean")) or ()


def encoded_runs(record: Record, num_shots: int) -> list[range]:
    """Longest runs of neighbouring shots that have latents of one channel count, height and width."""
    runs: list[range] = []
    size = None
    for shot in range(num_shots):
        shape = latent_shape(record, shot)
        here = (shape[0], *shape[2:]) if shape else None
        if here is None:
            pass
        elif here == size:
            runs[-1] = range(runs[-1].start, shot + 1)
        else:
            runs.append(range(shot, shot + 1))
        size = here
    return runs

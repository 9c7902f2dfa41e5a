"""List files: `.txt`, `.csv`, `.jsonl` and `.parquet`, one video a row.

`path` names the video and `captions` its caption file, relative to the list; `fps` is the rate of a folder of numbered
images; all other columns are the video's own fields and are kept with it. A row that cannot be used is set aside by
file, line, field and value, and the rest of the list goes on.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from preprocess.outcome import short
from preprocess.remote import open_file

LIST_SUFFIXES = frozenset((".txt", ".csv", ".jsonl", ".parquet"))


class ListError(ValueError):
    """A list cannot be read as a whole."""


@dataclass
class Row:
    """One row; `error` says what is wrong with it (field and value), and then the rest is empty."""

    line: int  # from 1; of a Parquet file the row
    path: str = ""
    captions: str | None = None
    fps: float | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def read_list(path: str) -> list[Row]:
    """All rows of a list file. Raises ListError where there is no list in it."""
    suffix = PurePosixPath(path).suffix.lower()
    with open_file(path) as file:
        if suffix == ".parquet":
            return list(_parquet(file))
        # bytes that are not UTF-8 stay as they are, for the names of files that have them
        text = file.read().decode("utf-8-sig", "surrogateescape")
    return list({".csv": _csv, ".jsonl": _jsonl}.get(suffix, _txt)(text))


def _txt(text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if (line := line.strip()) and not line.startswith("#"):
            yield _row(number, {"path": line})


def _csv(text: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="", restval=None)
    if "path" not in (reader.fieldnames or []):
        raise ListError(f"it needs a column 'path', has {reader.fieldnames}")
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(reader.line_num, error=f"cannot be read as CSV: {error}")
            continue
        if extra := row.pop("", None):
            yield Row(reader.line_num, error=f"has {len(extra)} values more than the header has names: {_short(extra)}")
        else:
            yield _row(reader.line_num, {name: value for name, value in row.items() if value not in (None, "")})


def _jsonl(text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            yield Row(number, error=f"is not JSON ({error}): {_short(line)}")
            continue
        if isinstance(value, dict):
            yield _row(number, {name: one for name, one in value.items() if one is not None})
        else:
            yield Row(number, error=f"is not a JSON object: {_short(line)}")


def _parquet(file: Any) -> Iterator[Row]:
    try:
        table = pq.ParquetFile(file)
    except pa.ArrowException as error:
        raise ListError(f"it is not a Parquet file ({short(error)})") from error
    if "path" not in table.schema_arrow.names:
        raise ListError(f"it needs a column 'path', has {table.schema_arrow.names}")
    number = 0
    for batch in table.iter_batches():
        for value in batch.to_pylist():
            number += 1
            yield _row(number, {name: one for name, one in value.items() if one is not None})


def _row(line: int, value: dict[str, Any]) -> Row:
    path, captions, fps = value.pop("path", None), value.pop("captions", "") or None, value.pop("fps", None)
    fps = None if fps == "" else fps
    for name, given in (("path", path), ("captions", captions)):
        if given is None and name == "captions":
            continue
        if not isinstance(given, str) or not given.strip() or "\0" in given:
            return Row(line, error=f"field '{name}' is {_short(given)}, expected the path of a file")
    if fps is not None:
        try:
            rate = float(fps)
        except (TypeError, ValueError):
            rate = math.nan
        if isinstance(fps, bool) or not 0 < rate <= 1000:
            return Row(line, error=f"field 'fps' is {_short(fps)}, expected frames per second above 0")
        fps = rate
    return Row(line, str(path), captions, fps, plain_fields(value))


def plain_fields(value: Any) -> Any:
    """As a record can hold it; what JSON cannot (times, bytes, infinities, half characters) as text."""
    if isinstance(value, dict):
        return {_text(str(name)): plain_fields(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_fields(one) for one in value]
    if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return _text(str(value))


def _text(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

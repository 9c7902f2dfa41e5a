"""List files: `.txt`, `.csv`, `.jsonl` and `.parquet`, one video a row.

`path` names the video and `captions` its caption file, relative to the list; `references` is a list of {role, path} (in
a CSV as JSON) and `label` a class, counted from 0; `fps` is the rate of a folder of numbered images; all other columns
are the video's own fields and are kept with it. A row that cannot be used is set aside by file, line, field and value,
and the rest of the list goes on.
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

from models.records import RecordError, decode
from models.scene import Reference
from preprocess.outcome import short
from preprocess.remote import open_file

LIST_SUFFIXES = frozenset((".txt", ".csv", ".jsonl", ".parquet"))
CLASSES = 2**31


class ListError(ValueError):
    """A list cannot be read as a whole."""


@dataclass
class Row:
    """One row; `error` says what is wrong with it (field and value), and then the rest is empty."""

    line: int  # from 1; of a Parquet file the row
    path: str = ""
    captions: str | None = None
    fps: float | None = None
    references: list[Reference] = field(default_factory=list)
    label: int | None = None
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
    try:
        references = _references(value.pop("references", None))
        label = _label(value.pop("label", None))
    except ValueError as error:
        return Row(line, error=str(error))
    places = [(f"references[{i}].path", one.path) for i, one in enumerate(references)]
    for name, given in (("path", path), ("captions", captions), *places):
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
    return Row(line, str(path), captions, fps, references, label, plain_fields(value))


def _references(value: Any) -> list[Reference]:
    """Raises ValueError naming the field and the value."""
    given = value
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError:
            pass  # still a text, which is refused below
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(f"field 'references' is {_short(given)}, expected a list of objects {{role, path}}")
    try:
        return [decode(Reference, one, f"references[{i}]") for i, one in enumerate(value)]
    except RecordError as error:
        raise ValueError(str(error)) from error


def _label(value: Any) -> int | None:
    """A class, also from text or a float that holds a whole number. Raises ValueError naming the value."""
    if value is None or value == "":
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (0 <= number < CLASSES and number.is_integer()):
        hint = "give labels of another kind another name"
        raise ValueError(f"field 'label' is {_short(value)}, expected a class, counted from 0; {hint}")
    return int(number)


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

"""What models have answered, kept so that no question is asked twice: recorded answers give the same captions again.

While a run is under way each answer is a file of its own in its parts folder, written the moment it is accepted; at
compaction all go into `answers.parquet` of the dataset, sorted by key, from which later runs read them. A dataset's
table copied into another output folder answers there, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.storage import atomic_path, atomic_write_json

ANSWERS = "answers.parquet"
_SCHEMA = pa.schema([(name, pa.string()) for name in ("key", "kind", "place", "model", "prompt_hash", "answer")])
_ROWS = 1024  # of a row group: what is read to find one answer


@dataclass(frozen=True)
class Answer:
    """An accepted answer. `key` is the hash of all that it depends on (`question_key`)."""

    key: str
    kind: str  # captions or states
    place: str  # the scene or shot it was first given for
    model: str
    prompt_hash: str
    answer: str


@dataclass(frozen=True)
class Answers:
    """The recorded answers of an output folder: those of this run in `folder`, those of earlier runs in `table`."""

    table: Path
    folder: Path

    def find(self, key: str) -> str | None:
        """The answer to a question; None where it was never answered."""
        try:
            return str(json.loads(self._file(key).read_text(encoding="utf-8"))["answer"])
        except FileNotFoundError:
            pass
        if not self.table.is_file():
            return None
        found = pq.read_table(self.table, columns=["answer"], filters=[("key", "=", key)])
        return str(found["answer"][0]) if len(found) else None

    def record(self, answer: Answer) -> None:
        """Keep an accepted answer. Raises OSError where it cannot be written."""
        atomic_write_json(self._file(answer.key), asdict(answer))

    def write_table(self, path: Path) -> None:
        """All answers, of earlier runs and of this one, as one table; no file where there are none."""
        rows = {row["key"]: row for row in self._rows()}
        if not rows:
            return
        with atomic_path(path) as temporary:
            table = pa.Table.from_pylist([rows[key] for key in sorted(rows)], _SCHEMA)
            pq.write_table(table, temporary, row_group_size=_ROWS)

    def _rows(self) -> Iterator[dict[str, Any]]:
        if self.table.is_file():
            yield from pq.read_table(self.table, schema=_SCHEMA).to_pylist()
        for path in self.folder.glob("*/[!.]*.json"):  # those with a dot were never finished
            yield json.loads(path.read_text(encoding="utf-8"))

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


def question_key(*facts: Any) -> str:
    """Hash of all that an answer depends on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]

"""Tests of decoding dataclasses from JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

import pytest

from models.records import RecordError, decode


@dataclass
class Clip:
    name: str
    size: tuple[int, int] | None = None
    spans: list[tuple[int, float]] = field(default_factory=list)


@pytest.mark.parametrize("clip", [Clip("a"), Clip("b", (48, 64)), Clip("c", (48, 64), [(1, 0.5), (2, 1.5)])])
def test_a_record_comes_back_from_its_json(clip: Clip) -> None:
    assert decode(Clip, json.loads(json.dumps(asdict(clip))), "clip") == clip


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"name": "a", "size": [48]}, r"clip\.size is \[48\]"),
        ({"name": "a", "size": [48, "64"]}, r"clip\.size\[1\] is '64' \(str\), expected int"),
        ({"name": "a", "size": 48}, r"clip\.size is 48 \(int\)"),
        ({"name": "a", "spans": [[1, 0.5], [True, 0.5]]}, r"clip\.spans\[1\]\[0\] is True"),
        ({"name": "a", "sise": [48, 64]}, r"unknown field 'sise'; did you mean 'size'\?"),
        ({"size": [48, 64]}, r"missing field 'name'"),
    ],
)
def test_an_error_names_the_field_and_the_value(value: dict[str, object], words: str) -> None:
    with pytest.raises(RecordError, match=words):
        decode(Clip, value, "clip")

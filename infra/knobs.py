"""Documented dataclass fields, and the words that describe them in help texts and error messages."""

from __future__ import annotations

import copy
import dataclasses
import enum
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, Union


def knob(default: Any, help: str) -> Any:
    """A documented dataclass field. A class as default means "make a fresh one"; lists and dicts are copied."""
    metadata = {"help": help}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if isinstance(default, (list, dict, set)) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def required(help: str) -> Any:
    """A documented field without a default; declare its dataclass with `kw_only=True`."""
    return dataclasses.field(metadata={"help": help})


@dataclass(frozen=True)
class KeyDoc:
    """One row of a command's help: the dotted key, its type and default in words, its one-line meaning."""

    key: str
    type: str
    default: str
    help: str


def describe(cls: type, prefix: str = "", base: Any = None) -> list[KeyDoc]:
    """Every key of a config class in the order of declaration; keys of nested classes dotted, of list items `[]`.

    `base` is an object of the class whose values are the defaults.
    """
    rows = []
    for field, hint in fields(cls):
        key, help = prefix + field.name, field.metadata.get("help", "")
        default = getattr(base, field.name) if isinstance(base, cls) else default_of(field)
        nested, many = _nested(hint)
        if nested is not None and not many:
            rows += describe(nested, key + ".", default)
            continue
        rows.append(KeyDoc(key, type_words(hint), _default_words(default), help))
        if nested is not None:
            rows += describe(nested, key + "[].")
    return rows


def fields(cls: type) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    """The fields that make up an object of a dataclass, each with its resolved type."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.init:
            yield field, hints[field.name]


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field, freshly made; MISSING where it has none."""
    return field.default_factory() if field.default_factory is not MISSING else field.default


def plain(value: Any) -> Any:
    """A config value as what YAML and JSON hold: mappings, lists and scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, enum.Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


_WORDS = {
    bool: "true|false",
    int: "integer",
    float: "number",
    str: "text",
    Path: "path",
    type(None): "null",
    Any: "any value",
}


def type_words(hint: Any) -> str:
    """A type as a user reads it: `number`, `cut|fade`, `list of integer`, `text or null`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in _WORDS:
        return _WORDS[hint]
    if origin in (Union, types.UnionType):
        return " or ".join(type_words(a) for a in args)
    if origin is Literal:
        return "|".join(map(str, args))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "|".join(str(m.value) for m in hint)
    if origin is list or (origin is tuple and args[-1] is Ellipsis):
        return f"list of {type_words(args[0])}"
    if origin is tuple:
        return "list [" + ", ".join(map(type_words, args)) + "]"
    return "mapping" if origin is dict or hint is dict or dataclasses.is_dataclass(hint) else "list"


def _default_words(value: Any) -> str:
    if value is MISSING:
        return "required"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(plain(value)) or "empty"


def _nested(hint: Any) -> tuple[type | None, bool]:
    """The dataclass a field holds, if any, and whether it holds a list of them."""
    args = [a for a in typing.get_args(hint) if a is not type(None) and a is not Ellipsis]
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint, False
    if len(args) != 1 or typing.get_origin(hint) is Literal:
        return None, False
    nested, many = _nested(args[0])
    return nested, many or typing.get_origin(hint) in (list, tuple)

"""Dataclasses from JSON, with every type checked and every error naming the field."""

from __future__ import annotations

import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, cast

T = TypeVar("T")


class RecordError(ValueError):
    """A record does not have the fields or types that its dataclass asks for; `at` is the field's place, if known."""

    def __init__(self, message: str, at: str = "") -> None:
        super().__init__(message)
        self.at = at


def decode(kind: type[T], value: Any, at: str) -> T:
    """The value of type `kind` whose JSON form is `value`; `at` is how errors call it.

    Knows dataclasses, lists, tuples of a fixed length, string-keyed dicts, Literal, X | None, Any and the scalar types.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind):
        return cast(T, _decode_dataclass(kind, value, at))
    if origin in (types.UnionType, typing.Union):  # X | None
        return cast(T, None if value is None else decode(next(a for a in args if a is not type(None)), value, at))
    if origin is Literal:
        if value not in args:
            raise RecordError(f"{at} is {value!r}, expected one of {', '.join(map(repr, args))}", at)
        return cast(T, value)
    if origin is list and isinstance(value, list):
        return cast(T, [decode(args[0], inner, f"{at}[{i}]") for i, inner in enumerate(value)])
    if origin is tuple and isinstance(value, list | tuple) and len(value) == len(args):
        parts = (decode(part, one, f"{at}[{i}]") for i, (part, one) in enumerate(zip(args, value, strict=True)))
        return cast(T, tuple(parts))
    if origin is dict and isinstance(value, dict):
        return cast(T, {key: decode(args[1], inner, f"{at}.{key}") for key, inner in value.items()})
    if kind is Any:
        return cast(T, value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return cast(T, float(value))
    if origin is None and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    expected = getattr(kind, "__name__", kind)
    raise RecordError(f"{at} is {value!r} ({type(value).__name__}), expected {expected}", at)


def _decode_dataclass(kind: Any, value: Any, at: str) -> Any:
    if not isinstance(value, dict):
        raise RecordError(f"{at}: expected an object, got {type(value).__name__}", at)
    hints = typing.get_type_hints(kind)
    names = [f.name for f in fields(kind)]
    for key in value:
        if key not in names:
            near = get_close_matches(key, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"
            raise RecordError(f"{at}: unknown field {key!r}{hint}", f"{at}.{key}")
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in value]:
        raise RecordError(f"{at}: missing field {', '.join(map(repr, missing))}", f"{at}.{missing[0]}")
    return kind(**{name: decode(hints[name], value[name], f"{at}.{name}") for name in names if name in value})

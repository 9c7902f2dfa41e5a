"""Typed configuration: a dataclass, a YAML file and `key=value` overrides become one checked object.

    @dataclass(kw_only=True)
    class TrainConfig:
        dataset: Path = required("folder that `shotloom prepare` wrote")
        steps: int = knob(1000, "optimizer steps")
        optim: OptimConfig = knob(OptimConfig, "optimizer")

    config = load_config(TrainConfig, Path("train.yaml"), ["steps=20", "optim.lr=3e-4"])

Values are read by the type of their field, not by YAML's guess: `1e-3` is a number where a number is wanted, and
`version: 1.10` or `answer: no` stay text where text is wanted. Understood: bool, int, float, str, Path, Literal, Enum,
Optional and unions, list, tuple, dict[str, T], Any, and dataclasses nested to any depth. Relative paths are relative
to the current folder. Every problem is a ConfigError that names the file and line, the key, the value and a remedy.

PyYAML parses; this file binds its nodes to types. OmegaConf and pydantic would bind values after YAML has guessed their
types and forgotten their lines.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from infra.knobs import KeyDoc, default_of, describe, fields, knob, plain, required, type_words
from infra.yaml_nodes import (
    LITERAL,
    ConfigError,
    apply_override,
    children,
    is_null,
    parse_literal,
    read_file,
    untyped,
    value_words,
    where,
)

__all__ = ["ConfigError", "KeyDoc", "describe", "knob", "load_config", "required", "to_yaml"]

T = TypeVar("T")
_TRUE, _FALSE = {"true", "yes", "on"}, {"false", "no", "off"}


def load_config(cls: type[T], file: Path | str | None = None, overrides: Sequence[str] = ()) -> T:
    """Builds `cls` from its defaults, then `file` (YAML), then `overrides` ("a.b=3"; list items: "shots.0.prompt=x").

    Raises ConfigError on an unknown, missing, doubled or ill-typed key, and when a dataclass refuses its values.
    """
    tree = read_file(Path(file)) if file is not None else yaml.MappingNode("tag:yaml.org,2002:map", [])
    if not isinstance(tree, yaml.MappingNode):
        raise ConfigError(f"{where(tree)}: a config file holds `key: value` lines, found {value_words(tree)}")
    for override in overrides:
        apply_override(tree, override)
    return typing.cast(T, _Reader(cls).read_dataclass(cls, tree, "", None))


def to_yaml(config: Any) -> str:
    """The YAML text of a config object; `load_config(type(config), file_with_that_text)` gives an equal object."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True, width=120)


class _Reader:
    """Turns nodes into objects of the wanted types; knows the root class, to suggest keys."""

    def __init__(self, root: type) -> None:
        self.root = root

    def read(self, hint: Any, node: Any, key: str, base: Any) -> Any:
        """The value of `node` as type `hint`; `base` is the default it replaces (kept where a mapping is partial)."""
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin in (Union, types.UnionType):
            return self._read_union(hint, args, node, key, base)
        if origin is Literal:
            return self._read_choice(args, node, key)
        if isinstance(hint, type) and issubclass(hint, enum.Enum):
            return hint(self._read_choice(tuple(m.value for m in hint), node, key))
        if node.tag == LITERAL and hint not in (str, Path):
            literal, node = node, parse_literal(node)
            if not isinstance(node, yaml.SequenceNode) and list in (origin, hint):
                node = yaml.SequenceNode("tag:yaml.org,2002:seq", [literal])  # one value stands for a list of one
        if hint is Any:
            return untyped(node)
        if dataclasses.is_dataclass(hint):
            return self.read_dataclass(typing.cast(type, hint), node, key, base)
        if origin in (list, tuple) or hint in (list, tuple):
            return self._read_sequence(hint, origin or hint, args, node, key)
        if origin is dict or hint is dict:
            if not isinstance(node, yaml.MappingNode):
                raise _mismatch(hint, node, key)
            item = args[1] if args else Any
            return {k: self.read(item, v, f"{key}.{k}", None) for k, v in children(node)}
        return _read_scalar(hint, node, key)

    def read_dataclass(self, cls: type, node: Any, key: str, base: Any) -> Any:
        if not isinstance(node, yaml.MappingNode):
            raise _mismatch(cls, node, key)
        given = dict(children(node))
        prefix = key + "." if key else ""
        names = [field.name for field, _ in fields(cls)]
        for name, child in given.items():
            if name not in names:
                remedy = self._suggest(names, prefix, name)
                raise ConfigError(f"{where(child)}: unknown key '{prefix}{name}'; {remedy}")
        values = {}
        for field, hint in fields(cls):
            name, default = field.name, getattr(base, field.name) if isinstance(base, cls) else default_of(field)
            if name in given:
                values[name] = self.read(hint, given[name], prefix + name, default)
            elif default is MISSING:
                note = f": {field.metadata['help']}" if "help" in field.metadata else ""
                raise ConfigError(f"{where(node)}: key '{prefix}{name}' ({type_words(hint)}) is required{note}")
            else:
                values[name] = default
        try:
            return cls(**values)
        except (ValueError, TypeError) as error:  # what the dataclass checks in __post_init__
            raise ConfigError(f"{where(node)}: {f'in {key!r}: ' if key else ''}{error}") from error

    def _read_union(self, hint: Any, args: tuple[Any, ...], node: Any, key: str, base: Any) -> Any:
        if type(None) in args and is_null(node):
            return None
        members = [a for a in args if a is not type(None)]
        if len(members) == 1:
            return self.read(members[0], node, key, base)
        for member in sorted(members, key=lambda m: m in (str, Path)):  # text accepts anything, so it comes last
            try:
                return self.read(member, node, key, base)
            except ConfigError:
                continue
        raise _mismatch(hint, node, key)

    def _read_sequence(self, hint: Any, kind: Any, args: tuple[Any, ...], node: Any, key: str) -> Any:
        fixed = kind is tuple and bool(args) and args[-1] is not Ellipsis
        if not isinstance(node, yaml.SequenceNode) or (fixed and len(node.value) != len(args)):
            raise _mismatch(hint, node, key)
        hints = args if fixed else [args[0] if args else Any] * len(node.value)
        pairs = zip(hints, node.value, strict=True)
        return kind(self.read(item, child, f"{key}[{i}]", None) for i, (item, child) in enumerate(pairs))

    def _read_choice(self, choices: tuple[Any, ...], node: Any, key: str) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            raise _mismatch(Literal[choices], node, key)
        for choice in choices:
            if str(choice) == node.value or (isinstance(choice, bool) and str(choice).lower() == node.value.lower()):
                return choice
        close = difflib.get_close_matches(node.value, [str(c) for c in choices], 1)
        nearest = f"; nearest is '{close[0]}'" if close else ""
        words = ", ".join(f"'{c}'" for c in choices)
        raise ConfigError(f"{where(node)}: key '{key}': {value_words(node)} is not one of {words}{nearest}")

    def _suggest(self, siblings: list[str], prefix: str, name: str) -> str:
        if close := difflib.get_close_matches(name, siblings, 1):
            return f"nearest is '{prefix}{close[0]}'"
        leaves = {row.key.rpartition(".")[2]: row.key for row in reversed(describe(self.root))}
        if close := difflib.get_close_matches(name, leaves, 1, cutoff=0.8):
            return f"nearest is '{leaves[close[0]]}'"
        return "known keys here: " + ", ".join(prefix + s for s in siblings)


def _read_scalar(hint: Any, node: Any, key: str) -> Any:
    text = node.value
    if not isinstance(node, yaml.ScalarNode):
        pass
    elif hint in (str, Path):
        if node.tag == LITERAL or not is_null(node):
            return Path(text).expanduser() if hint is Path else text
    elif node.style is None and hint is bool and text.lower() in _TRUE | _FALSE:
        return text.lower() in _TRUE
    elif node.style is None and hint in (int, float):
        try:
            return hint({".inf": "inf", "-.inf": "-inf", ".nan": "nan"}.get(text.lower(), text))
        except ValueError:
            pass
    raise _mismatch(hint, node, key)


def _mismatch(hint: Any, node: Any, key: str) -> ConfigError:
    at = f"key '{key}': " if key else ""
    return ConfigError(f"{where(node)}: {at}expected {type_words(hint)}, got {value_words(node)}")

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
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from infra.knobs import KeyDoc, default_of, describe, fields, knob, plain, required, type_words

__all__ = ["ConfigError", "KeyDoc", "describe", "knob", "load_config", "required", "to_yaml"]

T = TypeVar("T")
COMMAND_LINE = "command line"
_TRUE, _FALSE = {"true", "yes", "on"}, {"false", "no", "off"}
_LITERAL = "!literal"  # tag of command-line text that is not yet read as YAML
_MAP = "tag:yaml.org,2002:map"


class ConfigError(ValueError):
    """A configuration that cannot be used. The message says where, which key, which value and what to do."""


def load_config(cls: type[T], file: Path | str | None = None, overrides: Sequence[str] = ()) -> T:
    """Builds `cls` from its defaults, then `file` (YAML), then `overrides` ("a.b=3"; list items: "shots.0.prompt=x").

    Raises ConfigError on an unknown, missing, doubled or ill-typed key, and when a dataclass refuses its values.
    """
    tree = _read_file(Path(file)) if file is not None else yaml.MappingNode(_MAP, [])
    if not isinstance(tree, yaml.MappingNode):
        raise ConfigError(f"{_where(tree)}: a config file holds `key: value` lines, found {_value_words(tree)}")
    for override in overrides:
        _apply_override(tree, override)
    return typing.cast(T, _Reader(cls).read_dataclass(cls, tree, "", None))


def to_yaml(config: Any) -> str:
    """The YAML text of a config object; `load_config(type(config), file_with_that_text)` gives an equal object."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True, width=120)


# --- text to node tree: a node keeps its literal text and its line ------------------------------------------------


def _read_file(path: Path) -> yaml.Node:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file (looked from {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    try:
        node = _compose(text, str(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    return node if node is not None else yaml.MappingNode(_MAP, [], yaml.Mark(str(path), 0, 0, 0, "", 0))


def _compose(text: str, name: str) -> yaml.Node | None:
    loader = yaml.SafeLoader(text)
    loader.name = name
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def _apply_override(tree: yaml.MappingNode, override: str) -> None:
    """Sets one `a.b=value` in the tree. The value stays literal text until the type of its field is known."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"{COMMAND_LINE}: '{override}' is not of the form key=value (example: train.steps=20)")
    node: Any = tree
    for part in parts[:-1]:
        child = _child(node, part, key)
        if not isinstance(child, (yaml.MappingNode, yaml.SequenceNode)):
            child = yaml.MappingNode(_MAP, [])
            _set_child(node, part, child)
        node = child
    _child(node, parts[-1], key)
    _set_child(node, parts[-1], yaml.ScalarNode(_LITERAL, text))


def _child(node: Any, part: str, key: str) -> Any:
    if isinstance(node, yaml.MappingNode):
        return next((child for name, child in node.value if name.value == part), None)
    if part.isdecimal() and int(part) < len(node.value):
        return node.value[int(part)]
    raise ConfigError(f"{COMMAND_LINE}: '{key}': no item {part} in a list of {len(node.value)}, counted from 0")


def _set_child(node: Any, part: str, child: yaml.Node) -> None:
    if isinstance(node, yaml.SequenceNode):
        node.value[int(part)] = child
        return
    kept = [(name, old) for name, old in node.value if name.value != part]
    node.value = [*kept, (yaml.ScalarNode(_LITERAL, part), child)]


# --- node tree to typed objects ----------------------------------------------------------------------------------


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
        if node.tag == _LITERAL and hint not in (str, Path):
            literal, node = node, _parse_literal(node)
            if isinstance(node, yaml.ScalarNode) and list in (origin, hint):
                node = yaml.SequenceNode("tag:yaml.org,2002:seq", [literal])  # one value stands for a list of one
        if hint is Any:
            return _untyped(node)
        if dataclasses.is_dataclass(hint):
            return self.read_dataclass(typing.cast(type, hint), node, key, base)
        if origin in (list, tuple) or hint in (list, tuple):
            return self._read_sequence(hint, origin or hint, args, node, key)
        if origin is dict or hint is dict:
            if not isinstance(node, yaml.MappingNode):
                raise _mismatch(hint, node, key)
            item = args[1] if args else Any
            return {k: self.read(item, v, f"{key}.{k}", None) for k, v in _pairs(node, key)}
        return _read_scalar(hint, node, key)

    def read_dataclass(self, cls: type, node: Any, key: str, base: Any) -> Any:
        if not isinstance(node, yaml.MappingNode):
            raise _mismatch(cls, node, key)
        given = dict(_pairs(node, key))
        prefix = key + "." if key else ""
        names = [field.name for field, _ in fields(cls)]
        for name, child in given.items():
            if name not in names:
                remedy = self._suggest(names, prefix, name)
                raise ConfigError(f"{_where(child)}: unknown key '{prefix}{name}'; {remedy}")
        values = {}
        for field, hint in fields(cls):
            name, default = field.name, getattr(base, field.name) if isinstance(base, cls) else default_of(field)
            if name in given:
                values[name] = self.read(hint, given[name], prefix + name, default)
            elif default is MISSING:
                note = f": {field.metadata['help']}" if "help" in field.metadata else ""
                raise ConfigError(f"{_where(node)}: key '{prefix}{name}' ({type_words(hint)}) is required{note}")
            else:
                values[name] = default
        try:
            return cls(**values)
        except (ValueError, TypeError) as error:  # what the dataclass checks in __post_init__
            raise ConfigError(f"{_where(node)}: {f'in {key!r}: ' if key else ''}{error}") from error

    def _read_union(self, hint: Any, args: tuple[Any, ...], node: Any, key: str, base: Any) -> Any:
        if type(None) in args and _is_null(node):
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
        raise ConfigError(f"{_where(node)}: key '{key}': {_value_words(node)} is not one of {words}{nearest}")

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
        if node.tag == _LITERAL or not _is_null(node):
            return Path(text).expanduser() if hint is Path else text
    elif node.style is None and hint is bool and text.lower() in _TRUE | _FALSE:
        return text.lower() in _TRUE
    elif node.style is None and hint in (int, float):
        try:
            return hint({".inf": "inf", "-.inf": "-inf", ".nan": "nan"}.get(text.lower(), text))
        except ValueError:
            pass
    raise _mismatch(hint, node, key)


def _parse_literal(node: yaml.ScalarNode) -> yaml.Node:
    """Command-line text where something other than text is wanted is YAML: numbers, [lists], {mappings}."""
    try:
        parsed = _compose(node.value, COMMAND_LINE)
    except yaml.YAMLError:
        parsed = None
    return parsed if parsed is not None else yaml.ScalarNode("tag:yaml.org,2002:str", node.value, style='"')


def _pairs(node: yaml.MappingNode, key: str) -> Iterator[tuple[str, Any]]:
    yaml.SafeLoader("").flatten_mapping(node)  # YAML merge keys `<<: *base`
    seen = set()
    for name, child in node.value:
        if name.value in seen:
            raise ConfigError(f"{_where(name)}: key '{f'{key}.' if key else ''}{name.value}' is given twice; keep one")
        seen.add(name.value)
        yield str(name.value), child


def _untyped(node: Any) -> Any:
    """A value whose field accepts anything: YAML's own reading, plus `1e-3` as a number."""
    if isinstance(node, yaml.MappingNode):
        return {key: _untyped(child) for key, child in _pairs(node, "")}
    if isinstance(node, yaml.SequenceNode):
        return [_untyped(child) for child in node.value]
    value = yaml.SafeLoader("").construct_object(node)
    try:
        return float(value) if isinstance(value, str) and node.style is None else value
    except ValueError:
        return value


def _is_null(node: Any) -> bool:
    nulls = ("null", "~") if node.tag == _LITERAL else ("null", "~", "")
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value.lower() in nulls


def _mismatch(hint: Any, node: Any, key: str) -> ConfigError:
    at = f"key '{key}': " if key else ""
    return ConfigError(f"{_where(node)}: {at}expected {type_words(hint)}, got {_value_words(node)}")


def _value_words(node: Any) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return f"a list of {len(node.value)}"
    quoted = " (quoted text)" if node.style and node.start_mark else ""
    return "null" if _is_null(node) else f"'{node.value}'{quoted}"


def _where(node: Any) -> str:
    mark = node.start_mark
    return COMMAND_LINE if mark is None or mark.name == COMMAND_LINE else f"{mark.name}:{mark.line + 1}"

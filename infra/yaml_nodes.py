"""YAML as a tree of nodes, which keep each value's literal text and line; the ground `infra.config` stands on.

Only plain YAML passes: no tags that make objects, no key twice, no value inside itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

COMMAND_LINE = "command line"
LITERAL = "!literal"  # tag of command-line text that is not yet read as YAML
_TAG = "tag:yaml.org,2002:"


class ConfigError(ValueError):
    """A configuration that cannot be used. The message says where, which key, which value and what to do."""


def read_file(path: Path) -> yaml.Node:
    """The node tree of a YAML file; an empty mapping where the file holds nothing."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file (looked from {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    try:
        node = compose(text, str(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    return node if node is not None else yaml.MappingNode(_TAG + "map", [], yaml.Mark(str(path), 0, 0, 0, "", 0))


def compose(text: str, name: str) -> yaml.Node | None:
    """The node tree of a text, merge keys (`<<: *base`) applied; None where it is empty."""
    loader = yaml.SafeLoader(text)
    loader.name = name
    try:
        tree = loader.get_single_node()
        if tree is not None:
            _check(tree, "", ())
            _merge(tree, loader)
        return tree
    finally:
        loader.dispose()


def children(node: yaml.Node) -> list[tuple[str, yaml.Node]]:
    """Keys (or numbers) and values of a mapping or list; nothing for a scalar."""
    if isinstance(node, yaml.MappingNode):
        return [(str(name.value), child) for name, child in node.value]
    return [(str(i), child) for i, child in enumerate(node.value)] if isinstance(node, yaml.SequenceNode) else []


def _check(node: yaml.Node, key: str, parents: tuple[yaml.Node, ...]) -> None:
    if not node.tag.startswith(_TAG) or node.tag.startswith(_TAG + "python"):
        raise ConfigError(f"{where(node)}: key '{key}': the tag '{node.tag}' is not plain YAML; leave it out")
    if any(node is parent for parent in parents):
        raise ConfigError(f"{where(node)}: key '{key}' holds itself through an alias")
    seen = set()
    if isinstance(node, yaml.MappingNode):
        for name, _ in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise ConfigError(f"{where(name)}: in '{key}': a key must be one word, not {value_words(name)}")
            if name.value in seen:
                raise ConfigError(f"{where(name)}: key '{_below(key, name.value)}' is given twice; keep one")
            seen.add(name.value)
    for name, child in children(node):
        _check(child, _below(key, name), (*parents, node))


def _merge(node: yaml.Node, loader: yaml.SafeLoader) -> None:
    if isinstance(node, yaml.MappingNode):
        loader.flatten_mapping(node)
        node.value = list({name.value: (name, child) for name, child in node.value}.values())  # the later wins
    for _, child in children(node):
        _merge(child, loader)


def _below(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def apply_override(tree: yaml.MappingNode, override: str) -> None:
    """Sets one `a.b=value` in the tree. The value stays literal text until the type of its field is known."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"{COMMAND_LINE}: '{override}' is not of the form key=value (example: steps=20)")
    node: Any = tree
    for part in parts[:-1]:
        child = _child(node, part, key)
        if not isinstance(child, (yaml.MappingNode, yaml.SequenceNode)):
            child = yaml.MappingNode(_TAG + "map", [])
            _set_child(node, part, child)
        node = child
    _child(node, parts[-1], key)
    _set_child(node, parts[-1], yaml.ScalarNode(LITERAL, text))


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
    node.value = [*kept, (yaml.ScalarNode(LITERAL, part), child)]


def parse_literal(node: yaml.ScalarNode) -> yaml.Node:
    """Command-line text where something other than text is wanted is YAML: numbers, [lists], {mappings}."""
    try:
        parsed = compose(node.value, COMMAND_LINE)
    except yaml.YAMLError:
        parsed = None
    return parsed if parsed is not None else yaml.ScalarNode(_TAG + "str", node.value, style='"')


def untyped(node: Any) -> Any:
    """The value of a node where any type will do: YAML's own reading, plus `1e-3` as a number."""
    if node.tag == LITERAL:
        node = parse_literal(node)
    if isinstance(node, yaml.MappingNode):
        return {key: untyped(child) for key, child in children(node)}
    if isinstance(node, yaml.SequenceNode):
        return [untyped(child) for _, child in children(node)]
    value = yaml.SafeLoader("").construct_object(node)
    try:
        return float(value) if isinstance(value, str) and node.style is None else value
    except ValueError:
        return value


def is_null(node: Any) -> bool:
    """Whether a node says "no value": `null`, `~`, and in a file also nothing at all."""
    nulls = ("null", "~") if node.tag == LITERAL else ("null", "~", "")
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value.lower() in nulls


def value_words(node: Any) -> str:
    """A node's value as an error message shows it."""
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return f"a list of {len(node.value)}"
    quoted = " (quoted text)" if node.style and node.start_mark else ""
    return "null" if is_null(node) else f"'{node.value}'{quoted}"


def where(node: Any) -> str:
    """The file and line of a node, or that it came from the command line."""
    mark = node.start_mark
    return COMMAND_LINE if mark is None or mark.name == COMMAND_LINE else f"{mark.name}:{mark.line + 1}"

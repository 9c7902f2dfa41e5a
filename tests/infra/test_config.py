"""Configuration: what is accepted, how the three sources combine, and what each error says."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from infra.config import ConfigError, describe, knob, load_config, required, to_yaml


class Speed(enum.Enum):
    SLOW = "slow"
    FAST = "fast"


@dataclass
class Optim:
    learning_rate: float = knob(1e-3, "peak rate")
    kind: Literal["adam", "sgd"] = knob("adam", "algorithm")


@dataclass
class Shot:
    prompt: str = knob("", "what happens")
    frames: int = knob(17, "length")

    def __post_init__(self) -> None:
        if self.frames % 4 != 1:
            raise ValueError(f"frames={self.frames} is not 4k+1; use {self.frames // 4 * 4 + 1}")


@dataclass(kw_only=True)
class Config:
    data: Path = required("the dataset")
    steps: int = knob(10, "steps")
    name: str = knob("run", "name")
    compile: bool = knob(False, "compile")
    limit: int | None = knob(None, "limit")
    note: str | None = knob(None, "note")
    train: Optim = knob(Optim(learning_rate=5.0), "optimizer")
    second: Optim | None = knob(None, "another optimizer")
    shots: list[Shot] = knob([], "shots")
    sizes: list[int] = knob([1, 2], "sizes")
    targets: list[str] = knob(["q"], "targets")
    span: tuple[int, float] = knob((1, 2.0), "span")
    params: dict[str, Any] = knob({}, "parameters")
    weights: dict[str, float] = knob({}, "weights")
    either: float | list[float] = knob(1.0, "one or many")
    speed: Speed = knob(Speed.SLOW, "speed")
    level: Literal[1, 2, "all"] = knob(1, "level")


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    return load_config(Config, file, overrides)


def error(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(Config, None, ["data=d", *overrides])
    return str(caught.value)


def file_error(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    return str(caught.value).replace(str(tmp_path) + "/", "")


def test_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    config = load(tmp_path, "data: a\nsteps: 20\ntrain:\n  kind: sgd\n", "steps=30", "train.kind=adam")
    assert (config.data, config.steps, config.name) == (Path("a"), 30, "run")
    assert config.train == Optim(learning_rate=5.0, kind="adam")


def test_a_partly_given_nested_config_keeps_the_defaults_of_its_field(tmp_path: Path) -> None:
    assert load(tmp_path, "data: a\ntrain: {kind: sgd}\n").train.learning_rate == 5.0
    assert load(tmp_path, "data: a\nsecond: {kind: sgd}\n").second == Optim(kind="sgd")


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("steps=1_000", "steps", 1000),
        ("train.learning_rate=1e-3", "train", Optim(1e-3)),
        ("train.learning_rate=3", "train", Optim(3.0)),
        ("compile=true", "compile", True),
        ("compile=off", "compile", False),
        ("name=3", "name", "3"),
        ("name=null", "name", "null"),
        ("name=", "name", ""),
        ("name=[Character] a: b # c = d", "name", "[Character] a: b # c = d"),
        ("limit=5", "limit", 5),
        ("limit=null", "limit", None),
        ("note=null", "note", None),
        ("note=no", "note", "no"),
        ("second.kind=sgd", "second", Optim(kind="sgd")),
        ("sizes=[3, 4]", "sizes", [3, 4]),
        ("sizes=3", "sizes", [3]),
        ("sizes=[]", "sizes", []),
        ("targets=a: b", "targets", ["a: b"]),
        ("span=[3, 4]", "span", (3, 4.0)),
        ("params.p=1e-3", "params", {"p": 1e-3}),
        ("params.a.b=[x, 1]", "params", {"a": {"b": ["x", 1]}}),
        ("params={a: true, b: null}", "params", {"a": True, "b": None}),
        ("weights.x=2", "weights", {"x": 2.0}),
        ("either=2", "either", 2.0),
        ("either=[1, 2.5]", "either", [1.0, 2.5]),
        ("speed=fast", "speed", Speed.FAST),
        ("level=2", "level", 2),
        ("level=all", "level", "all"),
        ("data=~/x", "data", Path.home() / "x"),
    ],
)
def test_values_are_read_by_the_type_of_their_field(override: str, name: str, value: object) -> None:
    read = getattr(load_config(Config, None, ["data=d", override]), name)
    assert read == value and type(read) is type(value)


def test_text_in_a_file_is_taken_as_written(tmp_path: Path) -> None:
    assert load(tmp_path, "data: d\nname: no\n").name == "no"
    assert load(tmp_path, "data: d\nname: 1.10\n").name == "1.10"
    assert load(tmp_path, "data: d\nname: 'null'\n").name == "null"
    assert load(tmp_path, "data: d\nname: >\n  two\n  lines\n").name == "two lines\n"


def test_list_items_are_reached_by_number(tmp_path: Path) -> None:
    text = "data: d\nshots:\n- prompt: a\n- prompt: b\n  frames: 5\n"
    config = load(tmp_path, text, "shots.1.prompt=c: d", "shots.0.frames=9")
    assert config.shots == [Shot("a", 9), Shot("c: d", 5)]


def test_anchors_and_merge_keys_of_yaml_work(tmp_path: Path) -> None:
    text = "data: d\ntrain: &base {kind: sgd, learning_rate: 2}\nsecond:\n  <<: *base\n  kind: adam\n"
    assert load(tmp_path, text).second == Optim(2.0, "adam")


def test_an_empty_file_is_no_keys(tmp_path: Path) -> None:
    assert load(tmp_path, "# nothing yet\n", "data=d").steps == 10


def test_defaults_are_not_shared() -> None:
    first, second = (load_config(Config, None, ["data=d"]) for _ in range(2))
    first.sizes.append(3)
    first.train.kind = "sgd"
    assert second.sizes == [1, 2] and second.train.kind == "adam"


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = load_config(
        Config,
        None,
        [
            "data=a b",
            "name=null",
            "note=1e-3",
            "shots=[{prompt: 'x: y'}]",
            "params.p=1e-3",
            "span=[1, .inf]",
            "speed=fast",
        ],
    )
    assert load(tmp_path, to_yaml(config)) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lerning_rate=1", "unknown key 'train.lerning_rate'; nearest is 'train.learning_rate'"),
        ("learning_rate=1", "unknown key 'learning_rate'; nearest is 'train.learning_rate'"),
        ("train.zzz=1", "unknown key 'train.zzz'; known keys here: train.learning_rate, train.kind"),
        ("steps=1.5", "key 'steps': expected integer, got '1.5'"),
        ("steps=true", "key 'steps': expected integer, got 'true'"),
        ("steps=", "key 'steps': expected integer, got ''"),
        ("steps=null", "key 'steps': expected integer, got null"),
        ("steps=[1]", "key 'steps': expected integer, got a list of 1"),
        ("train.learning_rate=fast", "key 'train.learning_rate': expected number, got 'fast'"),
        ("compile=2", "key 'compile': expected true|false, got '2'"),
        ("limit=x", "key 'limit': expected integer, got 'x'"),
        ("train=5", "key 'train': expected mapping, got '5'"),
        ("train.kind=adma", "key 'train.kind': 'adma' is not one of 'adam', 'sgd'; nearest is 'adam'"),
        ("speed=fats", "key 'speed': 'fats' is not one of 'slow', 'fast'; nearest is 'fast'"),
        ("sizes=[1, x]", "key 'sizes[1]': expected integer, got 'x'"),
        ("span=[1]", "key 'span': expected list [integer, number], got a list of 1"),
        ("weights.x=y", "key 'weights.x': expected number, got 'y'"),
        ("either=x", "key 'either': expected number or list of number, got 'x'"),
        ("shots=[{frames: 6}]", "in 'shots[0]': frames=6 is not 4k+1; use 5"),
        ("shots.0.frames=5", "key 'shots': expected list of mapping, got a mapping"),
        ("sizes={", "key 'sizes[0]': expected integer, got '{'"),
        ("steps", "'steps' is not of the form key=value"),
        ("=5", "'=5' is not of the form key=value"),
        ("a..b=5", "'a..b=5' is not of the form key=value"),
    ],
)
def test_errors_on_the_command_line(override: str, message: str) -> None:
    assert error(override).startswith("command line: ")
    assert message in error(override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: d\ntrain:\n  lerning_rate: 1\n", "c.yaml:3: unknown key 'train.lerning_rate'; nearest is 'train.lea"),
        ("data: d\nsteps: '3'\n", "c.yaml:2: key 'steps': expected integer, got '3' (quoted text)"),
        ("data: d\nname:\n", "c.yaml:2: key 'name': expected text, got null"),
        ("data: d\nsizes: 3\n", "c.yaml:2: key 'sizes': expected list of integer, got '3'"),
        ("data: d\nsteps: 1\nsteps: 2\n", "c.yaml:3: key 'steps' is given twice"),
        ("data: d\nshots:\n- prompt: a\n- frames: 6\n", "c.yaml:4: in 'shots[1]': frames=6 is not 4k+1"),
        ("steps: 1\n", "c.yaml:1: key 'data' (path) is required: the dataset"),
        ("", "c.yaml:1: key 'data' (path) is required: the dataset"),
        ("- a\n- b\n", "c.yaml:1: a config file holds `key: value` lines, found a list of 2"),
        ("data: [a\nsteps: 3\n", "c.yaml:2: not valid YAML"),
        ("data: d\nname: !!python/name:os.system x\n", "c.yaml:2: key 'name': the tag"),
        ("data: d\nname: !mine x\n", "c.yaml:2: key 'name': the tag '!mine' is not plain YAML"),
        ("data: d\nparams: &p {x: *p}\n", "c.yaml:2: key 'params.x' holds itself through an alias"),
        ("data: d\n? [a, b]\n: 1\n", "c.yaml:2: in '': a key must be one word, not a list of 2"),
    ],
)
def test_errors_in_a_file(tmp_path: Path, text: str, message: str) -> None:
    assert file_error(tmp_path, text).startswith(message)


def test_override_of_a_missing_list_item(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'shots.2.prompt': no item 2 in a list of 1, counted from 0"):
        load(tmp_path, "data: d\nshots: [{prompt: a}]\n", "shots.2.prompt=b")


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing.yaml: no such config file"):
        load_config(Config, tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="cannot be read as UTF-8"):
        load_config(Config, tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as UTF-8"):
        load_config(Config, tmp_path / "binary.yaml")


def test_describe_lists_every_key_once() -> None:
    rows = {row.key: row for row in describe(Config)}
    assert rows["data"].default == "required" and rows["data"].help == "the dataset"
    assert (rows["train.kind"].type, rows["train.kind"].default) == ("adam|sgd", "adam")
    assert rows["train.learning_rate"].default == "5.0", "of the object that is the default, not of its class"
    assert rows["limit"].type == "integer or null" and rows["shots"].type == "list of mapping"
    assert rows["shots[].frames"].default == "17" and rows["compile"].default == "false"
    assert "train" not in rows and len(rows) == len(describe(Config))


def test_plain_dataclasses_need_no_knobs() -> None:
    @dataclass
    class Plain:
        x: int = 1
        y: list[str] = field(default_factory=list)

    assert load_config(Plain, None, ["x=2", "y=[a]"]) == Plain(2, ["a"])

"""Files are whole or absent, names stay inside their folder."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest

from infra.storage import (
    atomic_path,
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    open_uri,
    safe_join,
    sha256_file,
)


def test_atomic_writes_replace_and_leave_nothing_beside(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.txt"
    atomic_write_text(target, "früh\r\n")
    atomic_write_bytes(target, b"late")
    assert target.read_bytes() == b"late" and os.listdir(target.parent) == ["a.txt"]


def test_a_failed_write_keeps_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "a.mp4"
    target.write_bytes(b"good")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        assert temporary.suffix == ".mp4" and temporary.parent == tmp_path
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert target.read_bytes() == b"good" and os.listdir(tmp_path) == ["a.mp4"]


def test_a_write_that_makes_no_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a"):
        pass
    assert os.listdir(tmp_path) == []


def test_files_are_readable_as_the_user_set_it_up(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    atomic_write_bytes(tmp_path / "atomic", b"")
    assert stat.S_IMODE((tmp_path / "atomic").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_json_keeps_order_and_refuses_what_is_not_json(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    atomic_write_json(target, {"b": 1, "a": ["ü", None]})
    assert (
        target.read_text(encoding="utf-8").startswith('{\n  "b": 1') and json.loads(target.read_text())["a"][0] == "ü"
    )
    for bad in (float("nan"), {"x": {1}}, Path("p")):
        with pytest.raises(ValueError, match="a.json: cannot be written as JSON"):
            atomic_write_json(target, bad)
    assert json.loads(target.read_text())["b"] == 1


def test_sha256(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "a").write_bytes(data)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("name", ["a.mp4", "b/c.mp4", "./a", "b/../a", "..a", "a..b/c"])
def test_safe_join_allows(tmp_path: Path, name: str) -> None:
    assert safe_join(tmp_path, name).is_relative_to(tmp_path.resolve())


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "/etc/passwd", "b/../../a", "a\0b", "link/a", "link"])
def test_safe_join_refuses(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError):
        safe_join(root, name)


def test_safe_join_does_not_take_a_sibling_with_the_same_beginning(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="outside"):
        safe_join(tmp_path / "root", "../root2/a")


def test_open_uri_reads_local_and_remote(tmp_path: Path) -> None:
    for uri in (tmp_path / "a", f"file://{tmp_path}/b", "memory://shotloom-test/c"):
        with open_uri(uri, "w") as file:
            file.write("ä")
        with open_uri(uri) as file:
            assert file.read() == "ä".encode()

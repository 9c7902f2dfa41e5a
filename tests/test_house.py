"""The house rules that a file can break without any code failing."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

MAX_LINES = 500


@pytest.fixture(scope="module")
def tracked(repo_root: Path) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=repo_root, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [repo_root / name for name in listed.stdout.split("\0") if name and (repo_root / name).is_file()]


def test_lock_holds_no_address_and_pins_every_dependency(repo_root: Path) -> None:
    lock = (repo_root / "requirements.lock").read_text()
    assert "://" not in lock
    pinned = dict(re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==(\S+)", lock, re.M))
    project = tomllib.loads((repo_root / "pyproject.toml").read_text())
    wanted = project["project"]["dependencies"] + project["dependency-groups"]["dev"]
    names = [re.match(r"[A-Za-z0-9._-]+", text)[0] for text in wanted]  # type: ignore[index]
    assert [name for name in names if name.lower() not in pinned] == []


def test_python_files_stay_small(tracked: list[Path]) -> None:
    long = [
        f"{f}: {n} lines" for f in tracked if f.suffix == ".py" and (n := len(f.read_text().splitlines())) > MAX_LINES
    ]
    assert not long, "\n".join(long)


def test_no_file_names_the_machine_it_was_written_on(tracked: list[Path], repo_root: Path) -> None:
    places = {str(repo_root), str(Path.home())} - {"/"}
    if str(repo_root) in ("/", "/app", "/src"):
        pytest.skip("the checkout's own path is too general to search for")
    text_files = [f for f in tracked if f.suffix in {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".lock", ".sh"}]
    found = [f"{f}: {p}" for f in text_files for p in places if re.search(re.escape(p) + r"(?![\w-])", f.read_text())]
    assert not found, "\n".join(found)


def test_weights_in_the_repository_stay_below_25_mb(tracked: list[Path]) -> None:
    total = sum(f.stat().st_size for f in tracked if f.suffix == ".safetensors")
    assert total <= 25e6


def test_every_shipped_docs_link_leads_somewhere(tracked: list[Path]) -> None:
    broken = []
    for page in (f for f in tracked if f.suffix == ".md"):
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page}: {target}")
    assert not broken, "\n".join(broken)

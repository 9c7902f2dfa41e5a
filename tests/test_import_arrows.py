"""The arrows of the design: imports point down only, and only pipelines and infra know files and the environment."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

# What each package may import of ours.
ARROWS: dict[str, set[str]] = {
    "models": set(),
    "toyworld": set(),
    "infra": set(),
    "preprocess": {"models", "infra"},
    "train": {"models", "infra"},
    "sample": {"models", "infra"},
    "pipelines": {"preprocess", "train", "sample", "models", "infra", "toyworld"},
}
OURS = set(ARROWS) | {"benchmarks", "tests"}
CONFIG_READERS = {"yaml", "omegaconf", "hydra", "dotenv"}
MAY_READ_CONFIG = {"pipelines", "infra"}
ROOT = Path(__file__).resolve().parent.parent


def violations(package: str, source: str) -> list[str]:
    """What a file of `package` does that the arrows forbid, each with its line number."""
    found = []
    for node in ast.walk(ast.parse(source)):
        for name in _imported(node):
            top = name.split(".")[0]
            if top in OURS and top != package and top not in ARROWS[package]:
                found.append(f"{node.lineno}: {package} must not import {name}")
            if package == "models" and top == "ray":
                found.append(f"{node.lineno}: models must not import ray")
            if top in CONFIG_READERS and package not in MAY_READ_CONFIG:
                found.append(f"{node.lineno}: {package} must not read configuration files ({name})")
        if package not in MAY_READ_CONFIG and _reads_environment(node):
            found.append(f"{node.lineno}: {package} must not read the environment; take an argument")
    return found


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []


def _reads_environment(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.module == "os" and any(alias.name in ("environ", "getenv") for alias in node.names)
    if isinstance(node, ast.Subscript):  # os.environ["X"] read; setting one for a child process is not reading
        return isinstance(node.ctx, ast.Load) and _is_os(node.value, "environ")
    if isinstance(node, ast.Call):
        function = node.func
        in_environ = isinstance(function, ast.Attribute) and _is_os(function.value, "environ")
        return _is_os(function, "getenv") or (in_environ and function.attr not in ("setdefault", "update"))
    return isinstance(node, ast.Compare) and any(_is_os(part, "environ") for part in node.comparators)


def _is_os(node: ast.AST, name: str) -> bool:
    is_attribute = isinstance(node, ast.Attribute) and node.attr == name
    return is_attribute and isinstance(node.value, ast.Name) and node.value.id == "os"


@pytest.mark.parametrize("package", ARROWS)
def test_package_keeps_the_arrows(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"{package}/ holds no Python files"
    found = [f"{f.relative_to(ROOT)}:{v}" for f in files for v in violations(package, f.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("models", "import ray"),
        ("models", "def f():\n    from ray.train import report"),
        ("models", "from infra.storage import safe_join"),
        ("toyworld", "from models.scene import Scene"),
        ("infra", "import preprocess.shots"),
        ("train", "from sample.sampler import sample"),
        ("sample", "if TYPE_CHECKING:\n    from train.loop import train"),
        ("preprocess", "import pipelines.prepare"),
        ("pipelines", "from tests import conftest"),
        ("train", "import yaml"),
        ("sample", "from omegaconf import OmegaConf"),
        ("train", "import os\nx = os.environ['HOME']"),
        ("train", "import os\nx = os.environ.get('HOME')"),
        ("train", "import os\nx = os.getenv('HOME')"),
        ("train", "import os\nx = 'HOME' in os.environ"),
        ("train", "from os import environ"),
    ],
)
def test_checker_finds(package: str, source: str) -> None:
    assert violations(package, source)


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("models", "import torch\nfrom models.layout import ClipLayout"),
        ("train", "import os, ray\nfrom models.process import FlowMatching\nos.environ['DS_ACCELERATOR'] = 'cpu'"),
        ("pipelines", "import os, yaml\nfrom sample import sampler\nos.environ.get('X')"),
        ("sample", "from . import guidance\nfrom .guidance import Guidance"),
    ],
)
def test_checker_allows(package: str, source: str) -> None:
    assert not violations(package, source)

"""The core needs the standard library and msgspec, and takes clocks and random generators as arguments."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = sorted((ROOT / "helixnet/core").rglob("*.py"))
ALLOWED = sys.stdlib_module_names | {"msgspec"}


def imported(tree: ast.AST) -> Iterator[str]:
    """The dotted names that are imported, those imported for types only too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def is_of_the_core(module: str) -> bool:
    """Whether the core may import the module: its own, or one that comes with nothing."""
    return module.split(".")[0] in ALLOWED or module == "helixnet.core" or module.startswith("helixnet.core.")


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_core_module_imports_only_the_standard_library_msgspec_and_the_core(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [module for module in imported(tree) if not is_of_the_core(module)] == []


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_core_module_uses_no_global_random_generator(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used = [
        f"random.{node.attr} in line {node.lineno}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "random"
    ]
    names = [
        f"{alias.name} in line {node.lineno}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "random"
        for alias in node.names
    ]
    allowed = ("random.Random in", "Random in")
    assert [use for use in used + names if not use.startswith(allowed)] == []

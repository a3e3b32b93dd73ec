"""Which of our sources a module rests on: what it imports, what that imports, and so on."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import helixnet

PACKAGE = Path(helixnet.__file__).parent


def closure(module: str) -> tuple[Path, ...]:
    """The files of `module` and of all that it imports of this package, wherever in them that stands; sorted."""
    found: set[Path] = set()
    ahead = [file] if (file := file_of(module)) is not None else []
    while ahead:
        path = ahead.pop()
        if path not in found:
            found.add(path)
            ahead += _imported(path)
    return tuple(sorted(found))


def file_of(module: str) -> Path | None:
    """Where a module of this package stands; None if there is none of this name."""
    first, *rest = module.split(".")
    if first != PACKAGE.name:
        return None
    folder = PACKAGE.joinpath(*rest)
    return next((path for path in (folder / "__init__.py", folder.with_suffix(".py")) if path.exists()), None)


@cache
def _imported(path: Path) -> tuple[Path, ...]:
    names = {name for statement in ast.walk(ast.parse(path.read_bytes())) for name in _names(statement)}
    # Whoever imports a.b.c runs a and a.b, too.
    parts = {name.rsplit(".", level)[0] for name in names for level in range(name.count(".") + 1)}
    return tuple(file for name in sorted(parts) if (file := file_of(name)) is not None)


def _names(statement: ast.AST) -> Iterator[str]:
    """What a statement imports; what it takes from a module may be one itself."""
    if isinstance(statement, ast.Import):
        yield from (alias.name for alias in statement.names)
    elif isinstance(statement, ast.ImportFrom) and statement.module:
        yield from (f"{statement.module}.{alias.name}" for alias in statement.names)

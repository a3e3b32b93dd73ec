"""Nothing grows past what one can read: files of 500 lines, functions of 60, 8 parameters."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("helixnet", "client", "bootstrap", "tests", "scripts")
FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 60
PARAMETERS_MAX = 8

Function = ast.FunctionDef | ast.AsyncFunctionDef


def is_python(path: Path) -> bool:
    """Whether the file is Python by its name or, without a suffix, by its first line."""
    if path.suffix or not path.is_file():
        return path.suffix == ".py"
    with path.open("rb") as file:
        first = file.readline(200)
    return first.startswith(b"#!") and b"python" in first


def python_files() -> list[Path]:
    """Every Python file of ours, sorted."""
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if is_python(path))


def functions(source: str) -> Iterator[Function]:
    """Every function and method, nested ones too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function):
            yield node


def line_count(function: Function) -> int:
    """From `def` to the last line, docstring and comments included, decorators not."""
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def parameter_count(function: Function) -> int:
    """All parameters, `self`, `*args` and `**kwargs` included."""
    arguments = function.args
    named = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)
    return named + (arguments.vararg is not None) + (arguments.kwarg is not None)


def oversizes(source: str) -> list[str]:
    """What is too large in one file, a sentence each."""
    found = []
    lines = len(source.splitlines())
    if lines > FILE_LINES_MAX:
        found.append(f"the file has {lines} lines, more than {FILE_LINES_MAX}")
    for function in functions(source):
        if line_count(function) > FUNCTION_LINES_MAX:
            found.append(f"{function.name} has {line_count(function)} lines, more than {FUNCTION_LINES_MAX}")
        if parameter_count(function) > PARAMETERS_MAX:
            found.append(f"{function.name} has {parameter_count(function)} parameters, more than {PARAMETERS_MAX}")
    return found


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_and_its_functions_stay_readable(path: Path) -> None:
    assert oversizes(path.read_text(encoding="utf-8")) == []


FULL_FUNCTION = "def f(a, b, /, c, *d, e, g, h, **i):\n" + "    pass\n" * (FUNCTION_LINES_MAX - 1)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        pytest.param("\n" * FILE_LINES_MAX, 0, id="a-full-file"),
        pytest.param("\n" * (FILE_LINES_MAX + 1), 1, id="one-line-too-many"),
        pytest.param(FULL_FUNCTION, 0, id="a-full-function"),
        pytest.param(FULL_FUNCTION + "    pass\n", 1, id="one-line-of-a-function-too-many"),
        pytest.param("async def f(self, a, b, c, d, e, *, g, h, i): ...\n", 1, id="one-parameter-too-many"),
    ],
)
def test_the_sizes_are_measured_at_the_limit(source: str, count: int) -> None:
    assert len(oversizes(source)) == count

"""What we ship names no machine of ours, no package registry, and never opens a pickle."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("helixnet", "client", "bootstrap", "scripts", "docs", "tests", ".ci")
TEXT_SUFFIXES = frozenset(
    ["", ".css", ".html", ".js", ".json", ".md", ".py", ".service", ".svg", ".toml", ".txt", ".yaml", ".yml"]
)

# Spelled in pieces, so that this file does not find itself.
MACHINE_PATHS = re.compile(
    r"(?<![\w./-])/(?:" + "wor" + "k|roo" + "t|tmp/" + "w|opt/(?:py" + "pi|whe" + r"els))(?![\w-])"
)
REGISTRIES = re.compile(
    r"\b(?:pypi\." + r"org|pythonhosted\." + r"org|download\.pytorch\." + r"org|registry\.npmjs\." + r"org)\b",
    re.IGNORECASE,
)
PICKLES = re.compile(
    r"\b(?:torch\." + r"load|c?pickle\." + r"loads?|Un" + r"pickler|joblib\." + r"load)\b|allow_" + r"pickle\s*=\s*True"
)

FORBIDDEN = {"a path of one machine": MACHINE_PATHS, "a package registry": REGISTRIES, "opening a pickle": PICKLES}


def text_files() -> Iterator[Path]:
    """Every text file of the repository that a person wrote."""
    yield from sorted(path for path in ROOT.iterdir() if path.is_file() and path.suffix in TEXT_SUFFIXES)
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix in TEXT_SUFFIXES and "__pycache__" not in path.parts:
                yield path


@pytest.mark.parametrize("what", sorted(FORBIDDEN))
def test_no_file_contains(what: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if FORBIDDEN[what].search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("a path of one machine", "cd /" + "work/main"),
        ("a path of one machine", "/" + "root/.cache"),
        ("a path of one machine", "open('/tmp/" + "w/x')"),
        ("a package registry", "--index-url https://PyPI." + "org/simple"),
        ("opening a pickle", "state = torch." + "load(path)"),
        ("opening a pickle", "numpy.load(path, allow_" + "pickle=True)"),
    ],
)
def test_a_forbidden_line_is_found(what: str, line: str) -> None:
    assert FORBIDDEN[what].search(line)


@pytest.mark.parametrize("line", ["the /working set", "a/" + "work/b", "torch.load_state", "/tmp/" + "work"])
def test_a_line_that_only_looks_alike_is_not_found(line: str) -> None:
    assert not any(pattern.search(line) for pattern in FORBIDDEN.values())

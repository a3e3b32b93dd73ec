"""Every declared dependency that the checks install is pinned, to a version that its declared range allows."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINNED_EXTRAS = ("peer", "gateway", "sim", "dev")


def declared() -> list[Requirement]:
    """What the base and the pinned extras ask for."""
    extras = (line for extra in PINNED_EXTRAS for line in PROJECT["optional-dependencies"][extra])
    return [Requirement(line) for line in (*PROJECT["dependencies"], *extras)]


def pins() -> dict[str, str]:
    """Canonical name to exact version. Raises if a line is anything else than a pin."""
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        pin = re.fullmatch(r"([\w.-]+)==([\w.!]+)", line)
        assert pin, f"not an exact version without a local label: {line}"
        found[canonicalize_name(pin[1])] = pin[2]
    return found


@pytest.mark.parametrize("requirement", declared(), ids=lambda requirement: requirement.name)
def test_a_declared_dependency_is_pinned_within_its_range(requirement: Requirement) -> None:
    assert pins()[canonicalize_name(requirement.name)] in requirement.specifier


def test_the_light_install_asks_for_nothing_heavy() -> None:
    names = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    assert names.isdisjoint({"torch", "transformers", "hivemind", "vllm", "accelerate"})

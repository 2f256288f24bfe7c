"""The order of the house, read from the code itself: imports run downwards, files and functions stay readable."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What each package may import beside itself.
BELOW = {"utils": set(), "datasets": {"utils"}, "models": {"utils"}}
BELOW["objectives"] = {"utils", "datasets", "models"}
BELOW["conversion"] = {"utils", "datasets"}
BELOW["training"] = {"utils", "datasets", "models", "objectives"}
BELOW["downstream"] = BELOW["training"] | {"conversion", "training"}
TOP = BELOW["downstream"] | {"downstream"}
BELOW |= {"reporting": TOP, "benchmarks": TOP, "experiments": TOP}


def imported(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it, by their first two names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return {".".join(name.split(".")[:2]) for name in found}


@pytest.mark.parametrize("package", BELOW)
def test_imports_run_downwards(package):
    allowed = BELOW[package] | {package}
    for path in sorted((ROOT / package).rglob("*.py")):
        above = {name for name in imported(path) if name.split(".")[0] in BELOW and name.split(".")[0] not in allowed}
        assert not above, f"{path.relative_to(ROOT)} imports {above}"


@pytest.mark.parametrize("package", BELOW)
def test_no_package_imports_in_a_circle(package):
    graph = {
        f"{package}.{path.stem}": {name for name in imported(path) if name.startswith(f"{package}.")}
        for path in (ROOT / package).glob("*.py")
    }

    def reaches(start: str, seen: tuple[str, ...]) -> None:
        assert start not in seen, f"a circle of imports: {' -> '.join((*seen, start))}"
        for name in graph.get(start, set()):
            reaches(name, (*seen, start))

    for module in graph:
        reaches(module, ())

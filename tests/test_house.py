"""The order of the house, read from the code itself: imports run downwards, files and functions stay readable."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from training.scripts import SCRIPTS

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
    graph = {f"{package}.{path.stem}": imported(path) for path in (ROOT / package).glob("*.py")}
    TopologicalSorter(graph).prepare()  # raises CycleError


def python_files() -> list[Path]:
    folders = [path for package in BELOW for path in (ROOT / package).rglob("*.py")]
    return sorted([*folders, *ROOT.glob("*.py")])


def test_files_and_functions_stay_readable():
    for path in python_files():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, f"{path.relative_to(ROOT)} has more than 400 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 60, f"{path.relative_to(ROOT)}: {node.name} has {length} lines"


def test_training_scripts_fit_on_a_page():
    scripts = [path for path in ROOT.glob("*.py") if path.name.startswith(("ssl_", "mask_"))]
    assert len(scripts) == 6
    assert all(path.read_text(encoding="utf-8").count("\n") < 100 for path in scripts)


@pytest.mark.slow
def test_training_and_benchmarks_run_without_the_packages_of_the_tools():
    tools = {"faiss", "scipy", "pandas", "sklearn", "monai", "nibabel", "pydicom", "SimpleITK", "matplotlib", "plotly"}
    code = f"import sys, benchmarks.step, benchmarks.data, {', '.join(SCRIPTS)}; print({tools} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

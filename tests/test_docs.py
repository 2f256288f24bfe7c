"""What the documentation promises is there: commands, options, files, names, and no more words than one can read."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = ("*.md", "docs/*.md", "[!.]*/README.md", "experiments/**/*.md")
SOURCES = [p for pattern in ("*.py", "[!.]*/*.py", "experiments/**/*.yaml") for p in ROOT.glob(pattern)]
TEXTS = {page: page.read_text(encoding="utf-8") for place in PLACES for page in ROOT.glob(place)}
VIEWS = ROOT / "reporting/views.py"
OF_OTHERS = re.compile(r"--((nnodes|nodes|nproc_per_node|max-restarts|signals_to_handle)\b|rdzv-|options\.)")
every_page = pytest.mark.parametrize("page", sorted(TEXTS), ids=lambda page: str(page.relative_to(ROOT)))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)


def spans(text: str) -> list[str]:
    """What stands between backticks in running text."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", re.sub(r"(?s)```.*?```", "", text))]


def commands(text: str) -> list[list[str]]:
    """The words of every command that python, torchrun, sbatch or make is given."""
    lines = [line for block in blocks(text, "sh") for line in block.replace("\\\n", " ").splitlines()]
    parts = [part.strip() for line in [*lines, *spans(text)] for part in re.sub(r"(?<!\S)# .*", "", line).split("&&")]
    return [shlex.split(part) for part in parts if re.match(r"(\S*/)?(python3?|torchrun|sbatch|make) ", part)]


def file_of(module: str) -> Path:
    """The file of a module of this repository; it need not exist."""
    base = ROOT / module.replace(".", "/")
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def options(path: Path, name: str = "Config") -> set[str]:
    """Fields of a module's dataclass; none where it has no such class."""
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return {field.name for field in dataclasses.fields(getattr(module, name))} if hasattr(module, name) else set()


def program(words: list[str]) -> Path | None:
    """The file of this repository that a command runs; None: a program of others."""
    if "-m" in words:
        module = words[words.index("-m") + 1]
        return file_of(module) if (ROOT / module.split(".")[0]).is_dir() else None
    return next((ROOT / word for word in words if word.endswith(".py")), None)


@every_page
def test_commands_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for words in commands(TEXTS[page]):
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets
        elif path := program(words):
            assert path.is_file(), words
            given = {word.split("=")[0] for word in words if word.startswith("--") and not OF_OTHERS.match(word)}
            views = options(VIEWS, "DataPage") | options(ROOT / "ssl_swav3D.py") if "--data" in words else set()
            assert given <= {f"--{name}" for name in options(path) | views} | {"--config", "--help"}, words


def test_options_in_running_text_exist() -> None:
    programs = [VIEWS, *(path for path in SOURCES if "\nclass Config" in path.read_text(encoding="utf-8"))]
    known = {f"--{name}" for path in programs for kind in ("Config", "DataPage") for name in options(path, kind)}
    named = {name for text in TEXTS.values() for span in spans(text) for name in re.findall(r"--[a-z][\w-]*", span)}
    assert {name for name in named - known if not OF_OTHERS.match(name)} <= {"--config", "--help"}


@every_page
def test_files_and_names_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", TEXTS[page]) + re.findall(r'(?:src|srcset)="([^"]+)"', TEXTS[page])
    assert [link for link in links if not link.startswith("http") and not (page.parent / link).exists()] == []
    files = [span for span in spans(TEXTS[page]) if re.fullmatch(r"[\w*/]+\.(py|sh)|[\w*/]*[A-Z]+\.md", span)]
    assert [name for name in files if not any(ROOT.glob(name)) and not any(page.parent.glob(name))] == []
    for block in blocks(TEXTS[page], "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and file_of(node.module).is_file():
                assert {alias.name for alias in node.names} <= set(dir(importlib.import_module(node.module)))


def test_pages_that_sources_name_exist() -> None:
    named = {(p.name, page) for p in SOURCES for page in re.findall(r"docs/[A-Z]+\.md", p.read_text(encoding="utf-8"))}
    assert sorted((source, page) for source, page in named if not (ROOT / page).is_file()) == []


def test_words_are_few() -> None:
    words = {page: len(text.split()) for page, text in TEXTS.items()}
    assert sum(words.values()) <= 16_000
    assert words[ROOT / "README.md"] <= 1_100
    assert len(list(ROOT.glob("docs/*.md"))) <= 8

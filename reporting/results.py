"""Tables of what downstream/ wrote."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import UserError

NAMES = ("results.json", "summary.csv")  # of a task, of a comparison


@dataclass
class Table:
    title: str
    about: str
    columns: list[str]
    rows: list[list[str]]


def read_tables(paths: list[str]) -> list[Table]:
    """Tables of the files, and of those in folders that have the names which downstream/ gives.

    Raises UserError for what is not there or cannot be read.
    """
    return [_read(path) for given in paths for path in _files(Path(given).expanduser())]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"downstream: {path} does not exist; name results files of downstream/, or their folders")
    # The cells of a comparison are in its summary already.
    files = [f for f in sorted(path.rglob("*")) if f.name in NAMES and "cells" not in f.relative_to(path).parts[:-1]]
    if not files:
        raise UserError(f"downstream: {path} holds neither {' nor '.join(NAMES)}, which downstream/ writes")
    return files


def _read(path: Path) -> Table:
    try:
        text = path.read_text(encoding="utf-8")
        facts, columns, rows = _from_csv(text) if path.suffix == ".csv" else _from_json(json.loads(text))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(f"{path}: is not a results file of downstream/ ({error})") from None
    about = f"{path}: {', '.join(facts)}" if facts else str(path)
    return Table(path.parent.name, about, columns, [[_cell(value) for value in row] for row in rows])


def _from_csv(text: str) -> tuple[list[str], list[str], list[list[str]]]:
    columns, *rows = csv.reader(text.splitlines(), strict=True)
    if any(len(row) != len(columns) for row in rows):
        raise ValueError("lines of different length")
    return [], columns, rows


def _from_json(result: dict[str, Any]) -> tuple[list[str], list[str], list[list[Any]]]:
    """`metrics` is nested; what stands in its last level makes the columns where there is more than one level."""
    table: dict[str, dict[str, Any]] = {}
    for names, value in _leaves(result["metrics"], ()):
        table.setdefault(".".join(names[:-1]) or "all", {})[names[-1]] = value
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    facts = [f"{result[key]} {key}" for key in ("cases", "patients") if isinstance(result.get(key), int)]
    facts += [f"weights {result['weights']}"] if "weights" in result else []
    rows = [[name, *(row.get(column, "") for column in columns)] for name, row in table.items()]
    return facts, ["", *columns], rows


def _leaves(value: Any, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*names, str(key)))
    elif names and not isinstance(value, list):
        yield names, value


def _cell(value: Any) -> str:
    """Three digits after the point of what is no whole number."""
    if value is None:
        return "not defined"
    try:
        return str(value) if isinstance(value, int) or str(value).lstrip("+-").isdigit() else f"{float(value):.3f}"
    except (TypeError, ValueError):
        return str(value)

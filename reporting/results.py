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
MOST_ROWS = 200


@dataclass
class Table:
    title: str
    about: str
    columns: list[str]
    rows: list[list[str]]
    left_out: int = 0  # rows beyond MOST_ROWS


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
        return _from_csv(path, text) if path.suffix == ".csv" else _from_json(path, json.loads(text))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(f"{path}: is not a results file of downstream/ ({error})") from None


def _from_csv(path: Path, text: str) -> Table:
    columns, *rows = csv.reader(text.splitlines(), strict=True)
    if any(len(row) != len(columns) for row in rows):
        raise ValueError("lines of different length")
    shown = [[_cell(value) for value in row] for row in rows[:MOST_ROWS]]
    return Table(path.parent.name, str(path), columns, shown, max(0, len(rows) - MOST_ROWS))


def _from_json(path: Path, result: dict[str, Any]) -> Table:
    """`metrics` is nested; what stands in its last level makes the columns where there is more than one level."""
    rows: dict[str, dict[str, Any]] = {}
    for names, value in _leaves(result["metrics"], ()):
        rows.setdefault(".".join(names[:-1]) or "all", {})[names[-1]] = value
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    cells = [[name, *(_cell(row.get(column, "")) for column in columns)] for name, row in rows.items()]
    facts = [f"{result[key]} {key}" for key in ("cases", "patients") if isinstance(result.get(key), int)]
    facts += [f"weights {result['weights']}"] if "weights" in result else []
    about = f"{path}: {', '.join(facts)}"
    return Table(path.parent.name, about, ["", *columns], cells[:MOST_ROWS], max(0, len(cells) - MOST_ROWS))


def _leaves(value: Any, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*names, str(key)))
    elif names and not isinstance(value, list):
        yield names, value


def _cell(value: Any) -> str:
    if value is None:
        return "not defined"
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return str(value) if isinstance(value, int) or str(value).lstrip("+-").isdigit() else f"{number:.3f}"

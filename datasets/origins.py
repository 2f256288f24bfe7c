"""Which files and patients a run has seen: what tells that two trees share some, wherever they lie."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError
from utils.files import read_csv

DIGITS = 16  # of a sha256


class Origin(NamedTuple):
    """Of a data file: its data set's folder and its name, the start of its sha256 and its patient ("" if unknown)."""

    name: str
    content: str
    patient: str


def origin(path: Path) -> Origin:
    """As the cases.csv beside a file tells that prepare_data.py has written."""
    row = _table(path.parent).get(path.name, {})
    patient = row.get("patient")
    name = f"{path.parent.name}/{path.name}"
    return Origin(name, (row.get("sha256") or "")[:DIGITS], f"{path.parent.name}/{patient}" if patient else "")


def shared(ours: Mapping[str, Path], theirs: Iterable[Iterable[str]]) -> list[str]:
    """Those of our cases that are, or whose patient is, among the origins that a record of weights lists.

    Files of one name are the same unless both contents are known and differ.
    """
    known = [Origin(*values) for values in theirs]
    names = {entry.name: entry.content for entry in known}
    contents, patients = ({getattr(entry, of) for entry in known} - {""} for of in ("content", "patient"))
    found = []
    for case, path in ours.items():
        own = origin(path)
        same_name = own.name in names and not (own.content and names[own.name] and own.content != names[own.name])
        if same_name or own.content in contents or own.patient in patients:
            found.append(case)
    return found


@functools.lru_cache(maxsize=64)
def _table(folder: Path) -> dict[str, dict[str, str]]:
    path, rows = folder / "cases.csv", []
    if path.is_file():
        with contextlib.suppress(UserError):  # of another program: it tells nothing, and must not cost a trained run
            rows = read_csv(path, "data_path")
    return {row["file"]: row for row in rows if row.get("file")}

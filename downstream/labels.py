"""What is classified: cases with their labels and patients, from a CSV."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from downstream.features import Cases
from downstream.splits import places_of, without_suffix
from utils.errors import UserError

CASE_COLUMNS = ("case", "file", "filename", "image")
LABEL_COLUMNS = ("label", "finding", "class")
PATIENT_COLUMNS = ("patient", "subject", "patient_id")


@dataclass(frozen=True)
class Items:
    """What is classified. Lists and arrays run over the items."""

    cases: Cases
    index: list[int]  # position in `cases`
    names: list[str]
    units: list[str]  # what is split and labelled: the case itself, or the scan of a candidate
    labels: np.ndarray  # position in `classes`
    classes: list[str]
    patients: dict[str, str]  # of every unit, those without items too
    for_test_only: np.ndarray  # bool: left out of training and validation

    def counts(self) -> dict[str, int]:
        return {name: int((self.labels == k).sum()) for k, name in enumerate(self.classes)}


class LabelRow(NamedTuple):
    """A line of the labels file: the case's position among the names, its label, its patient (None: not told)."""

    case: int
    label: str
    patient: str | None


def read_labels(
    path: str | Path,
    names: Sequence[str],
    case_column: str | None = None,
    label_column: str | None = None,
    patient_column: str | None = None,
) -> list[LabelRow]:
    """The labels of the cases `names` from a CSV file with a header.

    A case is named by its path below the data folder or, where that is unique, its file name; with or without suffix.
    Raises UserError for a missing file or column, an unknown or ambiguous case, a case named twice, an empty label.
    """
    path = Path(path)
    rows = read_csv(path, "labels")
    columns = list(rows[0])

    def column(wanted: str | None, known: tuple[str, ...], option: str, needed: bool = True) -> str | None:
        found = wanted if wanted in columns else None if wanted else next((c for c in known if c in columns), None)
        if found is None and (needed or wanted):
            raise UserError(
                f"labels: {path} has no column {wanted or ' or '.join(known)}, but {', '.join(columns)}; "
                f"name the right one with --{option}"
            )
        return found

    case_name = column(case_column, CASE_COLUMNS, "case_column")
    label_name = column(label_column, LABEL_COLUMNS, "label_column")
    patient_name = column(patient_column, PATIENT_COLUMNS, "patient_column", needed=False)
    places = places_of(names)
    result: list[LabelRow] = []
    lines: dict[int, int] = {}
    for line, row in enumerate(rows, start=2):
        case, label = row[case_name], row[label_name]
        found = sorted(places.get(case) or places.get(without_suffix(case)) or ())
        if not found:
            raise UserError(
                f"labels: {path}, line {line}: {case!r} is none of the {len(names)} cases in data_path (the first is "
                f"{names[0]}); correct it or remove the line"
            )
        if len(found) > 1:
            both = " and ".join(names[i] for i in found[:2])
            raise UserError(f"labels: {path}, line {line}: {case!r} may be {both}; write the path below data_path")
        if found[0] in lines:
            raise UserError(f"labels: {path}: {case!r} stands in lines {lines[found[0]]} and {line}; keep one")
        lines[found[0]] = line
        for name in (label_name, patient_name):
            if name and not row[name]:
                raise UserError(f"labels: {path}, line {line}: {case!r} has no {name}; write one or remove the line")
        result.append(LabelRow(found[0], label, row[patient_name] if patient_name else None))
    return result


def label_items(
    cases: Cases,
    rows: Sequence[LabelRow],
    classes: Sequence[str] = (),
    positive: str | None = None,
    patient_pattern: str | None = None,
    source: str = "labels",
) -> Items:
    """What is classified: the cases that have one of the labels `classes` (none given: all labels).

    positive, patient_pattern: as in `Config`.  source: where the labels come from, for messages.  Raises UserError for
    a class without cases, and where there are not two classes.
    """
    found = {part for row in rows for part in (row.label.split("|") if positive else [row.label])}
    for wanted in [*classes, *([positive] if positive else [])]:
        if wanted not in (found if wanted == positive else {row.label for row in rows}):
            raise UserError(f"classes, positive: no case in {source} has the label {wanted!r}, only {some(found)}")
    if classes:
        rows = [row for row in rows if row.label in classes]
    if positive:
        labels = [int(positive in row.label.split("|")) for row in rows]
        classes = [f"not {positive}", positive]
    else:
        classes = classes or sorted(found)
        labels = [classes.index(row.label) for row in rows]
    if len(set(labels)) < 2:
        raise UserError(f"labels: all cases in {source} have the same label; two are needed to tell apart")
    names = [cases.names[row.case] for row in rows]
    patients = [row.patient for row in rows]
    if patient_pattern or None in patients:
        patients = name_patients(names, patient_pattern)
    return Items(
        cases=cases,
        index=[row.case for row in rows],
        names=names,
        units=names,
        labels=np.array(labels),
        classes=list(classes),
        patients=dict(zip(names, patients, strict=True)),
        for_test_only=np.zeros(len(names), dtype=bool),
    )


def name_patients(names: Sequence[str], pattern: str | None) -> list[str]:
    """The patient of each case: the first group of `pattern` in its file name; without a pattern, the case itself."""
    if pattern is None:
        return list(names)
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"patient_pattern: {pattern!r} is not a regular expression ({error})") from None
    if expression.groups < 1:
        raise UserError(f"patient_pattern: {pattern!r} has no group; put the patient's part in parentheses")
    patients = []
    for name in names:
        match = expression.search(Path(name).name)
        if match is None or not match[1]:
            raise UserError(f"patient_pattern: {pattern!r} finds no patient in the file name {Path(name).name}")
        patients.append(match[1])
    return patients


def read_csv(path: Path, option: str) -> list[dict[str, str]]:
    """Lines of a CSV file as dictionaries of stripped texts. Raises UserError for anything that is not one."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            rows = list(reader)
    except OSError as error:
        raise UserError(f"{option}: {path}: cannot be read ({error.strerror}); name an existing CSV file") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{option}: {path}: is not a CSV text file ({error}); export it again, as UTF-8") from None
    if not rows:
        raise UserError(f"{option}: {path}: has no lines below its header; write one per case")
    for line, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise UserError(f"{option}: {path}, line {line}: has not the header's {len(reader.fieldnames)} fields")
    return [{key.strip(): value.strip() for key, value in row.items()} for row in rows]


def some(names: Sequence[str] | set[str], count: int = 5) -> str:
    listed = sorted(names)
    return ", ".join(listed[:count]) + (", ..." if len(listed) > count else "")

"""What is classified: cases with their labels and patients, from a CSV."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from downstream.features import Cases
from downstream.splits import places_of, without_suffix
from utils.errors import UserError
from utils.files import read_csv

CASE_COLUMNS = ("case", "file", "filename", "image")
LABEL_COLUMNS = ("label", "finding", "class")
PATIENT_COLUMNS = ("patient", "subject", "patient_id")


@dataclass(frozen=True)
class Items:
    """What is classified: the stacks of slices of the labelled cases. Lists and arrays run over these stacks."""

    cases: Cases
    index: np.ndarray  # of the stack in `cases`
    names: list[str]  # of the case that it is of: what is split, and what the labels are counted by
    labels: np.ndarray  # position in `classes`
    classes: list[str]
    patients: dict[str, str]  # of every case
    test_only: np.ndarray  # bool: left out of training and validation

    @property
    def label_of(self) -> dict[str, int]:
        """Of every case."""
        return dict(zip(self.names, self.labels.tolist(), strict=True))


class LabelRow(NamedTuple):
    """A line of the labels file."""

    case: int  # position among the names
    label: str
    patient: str | None = None  # None: not told
    test_only: bool = False  # the negatives of LUNA16 that are too many to train on


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
    rows = read_csv(path, "labels")
    case_name = _column(path, rows[0], case_column, CASE_COLUMNS, "case_column")
    label_name = _column(path, rows[0], label_column, LABEL_COLUMNS, "label_column")
    told = patient_column or any(name in rows[0] for name in PATIENT_COLUMNS)
    patient_name = _column(path, rows[0], patient_column, PATIENT_COLUMNS, "patient_column") if told else None
    places = places_of(names)
    result: list[LabelRow] = []
    lines: dict[int, int] = {}
    for line, row in enumerate(rows, start=2):
        case, where = row[case_name], f"labels: {path}, line {line}"
        found = sorted(places.get(case) or places.get(without_suffix(case)) or ())
        if not found:
            raise UserError(
                f"{where}: {case!r} is none of the {len(names)} cases in data_path (the first is {names[0]}); correct "
                "it or remove the line"
            )
        if len(found) > 1:
            both = " and ".join(names[i] for i in found[:2])
            raise UserError(f"{where}: {case!r} may be {both}; write the path below data_path")
        if found[0] in lines:
            raise UserError(f"labels: {path}: {case!r} stands in lines {lines[found[0]]} and {line}; keep one")
        lines[found[0]] = line
        for name in (label_name, patient_name):
            if name and not row[name]:
                raise UserError(f"{where}: {case!r} has no {name}; write one or remove the line")
        patient, test_only = row[patient_name] if patient_name else None, row.get("test_only", "0") not in ("", "0")
        result.append(LabelRow(found[0], row[label_name], patient, test_only))
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

    positive, patient_pattern: as in the options of `downstream.classify`.  source: where the labels come from, for
    messages.  Raises UserError for a class without cases, and where there are not two classes.
    """
    whole = {row.label for row in rows}
    parts = {part for label in whole for part in label.split("|")}
    for wanted, found in [*((name, whole) for name in classes), *([(positive, parts)] if positive else [])]:
        if wanted not in found:
            there = ", ".join(sorted(found)[:5])
            raise UserError(f"classes, positive: no case in {source} has the label {wanted!r}; there are {there}")
    rows = [row for row in rows if not classes or row.label in classes]
    if positive:
        labels = [int(positive in row.label.split("|")) for row in rows]
        classes = [f"not {positive}", positive]
    else:
        classes = list(classes) or sorted(whole)
        labels = [classes.index(row.label) for row in rows]
    if len(set(labels)) < 2:
        raise UserError(f"labels: all cases in {source} have the same label; two are needed to tell apart")
    names = [cases.names[row.case] for row in rows]
    if patient_pattern:
        patients = name_patients(names, patient_pattern)
    else:
        told = _prepared_patients(cases)
        patients = [row.patient or told.get(cases.samples[row.case].name, cases.names[row.case]) for row in rows]
    wanted = [row.case for row in rows]
    first, end = (np.searchsorted(cases.owner, wanted, side) for side in ("left", "right"))  # the stacks of each row
    row_of = np.repeat(np.arange(len(rows)), end - first)
    return Items(
        cases=cases,
        index=np.concatenate([np.arange(*ends) for ends in zip(first, end, strict=True)]),
        names=[names[row] for row in row_of],
        labels=np.array(labels)[row_of],
        classes=classes,
        patients=dict(zip(names, patients, strict=True)),
        test_only=np.array([row.test_only for row in rows])[row_of],
    )


def name_patients(names: Sequence[str], pattern: str) -> list[str]:
    """The patient of each case: the first group of `pattern` in its file name."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"patient_pattern: {pattern!r} is not a regular expression ({error})") from None
    if expression.groups < 1:
        raise UserError(f"patient_pattern: {pattern!r} has no group; put the patient's part in parentheses")
    found = [expression.search(Path(name).name) for name in names]
    for name, match in zip(names, found, strict=True):
        if match is None or not match[1]:
            raise UserError(f"patient_pattern: {pattern!r} finds no patient in the file name {Path(name).name}")
    return [match[1] for match in found]


def _prepared_patients(cases: Cases) -> dict[str, str]:
    """Name of a sample -> its patient, where prepare_data.py has found one (cases.csv)."""
    tables = {sample.dataset: sample.data_path / sample.dataset / "cases.csv" for sample in cases.samples}
    return {
        f"{dataset}/{row.get('file')}": row["patient"]
        for dataset, table in tables.items()
        if table.is_file()
        for row in read_csv(table, "data_path")
        if row.get("patient")
    }


def _column(path: str | Path, row: dict[str, str], wanted: str | None, known: Sequence[str], option: str) -> str:
    """The wanted column, or the first of the known ones."""
    found = [name for name in ([wanted] if wanted else known) if name in row]
    if not found:
        raise UserError(
            f"labels: {path} has no column {wanted or ' or '.join(known)}, but {', '.join(row)}; name the right one "
            f"with --{option}"
        )
    return found[0]

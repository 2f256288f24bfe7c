"""What is classified: cases with their labels and patients, from a CSV or the data sets themselves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from downstream.features import Cases
from downstream.pairs import read_cases
from downstream.splits import Naming
from utils.errors import UserError
from utils.files import read_csv

KNOWN = {
    "case": ("case", "file", "filename", "image"),
    "label": ("label", "finding", "class"),
    "patient": ("patient", "subject", "patient_id"),
}


def read_labels(path: str | Path, names: Sequence[str], **wanted: str | None) -> pd.DataFrame:
    """The lines of a CSV file with a header: place (of the case in `names`), label, patient (or None), test_only.

    A case is named by its path below the data folder or, where that is unique, its file name; with or without suffix.
    wanted: the columns of case, label and patient, by default the first of KNOWN.
    Raises UserError for a missing file or column, an unknown or ambiguous case, a case named twice, an empty label.
    """
    rows, naming, places = read_csv(path, "labels"), Naming(names), {name: i for i, name in enumerate(names)}
    columns = {what: _column(path, rows[0], what, wanted.get(what)) for what in KNOWN}
    table: dict[int, dict[str, Any]] = {}  # by place
    for line, row in enumerate(rows, start=2):
        where = f"labels: {path}, line {line}"
        case, label, patient = (row.get(column) for column in columns.values())
        place = places.get(naming.find(case, where))
        if place is None:
            known = f"the {len(names)} cases in data_path (the first is {names[0]})"
            raise UserError(f"{where}: {case!r} is none of {known}; correct it or remove the line")
        if place in table:
            raise UserError(f"{where}: {case!r} stands in line {table[place]['line']} already; keep one")
        if not label or patient == "":
            what = columns["patient" if label else "label"]
            raise UserError(f"{where}: {case!r} has no {what}; write one or remove the line")
        test_only = row.get("test_only", "0") not in ("", "0")  # negatives of LUNA16 that are too many to train on
        table[place] = {"line": line, "place": place, "label": label, "patient": patient, "test_only": test_only}
    return pd.DataFrame(table.values())


def label_items(cases: Cases, cfg: Any) -> tuple[pd.DataFrame, list[str]]:
    """What is classified, a row per stack of slices: stack (in `cases`), case, label, patient, test_only; the classes.

    case: its name.  label: position in the classes.  cfg: options of `downstream.classify`.
    Raises UserError for a class without cases, and where there are not two.
    """
    classes, positive = cfg.classes, cfg.positive
    if cfg.labels:
        wanted = {what: getattr(cfg, f"{what}_column") for what in KNOWN}
        table = read_labels(cfg.labels, cases.names, **wanted)
    else:
        table = pd.DataFrame({"label": [sample.dataset for sample in cases.samples]})
        table = table.assign(place=table.index, patient=None, test_only=False)
    parts = table.label.str.split("|").explode()
    asked = [("classes", name, table.label) for name in classes] + [("positive", positive, parts)] * bool(positive)
    for option, label, there in asked:
        if label not in set(there):
            raise UserError(f"{option}: no case has the label {label!r}; there are {', '.join(sorted(set(there))[:5])}")
    table = table[table.label.isin(classes)] if classes else table
    if positive:
        names = [f"not {positive}", positive]
        labels = [int(positive in label.split("|")) for label in table.label]
    else:
        names = list(classes) or sorted(set(table.label))
        labels = [names.index(label) for label in table.label]
    if len(set(labels)) < 2:
        raise UserError("labels: all cases have the same label; two are needed to tell apart")
    table = table.assign(label=labels, case=[cases.names[place] for place in table.place])
    table["patient"] = name_patients(table.case, cfg.patient_pattern) if cfg.patient_pattern else _told(cases, table)
    stacks = pd.DataFrame({"place": cases.owner, "stack": range(len(cases.owner))})
    return table.merge(stacks, on="place"), names


def name_patients(names: Sequence[str], pattern: str) -> list[str]:
    """The patient of each case: the first group of `pattern` in its file name."""
    files = pd.Series([Path(name).name for name in names])
    try:
        people = files.str.extract(pattern)[0].fillna("")
    except (re.error, ValueError) as error:
        raise UserError(f"patient_pattern: {pattern!r} must be a regular expression with a group ({error})") from None
    if (people == "").any():
        raise UserError(f"patient_pattern: {pattern!r} finds no patient in the file name {files[people == ''].iloc[0]}")
    return people.tolist()


def _told(cases: Cases, table: pd.DataFrame) -> list[str]:
    """Each case's patient by the table, else by the cases.csv that prepare_data.py wrote, else the case itself."""
    folders = {sample.data_path / sample.dataset for sample in cases.samples}
    prepared = {
        f"{folder.name}/{row.get('file')}": row.get("patient") for folder in folders for row in read_cases(folder)
    }
    known = (prepared.get(cases.samples[place].name) for place in table.place)
    return [a or b or case for a, b, case in zip(table.patient, known, table.case, strict=True)]


def _column(path: str | Path, row: dict[str, str], what: str, wanted: str | None) -> str | None:
    """The wanted column, or the first of the known ones; patients need not be told."""
    found = [name for name in ([wanted] if wanted else KNOWN[what]) if name in row]
    if not found and (wanted or what != "patient"):
        lacking = wanted or " or ".join(KNOWN[what])
        raise UserError(f"labels: {path} has no column {lacking}, but {', '.join(row)}; name it with --{what}_column")
    return found[0] if found else None

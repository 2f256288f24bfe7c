"""The tables of a prepared tree: cases.csv, dataset.yaml, and what is printed of them; ids that stay."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from conversion.description import split_suffix
from conversion.layouts import Source
from datasets.cache import is_whole
from datasets.index import MONTAGE, read_settings
from utils.config import read_yaml
from utils.errors import UserError
from utils.files import read_csv, write_csv, write_text

CASES = "cases.csv"
LABELS = "labels"  # the folder of label maps: one that datasets.index never reads as data
PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
LONGEST = 120  # characters of an id: file systems take names of 255 bytes
SAME_SPACING = 0.02  # data sets whose spacings differ by less than this share have one spacing


@dataclass
class Case:
    """A converted case: one row of cases.csv. Lists are joined with " x "."""

    id: str
    source: str  # folder or file given as --source, and the path below it
    file: str = ""  # written, relative to the data set
    label: str = ""  # written label map, relative to the data set
    patient: str = ""
    modality: str = ""
    channels: str = ""  # names, joined by ", ", of a volume with several
    plane: str = ""
    orientation: str = ""  # sides towards which the row, column and slice index grows
    spacing_mm: str = ""  # rows x columns x slices
    affine: str = ""  # 12 numbers, see docs/DATA.md
    shape: str = ""
    dtype: str = ""
    minimum: str = ""
    maximum: str = ""
    original_orientation: str = ""  # x, y, z of the source
    original_spacing_mm: str = ""
    original_shape: str = ""
    original_files: str = "1"
    sha256: str = ""  # of the written file
    notes: str = ""
    key: str = ""  # of the source files and the options: a case with another key is made again

    @property
    def is_volume(self) -> bool:
        return self.file.endswith(".npy")

    def is_whole(self, dest: Path) -> bool:
        return all(is_whole(dest / file) for file in (self.file, self.label) if file)


def read_table(dest: Path) -> dict[str, Case]:
    """{source: case} of cases.csv; {} where there is none."""
    path = dest / CASES
    for place in (path, dest / "dataset.yaml", dest / MONTAGE, dest / LABELS):
        if place.is_symlink() or (place.exists() and not (place.is_dir() if place.name == LABELS else place.is_file())):
            raise UserError(f"{place}: is a link or no regular file, through which nothing is written; move it away")
    if not path.exists():
        return {}
    rows, names = read_csv(path, "dest"), {f.name for f in fields(Case)}
    if set(rows[0]) != names:
        raise UserError(f"{path}: was not written by this version; move it away, and all cases are converted again")
    for line, row in enumerate(rows, start=2):
        label = row["label"].removeprefix(f"{LABELS}/") if row["label"] else row["id"]
        for name in (row["id"], row["file"], label):  # they are written and deleted
            if not PLAIN.fullmatch(name):
                raise UserError(f"{path}, line {line}: {name!r} is no plain file name; correct it or remove the line")
    return {row["source"]: Case(**row) for row in rows}


def write_table(table: dict[str, Case], dest: Path) -> None:
    write_csv([vars(case) for case in in_order(table)], dest / CASES)


def in_order(table: dict[str, Case]) -> list[Case]:
    return sorted(table.values(), key=lambda case: os.fsencode(case.id))


def assign_ids(sources: Sequence[Source], known: dict[str, str]) -> list[Source]:
    """The sources with their ids: letters, digits, ".", "_" and "-", unique on any file system.

    An id is the file's name; where several files want the same one, all of them get their whole path instead, and
    a hash of it should that not tell them apart. known: ids of earlier runs by the sources' names, which stay.
    """
    ids = known | {"": split_suffix(MONTAGE)[0]}  # a name that is taken
    for proposal in range(3):
        wanted = {}
        for s in (s for s in sources if s.name not in ids):
            digest = hashlib.sha256(os.fsencode(s.name)).hexdigest()[:8]
            text = (s.stem, split_suffix(s.name)[0].replace("/", "__"), f"{s.stem[:LONGEST]}_{digest}")[proposal]
            text = f"{text[:LONGEST]}_{digest}" if len(text) > LONGEST + 9 else text
            wanted[s.name] = re.sub(r"[^A-Za-z0-9._-]+", "_", text).lstrip(".") or "case"
        count = Counter(identifier.lower() for identifier in (*ids.values(), *wanted.values()))
        ids |= {name: identifier for name, identifier in wanted.items() if count[identifier.lower()] == 1}
    return [replace(s, id=ids[s.name]) for s in sources]


def assign_values(
    sources: Sequence[Source], table: dict[str, Case], dest: Path, described: dict[str, list[int]]
) -> tuple[list[Source], dict[str, list[int]]]:
    """The sources with the values of structures that DICOM names alone, and what all label values mean.

    What those of earlier runs mean stays, if some are kept. described: what this run's dataset.json or preset says.
    Raises UserError where one value would mean two things.
    """
    kept = any(case.label for name, case in table.items() if name not in {s.name for s in sources})
    old = (read_settings(dest).get("structures") or {}) if kept else {}
    for name, values in described.items():
        before = [other for other in old.keys() - described if set(old[other]) & (set(values) - set(old.get(name, ())))]
        if before or set(old.get(name, ())) - set(values):
            was = f"{old[before[0]]} are {before[0]!r}" if before else f"{old[name]} are {name!r}"
            raise UserError(
                f"dest: in the label maps of {dest} {was}, in those to be added {values} are {name!r}; convert these "
                "into a data set of their own"
            )
    structures = {name: list(values) for name, values in {**old, **described}.items()}
    value_of: dict[str, int] = {}
    for name in sorted({name for s in sources for name in s.structures}):
        taken = [value for values in structures.values() for value in values]
        own = [value for value in structures.get(name, ()) if taken.count(value) == 1]
        value_of[name] = own[0] if own else max(taken, default=0) + 1
        structures[name] = sorted({*structures.get(name, ()), value_of[name]})
    return [replace(s, values=tuple((name, value_of[name]) for name in s.structures)) for s in sources], structures


def describe(
    cases: Sequence[Case],
    dest: Path,
    spacing_mm: Sequence[float],
    window: Sequence[float] | str | None,
    source: str,
    structures: dict[str, list[int]],
) -> dict[str, Any]:
    """Write dataset.yaml and return its content; keys of people stay, what differs between cases is left out.

    spacing_mm: that was asked for.  window: "keep": the one that is there.  source: where the data come from, if known.
    structures: of the label maps.
    """
    path = dest / "dataset.yaml"
    old = (read_yaml(path) if path.exists() else None) or {}
    volumes = [case for case in cases if case.is_volume]
    new: dict[str, Any] = {"modality": ", ".join(sorted({case.modality or "unknown" for case in cases}))}
    if volumes:
        new["slice_axis"] = 2
        for key in ("plane", "orientation", "channels"):
            values = {getattr(case, key) for case in volumes}
            new[key] = values.pop() if len(values) == 1 and "" not in values else None
        new["channels"] = new["channels"] and new["channels"].split(", ")
        new["spacing_mm"] = _common_spacing(volumes, spacing_mm)
        new["window"] = old.get("window") if window == "keep" else window and [float(x) for x in window]
    new["source"] = source or ", ".join(sorted({re.split("[/#]", case.source)[0] for case in cases}))
    new["structures"] = (any(case.label for case in cases) and structures) or old.get("structures")
    content = {key: value for key, value in {**old, **new}.items() if value is not None and value != {}}
    write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), path)
    return content


def _common_spacing(volumes: Sequence[Case], asked: Sequence[float]) -> list[float] | None:
    if not all(case.spacing_mm for case in volumes):
        return None
    spacings = np.array([case.spacing_mm.split(" x ") for case in volumes], dtype=float)
    middle = np.median(spacings, axis=0)
    middle = np.where(np.array(asked) > 0, asked, middle) if asked else middle
    alike = (np.abs(spacings / middle - 1) < SAME_SPACING).all()
    return [round(float(x), 4) for x in middle] if alike else None

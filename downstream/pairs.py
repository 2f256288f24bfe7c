"""Pairs of an image volume and a label volume in a prepared tree: found, checked by their headers, and read.

    <data_path>/CASE.npy, labels/CASE.npy, dataset.yaml, cases.csv      as prepare_data.py writes them

Only the arrays are needed. dataset.yaml may say structures, slice_axis, window and spacing_mm; cases.csv the patient
and the spacing of each case, and which cases have no label.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from datasets.cache import is_whole
from datasets.index import Sample, bad_files, read_settings, scan
from datasets.render import robust_limits
from utils.config import read_yaml
from utils.errors import UserError
from utils.files import read_csv

LABELS = "labels"  # the folder of the label volumes, beside the images

Structures = dict[str, list[int]]  # label values of each; they may overlap


@dataclass(frozen=True)
class Pair:
    """One volume with its labels, as their headers describe them."""

    case: str
    patient: str
    image: Sample  # with the slice axis and the window of the task
    label: Path
    spacing_mm: tuple[float, ...]  # of slices, rows, columns
    written: int  # when the label was, in ns: what is remembered of it is of this file

    @property
    def shape(self) -> tuple[int, int, int]:
        """Slices, rows, columns."""
        return self.image.slices, self.image.height, self.image.width

    @property
    def channels(self) -> int:
        """Of the image."""
        return len(self.image.channel_names) or 1


def number_classes(structures: Mapping[str, Sequence[int]]) -> dict[int, int]:
    """Classes 0, 1, ... of the label values: values that belong to the same structures share one; in none: class 0.

    So nested regions become the disjoint classes that a softmax needs, and unions of them are scored.
    """
    for name, values in structures.items():
        if not values or 0 in values:
            raise UserError(f"structures: {name}: {values} must be label values other than 0, the background")
    classes, signatures = {0: 0}, [()]  # in which structures a class is; the background in none
    for value in sorted({value for values in structures.values() for value in values}):
        belongs = tuple(name for name, values in structures.items() if value in values)
        if belongs not in signatures:
            signatures.append(belongs)
        classes[value] = signatures.index(belongs)
    return classes


class LabelledVolumes:
    """The pairs of a prepared data set, found and checked by their headers, and what their label values mean.

    structures, slice_axis and window win over what dataset.yaml says.  patients: JSON or YAML file that maps cases to
    patients, in place of cases.csv. Raises one UserError that lists what does not fit.
    Has name, pairs, structures, classes (of `number_classes`), members (the classes that make up each structure) and
    notes (what a user should know of the data).
    """

    def __init__(
        self,
        data_path: str | Path,
        structures: Structures | None = None,
        slice_axis: int | None = None,
        window: Sequence[float] | None = None,
        patients: str | None = None,
    ) -> None:
        root = Path(data_path).expanduser().resolve()
        labels = {path.stem: path for path in sorted((root / LABELS).glob("[!.]*.npy"))}
        if not labels:
            raise UserError(_no_pairs(root))
        found, problems = scan(root.parent, only=root.name)
        images = {s.path.stem: s for s in found if s.kind == "volume" and s.path.parent == root}
        about, table = read_settings(root), {row["id"]: row for row in read_cases(root, "id")}
        people = _patients(patients, table, [case for case in images if case in labels])
        problems += [f"{labels[case]}: has no image {root / case}.npy; add it" for case in labels if case not in images]
        self.pairs, notes = [], Counter()
        for case, sample in images.items():
            row = table.get(case, {})
            if case not in labels and row.get("label") == "":  # prepare_data.py knew of none
                notes["without labels, which are left out"] += 1
            elif case not in labels:
                problems.append(f"{sample.path}: has no label {root / LABELS / case}.npy; add it")
            elif not is_whole(labels[case], tuple(shape := _file_shape(sample))):
                wanted = " x ".join(map(str, shape))
                problems.append(
                    f"{labels[case]}: is not a whole array of {wanted} voxels, as its image; convert it again"
                )
            else:
                spacing = _spacing(row["spacing_mm"], root) if row.get("spacing_mm") else about.get("spacing_mm")
                notes["of unknown spacing, whose HD95 counts voxels"] += not spacing
                notes["whose patient no file names: each counts as a patient of its own"] += not people
                image, written = _as_asked(sample, slice_axis, window), labels[case].stat().st_mtime_ns
                mm = list(map(float, spacing or (1, 1, 1)))
                mm.insert(0, mm.pop(image.slice_axis))
                self.pairs.append(Pair(case, people.get(case, case), image, labels[case], tuple(mm), written))
        if len({pair.channels for pair in self.pairs}) > 1:
            problems.append(f"{root}: some volumes have more channels than others; keep those of one kind")
        if problems:
            raise bad_files(problems, f"data_path {root}")
        self.name, self.notes = root.name, [f"{count} volumes {what}" for what, count in notes.items() if count]
        self.structures = structures or _declared(root, about)
        self.classes = number_classes(self.structures)
        self.members = {name: sorted({self.classes[v] for v in values}) for name, values in self.structures.items()}


def read_image(pair: Pair) -> np.ndarray:
    """[channels, D, H, W] in the file's own type, a view of the file."""
    array = np.load(pair.image.path, mmap_mode="r", allow_pickle=False)
    array = array if array.ndim == 4 else array[..., None]
    return np.moveaxis(array, (3, pair.image.slice_axis), (0, 1))


def read_label(pair: Pair, classes: Mapping[int, int]) -> np.ndarray:
    """[D, H, W] uint8 classes of label values, which `require_declared` has checked."""
    label = np.moveaxis(np.load(pair.label, allow_pickle=False), pair.image.slice_axis, 0)
    encoded = np.zeros(label.shape, dtype=np.uint8)
    for value, number in classes.items():
        encoded[label == value] = number
    return encoded


@functools.cache
def label_values(pair: Pair) -> tuple[float, ...]:
    """The values in a label volume; remembered."""
    return tuple(np.unique(np.load(pair.label, allow_pickle=False)).tolist())


def require_declared(pair: Pair, classes: Mapping[int, int]) -> None:
    """Raise UserError for a label value that `classes` does not have."""
    if unknown := sorted(set(label_values(pair)) - set(classes)):
        values = f"{_some(unknown)} outside the declared {_some(sorted(classes))}"
        raise UserError(f"{pair.label}: holds label values {values}; correct it, or declare them with --structures")


@functools.cache
def intensity_limits(pair: Pair) -> tuple[tuple[float, float], ...]:
    """Of each channel the intensities that become 0 and 1, the window or robust percentiles as in pre-training.

    Remembered. Raises UserError for NaN or Inf, no contrast, and voxels that all lie outside the window.
    """
    limits, path, window = [], pair.image.path, pair.image.window
    for array in read_image(pair):
        low, high = float(array.min()), float(array.max())  # NaN if any is
        if not (math.isfinite(low) and math.isfinite(high)):
            raise UserError(f"{path}: holds NaN or Inf; replace them (np.nan_to_num)")
        if low == high:
            raise UserError(f"{path}: is constant (all voxels are {low:g}); remove this case")
        if window and (high <= window[0] or low >= window[1]):
            raise UserError(f"{path}: its intensities, {low:g} to {high:g}, lie outside the window {window}; change it")
        limits.append(window or robust_limits(array))
    return tuple(limits)


def read_cases(folder: Path, *columns: str) -> list[dict[str, str]]:
    """The rows of a data set's cases.csv; none where there is no such file."""
    path = folder / "cases.csv"
    return read_csv(path, "data_path", columns) if path.is_file() else []


def _no_pairs(root: Path) -> str:
    """Why there are none, and what to do."""
    if not root.is_dir():
        return f"data_path: {root} is not a folder; give one data set that prepare_data.py has written"
    if next(root.rglob("*.nii*"), None):
        dest = f"Training_Data/{root.name}"
        return (
            f"data_path: {root} holds NIfTI files; convert them once, python prepare_data.py --source {root} "
            f"--dest {dest}, and then give --data_path {dest}"
        )
    below = sorted(path.parent for path in root.glob(f"*/{LABELS}"))
    hint = f"; did you mean {below[0]}?" if below else ""
    return f"data_path: {root} has no pairs of CASE.npy and {LABELS}/CASE.npy, which prepare_data.py writes{hint}"


def _file_shape(sample: Sample) -> list[int]:
    """Of the first three axes of the file."""
    shape = [sample.height, sample.width]
    shape.insert(sample.slice_axis, sample.slices)
    return shape


def _as_asked(sample: Sample, slice_axis: int | None, window: Sequence[float] | None) -> Sample:
    """The sample with what is given in place of dataset.yaml's."""
    axis, shape = sample.slice_axis if slice_axis is None else slice_axis, _file_shape(sample)
    slices, (height, width) = shape.pop(axis), shape
    own = tuple(window) if window else sample.window
    return replace(sample, slices=slices, height=height, width=width, slice_axis=axis, window=own)


def _patients(file: str | None, table: Mapping[str, Mapping[str, str]], cases: list[str]) -> dict[str, str]:
    """{case: patient}, of every case; {} where nothing says."""
    people: Any = {case: row["patient"] for case, row in table.items() if row.get("patient")}
    if file:
        people = read_yaml(Path(file).expanduser())
        people = people.get("patient", people) if isinstance(people, dict) else None
    if not isinstance(people, dict):
        raise UserError(f"patients: {file}: must map cases to patients")
    if people and (lacking := [case for case in cases if case not in people]):
        raise UserError(f"{file or 'cases.csv'}: does not name the patient of {_some(lacking)}; add it")
    return {case: str(patient) for case, patient in people.items()}


def _spacing(text: str, root: Path) -> list[float]:
    """mm in the order of the file's axes, as cases.csv writes them."""
    try:
        rows, columns, slices = map(float, text.split(" x "))
    except ValueError:
        raise UserError(f"{root / 'cases.csv'}: spacing_mm: {text!r} is not three numbers, as in 1 x 1 x 2.5") from None
    return [rows, columns, slices]


def _declared(root: Path, about: Mapping[str, Any]) -> Structures:
    """Structures as {left atrium: [1]} (prepare_data.py), {left atrium: 1}, or {1: left atrium}."""
    try:
        pairs = [(value, key) if str(key).isdigit() else (key, value) for key, value in about["structures"].items()]
        lists = {str(name): [int(value) for value in np.atleast_1d(values)] for name, values in pairs}
    except (AttributeError, KeyError, TypeError, ValueError):
        remedy = "write there, or as --structures, {left atrium: [1]}"
        raise UserError(f"{root / 'dataset.yaml'}: structures: do not say what label values mean; {remedy}") from None
    return {name: values for name, values in lists.items() if values != [0]}


def _some(values: Sequence[Any], count: int = 8) -> str:
    return ", ".join(map(str, values[:count])) + (", ..." if len(values) > count else "")

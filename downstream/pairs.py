"""Pairs of an image volume and a label volume in a prepared tree: found, checked by their headers, and read.

    <data_path>/CASE.npy, labels/CASE.npy, dataset.yaml, cases.csv      as prepare_data.py writes them

Only the arrays are needed. dataset.yaml may say structures, slice_axis, window and spacing_mm; cases.csv the patient
and the spacing of each case, and which cases have no label.
"""

from __future__ import annotations

import csv
import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datasets.index import MIN_SIDE, bad_files, npy_header, read_settings
from datasets.render import robust_limits
from utils.config import read_yaml
from utils.errors import UserError

LABELS = "labels"  # the folder of the label volumes, beside the images

Structures = dict[str, list[int]]  # label values of each; they may overlap


@dataclass(frozen=True)
class Pair:
    """One volume with its labels, as their headers describe them."""

    case: str
    patient: str
    image: Path  # three axes, or four of which the last counts channels
    label: Path
    slice_axis: int
    shape: tuple[int, ...]  # slices, rows, columns
    channels: int
    spacing_mm: tuple[float, ...]  # of slices, rows, columns
    written: tuple[int, ...]  # when the two files were, so that what is remembered of them is of these


@dataclass(frozen=True)
class LabelledVolumes:
    """Pairs and what their label values mean."""

    name: str
    pairs: list[Pair]
    structures: Structures
    window: tuple[float, float] | None  # intensities that become 0 and 1; None: robust percentiles
    notes: list[str]  # what a user should know of them

    @functools.cached_property
    def classes(self) -> dict[int, int]:
        """The class of each declared label value; 0 is background."""
        return number_classes(self.structures)

    @property
    def members(self) -> Structures:
        """The classes that make up each structure."""
        return {name: sorted({self.classes[value] for value in values}) for name, values in self.structures.items()}


def number_classes(structures: Mapping[str, Sequence[int]]) -> dict[int, int]:
    """Classes 0, 1, ... of the label values: values that belong to the same structures share one; in none: class 0.

    So nested regions become the disjoint classes that a softmax needs, and unions of them are scored.
    """
    for name, values in structures.items():
        if not values or 0 in values:
            raise UserError(f"structures: {name}: {values} must be label values other than 0, the background")
    signatures = [(False,) * len(structures)]  # in which structures a class is; the background in none
    classes = {0: 0}
    for value in sorted({value for values in structures.values() for value in values}):
        belongs = tuple(value in values for values in structures.values())
        if belongs not in signatures:
            signatures.append(belongs)
        classes[value] = signatures.index(belongs)
    return classes


def find_pairs(
    data_path: str | Path,
    structures: Structures | None = None,
    slice_axis: int | None = None,
    window: Sequence[float] | None = None,
    patients: str | None = None,
) -> LabelledVolumes:
    """Find the pairs of a prepared data set, check them by their headers, and learn what their labels mean.

    structures, slice_axis and window win over what dataset.yaml says.  patients: JSON or YAML file that maps cases to
    patients, in place of cases.csv. Raises one UserError that lists images without labels, labels without images, and
    pairs that differ in shape; or says that there are no pairs, or that no structure is declared.
    """
    root = Path(data_path).expanduser()
    images, labels = _by_case(root), _by_case(root / LABELS)
    if not images or not labels:
        raise UserError(_no_pairs(root))
    about, table = read_settings(root), _read_table(root / "cases.csv")
    axis = next(axis for axis in (slice_axis, about.get("slice_axis"), 2) if axis is not None)
    cases = [case for case in images if case in labels]
    people = _patients(patients, table, cases)
    problems = [
        f"{path}: has no image {root / case}.npy; add it" for case, path in labels.items() if case not in images
    ]
    pairs, notes = [], Counter()
    for case, image in images.items():
        row = table.get(case, {})
        spacing = _spacing(row.get("spacing_mm"), root) or about.get("spacing_mm")
        if case in labels:
            try:
                pairs.append(_inspect(case, people.get(case, case), image, labels[case], axis, spacing or (1, 1, 1)))
            except ValueError as error:
                problems.append(str(error))
            notes["of unknown spacing, whose HD95 counts voxels"] += not spacing
            notes["whose patient no file names: each counts as a patient of its own"] += not people
        elif row.get("label") == "":  # prepare_data.py knew of none
            notes["without labels, which are left out"] += 1
        else:
            problems.append(f"{image}: has no label {root / LABELS / case}.npy; add it")
    if problems:
        raise bad_files(problems, f"data_path {root}")
    window = window or about.get("window")
    said = [f"{count} volumes {what}" for what, count in notes.items() if count]
    declared = structures or _declared(root, about)
    return LabelledVolumes(root.resolve().name, pairs, declared, tuple(window) if window else None, said)


def read_image(pair: Pair) -> np.ndarray:
    """[channels, D, H, W] in the file's own type, a view of the file."""
    array = _read(pair.image)
    array = array if array.ndim == 4 else array[..., None]
    return np.moveaxis(array, (3, pair.slice_axis), (0, 1))


def read_label(pair: Pair, classes: Mapping[int, int]) -> np.ndarray:
    """[D, H, W] uint8 classes of label values, which `require_declared` has checked."""
    label = np.moveaxis(_read(pair.label), pair.slice_axis, 0)
    encoded = np.zeros(label.shape, dtype=np.uint8)
    for value, number in classes.items():
        encoded[label == value] = number
    return encoded


@functools.cache
def label_values(pair: Pair) -> tuple[float, ...]:
    """The values in a label volume; remembered."""
    return tuple(np.unique(_read(pair.label)).tolist())


def require_declared(pair: Pair, classes: Mapping[int, int]) -> None:
    """Raise UserError for a label value that `classes` does not have."""
    unknown = sorted(set(label_values(pair)) - set(classes))
    if unknown:
        raise UserError(
            f"{pair.label}: holds label values {_some(unknown)} outside the declared {_some(sorted(classes))}; correct "
            "the file, or declare them: --structures '{NAME: [VALUE, ...]}'"
        )


@functools.cache
def intensity_limits(pair: Pair, window: tuple[float, float] | None) -> tuple[tuple[float, float], ...]:
    """Of each channel the intensities that become 0 and 1, the window or robust percentiles as in pre-training.

    Remembered. Raises UserError for NaN or Inf, no contrast, and voxels that all lie outside the window.
    """
    limits = []
    for array in read_image(pair):
        low, high = float(array.min()), float(array.max())  # NaN if any is
        if not np.isfinite([low, high]).all():
            count = array.size - int(np.isfinite(array).sum())
            raise UserError(
                f"{pair.image}: {count} of {array.size} voxels are NaN or Inf; replace them (np.nan_to_num)"
            )
        if low == high:
            raise UserError(f"{pair.image}: is constant (all voxels are {low:g}); remove this case")
        if window and (high <= window[0] or low >= window[1]):
            raise UserError(
                f"{pair.image}: its intensities, {low:g} to {high:g}, lie outside the window {list(window)}; correct it"
            )
        limits.append(window or robust_limits(array))
    return tuple(limits)


def _by_case(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.glob("*.npy")) if not path.name.startswith(".")}


def _no_pairs(root: Path) -> str:
    """Why there are none, and what to do."""
    if not root.is_dir():
        return f"data_path: {root} is not a folder; give one data set that prepare_data.py has written"
    if next(root.rglob("*.nii*"), None):
        dest = f"Training_Data/{root.resolve().name}"
        return (
            f"data_path: {root} holds NIfTI files; convert them once, python prepare_data.py --source {root} "
            f"--dest {dest}, and then give --data_path {dest}"
        )
    below = sorted(path.parent for path in root.glob(f"*/{LABELS}"))
    hint = f"; did you mean {below[0]}?" if below else ""
    return f"data_path: {root} has no pairs of CASE.npy and {LABELS}/CASE.npy, which prepare_data.py writes{hint}"


def _inspect(case: str, patient: str, image: Path, label: Path, slice_axis: int, spacing: Sequence[float]) -> Pair:
    """The pair by its headers. Raises ValueError: what is wrong with which file."""
    shape = _shape(label, axes=(3,))
    *found, channels = (*_shape(image, axes=(3, 4)), 1)[:4]
    if tuple(found) != shape:
        raise ValueError(f"{image}: is {_by(found)} voxels, but its label {label} is {_by(shape)}")
    order = (slice_axis, *(axis for axis in range(3) if axis != slice_axis))
    depth, height, width = (shape[axis] for axis in order)
    if min(height, width) < MIN_SIDE:
        raise ValueError(f"{label}: has slices of {height} x {width} pixels, below {MIN_SIDE}; remove this case")
    return Pair(
        case=case,
        patient=patient,
        image=image,
        label=label,
        slice_axis=slice_axis,
        shape=(depth, height, width),
        channels=channels,
        spacing_mm=tuple(float(spacing[axis]) for axis in order),
        written=tuple(path.stat().st_mtime_ns for path in (image, label)),
    )


def _shape(path: Path, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Of an array with one of these numbers of axes, from its header. Raises ValueError."""
    try:
        shape, _, _ = npy_header(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if len(shape) not in axes:
        wanted = " or ".join(map(str, axes))
        raise ValueError(f"{path}: has {len(shape)} axes ({_by(shape)}) instead of {wanted}; convert it again")
    return shape


def _read(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); convert it again") from None


def _read_table(path: Path) -> dict[str, dict[str, str]]:
    """The rows of cases.csv by case; {} where there is none."""
    if not path.is_file():
        return {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return {row["id"]: row for row in csv.DictReader(file)}
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); run prepare_data.py again") from None


def _patients(file: str | None, table: Mapping[str, Mapping[str, str]], cases: list[str]) -> dict[str, str]:
    """{case: patient}, of every case; {} where nothing says."""
    people: Any = {case: row["patient"] for case, row in table.items() if row.get("patient")}
    if file:
        people = read_yaml(Path(file).expanduser())
        people = people.get("patient", people) if isinstance(people, dict) else None
    if not isinstance(people, dict):
        raise UserError(f"patients: {file}: must map cases to patients")
    lacking = [case for case in cases if case not in people]
    if people and lacking:
        raise UserError(f"{file or 'cases.csv'}: does not name the patient of {_some(lacking)}; add it")
    return {case: str(patient) for case, patient in people.items()}


def _spacing(text: str | None, root: Path) -> tuple[float, ...] | None:
    """mm in the order of the file's axes, as cases.csv writes them."""
    try:
        spacing = tuple(map(float, text.split(" x "))) if text else None
    except ValueError:
        spacing = ()
    if spacing is not None and not (len(spacing) == 3 and all(0 < mm < float("inf") for mm in spacing)):
        raise UserError(f"{root / 'cases.csv'}: spacing_mm: {text!r} is not three positive numbers; correct it")
    return spacing


def _declared(root: Path, about: Mapping[str, Any]) -> Structures:
    """Structures as {left atrium: [1]} (prepare_data.py), {left atrium: 1}, or {1: left atrium}."""
    declared = about.get("structures")
    if not declared:
        raise UserError(
            f"{root}: nothing says what the label values mean; name them, --structures '{{left atrium: [1]}}', or add "
            "structures to dataset.yaml"
        )
    try:
        by_name = {
            str(value) if str(key).isdigit() else str(key): [int(key)] if str(key).isdigit() else value
            for key, value in declared.items()
        }
        lists = {name: values if isinstance(values, list) else [values] for name, values in by_name.items()}
        return {name: [int(value) for value in values] for name, values in lists.items() if values != [0]}
    except (AttributeError, TypeError, ValueError):
        raise UserError(
            f"{root / 'dataset.yaml'}: structures: {declared!r} does not map names to label values"
        ) from None


def _by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _some(values: Sequence[Any], count: int = 8) -> str:
    return ", ".join(map(str, values[:count])) + (", ..." if len(values) > count else "")

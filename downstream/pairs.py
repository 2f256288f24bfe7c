"""Pairs of an image and a label map, volumes or 2D, in a data set: found, checked by their headers, and read.

    <data_path>/CASE.npy, labels/CASE.npy, dataset.yaml, cases.csv    as prepare_data.py writes them
    <data_path>/CASE.png, masks/CASE.png                              2D: also images/CASE.png, labels/; JPEG, TIFF, ...
    <data_path>/imagesTr/CASE_0000.png, labelsTr/CASE.png             nnU-Net's 2D layout

dataset.yaml says structures, slice_axis, window and spacing_mm; cases.csv the patient and the spacing of each case, and
which cases have no label. Pixels of a mask are label values: those of a palette its indices.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datasets.cache import is_whole
from datasets.index import (
    IMAGE_FORMATS,
    IMAGE_SUFFIXES,
    LABEL_FOLDERS,
    Sample,
    bad_files,
    holds_labels,
    image_header,
    read_settings,
    scan,
)
from datasets.render import read_grey, robust_limits
from utils.config import read_yaml
from utils.errors import UserError
from utils.files import read_csv

IMAGE_FOLDERS = ("images", "imagestr")  # in lower case, beside the folder of the labels; or none


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


def number_classes(structures: Mapping[str, Sequence[int]]) -> dict[int, int]:
    """Classes 0, 1, ... of the label values: values that belong to the same structures share one; in none: class 0.

    So nested regions become the disjoint classes that a softmax needs, and unions of them are scored.
    """
    for name, values in structures.items():
        if not isinstance(values, list) or not values or 0 in values:
            raise UserError(f"structures: {name}: {values} must be a list of label values other than 0, the background")
    values = sorted({value for values in structures.values() for value in values})
    belongs = {value: tuple(name for name, own in structures.items() if value in own) for value in (0, *values)}
    order = list(dict.fromkeys(belongs.values()))  # the background, which is in none, first
    return {value: order.index(names) for value, names in belongs.items()}


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
        structures: dict[str, list[int]] | None = None,
        slice_axis: int | None = None,
        window: Sequence[float] | None = None,
        patients: str | None = None,
    ) -> None:
        root = Path(os.path.realpath(Path(data_path).expanduser()))
        given = {key: value for key, value in (("slice_axis", slice_axis), ("window", window)) if value is not None}
        labels = _label_files(root)
        if not labels:
            raise UserError(_no_pairs(root))
        found, problems = scan(root.parent, root.name, given)
        images = {_case_of(s.path): s for s in found if s.path.parent in (root, *_folders(root, IMAGE_FOLDERS))}
        about, table = read_settings(root), {row["id"]: row for row in read_cases(root, "id")}
        people = _patients(patients, table, images.keys() & labels)
        problems += [f"{labels[case]}: has no image {root / case}.npy; add it" for case in labels if case not in images]
        self.pairs, notes = [], Counter()
        for case, image in images.items():
            row, shape, axis = table.get(case, {}), [image.height, image.width], image.slice_axis
            shape.insert(axis, image.slices)
            if case not in labels and row.get("label") == "":  # prepare_data.py knew of none
                notes["without labels, which are left out"] += 1
            elif case not in labels:
                expected = next(iter(labels.values())).parent / f"{case}{image.path.suffix}"
                problems.append(f"{image.path}: has no label {expected}; add it")
            elif wrong := _misfit(labels[case], image, shape):
                problems.append(f"{labels[case]}: {wrong}")
            else:
                spacing = _spacing(row["spacing_mm"], root) if row.get("spacing_mm") else about.get("spacing_mm")
                notes["of unknown spacing, whose HD95 counts voxels"] += not spacing
                notes["whose patient no file names: each counts as a patient of its own"] += not people
                mm = list(map(float, spacing or (1, 1, 1)))
                mm.insert(0, mm.pop(axis))
                written = labels[case].stat().st_mtime_ns
                self.pairs.append(Pair(case, people.get(case, case), image, labels[case], tuple(mm), written))
        if len({pair.image.channels for pair in self.pairs}) > 1:
            problems.append(f"{root}: some volumes have more channels than others; keep those of one kind")
        if problems:
            raise bad_files(problems, f"data_path {root}")
        self.name, self.notes = root.name, [f"{count} volumes {what}" for what, count in notes.items() if count]
        self.structures = structures or about.get("structures")
        if not self.structures:
            values = [f"{value:g}" for value in label_values(self.pairs[0]) if value]
            example = f"{{left atrium: [{', '.join(values[:1]) or 1}]}}"
            said = f"no structures say what label values mean ({self.pairs[0].label.name} holds {_some(values)})"
            raise UserError(f"{root / 'dataset.yaml'}: {said}; write there, or as --structures, {example}")
        self.classes = number_classes(self.structures)
        self.members = {name: sorted({self.classes[v] for v in values}) for name, values in self.structures.items()}


def _folders(root: Path, names: Container[str]) -> list[Path]:
    return [folder for folder in sorted(root.iterdir()) if folder.is_dir() and folder.name.lower() in names]


def _label_files(root: Path) -> dict[str, Path]:
    """{case: label map}."""
    if not root.is_dir():
        return {}
    files = [path for folder in _folders(root, LABEL_FOLDERS) for path in sorted(folder.glob("[!.]*"))]
    return {path.stem: path for path in files if path.suffix.lower() in (".npy", *IMAGE_SUFFIXES)}


def _case_of(path: Path) -> str:
    """nnU-Net writes the number of the channel behind the case."""
    return re.sub(r"_\d{4}$", "", path.stem) if path.parent.name.lower().startswith("images") else path.stem


def _misfit(label: Path, image: Sample, shape: Sequence[int]) -> str:
    """What is wrong with the header of a label map; nothing: ''."""
    size = " x ".join(map(str, shape))
    if image.kind == "volume":
        fits = label.suffix == ".npy" and is_whole(label, tuple(shape))
        return "" if fits else f"is not a whole array of {size} voxels, as its image; convert it again"
    try:
        header = image_header(label)
    except ValueError as error:
        return str(error)
    if not holds_labels(header["dtype"]):
        return (
            f"is a picture of mode {header['dtype']} where each pixel must be a label value; save it with one channel"
        )
    if (header["height"], header["width"]) != (image.height, image.width):
        return f"has {header['height']} x {header['width']} pixels, its image {image.height} x {image.width}"
    return ""


def _spacing(text: str, root: Path) -> list[float]:
    """mm in the order of the file's axes, as cases.csv writes them."""
    try:
        rows, columns, slices = map(float, text.split(" x "))
    except ValueError:
        raise UserError(f"{root / 'cases.csv'}: spacing_mm: {text!r} is not three numbers, as in 1 x 1 x 2.5") from None
    return [rows, columns, slices]


def _array(path: Path) -> np.ndarray:
    """Read, not mapped: a mapped file that is cut or replaced meanwhile kills the process without a word."""
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise UserError(f"{path}: is not the array that it was when this run began; convert it again") from None


def read_image(pair: Pair) -> np.ndarray:
    """[channels, D, H, W] in the file's own type; D is 1 for a 2D image."""
    if pair.image.kind == "image":
        return read_grey(pair.image.path)[None, None]
    array = _array(pair.image.path)
    array = array if array.ndim == 4 else array[..., None]
    return np.moveaxis(array, (3, pair.image.slice_axis), (0, 1))


def _label(pair: Pair) -> np.ndarray:
    """Label values in the order of the file's axes; a 2D map as one slice."""
    if pair.image.kind == "volume":
        return _array(pair.label)
    with Image.open(pair.label, formats=IMAGE_FORMATS) as image:
        return np.asarray(image.convert("L") if image.mode == "1" else image)[:, :, None]


def read_label(pair: Pair, classes: Mapping[int, int]) -> np.ndarray:
    """[D, H, W] uint8 classes of label values, which `require_declared` has checked."""
    label = np.moveaxis(_label(pair), pair.image.slice_axis, 0)
    encoded = np.zeros(label.shape, dtype=np.uint8)
    for value, number in classes.items():
        encoded[label == value] = number
    return encoded


@functools.cache
def label_values(pair: Pair) -> tuple[float, ...]:
    """Of a label volume; remembered."""
    return tuple(np.unique(_label(pair)).tolist())


def require_declared(pair: Pair, classes: Mapping[int, int]) -> None:
    """Raise UserError for a label value that `classes` does not have."""
    if unknown := sorted(set(label_values(pair)) - set(classes)):
        values = f"{_some(unknown)} outside the declared {_some(sorted(classes))}"
        raise UserError(f"{pair.label}: holds label values {values}; correct it, or declare them with --structures")


@functools.cache
def intensity_limits(pair: Pair) -> tuple[tuple[float, float], ...]:
    """Of each channel the intensities that become 0 and 1, the window or robust percentiles as in pre-training.

    Remembered. Raises UserError where they cannot be told apart.
    """
    limits, window = [], pair.image.window
    floor, ceiling = window or (-math.inf, math.inf)
    for array in read_image(pair):
        low, high = float(array.min()), float(array.max())  # NaN if any is
        if not (math.isfinite(high - low) and max(low, floor) < min(high, ceiling)):
            within = f" and lie within the window {list(window)}" if window else ""
            found = f"its intensities, {low:g} to {high:g}, must be finite and differ{within}"
            raise UserError(f"{pair.image.path}: {found}; correct them, or remove this case")
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
        convert = f"python prepare_data.py --source {root} --dest Training_Data/{root.name}"
        return f"data_path: {root} holds NIfTI files; convert them once, {convert}, and give that folder"
    return (
        f"data_path: {root} has no pairs of CASE.npy and labels/CASE.npy, which prepare_data.py writes, nor of 2D "
        "images CASE.png and masks/CASE.png"
    )


def _patients(file: str | None, table: Mapping[str, Mapping[str, str]], cases: set[str]) -> dict[str, str]:
    """{case: patient}, of every case; {} where nothing says."""
    people: Any = {case: row["patient"] for case, row in table.items() if row.get("patient")}
    if file:
        people = read_yaml(Path(file).expanduser())
    lacking = sorted(cases - people.keys()) if isinstance(people, dict) else sorted(cases)
    if lacking and (people or file):
        raise UserError(f"{file or 'cases.csv'}: does not name the patient of {_some(lacking)}; add it")
    return {case: str(patient) for case, patient in people.items()}


def _some(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")

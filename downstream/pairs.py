"""Pairs of an image volume and a label volume: found in the usual layouts, checked, and read in slice order.

Layouts of a folder `data_path`, tried in this order:

    a preset's own (MMWHS, BraTS 2018)   CASE_image.nii.gz, CASE_label.nii.gz; CASE_flair.nii.gz ... CASE_seg.nii.gz
    Medical Segmentation Decathlon       imagesTr/CASE.nii.gz, labelsTr/CASE.nii.gz, dataset.json
    what prepare_data.py writes          CASE.npy, labels/CASE.npy, dataset.yaml, cases.csv

NIfTI volumes are turned to the view that prepare_data.py gives them, so that slices look as they did in pre-training.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import yaml

from conversion.volume import PLANES, THICKEST
from datasets.index import MIN_SIDE, bad_files, npy_header
from utils.errors import UserError

OPPOSITE = dict(zip("RLAPSI", "LRPAIS", strict=True))
NIFTI = (".nii.gz", ".nii")
SPACING_TOLERANCE = 1e-3  # relative; headers carry spacing in float32
NO_CLASS = 255

Structures = dict[str, list[int]]


@dataclass(frozen=True)
class Preset:
    """A public data set: what its label values mean, and how its files are called."""

    structures: Structures
    prefix: str
    label: str
    channels: tuple[str, ...]


MMWHS_STRUCTURES = {
    "left ventricle": [500],
    "right ventricle": [600],
    "left atrium": [420],
    "right atrium": [550],
    "myocardium": [205],
    "ascending aorta": [820],
    "pulmonary artery": [850],
}
PRESETS = {
    "mmwhs_ct": Preset(MMWHS_STRUCTURES, "ct_", "_label", ("_image",)),
    "mmwhs_mr": Preset(MMWHS_STRUCTURES, "mr_", "_label", ("_image",)),
    # 1 necrotic and non-enhancing core, 2 oedema, 4 enhancing tumour; the challenge scores three nested regions.
    "brats2018": Preset(
        {"whole tumour": [1, 2, 4], "tumour core": [1, 4], "enhancing tumour": [4]},
        "",
        "_seg",
        ("_flair", "_t1", "_t1ce", "_t2"),
    ),
}


@dataclass(frozen=True)
class Pair:
    """One volume with its labels, and how its slices lie in the file."""

    case: str
    patient: str
    images: tuple[Path, ...]  # one file per channel, or a single file, where a fourth axis holds channels
    label: Path
    channels: int
    file_shape: tuple[int, int, int]
    file_spacing_mm: tuple[float, float, float]
    order: tuple[int, int, int]  # the file's axes that count slices, rows and columns
    flips: tuple[bool, bool, bool]  # which of these three then run backwards

    @property
    def shape(self) -> tuple[int, ...]:
        """Slices, rows, columns: of what `read_image` and `read_label` give."""
        return tuple(self.file_shape[axis] for axis in self.order)

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Of slices, rows and columns."""
        return tuple(self.file_spacing_mm[axis] for axis in self.order)

    def arrange(self, array: np.ndarray) -> np.ndarray:
        """[file axes, ...] -> [D, H, W, ...], a view."""
        turned = array.transpose(*self.order, *range(3, array.ndim))
        return turned[tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)]


@dataclass(frozen=True)
class Task:
    """Checked pairs and what their label values mean."""

    name: str
    pairs: list[Pair]
    structures: Structures  # label values of each; they may overlap (BraTS)
    window: tuple[float, float] | None = None  # intensities that become 0 and 1; None: robust percentiles
    patients_known: bool = True
    classes: dict[int, int] = field(init=False)  # of each declared label value; 0 is background

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", number_classes(self.structures))

    @property
    def members(self) -> Structures:
        """The classes that make up each structure."""
        return {name: sorted({self.classes[value] for value in values}) for name, values in self.structures.items()}

    @property
    def num_classes(self) -> int:
        return max(self.classes.values()) + 1


def number_classes(structures: Mapping[str, Sequence[int]]) -> dict[int, int]:
    """Classes 0, 1, ... of the label values: values that belong to the same structures share one; in none: class 0.

    So nested regions become the disjoint classes that a softmax needs, and unions of them are scored.
    """
    for name, some in structures.items():
        if not some or 0 in some:
            raise UserError(f"structures: {name}: {some} must be label values other than 0, the background")
    values = sorted({0} | {value for some in structures.values() for value in some})
    belongs = {value: tuple(value in some for some in structures.values()) for value in values}
    signatures = [belongs[0]]
    for value in values:
        if belongs[value] not in signatures:
            signatures.append(belongs[value])
    return {value: signatures.index(belongs[value]) for value in values}


def find_task(
    data_path: str | Path,
    preset: str = "none",
    structures: Structures | None = None,
    slice_axis: int | None = None,
    window: Sequence[float] | None = None,
    patients: str | Path | None = None,
) -> Task:
    """Find the pairs below data_path, check them by their headers, and learn what their labels mean.

    structures, slice_axis and window win over what the preset, dataset.json or dataset.yaml say. Without slice_axis,
    NIfTI slices are those that prepare_data.py chooses: along the thickest spacing, else axial.
    patients: JSON or YAML file that maps cases to patients, or has such a map under `patient` (as dataset.json may).
    Raises one UserError that lists images without labels, labels without images, and pairs that differ in shape,
    spacing or orientation; or else says that no structure is declared.
    """
    root = Path(data_path).expanduser()
    if not root.is_dir():
        raise UserError(f"data_path: {root} is not a folder; give one with image/label pairs")
    about = _read_json(root / "dataset.json") | _read_yaml(root / "dataset.yaml")
    axis = slice_axis if slice_axis is not None else about.get("slice_axis")
    if axis not in (None, 0, 1, 2):
        raise UserError(f"slice_axis: {axis!r} is not 0, 1 or 2")
    files, problems = _find_files(root, preset, about)
    people = _patients(Path(patients).expanduser() if patients else None, about)
    problems += [
        f"{patients or root}: does not name the patient of {case}; add it"
        for case in files
        if people and case not in people
    ]
    spacings = _listed_spacings(root / "cases.csv", about)
    pairs = []
    for case, (images, label) in files.items():
        try:
            pairs.append(
                _inspect(case, str(people.get(case, case)), images, label, axis, spacings.get(case, spacings[""]))
            )
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise bad_files(problems, f"data_path {root}")
    declared = structures or (PRESETS[preset].structures if preset != "none" else None) or _declared(root, about)
    window = window if window is not None else about.get("window")
    if window and not (len(window) == 2 and window[0] < window[1]):
        raise UserError(f"window: {list(window)} must be two increasing numbers, e.g. [-160, 240]")
    known = bool(people) or preset != "none"  # one scan per patient in the data sets of the presets
    return Task(root.resolve().name, pairs, declared, tuple(window) if window else None, known)


def read_image(pair: Pair) -> np.ndarray:
    """[channels, D, H, W] in the file's own type. Raises UserError: unreadable, NaN or Inf, no contrast."""
    arrays = [_read(path) for path in pair.images]
    stack = arrays[0] if len(arrays) == 1 else np.stack(arrays, axis=-1)
    stack = np.moveaxis(pair.arrange(stack.reshape(*pair.file_shape, pair.channels)), 3, 0)
    for channel, array in enumerate(stack):
        path = pair.images[channel if len(pair.images) > 1 else 0]
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            count = array.size - int(np.isfinite(array).sum())
            raise UserError(f"{path}: {count} of {array.size} voxels are NaN or Inf; replace them (np.nan_to_num)")
        if array.min() == array.max():
            raise UserError(f"{path}: is constant (all voxels are {array.flat[0]:g}); remove this case")
    return stack


def read_label(pair: Pair, classes: Mapping[int, int]) -> np.ndarray:
    """[D, H, W] uint8 classes. Raises UserError for a label value that `classes` does not have."""
    label = pair.arrange(_read(pair.label).reshape(pair.file_shape))
    whole = label if label.dtype.kind in "iu" else np.rint(label).astype(np.int64)
    if whole is not label and not np.array_equal(whole, label):
        raise UserError(f"{pair.label}: holds values that are not whole numbers; give labels, not probabilities")
    low, high = int(whole.min()), int(whole.max())
    if low >= 0 and high <= max(classes) + 65536:
        table = np.full(max(high, *classes) + 1, NO_CLASS, dtype=np.uint8)
        for value, number in classes.items():
            table[value] = number
        encoded = table[whole]
        if not (encoded == NO_CLASS).any():
            return encoded
    unknown = sorted(set(np.unique(whole).tolist()) - set(classes))
    raise UserError(
        f"{pair.label}: holds label values {_some(unknown)} outside the declared {_some(sorted(classes))}; correct the "
        "file, or declare them: --structures '{NAME: [VALUE, ...]}'"
    )


def _find_files(
    root: Path, preset: str, about: dict[str, Any]
) -> tuple[dict[str, tuple[tuple[Path, ...], Path]], list[str]]:
    """({case: (image files, label file)}, problems)."""
    if preset != "none":
        found = _preset_files(root, PRESETS[preset])
        if found[0] or found[1]:
            return found
    images, labels = root / "imagesTr", root / "labelsTr"
    if images.is_dir() or labels.is_dir():
        if isinstance(about.get("training"), list):
            return _listed_files(root, about["training"])
        return _match(_by_case(images), _by_case(labels), images, labels)
    labels = root / "labels"
    if labels.is_dir():
        return _match(_by_case(root, (".npy",)), _by_case(labels, (".npy",)), root, labels)
    below = sorted(path.parent.name for kind in ("labels", "labelsTr") for path in root.glob(f"*/{kind}"))
    hint = f"; did you mean {root / below[0]}?" if below else ""
    raise UserError(
        f"data_path: {root} has no image/label pairs: neither imagesTr/ and labelsTr/ (NIfTI) nor labels/ beside .npy "
        f"volumes{'' if preset == 'none' else f', nor the files of {preset}'}{hint}"
    )


def _preset_files(root: Path, preset: Preset) -> tuple[dict[str, tuple[tuple[Path, ...], Path]], list[str]]:
    by_ending: dict[str, dict[str, Path]] = {ending: {} for ending in (*preset.channels, preset.label)}
    for path in sorted(root.rglob("*.nii*")):
        name = _case_name(path)
        if name.startswith("."):
            continue
        for ending, files in by_ending.items():
            if name.startswith(preset.prefix) and name.endswith(ending):
                files[name.removesuffix(ending)] = path
    problems, found = [], {}
    for case in sorted(set().union(*by_ending.values())):
        absent = [ending for ending, files in by_ending.items() if case not in files]
        if absent:
            problems.append(f"{root}: {case} has no {' and no '.join(f'{case}{end}.nii.gz' for end in absent)}; add it")
        else:
            images = tuple(by_ending[ending][case] for ending in preset.channels)
            found[case] = (images, by_ending[preset.label][case])
    return found, problems


def _listed_files(root: Path, training: list[Any]) -> tuple[dict[str, tuple[tuple[Path, ...], Path]], list[str]]:
    problems, found = [], {}
    for entry in training:
        if not isinstance(entry, dict) or not {"image", "label"} <= set(entry):
            raise UserError(f"{root / 'dataset.json'}: training: {entry!r} does not name an image and a label")
        image, label = root / entry["image"], root / entry["label"]
        problems += [
            f"{path}: no such file, but dataset.json lists it; copy it there, or remove the entry"
            for path in (image, label)
            if not path.is_file()
        ]
        found[_case_name(label)] = ((image,), label)
    if problems:
        found = {case: files for case, files in found.items() if files[0][0].is_file() and files[1].is_file()}
    if not training:
        problems.append(f"{root / 'dataset.json'}: training: lists no case")
    return found, problems


def _match(
    images: dict[str, list[Path]], labels: dict[str, list[Path]], image_folder: Path, label_folder: Path
) -> tuple[dict[str, tuple[tuple[Path, ...], Path]], list[str]]:
    problems, found = [], {}
    if set(images) != set(labels) and not set(images) & set(labels):
        images = _without_channel_number(images)
    for case in sorted(set(images) | set(labels)):
        if case not in labels:
            problems.append(f"{images[case][0]}: has no label {label_folder / case}.*; add it or remove the image")
        elif case not in images:
            problems.append(f"{labels[case][0]}: has no image {image_folder / case}.*; add it or remove the label")
        elif len(labels[case]) > 1:
            problems.append(f"{labels[case][0]}: {labels[case][1].name} is a second label of this case; remove one")
        else:
            found[case] = (tuple(images[case]), labels[case][0])
    if not images and not labels:
        problems.append(f"{label_folder}: holds no labels")
    return found, problems


def _by_case(folder: Path, suffixes: tuple[str, ...] = NIFTI) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.endswith(suffixes) and not path.name.startswith(".") and path.is_file():
            found.setdefault(_case_name(path), []).append(path)
    return found


def _without_channel_number(images: dict[str, list[Path]]) -> dict[str, list[Path]]:
    """nnU-Net's CASE_0000.nii.gz, CASE_0001.nii.gz, ...: the channels of CASE."""
    grouped: dict[str, list[Path]] = {}
    for case, paths in sorted(images.items()):
        stem, _, number = case.rpartition("_")
        grouped.setdefault(stem if len(number) == 4 and number.isdigit() else case, []).extend(paths)
    return grouped


def _inspect(
    case: str,
    patient: str,
    images: tuple[Path, ...],
    label: Path,
    slice_axis: int | None,
    npy_spacing: tuple[float, ...] | None,
) -> Pair:
    """The pair by its headers. Raises ValueError: what is wrong with which file."""
    shape, spacing, codes = _header(label, npy_spacing)
    if len(shape) != 3:
        raise ValueError(f"{label}: is {len(shape)}D ({_by(shape)}) where a label volume has three axes")
    channels = len(images)
    for path in images:
        found, image_spacing, image_codes = _header(path, npy_spacing)
        if len(found) == 4 and len(images) == 1:
            *found, channels = found
        if tuple(found) != shape:
            raise ValueError(f"{path}: is {_by(found)} voxels, but its label {label} is {_by(shape)}")
        if not np.allclose(image_spacing, spacing, rtol=SPACING_TOLERANCE):
            raise ValueError(f"{path}: has a spacing of {_mm(image_spacing)}, but its label {label} {_mm(spacing)}")
        if image_codes != codes:
            raise ValueError(f"{path}: its axes point to {image_codes}, but those of its label {label} to {codes}")
    order, flips = _view(codes, spacing, slice_axis)
    pair = Pair(case, patient, images, label, channels, shape, spacing, order, flips)
    if min(pair.shape[1:]) < MIN_SIDE:
        raise ValueError(f"{label}: has slices of {_by(pair.shape[1:])} pixels, below {MIN_SIDE}; remove this case")
    return pair


def _view(
    codes: str, spacing: Sequence[float], slice_axis: int | None
) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """(axes that count slices, rows and columns; which run backwards): as `conversion.convert.arrange` turns volumes.

    codes: sides of the patient towards which the axes grow, or "" for a .npy file, which stays as it is.
    """
    if not codes:
        slices = 2 if slice_axis is None else slice_axis
        return (slices, *(axis for axis in range(3) if axis != slices)), (False, False, False)
    if slice_axis is None:
        thin, thick = sorted(spacing)[-2:]
        slice_axis = (
            int(np.argmax(spacing)) if thick >= THICKEST * thin else next(i for i in range(3) if codes[i] in "IS")
        )
    along = codes[slice_axis]
    rows, columns, slices = next(plane for plane in PLANES.values() if along in (plane[2], OPPOSITE[plane[2]]))
    wanted = (slices, rows, columns)
    axes = [next(i for i in range(3) if codes[i] in (side, OPPOSITE[side])) for side in wanted]
    return tuple(axes), tuple(codes[axis] != side for axis, side in zip(axes, wanted, strict=True))


def _header(path: Path, npy_spacing: tuple[float, ...] | None) -> tuple[tuple[int, ...], tuple[float, ...], str]:
    """(shape, spacing in mm of the first three axes, sides to which they grow) without reading the voxels."""
    if path.suffix == ".npy":
        try:
            shape, _, _ = npy_header(path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if npy_spacing is None:
            raise ValueError(f"{path}: has no spacing, which distances in mm need; add spacing_mm to dataset.yaml")
        return shape, npy_spacing, ""
    try:
        nifti = nibabel.load(path)
        shape, spacing = nifti.shape, nifti.header.get_zooms()[:3]
        codes = "".join(str(code) for code in nibabel.aff2axcodes(nifti.affine))
    except Exception as error:  # a damaged header fails in many ways
        raise ValueError(f"{path}: is not readable as NIfTI ({_first_line(error)}); copy it again") from None
    if len(shape) == 4 and shape[3] == 1:
        shape = shape[:3]
    if len(spacing) < 3 or not all(math.isfinite(mm) and mm > 0 for mm in spacing):
        raise ValueError(f"{path}: has a spacing of {_mm(spacing)}; correct its header")
    if len(codes) != 3 or "None" in codes:
        raise ValueError(f"{path}: its header does not say how the volume lies in the patient; correct it")
    return tuple(shape), tuple(map(float, spacing)), codes


def _listed_spacings(table: Path, about: dict[str, Any]) -> dict[str, tuple[float, ...] | None]:
    """Spacing of .npy cases in mm, in the order of their axes: from cases.csv, and under "" from dataset.yaml."""
    spacings: dict[str, tuple[float, ...] | None] = {"": None}
    try:
        if about.get("spacing_mm") is not None:
            spacings[""] = _three_numbers(about["spacing_mm"])
        if table.is_file():
            with open(table, newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    if row.get("id") and row.get("spacing_mm"):
                        spacings[row["id"]] = _three_numbers(row["spacing_mm"].split(" x "))
    except ValueError as error:
        raise UserError(f"{table.parent}: spacing_mm: {error}; correct it in dataset.yaml or cases.csv") from None
    return spacings


def _three_numbers(values: Any) -> tuple[float, ...]:
    try:
        numbers = tuple(map(float, values))
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3 or not all(math.isfinite(mm) and mm > 0 for mm in numbers):
        raise ValueError(f"{values!r} is not three positive numbers")
    return numbers


def _patients(path: Path | None, about: dict[str, Any]) -> dict[str, Any]:
    """{case: patient}, or {} where nothing says."""
    if path is not None and not path.is_file():
        raise UserError(f"patients: {path}: no such file; give a JSON or YAML file that maps cases to patients")
    people = (_read_yaml(path) if path else about).get("patient")
    if people is None:
        people = _read_yaml(path) if path else {}
    if not isinstance(people, dict):
        raise UserError(f"{path or 'dataset.json'}: patient: must map cases to patients")
    return people


def _read(path: Path) -> np.ndarray:
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        return np.asanyarray(nibabel.load(path).dataobj)
    except Exception as error:  # truncated gzip streams and damaged arrays fail in many ways
        raise UserError(f"{path}: cannot be read ({_first_line(error)}); copy it again") from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({_first_line(error)}); correct it") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be an object, not a {type(content).__name__}")
    return content


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())}); correct it") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a mapping, not a {type(content).__name__}")
    return content


def _declared(root: Path, about: dict[str, Any]) -> Structures:
    """Structures as {"1": "left atrium"} (Decathlon, prepare_data.py) or {"left atrium": 1 or [1, 2]} (nnU-Net)."""
    labels = about.get("structures", about.get("labels"))
    if labels is None:
        raise UserError(
            f"{root}: nothing says what the label values mean; name them, --structures '{{left atrium: [1]}}', or add "
            "labels to dataset.json or structures to dataset.yaml, or choose a --preset"
        )
    try:
        structures: Structures = {}
        for key, value in labels.items():
            by_value = str(key).lstrip("-").isdigit()
            name, values = (str(value), [int(key)]) if by_value else (str(key), value)
            values = values if isinstance(values, list) else [values]
            if [int(v) for v in values] != [0]:
                structures[name] = [int(v) for v in values]
    except (AttributeError, TypeError, ValueError):
        raise UserError(f"{root}: labels: {labels!r} does not map label values to names; correct it") from None
    if not structures:
        raise UserError(f"{root}: labels: {labels!r} names no structure beside the background")
    return structures


def _case_name(path: Path) -> str:
    for suffix in (*NIFTI, ".npy"):
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix)
    return path.stem


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _mm(spacing: Iterable[float]) -> str:
    return " x ".join(f"{value:g}" for value in spacing) + " mm"


def _some(values: Sequence[Any], count: int = 8) -> str:
    return ", ".join(map(str, values[:count])) + (", ..." if len(values) > count else "")

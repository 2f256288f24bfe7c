"""What is in the data tree, from file headers only: the one sample index that every other part counts by."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import math
import os
import re
import stat
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from utils.config import read_yaml
from utils.errors import UserError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}
IMAGE_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")  # PIL tries no other decoder, whatever a file is called
LABEL_FOLDERS = {"labels", "labelstr", "labelsts", "masks"}  # compared in lower case
MONTAGE = "montage.png"  # a picture of the data set for people (prepare_data.py), in its folder, not data
SIDE_FILES = {".yaml", ".yml", ".csv", ".txt", ".md", ".json"}  # may lie beside the data, never read as data
MIN_SIDE = 8  # pixels; a smaller slice holds nothing to learn from
MAX_IMAGE_PIXELS = 80_000_000  # below PIL's own limit; a few bytes of PNG can claim far more
FILES_TO_TIME, SLOW_FILE = 64, 0.0005  # seconds: reading a header takes longer on a network disk only
HEADER_BYTES = 16_384  # numpy refuses NPY headers above 10,000 bytes, so more is never needed
ONE_PARSER = threading.Lock()  # numpy parses headers with ast.literal_eval, which CPython 3.11 cannot do in two threads
# What numpy.save writes for a plain array: read without numpy's parser, which takes ten times as long.
PLAIN_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '([<>|][a-z]\d+)', 'fortran_order': (?:True|False), "
    rb"'shape': \((\d+(?:, \d+)*),?\), \} *\n",
    re.DOTALL,
)
YAML_KEYS = ("modality", "window", "spacing_mm", "slice_axis")
GET_DATA = (
    "put volumes in <data_path>/<data set>/<case>.npy (height x width x slices) and images in further "
    "folders, or use the bundled example, --data_path Training_Data (git checkout -- Training_Data restores it)"
)


@dataclass(frozen=True)
class Sample:
    """One volume or image file. Its index is its position in the list that `scan` returns."""

    path: Path
    name: str  # relative to the data tree, with "/": the same on every machine
    dataset: str  # first-level folder
    kind: Literal["volume", "image"]
    slices: int  # D; 1 for an image
    height: int  # pixels, in plane
    width: int  # pixels, in plane
    slice_axis: int  # which of the three axes of the file counts slices; 2 unless dataset.yaml says otherwise
    window: tuple[float, float] | None  # volumes: intensities to map to 0 and 1; None: robust percentiles
    size_bytes: int
    mtime_ns: int
    # What follows describes a sample for checks (datasets/check.py) and is no part of what it is.
    dtype: str = field(default="", compare=False)  # of a volume's file, e.g. int16; an image's mode in PIL's words
    modality: str | None = field(default=None, compare=False)  # as dataset.yaml says

    @property
    def data_path(self) -> Path:
        """The data tree that the sample was found in."""
        return self.path.parents[self.name.count("/")]


def scan(data_path: str | Path, only: str | None = None) -> list[Sample]:
    """All volumes and images below data_path, ordered by data set and then by relative path (both as bytes).

    A data set is a first-level folder. Hidden files and folders and folders of labels are not entered. Only
    headers are read. only: the one data set that is looked at; None: all. Raises one UserError that lists the first ten bad files, each with its remedy, and counts
    all of them.
    """
    samples, problems = inspect_tree(data_path, only)
    if problems:
        raise bad_files(problems, f"data_path {Path(data_path).expanduser()}")
    return samples


def scan_usable(data_path: str | Path, only: str | None = None) -> tuple[list[Sample], list[str]]:
    """(good samples in the order of `scan`, one line for each file that is not good).

    Raises UserError for what concerns a whole data set, as `scan` does: without its dataset.yaml, for one, volumes
    would be read as something else than they are.
    """
    samples, files, data_sets = _inspect_tree(data_path, only)
    if data_sets:
        raise bad_files(data_sets, f"data_path {Path(data_path).expanduser()}")
    return samples, files


def inspect_tree(data_path: str | Path, only: str | None = None) -> tuple[list[Sample], list[str]]:
    """(good samples in the order of `scan`, one line with its remedy for each data set or file that is not good).

    Raises UserError where there is no data tree at all.
    """
    samples, files, data_sets = _inspect_tree(data_path, only)
    return samples, data_sets + files


def _inspect_tree(data_path: str | Path, only: str | None) -> tuple[list[Sample], list[str], list[str]]:
    """(good samples, problems of single files, problems of whole data sets)."""
    root = Path(data_path).expanduser()
    if not root.exists():
        raise UserError(f"data_path: {root} does not exist; {GET_DATA}")
    if not root.is_dir():
        raise UserError(f"data_path: {root} is a file, not a folder; {GET_DATA}")
    try:
        entries = sorted((e for e in root.iterdir() if not e.name.startswith(".")), key=_as_bytes)
        entries = [e for e in entries if only in (None, e.name)]
    except OSError as error:
        raise UserError(f"data_path: {root} cannot be listed ({error}); change its permissions") from None
    folders = [e for e in entries if e.is_dir() and e.name.lower() not in LABEL_FOLDERS]
    bad = [
        f"{e}: lies outside any data set; move it into a folder, e.g. {root / 'MyData' / e.name}"
        for e in entries
        if not e.is_dir() and _kind(e.name)
    ]
    if not folders and not bad:
        raise UserError(f"data_path: {root} holds no data set ({_found(entries)}); {GET_DATA}")

    samples: list[Sample] = []
    problems: list[str] = []
    for folder in folders:
        settings, files, more_problems = _scan_dataset(folder)
        problems += more_problems
        for result in _inspect_all(files, root, settings):
            (samples if isinstance(result, Sample) else bad).append(result)
    return samples, bad, problems


def volumes(samples: Sequence[Sample]) -> list[int]:
    """Indices of the volumes."""
    return [i for i, sample in enumerate(samples) if sample.kind == "volume"]


def images(samples: Sequence[Sample]) -> list[int]:
    """Indices of the 2D images."""
    return [i for i, sample in enumerate(samples) if sample.kind == "image"]


def slice_offsets(samples: Sequence[Sample]) -> np.ndarray:
    """[N + 1] int64: slice s of sample i has the global slice index offsets[i] + s; the last is the total."""
    return np.cumsum([0] + [sample.slices for sample in samples], dtype=np.int64)


def fingerprint(samples: Sequence[Sample]) -> str:
    """sha256 (hex) over names, file sizes and shapes: changes with the data, but not when they are copied."""
    digest = hashlib.sha256()
    for s in samples:
        fields = (s.name, s.kind, s.size_bytes, s.slices, s.height, s.width)
        digest.update(os.fsencode(repr(fields)) + b"\n")
    return digest.hexdigest()


def describe(samples: Sequence[Sample]) -> str:
    """A short table: for each data set and kind its counts and the range of in-plane sizes in pixels."""
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.dataset, sample.kind), []).append(sample)
    rows = [("data set", "kind", "files", "slices", "height x width")]
    for (dataset, kind), members in groups.items():
        size = f"{_range(s.height for s in members)} x {_range(s.width for s in members)}"
        rows.append((dataset, kind, str(len(members)), str(sum(s.slices for s in members)), size))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e}" for a, b, c, d, e in rows
    )


def bad_files(problems: Sequence[str], where: str) -> UserError:
    """One error for many files: the first ten problems and the count of all of them."""
    if len(problems) == 1:
        return UserError(problems[0])
    lines = [f"{where}: {len(problems)} problems", *(f"  {problem}" for problem in problems[:10])]
    if len(problems) > 10:
        lines.append(f"  ... and {len(problems) - 10} more")
    return UserError("\n".join(lines))


def npy_header(path: Path) -> tuple[tuple[int, ...], np.dtype, int]:
    """(shape, dtype, bytes before the data) of an NPY file of any version. Raises ValueError: what is wrong.

    Nothing is unpickled, and nothing is allocated on the word of the header, which may be a lie.
    """
    with open(path, "rb", buffering=0) as file:
        head = file.read(HEADER_BYTES)
    plain = PLAIN_HEADER.match(head)
    if plain and plain.end() == 10 + int.from_bytes(plain[1], "little"):
        with contextlib.suppress(TypeError):  # a type that numpy does not know; its parser says so below
            return tuple(map(int, plain[3].split(b", "))), np.dtype(plain[2].decode()), plain.end()
    start = io.BytesIO(head)
    magic = head[:8]
    if not magic:
        raise ValueError("is empty (0 bytes); remove it or copy it again")
    if magic.startswith(b"PK\x03\x04"):
        raise ValueError("is a zip archive (.npz); take the array out and write it with np.save")
    if not magic.startswith(b"\x93NUMPY"):
        raise ValueError(f"is not an NPY file (it starts with {magic!r}); write it with np.save or remove it")
    try:
        version = np.lib.format.read_magic(start)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError(f"unknown format version {version}")
        # Version 3 differs from 2 only in how field names are encoded; data with fields are refused anyway.
        one = version == (1, 0)
        read = np.lib.format.read_array_header_1_0 if one else np.lib.format.read_array_header_2_0
        with ONE_PARSER:
            shape, _, dtype = read(start)
    except Exception as error:  # numpy's parser meets arbitrary text here and fails in many ways
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"has a damaged NPY header ({reason}); write it again with np.save") from None
    return shape, dtype, start.tell()


def _scan_dataset(folder: Path) -> tuple[dict[str, Any], list[str], list[str]]:
    """(settings of dataset.yaml, data files in order, problems) of one data set."""
    problems = []
    try:
        settings = _read_settings(folder)
    except UserError as error:
        settings = {}
        problems.append(str(error))
    files, others, seen = [], [], set()
    failed: list[OSError] = []
    for parent, subfolders, names in os.walk(folder, followlinks=True, onerror=failed.append):
        real = os.path.realpath(parent)
        if real in seen:  # a link that leads back up, or a second way to the same files
            subfolders.clear()
            continue
        seen.add(real)
        # Sorted, so that of several links to one folder the same one is always followed.
        subfolders[:] = sorted(n for n in subfolders if not n.startswith(".") and n.lower() not in LABEL_FOLDERS)
        for name in names:
            if not name.startswith(".") and not (name == MONTAGE and parent == str(folder)):
                file = os.path.join(parent, name)
                if _kind(name):
                    files.append(file)
                else:
                    others.append(Path(file))
    problems += [f"{e.filename}: cannot be listed ({e.strerror}); change its permissions" for e in failed]
    if not files and not failed:
        problems.append(
            f"{folder}: this data set has neither .npy volumes nor images ({_found(others)}); convert its volumes to "
            "NPY, height x width x slices, with prepare_data.py, or add images (.png .jpg .tif), or remove the folder"
        )
    return settings, sorted(files, key=os.fsencode), problems


def _read_settings(folder: Path) -> dict[str, Any]:
    """The checked content of <folder>/dataset.yaml; {} where there is none."""
    path = folder / "dataset.yaml"
    if (folder / "dataset.yml").exists():
        raise UserError(f"{folder / 'dataset.yml'}: is not read under this name; rename it to dataset.yaml")
    if not path.exists():
        return {}
    settings = read_yaml(path)
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UserError(f"{path}: must be a mapping, e.g. 'window: [-1000, 400]', not a {type(settings).__name__}")
    # People keep notes of their own in this file, so other keys are fine, but a slip of the pen is not.
    for key in settings:
        close = difflib.get_close_matches(str(key).lower(), YAML_KEYS, n=1, cutoff=0.75)
        if key not in YAML_KEYS and close:
            raise UserError(f"{path}: unknown key {key!r}; did you mean {close[0]!r}?")

    def refuse(key: str, wanted: str) -> UserError:
        return UserError(f"{path}: {key}: {settings[key]!r} is not {wanted}")

    window = settings.get("window")
    if window is not None and not (_numbers(window, 2) and window[0] < window[1]):
        raise refuse("window", "two increasing numbers, e.g. [-1000, 400]")
    spacing = settings.get("spacing_mm")
    if spacing is not None and not (_numbers(spacing, 3) and min(spacing) > 0):
        raise refuse("spacing_mm", "three positive numbers (mm, in the order of the file's axes)")
    axis = settings.get("slice_axis")
    if axis is not None and not (type(axis) is int and 0 <= axis <= 2):
        raise refuse("slice_axis", "0, 1 or 2")
    modality = settings.get("modality")
    if modality is not None and not isinstance(modality, str):
        raise refuse("modality", "a name, e.g. CT or MR")
    return settings


def _inspect_all(files: list[str], root: Path, settings: dict[str, Any]) -> list[Sample | str]:
    """`_inspect` of each file, on threads where a file costs a round trip over a network.

    On a disk nearby threads only take turns: 100,000 headers took 10 s on eight of them and 4 s on one.
    """
    began = time.perf_counter()
    first = [_inspect(file, root, settings) for file in files[:FILES_TO_TIME]]
    rest = files[FILES_TO_TIME:]
    if time.perf_counter() - began < SLOW_FILE * len(first):
        return first + [_inspect(file, root, settings) for file in rest]
    with ThreadPoolExecutor(16) as pool:
        return first + list(pool.map(lambda file: _inspect(file, root, settings), rest))


def _inspect(file: str, root: Path, settings: dict[str, Any]) -> Sample | str:
    """The sample that a file holds, or what is wrong with the file."""
    path = Path(file)
    try:
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("is not a regular file; remove it")
        if status.st_size == 0:
            raise ValueError("is empty (0 bytes); remove it or copy it again")
        kind = _kind(file)
        axis = settings.get("slice_axis")
        axis = 2 if axis is None or kind == "image" else axis
        window = settings.get("window") if kind == "volume" else None  # an image's grey values are not HU
        if kind == "volume":
            slices, height, width, dtype = _volume_header(path, axis, status.st_size)
        else:
            slices, (height, width, dtype) = 1, _image_header(path)
    except ValueError as error:
        return f"{path}: {error}"
    except OSError as error:
        reason = error.strerror or type(error).__name__
        return f"{path}: cannot be read ({reason}); change its permissions, copy it again or remove it"
    name = path.relative_to(root).as_posix()
    return Sample(
        path=path,
        name=name,
        dataset=name.split("/")[0],
        kind=kind,
        slices=slices,
        height=height,
        width=width,
        slice_axis=axis,
        window=None if window is None else (float(window[0]), float(window[1])),
        size_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        dtype=dtype,
        modality=settings.get("modality"),
    )


def _volume_header(path: Path, slice_axis: int, size_bytes: int) -> tuple[int, int, int, str]:
    """(slices, height, width, name of the dtype) of an NPY volume, or ValueError."""
    shape, dtype, offset = npy_header(path)
    if dtype.hasobject:
        raise ValueError("holds Python objects (a pickle), which are never loaded; save a plain numeric array")
    if dtype.kind == "c":
        raise ValueError(f"is complex ({dtype}): k-space or raw MR data; save the magnitude, np.abs(volume)")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise ValueError(f"has dtype {dtype}; save intensities, e.g. volume.astype(np.float32)")
    found = " x ".join(map(str, shape)) or "a single number"
    if len(shape) != 3:
        remedy = {
            2: "save it as an image (.png), or stack the slices of a volume",
            4: "pick one channel or time point, e.g. volume[..., 0]",
        }.get(len(shape), "save one volume per file")
        raise ValueError(f"is {len(shape)}D ({found}) where height x width x slices is needed; {remedy}")
    if min(shape) < 1:
        raise ValueError(f"has an axis of length {min(shape)} ({found}); remove it or export it again")
    expected = offset + dtype.itemsize * math.prod(shape)
    if size_bytes != expected:
        what = "is truncated" if size_bytes < expected else "has trailing bytes"
        raise ValueError(f"{what}: {size_bytes} bytes where {found} {dtype} needs {expected}; copy it again")
    height, width = (length for axis, length in enumerate(shape) if axis != slice_axis)
    if min(height, width) < MIN_SIDE:
        raise ValueError(
            f"has slices of {height} x {width} pixels ({found}, slices along axis {slice_axis}), below "
            f"{MIN_SIDE}; remove it, or set slice_axis in dataset.yaml if its slices lie along another axis"
        )
    return shape[slice_axis], height, width, dtype.name


def _image_header(path: Path) -> tuple[int, int, str]:
    """(height, width, mode) of an image, or ValueError."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            (width, height), mode = image.size, image.mode
            pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"claims more than {MAX_IMAGE_PIXELS} pixels; reduce it or remove it") from None
    except PermissionError:
        raise
    except Exception:  # decoders fail in many ways on arbitrary bytes
        raise ValueError("is not a readable PNG, JPEG, TIFF or BMP image; export it again or remove it") from None
    if pages > 1:
        raise ValueError(f"is a stack of {pages} pages; save it as a volume, height x width x {pages} .npy")
    if width * height > MAX_IMAGE_PIXELS:
        raise ValueError(f"has {height} x {width} pixels, above {MAX_IMAGE_PIXELS}; reduce it or remove it")
    if min(height, width) < MIN_SIDE:
        raise ValueError(f"has {height} x {width} pixels, below {MIN_SIDE} in one direction; remove it")
    return height, width, mode


def _kind(name: str) -> Literal["volume", "image"] | None:
    suffix = os.path.splitext(name)[1].lower()
    return "volume" if suffix == ".npy" else "image" if suffix in IMAGE_SUFFIXES else None


def _as_bytes(path: Path) -> bytes:
    return os.fsencode(path.name)


def _numbers(value: Any, count: int) -> bool:
    """Whether value is a list of this many finite numbers."""
    return (
        isinstance(value, list)
        and len(value) == count
        and all(type(x) in (int, float) and math.isfinite(x) for x in value)
    )


def _found(paths: Sequence[Path]) -> str:
    """What lies there instead of data, e.g. `found 12 .nii.gz, 1 .json`."""
    kinds: Counter[str] = Counter()
    for path in paths:
        if path.is_dir():
            kinds[f"folder {path.name}"] += 1
        else:
            ends = path.suffixes[-2:] if path.suffix.lower() == ".gz" else path.suffixes[-1:]
            kinds["".join(ends) or "without suffix"] += 1
    # Side files last: a .nii.gz says more about what went wrong than the README beside it.
    order = sorted(kinds, key=lambda k: (k in SIDE_FILES, -kinds[k], k))
    return "found " + (", ".join(f"{kinds[k]} {k}" for k in order[:5]) or "nothing")


def _range(values: Iterable[int]) -> str:
    values = list(values)
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}..{high}"

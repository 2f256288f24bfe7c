"""What is in the data tree, from file headers only: the one sample index that every other part counts by."""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from utils.config import read_yaml
from utils.errors import UserError
from utils.files import shown

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}
IMAGE_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")  # PIL tries no other decoder, whatever a file is called
LABEL_FOLDERS = {"labels", "labelstr", "labelsts", "masks"}  # compared in lower case
MONTAGE = "montage.png"  # a picture of the data set for people (prepare_data.py), in its folder, not data
SIDE_FILES = {".yaml", ".yml", ".csv", ".txt", ".md", ".json"}  # may lie beside the data, never read as data
ORIENTATION = 0x0112  # EXIF tag
MIN_SIDE = 8  # pixels; a smaller slice holds nothing to learn from
MAX_IMAGE_PIXELS = 80_000_000  # below PIL's own limit; a few bytes of PNG can claim far more
THREADS = 8  # that read headers: on a network disk each costs a round trip
HEADER_BYTES = 16_384  # numpy refuses NPY headers above 10,000 bytes, so more is never needed
# Numpy's own parser takes five times as long, and in CPython 3.11 it fails when two threads use it at once.
NPY_ENTRIES = re.compile(
    rb"""(?=.*["']descr["']: *["']([<>|=]?[a-zA-Z]\d{0,9}(?:\[\w+\])?)["'])(?=.*["']shape["']: *\(([\d, ]*)\))""",
    re.DOTALL,
)
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
    slice_axis: int  # which of the first three axes of the file counts slices; 2 unless dataset.yaml says otherwise
    window: tuple[float, float] | None  # volumes: intensities to map to 0 and 1; None: robust percentiles
    size_bytes: int
    mtime_ns: int
    aligned_with: str | None = None  # data set whose positions correspond to this one's, as dataset.yaml says
    content: str = field(default="", compare=False)  # digest of the file, known when it stands in the cache
    # What follows describes a sample for checks (datasets/check.py) and is no part of what it is.
    dtype: str = field(default="", compare=False)  # of a volume's file, e.g. int16; an image's mode in PIL's words
    modality: str | None = field(default=None, compare=False)  # as dataset.yaml says
    channel_names: tuple[str, ...] = field(default=(), compare=False)  # of a file with a fourth axis

    @property
    def channels(self) -> int:
        """Length of the file's fourth axis; 1 where it has three."""
        return len(self.channel_names) or 1

    @property
    def data_path(self) -> Path:
        """The data tree that the sample was found in."""
        return self.path.parents[self.name.count("/")]


def scan(
    data_path: str | Path, only: str | None = None, settings: Mapping[str, Any] | None = None
) -> tuple[list[Sample], list[str]]:
    """(all good volumes and images below data_path, problems of the other files, each with its remedy).

    Ordered by data set, a first-level folder, then by relative path (both as bytes). Only headers are read.
    only: the one data set that is looked at.  settings: win over those of dataset.yaml.
    Raises UserError where there are no data, or one is not in order.
    """
    root = Path(data_path).expanduser()
    try:
        entries = [e for e in root.iterdir() if not e.name.startswith(".") and only in (None, e.name)]
    except OSError as error:
        reason = f"does not exist or cannot be listed ({error.strerror})"
        raise UserError(f"data_path: {root} {reason}; {GET_DATA}") from None
    entries.sort(key=lambda e: os.fsencode(e.name))
    folders = [e for e in entries if e.is_dir() and e.name.lower() not in LABEL_FOLDERS]
    folders = [e for e in folders if not (e.is_symlink() and leads_into(e, root, LABEL_FOLDERS))]
    bad = [
        f"{e}: lies outside any data set; move it into a folder, e.g. {root / 'MyData' / e.name}"
        for e in entries
        if not e.is_dir() and _kind(e.name)
    ]
    if not folders and not bad:
        raise UserError(f"data_path: {root} holds no data set ({_found(entries)}); {GET_DATA}")

    samples: list[Sample] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for folder in folders:
            inspect = partial(_inspect, root=root, settings=read_settings(folder) | (settings or {}))
            for result in pool.map(inspect, _data_files(folder)):
                (samples if isinstance(result, Sample) else bad).append(result)
    return samples, bad


def volumes(samples: Sequence[Sample]) -> list[int]:
    """Indices of the volumes."""
    return [i for i, sample in enumerate(samples) if sample.kind == "volume"]


def fingerprint(samples: Sequence[Sample]) -> str:
    """Two sha256 (hex) in one over all that a run sees of the data: changes with them, but not when they are copied.

    The first, of names, sizes and shapes, is all that versions before this one knew of a run's data; the second is of
    how files are read and, where that is known, of what they hold.
    """
    layout, content = hashlib.sha256(), hashlib.sha256()
    for s in samples:
        fields = (s.name, s.kind, s.size_bytes, s.slices, s.height, s.width)
        layout.update(os.fsencode(repr(fields)) + b"\n")
        content.update(os.fsencode(repr((s.slice_axis, s.window, s.content))) + b"\n")
    return layout.hexdigest() + content.hexdigest()


def groups(samples: Iterable[Sample]) -> dict[tuple[str, str], list[Sample]]:
    """Samples by data set and kind."""
    found: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        found.setdefault((sample.dataset, sample.kind), []).append(sample)
    return found


def describe(samples: Iterable[Sample]) -> str:
    """A line for each data set and kind: its counts and the range of in-plane sizes in pixels."""
    lines = []
    for (dataset, kind), members in groups(samples).items():
        slices = f", {sum(s.slices for s in members)} slices" if kind == "volume" else ""
        size = f"{_range(s.height for s in members)} x {_range(s.width for s in members)}"
        lines.append(f"{dataset}: {len(members)} {kind}{'s' * (len(members) > 1)}{slices}, {size} pixels")
    return "\n".join(lines)


def bad_files(problems: Sequence[str], where: str) -> UserError:
    """One error for many files: the first ten problems and the count of all of them."""
    if len(problems) == 1:
        return UserError(problems[0])
    lines = [f"{where}: {len(problems)} problems", *(f"  {problem}" for problem in problems[:10])]
    if len(problems) > 10:
        lines.append(f"  ... and {len(problems) - 10} more")
    return UserError("\n".join(lines))


def npy_header(path: Path) -> tuple[tuple[int, ...], np.dtype, int]:
    """(shape, dtype, bytes before the data) of an NPY file of any version; unpickles nothing. Raises ValueError."""
    with open(path, "rb", buffering=0) as file:
        return npy_layout(file.read(HEADER_BYTES))


def npy_layout(head: bytes) -> tuple[tuple[int, ...], np.dtype, int]:
    """What `npy_header` returns, of the first HEADER_BYTES of a file."""
    if not head:
        raise ValueError("is empty (0 bytes); remove it or copy it again")
    if not head.startswith(b"\x93NUMPY"):
        zipped = "a zip archive (.npz)" if head.startswith(b"PK\x03\x04") else "not an NPY file"
        raise ValueError(f"is {zipped}, it starts with {head[:8]!r}; write a single array with np.save or remove it")
    start = 10 if head[6:7] == b"\x01" else 12
    end = start + int.from_bytes(head[8:start], "little")
    entries = NPY_ENTRIES.match(head[start:end])
    try:
        return tuple(map(int, re.findall(rb"\d+", entries[2]))), np.dtype(entries[1].decode()), end
    except TypeError:  # no entries, or no such type
        raise ValueError("has a damaged NPY header, or several columns; write one array with np.save") from None


def read_settings(folder: Path) -> dict[str, Any]:
    """The checked content of <folder>/dataset.yaml; {} where there is none. Raises UserError."""
    path = folder / "dataset.yaml"
    if (folder / "dataset.yml").exists():
        raise UserError(f"{folder / 'dataset.yml'}: is not read under this name; rename it to dataset.yaml")
    if path.exists() and not path.is_file():  # a FIFO would be waited for
        raise UserError(f"{path}: is not a regular file; remove it")
    settings = read_yaml(path) if path.exists() else None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UserError(f"{path}: must be a mapping, e.g. 'window: [-1000, 400]', not a {type(settings).__name__}")
    # People keep notes of their own in this file, so other keys are fine, but a slip of the pen is not.
    for key, value in settings.items():
        close = difflib.get_close_matches(str(key).lower(), SETTINGS, n=1, cutoff=0.75)
        if key not in SETTINGS and close:
            raise UserError(f"{path}: unknown key {key!r}; did you mean {close[0]!r}?")
        good, wanted = SETTINGS.get(key, (None, ""))
        if good and value is not None and not good(value):
            raise UserError(f"{path}: {key}: {value!r} is not {wanted}")
    return settings


def _numbers(value: Any, count: int) -> bool:
    """Whether value is a list of this many finite numbers."""
    right = isinstance(value, list) and len(value) == count
    return right and all(type(x) in (int, float) and math.isfinite(x) for x in value)


# Keys of dataset.yaml: what is a good value, in code and in words.
SETTINGS: dict[str, tuple[Callable[[Any], bool] | None, str]] = {
    "window": (lambda v: _numbers(v, 2) and v[0] < v[1], "two increasing numbers, e.g. [-1000, 400]"),
    "spacing_mm": (lambda v: _numbers(v, 3) and min(v) > 0, "three positive numbers (mm, in the order of the axes)"),
    "slice_axis": (lambda v: type(v) is int and 0 <= v <= 2, "0, 1 or 2"),
    "modality": (lambda v: isinstance(v, str), "a name, e.g. CT or MR"),
    "aligned_with": (lambda v: isinstance(v, str), "the name of a data set with the same anatomy from end to end"),
    "channels": (
        lambda v: isinstance(v, list) and bool(v) and all(isinstance(name, str) for name in v),
        "a list of names, one for each place along the files' fourth axis, e.g. [t1, t2]",
    ),
    "structures": (
        lambda v: isinstance(v, dict) and all(isinstance(x, list) and {*map(type, x)} <= {int} for x in v.values()),
        "names with lists of label values, e.g. {left atrium: [1]}",
    ),
}


def walk(folder: Path, skip: Container[str] = ()) -> Iterator[Path]:
    """The files below a folder, but hidden ones and its montage. Raises UserError where one cannot be listed.

    Links are followed, to each folder once, and last: what a link shows has its own name where it lies in the tree,
    too.  skip: names of folders, in lower case, that are not entered, whatever a link to them is called.
    """
    seen: set[str] = set()
    waiting, links = [folder], []  # folders still to be listed
    while waiting or links:
        parent = waiting.pop() if waiting else links.pop(0)
        real = os.path.realpath(parent)
        if real in seen:  # a link that leads back up, or a second way to the same files
            continue
        seen.add(real)
        try:
            with os.scandir(parent) as found:
                entries = sorted((e for e in found if not e.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            raise UserError(f"{parent}: cannot be listed ({error.strerror}); change its permissions") from None
        folders = []
        for entry in entries:
            path = parent / entry.name
            linked = entry.is_symlink()
            if (entry.name.lower() if entry.is_dir() else "") in skip or (linked and leads_into(path, folder, skip)):
                continue
            if entry.is_dir():
                (links if linked else folders).append(path)
            elif path != folder / MONTAGE:
                yield path
        waiting += reversed(folders)


def leads_into(link: Path, root: Path, folders: Container[str]) -> bool:
    """Whether what a link shows is, or lies in, a folder with one of these names (in lower case), seen from `root`."""
    real = os.path.realpath(link)
    way = os.path.relpath(real, os.path.realpath(root)).lower().split(os.sep)
    return any(part in folders for part in (way if os.path.isdir(real) else way[:-1]))


def _data_files(folder: Path) -> list[Path]:
    """The data files of a data set in order. Raises UserError where there are none or they cannot be listed."""
    found = list(walk(folder, LABEL_FOLDERS))
    files = [path for path in found if _kind(path.name)]
    if not files:
        raise UserError(
            f"{folder}: this data set has neither .npy volumes nor images ({_found(found)}); convert its volumes to "
            "NPY, height x width x slices, with prepare_data.py, or add images (.png .jpg .tif), or remove the folder"
        )
    return sorted(files, key=os.fsencode)


def _inspect(path: Path, root: Path, settings: dict[str, Any]) -> Sample | str:
    """The sample that a file holds, or what is wrong with the file."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("is not a regular file; remove it")
        kind, name = _kind(path.name), path.relative_to(root).as_posix()
        layout = _volume_header(path, status.st_size, settings) if kind == "volume" else image_header(path)
        about = {"size_bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "modality": settings.get("modality")}
        about["aligned_with"] = settings.get("aligned_with")
        sample = Sample(path, name, name.split("/")[0], kind, **layout, **about)
        if min(sample.height, sample.width) < MIN_SIDE or not sample.slices:
            raise ValueError(
                f"has {sample.slices} slices of {sample.height} x {sample.width} pixels, below {MIN_SIDE}; remove it, "
                "or set slice_axis in dataset.yaml if its slices lie along another axis"
            )
        return sample
    except ValueError as error:
        return f"{shown(path)}: {error}"
    except OSError as error:
        reason = error.strerror or type(error).__name__
        return f"{shown(path)}: cannot be read ({reason}); change its permissions, copy it again or remove it"


def _volume_header(path: Path, size_bytes: int, settings: dict[str, Any]) -> dict[str, Any]:
    """What the header of an NPY volume and dataset.yaml say: fields of a Sample. Raises ValueError."""
    shape, dtype, offset = npy_header(path)
    if dtype.kind not in "iuf" or dtype.itemsize > 8:  # objects would have to be unpickled
        raise ValueError(
            f"has dtype {dtype}; save intensities, e.g. volume.astype(np.float32), of complex ones the magnitude, "
            "np.abs(volume), and never Python objects"
        )
    found = " x ".join(map(str, shape)) or "a single number"
    channels = tuple(settings.get("channels") or ())
    if len(shape) != 3 and (len(shape) != 4 or len(channels) != shape[3]):
        raise ValueError(
            f"is {len(shape)}D ({found}) where height x width x slices is needed; save 2D slices as images (.png), one "
            "volume per file, or name all channels of a fourth axis in dataset.yaml, e.g. channels: [t1, t2]"
        )
    expected = offset + dtype.itemsize * math.prod(shape)
    if size_bytes != expected:
        what = "is truncated" if size_bytes < expected else "has trailing bytes"
        raise ValueError(f"{what}: {size_bytes} bytes where {found} {dtype} needs {expected}; copy it again")
    axis = 2 if settings.get("slice_axis") is None else settings["slice_axis"]
    height, width = (length for i, length in enumerate(shape[:3]) if i != axis)
    window = settings.get("window")
    return {
        **{"slices": shape[axis], "height": height, "width": width, "slice_axis": axis, "dtype": dtype.name},
        "window": None if window is None else (float(window[0]), float(window[1])),
        "channel_names": channels if len(shape) == 4 else (),
    }


def image_header(path: Path) -> dict[str, Any]:
    """What the header of an image says: fields of a Sample. Raises ValueError. A window is for HU, never for these."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            layout = image_layout(image)
    except PermissionError:
        raise
    except Exception:  # decoders fail in many ways on arbitrary bytes
        raise ValueError("is not a readable PNG, JPEG, TIFF or BMP image; export it again or remove it") from None
    if layout["slices"] > 1:
        raise ValueError(f"is a stack of {layout['slices']} pages; convert it to a volume with prepare_data.py")
    if layout["height"] * layout["width"] > MAX_IMAGE_PIXELS:
        raise ValueError(f"has more than {MAX_IMAGE_PIXELS} pixels; reduce it or remove it")
    return layout


def image_layout(image: Image.Image) -> dict[str, Any]:
    """Of an open image: height and width are those of the upright picture, slices its pages."""
    (width, height), mode = image.size, image.mode
    pages = 1 if image.format in ("PNG", "JPEG", "MPO") else getattr(image, "n_frames", 1)
    if orientation(image) > 4:
        height, width = width, height
    return {"slices": pages, "height": height, "width": width, "slice_axis": 2, "window": None, "dtype": mode}


def holds_labels(mode: str) -> bool:
    """Whether pixels of one of PIL's modes are numbers, as label values must be; those of a palette are its indices."""
    return mode in ("1", "L", "P", "I") or mode.startswith("I;16")


def orientation(image: Image.Image) -> int:
    """EXIF's way to turn an open image upright, 1 to 8; 1 is none. PIL turns TIFF itself."""
    try:
        turn = image.getexif().get(ORIENTATION, 1) if "exif" in image.info and image.format != "TIFF" else 1
    except Exception:  # damaged EXIF data, which say nothing about the pixels
        return 1
    return turn if turn in range(1, 9) else 1


def _kind(name: str) -> Literal["volume", "image"] | None:
    suffix = os.path.splitext(name)[1].lower()
    return "volume" if suffix == ".npy" else "image" if suffix in IMAGE_SUFFIXES else None


def _found(paths: Iterable[Path]) -> str:
    """What lies there instead of data, e.g. `found 12 .nii.gz, 1 .json`."""
    kinds = Counter(re.search(r"(\.\w+)?(\.gz)?$", path.name)[0] or "without suffix" for path in paths)
    return "found " + (", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5)) or "nothing")


def _range(values: Iterable[int]) -> str:
    ordered = sorted(set(values))
    return f"{ordered[0]}..{ordered[-1]}" if len(ordered) > 1 else str(ordered[0])

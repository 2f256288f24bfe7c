"""NPY, NPZ and HDF5: arrays without geometry, which may be volumes, pictures, or many cases in one.

Nothing is unpickled, no memory is taken for what a file only claims to hold, and no other file is opened.
"""

from __future__ import annotations

import functools
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conversion.claims import DEFLATE, require_room
from conversion.volume import BadFile, Options, Volume, by, luminance, with_channels
from datasets.check import likely_slice_axis
from datasets.index import HEADER_BYTES, MIN_SIDE, npy_header, npy_layout

COLOURS = (3, 4)  # lengths of an axis that counts them


class Part(NamedTuple):
    """One case of an array that holds many."""

    array: str  # name in its file; "" of an NPY
    index: int


def read_array(path: Path, options: Options, part: Part | None = None) -> Volume:
    """A volume without geometry, its slices moved to the third axis and its channels to the fourth, or a picture."""
    name = (part and part.array) or _pick(array_shapes(path), options.array_key)
    array = (
        _cases(path, path.stat().st_mtime_ns, name, options.case_axis or 0)[part.index] if part else load(path, name)
    )
    shape, notes = array.shape, []
    if array.ndim == 3 and shape[2] in COLOURS and min(shape[:2]) >= MIN_SIDE and options.array_axis is None:
        if array.dtype != np.uint8 or options.channel is not None:
            raise BadFile(
                f"is a colour picture or a volume of {shape[2]} slices ({by(shape)}); say --array_axis 2 for slices, "
                "or save pictures as PNG"
            )
        notes.append(f"{by(shape)}: a colour picture, taken as its luminance; --array_axis 2 if these are slices")
        array = luminance(array)
    if array.ndim == 2:
        return Volume(array[:, :, None], notes=notes, flat=True)
    array = with_channels(array, options.channel, options.channel_axis)
    if array.ndim < 3:
        raise BadFile(f"is {array.ndim}D ({by(shape)}), neither a volume nor a picture; name another with --array_key")
    axis = 2 if options.array_axis is None else options.array_axis
    likely = likely_slice_axis(array.shape[:3], axis)
    if options.array_axis is None and likely != axis:
        raise BadFile(
            f"its slices seem to lie along axis {likely} ({by(array.shape)}): say --array_axis {likely}, or "
            f"--array_axis 2 if they do lie along the last"
        )
    return Volume(np.moveaxis(array, axis, 2), notes=notes)


def array_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the arrays in a file, from its headers alone."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return {"": _npy_header(path)[0]}
    if suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            return {name[:-4]: npy_layout(archive.open(name).read(HEADER_BYTES))[0] for name in names}
    import h5py

    found: dict[str, tuple[int, ...]] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.shape is not None:
            found[name] = item.shape

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return found


def load(path: Path, name: str) -> np.ndarray:
    """One array of a file, whole. Raises BadFile for one that cannot be what its header claims."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        shape, dtype, offset = _npy_header(path)
        _require(shape, dtype, path.stat().st_size - offset)
        return np.load(path, allow_pickle=False)
    if suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(f"{name}.npy")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise BadFile("is compressed in a way that numpy never writes; save it again with np.savez")
            with archive.open(info) as member:
                shape, dtype, offset = npy_layout(member.read(HEADER_BYTES))
            _require(shape, dtype, info.file_size - offset)
            require_room(info.file_size, min(info.compress_size, path.stat().st_size), info.compress_type > 0)
        with np.load(path, allow_pickle=False) as archive:
            return archive[name]
    import h5py

    with h5py.File(path, "r") as file:
        data = file[name]
        if data.is_virtual or data.external:
            raise BadFile(f"{name} lies in other files; save it as one file, e.g. with h5repack or h5py")
        filtered = data.id.get_create_plist().get_nfilters() > 0
        _require(data.shape, data.dtype, data.id.get_storage_size(), filtered)
        return np.asarray(data[...])


def _npy_header(path: Path) -> tuple[tuple[int, ...], np.dtype, int]:
    try:
        return npy_header(path)
    except ValueError as error:
        raise BadFile(f"{error}") from None


def _require(shape: tuple[int, ...], dtype: np.dtype, stored: int, compressed: bool = False) -> None:
    if dtype.kind not in "iufbc":
        raise BadFile(f"has dtype {dtype}, not intensities; save numbers, never Python objects")
    require_room(math.prod(map(int, shape)) * dtype.itemsize, stored, compressed)


@functools.lru_cache(maxsize=1)
def _cases(path: Path, mtime_ns: int, name: str, axis: int) -> np.ndarray:
    """[N, ...] an array of many cases; remembered, as its cases are converted one after the other."""
    return np.moveaxis(load(path, name), axis, 0)


def cases_in(path: Path, case_axis: int | None, key: str) -> list[Part]:
    """The cases of a file that holds many in an array: by `case_axis`, or in MedMNIST's layout; else none.

    key: the array that is meant; "": all.
    """
    try:
        shapes, stored = array_shapes(path), path.stat().st_size
    except Exception:  # said when it is to be converted
        return []
    if case_axis is None:
        shapes = {name: shape for name, shape in shapes.items() if _of_medmnist(name, shapes)}
        case_axis = 0
    return [
        Part(name, index)
        for name, shape in shapes.items()
        if len(shape) >= 3 and case_axis < len(shape) and key in ("", name) and math.prod(shape) <= DEFLATE * stored
        for index in range(shape[case_axis])
    ]


def _of_medmnist(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """train_images of (N, H, W), (N, H, W, 3) or (N, D, H, W) beside train_labels of (N, classes), and so on."""
    split, _, what = name.rpartition("_")
    labels = shapes.get(f"{split}_labels", ())
    return split in ("train", "val", "test") and what == "images" and labels[:1] == shapes[name][:1]


def _pick(shapes: Mapping[str, tuple[int, ...]], key: str) -> str:
    """The name of the array to read."""
    if key in shapes or shapes.keys() == {""}:  # an NPY has no names
        return key if key in shapes else ""
    volumes = [name for name, shape in shapes.items() if len(shape) >= 3]
    pictures = [name for name, shape in shapes.items() if len(shape) == 2 and min(shape) >= MIN_SIDE]
    found = volumes or pictures
    if len(found) == 1 and not key:
        return found[0]
    listed = ", ".join(f"{name} ({by(shape)})" for name, shape in list(shapes.items())[:8]) or "nothing"
    what = f"has no array {key!r}" if key else f"has {'several volumes' if found else 'no volume'}"
    raise BadFile(f"{what} among {listed}; name one with --array_key, and its label map with --label_key")

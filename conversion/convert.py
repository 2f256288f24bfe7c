"""One case of any format to its files in a prepared tree, which is what training and downstream read:

    <dest>/<id>.npy          a volume (height, width, slices), or (height, width, slices, channels); images: <id>.png ...
    <dest>/labels/<id>.npy   its label map (height, width, slices) in an unsigned integer type; of an image: <id>.png ...
    <dest>/cases.csv         a line per case with the columns of `Case`
    <dest>/dataset.yaml      what holds for all cases; a key is missing where nothing is known or cases differ

dataset.yaml: modality; window (two intensities that become 0 and 1); slice_axis (always 2); plane and orientation
(sides towards which rows, columns and slices grow, such as PLS); spacing_mm (rows, columns, slices); channels (names,
in the order of the fourth axis); structures ({name: [label values]}, which may overlap, background left out); source.

cases.csv, beside what its names say: `patient` is empty where the source does not tell it. `channels` are joined by
", ". `affine` takes voxels of the stored array to millimetres: the first three rows of the 4 x 4 matrix, row by row,
as 12 numbers with spaces between: (row, column, slice, 1) -> (to the right, to the front, to the head), nibabel's RAS,
a voxel's centre at whole numbers. So a mask of the array's shape is put back on the scan's grid by

    affine = np.vstack([np.array(case["affine"].split(), float).reshape(3, 4), [0, 0, 0, 1]])
    nibabel.Nifti1Image(mask, affine)

A volume is turned to one of three planes as radiologists view them, by permuting and flipping its axes (never by
interpolation), resampled if asked, and written slice by slice in the smallest type that holds its intensities.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from conversion.images import convert_image
from conversion.layouts import Source
from conversion.readers import read
from conversion.table import LABELS, Case
from conversion.volume import BadFile, Options, View, Volume, arrange, by, channel_index
from conversion.write import resample, stored_range, type_to_write, write_npy
from datasets.index import MIN_SIDE

VERSION = 2  # raise it when the content of converted files changes, so that they are made again
SPACING_TOLERANCE = 0.02  # of a label map against its image, as a share


def attempt(source: Source, case_id: str, dest: Path, options: Options) -> Case | str:
    """The case, written below `dest`, or what is wrong with its files."""
    try:
        key = source_key(source, options)
        image = source.format in ("image", "dicom_image")
        case = convert_image(source, case_id, dest) if image else _convert_volume(source, case_id, dest, options)
    except BadFile as error:
        return f"{source.path}: {error}"
    except MemoryError:
        return f"{source.path}: does not fit into memory; use fewer --workers"
    case.key, case.original_files = key, str(len(source.files))
    case.modality, case.patient = source.modality, source.patient
    return case


def source_key(source: Source, options: Options) -> str:
    """Changes with the source's files and with the options. Raises BadFile where a file is gone."""
    files = [*source.files, *([source.label] if source.label else [])]
    try:
        stats = [(file.name, (status := file.stat()).st_size, status.st_mtime_ns) for file in files]
    except OSError as error:
        raise BadFile(f"cannot be read ({error.strerror}); copy it again") from None
    # The window is applied in training, so another one changes no file.
    settings = asdict(replace(options, window=None))
    text = repr((source.name, sorted(stats), source.channels, sorted(settings.items()), VERSION))
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:32]


def outside(low: float, high: float, window: tuple[float, float] | None) -> bool:
    """Whether a window would make everything black or everything white."""
    return window is not None and (high <= window[0] or low >= window[1])


def _convert_volume(source: Source, case_id: str, dest: Path, options: Options) -> Case:
    volume = _read(source, options)
    view = arrange(volume, options.slice_axis)
    if min(view.array.shape[:2]) < MIN_SIDE:
        side = " x ".join(map(str, view.array.shape[:2]))
        raise BadFile(f"has slices of {side} pixels, below {MIN_SIDE}; remove it, or choose another --slice_axis")
    label = _read_label(source, volume, view, options)
    low, high = _intensity_range(volume, view, options)
    original = volume.array.dtype.newbyteorder("=")
    dtype = type_to_write(original, volume.slope, volume.intercept, low, high)
    shape, affine = _grid(view, options.spacing_mm)
    notes = [*volume.notes, *(["has a single slice"] if view.array.shape[2] == 1 else [])]
    case = Case(
        id=case_id,
        source=source.name,
        file=f"{case_id}.npy",
        channels=", ".join(_channel_names(source, volume)),
        plane=view.plane,
        orientation=view.codes,
        spacing_mm=by(view._replace(affine=affine).spacing_mm),
        affine="" if affine is None else " ".join(f"{x:.10g}" for x in affine[:3].ravel()),
        shape=by(shape),
        dtype=str(dtype),
        minimum=f"{low:g}",
        maximum=f"{high:g}",
        original_orientation=volume.codes,
        original_spacing_mm=by(volume.spacing_mm),
        original_shape=by(volume.array.shape),
        original_dtype=str(original),
        notes="; ".join(notes),
    )
    if label is not None:  # first, so that an image with a label never stands without it
        label = label if shape == view.array.shape else resample(label, shape[:3], nearest=True)
        case.label = f"{LABELS}/{case_id}.npy"
        pages = (label[:, :, k] for k in range(label.shape[2]))
        case.label_bytes = str(write_npy(dest / case.label, pages, label.shape, label.dtype)[1])
    case.sha256, size = write_npy(dest / case.file, _pages(volume, view.array, shape, options), shape, dtype)
    case.bytes = str(size)
    return case


def _read(source: Source, options: Options) -> Volume:
    """The volume; with all of its channels where the data set names them and none was chosen."""
    named = bool(source.channels) and options.channel is None
    volume = read(source.format, source.files, replace(options, channel="all") if named else options)
    if named and volume.array.ndim == 4 and volume.array.shape[3] != len(source.channels):
        channel_index(volume.array.shape, None, -1)  # raises: these are not the channels that were named
    volume.codes = options.orientation or volume.codes
    return volume


def _channel_names(source: Source, volume: Volume) -> tuple[str, ...]:
    if volume.array.ndim == 3:
        return ()
    count = volume.array.shape[3]
    return source.channels if len(source.channels) == count else tuple(map(str, range(count)))


def _channels(array: np.ndarray) -> list[np.ndarray]:
    """The [H, W, D] of each channel."""
    return [array] if array.ndim == 3 else [array[..., channel] for channel in range(array.shape[3])]


def _intensity_range(volume: Volume, view: View, options: Options) -> tuple[float, float]:
    """The smallest and the largest intensity. Raises BadFile where they are of no use."""
    ranges = []
    for channel in _channels(view.array):
        ends = stored_range(channel, options.nan_value)
        low, high = sorted(volume.slope * end + volume.intercept for end in ends)
        if low == high:
            where = "" if view.array.ndim == 3 else f" in channel {len(ranges)}"
            raise BadFile(
                f"is constant{where} (all voxels are {low:g}), so there is nothing to learn from it; remove it"
            )
        ranges.append((low, high))
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    if outside(low, high, options.window):
        raise BadFile(
            f"its intensities, {low:g} to {high:g}, lie outside the window {list(options.window)}; correct --window, "
            "or convert it into a data set of its own"
        )
    return low, high


def _grid(view: View, spacing_mm: tuple[float, ...]) -> tuple[tuple[int, ...], np.ndarray | None]:
    """(shape, affine) of what is written: the view's own, or over the same extent with other voxels."""
    old = view.array.shape
    if not any(spacing_mm):
        return old, view.affine
    if view.affine is None:
        raise BadFile("does not say its spacing, so it cannot be resampled; leave --spacing_mm out")
    new = tuple(
        max(1, round(n * mm / wanted)) if wanted else n
        for n, mm, wanted in zip(old[:3], view.spacing_mm, spacing_mm, strict=True)
    )
    if min(new[:2]) < MIN_SIDE:
        raise BadFile(f"would have slices of {new[0]} x {new[1]} pixels, below {MIN_SIDE}; correct --spacing_mm")
    ratio = np.array(old[:3]) / new
    affine = view.affine @ np.diag([*ratio, 1.0])
    affine[:3, 3] += view.affine[:3, :3] @ ((ratio - 1) / 2)  # the first voxel's centre moves with its size
    return (*new, *old[3:]), affine


def _pages(volume: Volume, array: np.ndarray, shape: tuple[int, ...], options: Options) -> Iterator[np.ndarray]:
    """The intensities [H, W] of every slice, channel after channel."""

    def scaled(block: np.ndarray) -> np.ndarray:
        if block.dtype.kind == "f" and options.nan_value is not None:
            block = np.where(np.isfinite(block), block, block.dtype.type(options.nan_value))
        if (volume.slope, volume.intercept) == (1, 0):
            return block
        return block * np.float64(volume.slope) + volume.intercept

    for channel in _channels(array):
        if shape == array.shape:
            yield from (scaled(channel[:, :, k]) for k in range(shape[2]))
            continue
        intensities = np.empty(channel.shape, dtype=np.float32, order="F")
        for k in range(channel.shape[2]):
            intensities[:, :, k] = scaled(channel[:, :, k])
        yield from resample(intensities, shape[:3]).transpose(2, 0, 1)


def _read_label(source: Source, volume: Volume, image: View, options: Options) -> np.ndarray | None:
    """[H, W, D] label map of a volume arranged as `image`, in an unsigned integer type where it fits."""
    if not (source.label or options.label_key):
        return None
    path, format = (source.label, source.label_format) if source.label else (source.path, source.format)
    try:
        if format in ("image", "dicom_image", "dicom"):
            raise BadFile("is not a volume, as its image is; give a label map of the image's shape")
        key = "" if source.label else options.label_key
        label = read(format, (path,), Options(array_axis=options.array_axis, array_key=key))
        label.codes = options.orientation or label.codes
        view = arrange(label, image.plane if image.plane and label.codes else "auto")
        if label.codes != volume.codes:  # masks saved without their image's header lie differently by mistake
            volume.notes.append(
                f"label map stored as {label.codes or 'unknown'}, image as {volume.codes or 'unknown'}: each turned "
                "by its own header, see whether they match"
            )
        if view.array.shape != image.array.shape[:3] or not _close(view.spacing_mm, image.spacing_mm):
            raise BadFile(
                f"{by(view.array.shape)} voxels of {by(view.spacing_mm)} mm do not match its image, "
                f"{by(image.array.shape[:3])} of {by(image.spacing_mm)} mm; find the label map that belongs to it, or "
                "remove this one"
            )
        return _whole_numbers(label, view.array)
    except BadFile as error:
        raise BadFile(f"label {path}: {error}") from None


def _whole_numbers(label: Volume, array: np.ndarray) -> np.ndarray:
    low, high = sorted(label.slope * end + label.intercept for end in stored_range(array))
    dtype = np.result_type(np.min_scalar_type(round(low)), np.min_scalar_type(round(high)))
    out = np.empty(array.shape, dtype=dtype, order="F")
    for k in range(array.shape[2]):
        values = array[:, :, k] * np.float64(label.slope) + label.intercept
        out[:, :, k] = np.rint(values)
        if np.abs(out[:, :, k] - values).max() > 1e-3:
            raise BadFile("holds numbers that are not whole, so it is not a label map; remove it")
    return out


def _close(a: tuple[float, ...] | None, b: tuple[float, ...] | None) -> bool:
    return a is None or b is None or all(abs(x - y) <= SPACING_TOLERANCE * y for x, y in zip(a, b, strict=True))

"""One case of any format to its files in a prepared tree, which is what training and downstream read:

    <dest>/<id>.npy          a volume (height, width, slices), or (height, width, slices, channels); an image: <id>.png
    <dest>/labels/<id>.npy   its label map (height, width, slices) in an unsigned integer type; of an image: <id>.png
    <dest>/cases.csv         a line per case with the columns of conversion.table.Case
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
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from conversion.images import convert_image
from conversion.layouts import Source
from conversion.readers import read
from conversion.table import LABELS, Case
from conversion.volume import BadFile, Options, Volume, arrange, by, channel_index
from conversion.write import resample, stored_range, type_to_write, write_npy
from datasets.index import MIN_SIDE

VERSION = 2  # raise it when the content of converted files changes, so that they are made again
SPACING_TOLERANCE = 0.02  # of a label map against its image, as a share

Window = tuple[float, float] | None


def attempt(source: Source, dest: Path, options: Options, window: Window = None) -> Case | str:
    """The case, written below `dest`, or what is wrong with its files.

    window: intensities that will become 0 and 1; a volume outside of it would be all black or all white.
    """
    try:
        key = source_key(source, options)
        image = source.format in ("image", "dicom_image")
        case = convert_image(source, dest) if image else _volume(source, dest, options, window)
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
    settings = [(f.name, getattr(options, f.name)) for f in fields(Options)]
    text = repr((source.name, sorted(stats), source.channels, settings, VERSION))
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:32]


def outside(low: float, high: float, window: Window) -> bool:
    """Whether a window would make everything black or everything white."""
    return window is not None and (high <= window[0] or low >= window[1])


def _volume(source: Source, dest: Path, options: Options, window: Window) -> Case:
    volume = _read(source, options)
    view = arrange(volume, options.slice_axis)
    if min(view.array.shape[:2]) < MIN_SIDE:
        side = " x ".join(map(str, view.array.shape[:2]))
        raise BadFile(f"has slices of {side} pixels, below {MIN_SIDE}; remove it, or choose another --slice_axis")
    label = _read_label(source, volume, view, options)
    low, high = _range(view, options)
    if outside(low, high, window):
        raise BadFile(
            f"its intensities, {low:g} to {high:g}, lie outside the window {list(window)}; correct --window, or "
            "convert it into a data set of its own"
        )
    original = volume.array.dtype.newbyteorder("=")
    dtype = type_to_write(original, volume.slope, volume.intercept, low, high)
    shape, affine = _grid(view, options.spacing_mm)
    case = Case(
        id=source.id,
        source=source.name,
        file=f"{source.id}.npy",
        channels=", ".join(_channel_names(source, volume)),
        plane=view.plane,
        orientation=view.codes,
        spacing_mm=by(replace(view, affine=affine).spacing_mm),
        affine="" if affine is None else " ".join(f"{x:.10g}" for x in affine[:3].ravel()),
        shape=by(shape),
        dtype=str(dtype),
        minimum=f"{low:g}",
        maximum=f"{high:g}",
        original_orientation=volume.codes,
        original_spacing_mm=by(volume.spacing_mm),
        original_shape=by(volume.array.shape),
        original_dtype=str(original),
        notes="; ".join([*volume.notes, *(["has a single slice"] if view.array.shape[2] == 1 else [])]),
    )
    if label is not None:  # first, so that an image with a label never stands without it
        label = label if shape == view.array.shape else resample(label, shape[:3], nearest=True)
        case.label = f"{LABELS}/{source.id}.npy"
        pages = (label[:, :, k] for k in range(label.shape[2]))
        case.label_bytes = str(write_npy(dest / case.label, pages, label.shape, label.dtype)[1])
    case.sha256, size = write_npy(dest / case.file, _pages(view, shape, options), shape, dtype)
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


def _channel_names(source: Source, volume: Volume) -> Sequence[str]:
    count = len(volume.channels)
    names = source.channels if len(source.channels) == count else tuple(map(str, range(count)))
    return names if volume.array.ndim == 4 else ()


def _range(view: Volume, options: Options) -> tuple[float, float]:
    """The smallest and the largest intensity. Raises BadFile where a channel has only one."""
    ranges = []
    for number, channel in enumerate(view.channels):
        low, high = sorted(view.slope * end + view.intercept for end in stored_range(channel, options.nan_value))
        if low == high:
            voxels = "voxels" if view.array.ndim == 3 else f"voxels of channel {number}"
            raise BadFile(f"is constant (all {voxels} are {low:g}), so there is nothing to learn from it; remove it")
        ranges.append((low, high))
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _grid(view: Volume, spacing_mm: Sequence[float]) -> tuple[tuple[int, ...], np.ndarray | None]:
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
    larger = np.diag([*ratio, 1.0])
    larger[:3, 3] = (ratio - 1) / 2  # the first voxel's centre moves with its size
    return (*new, *old[3:]), view.affine @ larger


def _pages(view: Volume, shape: tuple[int, ...], options: Options) -> Iterator[np.ndarray]:
    """The intensities [H, W] of every slice, channel after channel."""

    def scaled(block: np.ndarray) -> np.ndarray:
        if block.dtype.kind == "f" and options.nan_value is not None:
            block = np.where(np.isfinite(block), block, block.dtype.type(options.nan_value))
        if (view.slope, view.intercept) == (1, 0):
            return block
        return block * np.float64(view.slope) + view.intercept

    for channel in view.channels:
        slices = (scaled(channel[:, :, k]) for k in range(channel.shape[2]))
        if shape != view.array.shape:
            intensities = np.empty(channel.shape, dtype=np.float32, order="F")
            for k, content in enumerate(slices):
                intensities[:, :, k] = content
            slices = resample(intensities, shape[:3]).transpose(2, 0, 1)
        yield from slices


def _read_label(source: Source, volume: Volume, view: Volume, options: Options) -> np.ndarray | None:
    """[H, W, D] label map of a volume, arranged as its `view`, in an unsigned integer type where it fits."""
    if not (source.label or options.label_key):
        return None
    path, format = (source.label, source.label_format) if source.label else (source.path, source.format)
    try:
        if format in ("image", "dicom_image", "dicom"):
            raise BadFile("is not a volume, as its image is; give a label map of the image's shape")
        key = "" if source.label else options.label_key
        label = read(format, (path,), Options(array_axis=options.array_axis, array_key=key))
        label.codes = options.orientation or label.codes
        if label.codes != volume.codes:  # masks saved without their image's header lie differently by mistake
            volume.notes.append(
                f"label map stored as {label.codes or 'unknown'}, image as {volume.codes or 'unknown'}: each turned "
                "by its own header, see whether they match"
            )
        label = arrange(label, view.plane if view.plane and label.codes else "auto")
        if label.array.shape != view.array.shape[:3] or not _close(label.spacing_mm, view.spacing_mm):
            raise BadFile(
                f"{by(label.array.shape)} voxels of {by(label.spacing_mm)} mm do not match its image, "
                f"{by(view.array.shape[:3])} of {by(view.spacing_mm)} mm; find the label map that belongs to it, or "
                "remove this one"
            )
        return _whole_numbers(label)
    except BadFile as error:
        raise BadFile(f"label {path}: {error}") from None


def _whole_numbers(label: Volume) -> np.ndarray:
    low, high = sorted(label.slope * end + label.intercept for end in stored_range(label.array))
    dtype = np.result_type(np.min_scalar_type(round(low)), np.min_scalar_type(round(high)))
    out = np.empty(label.array.shape, dtype=dtype, order="F")
    for k in range(out.shape[2]):
        values = label.array[:, :, k] * np.float64(label.slope) + label.intercept
        out[:, :, k] = np.rint(values)
        if np.abs(out[:, :, k] - values).max() > 1e-3:
            raise BadFile("holds numbers that are not whole, so it is not a label map; remove it")
    return out


def _close(a: tuple[float, ...] | None, b: tuple[float, ...] | None) -> bool:
    return a is None or b is None or all(abs(x - y) <= SPACING_TOLERANCE * y for x, y in zip(a, b, strict=True))

"""One case of any format to its files in a prepared tree, which is what training and downstream read (docs/DATA.md)."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
from PIL import Image

from conversion.dicom import read_dicom_image
from conversion.dicom_labels import read_annotation
from conversion.layouts import Source
from conversion.readers import read
from conversion.table import LABELS, Case
from conversion.volume import BadFile, Options, Volume, arrange, by
from datasets.index import MIN_SIDE, image_header
from datasets.render import read_grey
from utils.files import whole_file

VERSION = 4  # raise it when the content of converted files changes, so that they are made again
SPACING_TOLERANCE = 0.02  # of a label map against its image, as a share

Window = tuple[float, float] | None


def attempt(source: Source, dest: Path, options: Options, window: Window = None) -> Case | str:
    """The case, written below `dest`, or what is wrong with its files.

    window: intensities that will become 0 and 1; a volume outside of it would be all black or all white.
    """
    case = Case(id=source.id, source=source.name, modality=source.modality, patient=source.patient)
    case.original_files, case.key = str(len(source.files)), source_key(source, options)
    try:
        if source.format in ("image", "dicom_image"):
            _image(source, case, dest)
        else:
            _volume(source, case, dest, options, window)
    except BadFile as error:
        return f"{source.path}: {error}"
    except MemoryError:
        return f"{source.path}: does not fit into memory; use fewer --workers"
    return case


def source_key(source: Source, options: Options) -> str:
    """Changes with the source's files and with the options."""
    files = [file for file in (*source.files, source.label) if file and file.exists()]
    stats = [(file.name, (status := file.stat()).st_size, status.st_mtime_ns) for file in files]
    settings = [(f.name, getattr(options, f.name)) for f in fields(Options)]
    text = repr((source.name, sorted(stats), source.channels, source.structures, settings, VERSION))
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:32]


def _volume(source: Source, case: Case, dest: Path, options: Options, window: Window) -> None:
    volume = _read(source, options)
    view = arrange(volume, options.slice_axis)
    label = _read_label(source, volume, view, options)
    low, high = _range(view.channels)
    if window and (high <= window[0] or low >= window[1]):
        raise BadFile(f"its intensities, {low:g} to {high:g}, lie outside the window {list(window)}; correct --window")
    view = _resampled(view, options.spacing_mm)
    if min(view.array.shape[:2]) < MIN_SIDE:
        side = by(view.array.shape[:2])
        raise BadFile(f"has slices of {side} pixels, below {MIN_SIDE}; correct --slice_axis or --spacing_mm")
    count = len(view.channels)
    names = source.channels if len(source.channels) == count else map(str, range(count))
    case.file = f"{source.id}.npy"
    case.channels = ", ".join(names) if view.array.ndim == 4 else ""
    case.plane, case.orientation, case.spacing_mm = view.plane, view.codes, by(view.spacing_mm)
    case.affine = "" if view.affine is None else " ".join(f"{x:.10g}" for x in view.affine[:3].ravel())
    case.shape, case.dtype = by(view.array.shape), str(view.array.dtype.newbyteorder("="))
    case.minimum, case.maximum = f"{low:g}", f"{high:g}"
    case.original_orientation, case.original_spacing_mm = volume.codes, by(volume.spacing_mm)
    case.original_shape, case.notes = by(volume.array.shape), "; ".join(volume.notes)
    if label is not None:  # first, so that an image with a label never stands without it
        case.label = f"{LABELS}/{source.id}.npy"
        _write(dest / case.label, _nearest(label, view.array.shape[:3]))
    case.sha256 = _write(dest / case.file, view.array)


def _read(source: Source, options: Options) -> Volume:
    """The volume; with all of its channels where the data set names them and none was chosen."""
    named = bool(source.channels) and options.channel is None
    volume = read(source.format, source.files, replace(options, channel="all") if named else options)
    if named and volume.array.ndim == 4 and volume.array.shape[3] != len(source.channels):
        count = len(source.channels)
        raise BadFile(f"is 4D ({by(volume.array.shape)}) but dataset.json names {count} channels; choose --channel")
    volume.codes = options.orientation or volume.codes
    return volume


def _range(pixels: Sequence[np.ndarray]) -> tuple[float, float]:
    """The smallest and the largest intensity of channels. Raises BadFile where one has only one."""
    lows, highs = ([float(end(channel)) for channel in pixels] for end in (np.min, np.max))
    for low, high in zip(lows, highs, strict=True):
        if not low < high:  # also of NaN
            raise BadFile(f"is constant (all values are {low:g}), so there is nothing to learn from it; remove it")
    return min(lows), max(highs)


def _resampled(view: Volume, spacing_mm: Sequence[float]) -> Volume:
    """Over the same extent with other voxels, linearly along each axis, averaging where voxels grow."""
    if not any(spacing_mm):
        return view
    if view.affine is None:
        raise BadFile("does not say its spacing, so it cannot be resampled; leave --spacing_mm out")
    import torch
    import torch.nn.functional as F

    old = view.array.shape[:3]
    axes = zip(old, view.spacing_mm, spacing_mm, strict=True)
    new = tuple(max(1, round(n * mm / wanted)) if wanted else n for n, mm, wanted in axes)

    def linear(channel: np.ndarray) -> np.ndarray:
        slices = torch.from_numpy(np.ascontiguousarray(channel.transpose(2, 0, 1), dtype=np.float32))[:, None]
        slices = F.interpolate(slices, size=new[:2], mode="bilinear", antialias=True)
        lines = slices.reshape(1, 1, old[2], -1)  # along the third axis
        lines = F.interpolate(lines, size=(new[2], lines.shape[3]), mode="bilinear", antialias=True).numpy()
        lines = np.rint(lines) if channel.dtype.kind in "iu" else lines
        return lines.reshape(new[2], *new[:2]).transpose(1, 2, 0).astype(channel.dtype)

    channels = [linear(channel) for channel in view.channels]
    array = channels[0] if view.array.ndim == 3 else np.stack(channels, axis=3)
    ratio = np.array(old) / new
    larger = np.diag([*ratio, 1.0])
    larger[:3, 3] = (ratio - 1) / 2  # the first voxel's centre moves with its size
    return replace(view, array=array, affine=view.affine @ larger)


def _nearest(label: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """With other voxels over the same extent, whose centres are those of `_resampled`."""
    if label.shape == shape:
        return label
    axes = zip(shape, label.shape, strict=True)
    return label[np.ix_(*(np.minimum(((np.arange(n) + 0.5) * old / n).astype(int), old - 1) for n, old in axes))]


def _read_label(source: Source, volume: Volume, view: Volume, options: Options) -> np.ndarray | None:
    """[H, W, D] label map of a volume, arranged as its `view`, in an unsigned integer type where it fits."""
    if not (source.label or options.label_key):
        return None
    path, format = (source.label, source.label_format) if source.label else (source.path, source.format)
    try:
        if format in ("image", "dicom_image") or (format == "dicom" and not source.structures):
            raise BadFile("is not a volume, as its image is; give a label map of the image's shape")
        key = "" if source.label else options.label_key
        if format == "dicom":
            label = read_annotation(path, volume, source.structures)
        else:
            label = read(format, (path,), Options(array_axis=options.array_axis, array_key=key))
        label.codes = options.orientation or label.codes
        if label.codes != volume.codes:  # masks saved without their image's header lie differently by mistake
            lies = f"label map stored as {label.codes or 'unknown'}, image as {volume.codes or 'unknown'}"
            volume.notes.append(f"{lies}: each turned by its own header, see whether they match")
        label = arrange(label, view.plane if view.plane and label.codes else "auto")
        spacings = (label.spacing_mm or view.spacing_mm or (), view.spacing_mm or label.spacing_mm or ())
        if label.array.shape != view.array.shape[:3] or not np.allclose(*spacings, rtol=SPACING_TOLERANCE, atol=0):
            raise BadFile(
                f"{by(label.array.shape)} voxels of {by(label.spacing_mm)} mm do not match its image, "
                f"{by(view.array.shape[:3])} of {by(view.spacing_mm)} mm; find the one that belongs to it, or remove it"
            )
        values = label.array
        if values.dtype.kind == "f":
            values = np.rint(values)
            if np.abs(values - label.array).max() > 1e-3:
                raise BadFile("holds numbers that are not whole, so it is not a label map; remove it")
        ends = (np.min_scalar_type(int(end)) for end in (values.min(), values.max()))
        return values.astype(np.result_type(*ends), copy=False)
    except BadFile as error:
        raise BadFile(f"label {path}: {error}") from None


def _write(path: Path, array: np.ndarray) -> str:
    """sha256 of an NPY file. In Fortran order a slice, which is what training reads, is one piece of the file."""
    array = np.asfortranarray(array, dtype=array.dtype.newbyteorder("<"))
    with whole_file(path) as temporary:
        with open(temporary, "wb") as file:
            np.save(file, array, allow_pickle=False)
        return _digest(temporary)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _image(source: Source, case: Case, dest: Path) -> None:
    """Write one image and its label map: the file itself, copied, or a DICOM radiograph as a grey PNG."""
    path, radiograph = source.path, source.format == "dicom_image"
    pixels = read_dicom_image(path, source.frame) if radiograph else _decode(path)
    if min(pixels.shape) < MIN_SIDE:
        raise BadFile(f"has {by(pixels.shape)} pixels, below {MIN_SIDE}; remove it")
    low, high = _range([pixels])
    pixels = _grey(pixels, low, high) if radiograph else pixels
    case.file = source.id + (".png" if radiograph else path.suffix.lower())
    case.shape = case.original_shape = by(pixels.shape)
    case.dtype, case.minimum, case.maximum = str(pixels.dtype), f"{low:g}", f"{high:g}"
    if source.label:
        if (shape := _decode(source.label).shape) != pixels.shape:
            raise BadFile(f"label {source.label}: {by(shape)} pixels do not match its image, {by(pixels.shape)}")
        case.label = f"{LABELS}/{source.id}{source.label.suffix.lower()}"
        with whole_file(dest / case.label) as temporary:
            shutil.copyfile(source.label, temporary)
    with whole_file(dest / case.file) as temporary:
        if radiograph:
            Image.fromarray(pixels).save(temporary, format="PNG")
        else:
            shutil.copyfile(path, temporary)
        case.sha256 = _digest(temporary)


def _grey(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    """Intensities in 8 or 16 bits: whole ones as they are, from 0 up where they are negative; others stretched."""
    if pixels.dtype.kind == "f" or high - low > 65535:
        return np.rint((pixels.astype(np.float64) - low) * (65535 / (high - low))).astype(np.uint16)
    dtype = np.uint8 if low >= 0 and high < 256 else np.uint16
    return (pixels.astype(np.int64) - min(0, int(low))).astype(dtype)


def _decode(path: Path) -> np.ndarray:
    """[H, W] grey values of an image file. Raises BadFile where it is none, is broken, or is a stack."""
    try:
        image_header(path)
        return read_grey(path)
    except (ValueError, PermissionError) as error:
        raise BadFile(f"{error}") from None

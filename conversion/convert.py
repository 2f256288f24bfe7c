"""One case of any format to its files in a prepared tree, which is what training and downstream read (docs/DATA.md)."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
from PIL import Image

from conversion import labels, pictures
from conversion.dicom import read_dicom_image
from conversion.labels import read_label
from conversion.layouts import Source
from conversion.readers import read
from conversion.resample import nearest, resampled
from conversion.table import LABELS, Case
from conversion.volume import BadFile, LeftOut, Options, Volume, arrange, by
from datasets.index import MIN_SIDE
from datasets.render import BadSource, contrast
from utils.files import whole_file

VERSION = 4  # raise it when the content of converted files changes, so that they are made again

Window = tuple[float, float] | None


def attempt(source: Source, dest: Path, options: Options, window: Window = None) -> Case | BadFile:
    """The case, written below `dest`, or what is wrong with its files.

    window: intensities that will become 0 and 1; a volume outside of it would be all black or all white.
    """
    case = Case(id=source.id, source=source.name, modality=source.modality, patient=source.patient)
    case.original_files, case.key = str(len(source.files)), source_key(source, options)
    try:
        with _library_notes() as notes:
            volume = _read(source, options)
            if volume.flat:
                _picture(volume, source, case, dest, options)
            else:
                _volume(volume, source, case, dest, options, window)
        case.notes = "; ".join([case.notes] * bool(case.notes) + notes)
    except (BadFile, BadSource) as error:
        kind = LeftOut if isinstance(error, LeftOut) else BadFile
        return kind(f"{source.path}: {_once(source.path, str(error))}")
    except MemoryError:
        return BadFile(f"{source.path}: does not fit into memory; use fewer --workers")
    return case


def _once(path: Path, text: str) -> str:
    """A message without the file's name, which stands before it already."""
    return (
        text.removeprefix(f"{path.name}: ")
        .removeprefix(f"{path}: ")
        .replace(f'"{path}"', "it")
        .replace(str(path), "it")
    )


@contextlib.contextmanager
def _library_notes() -> Iterator[list[str]]:
    """What libraries warn of goes to the notes of the case, where it has a file's name, and not to the screen."""
    said: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        said.append(record.getMessage())
        return False

    loggers = [logging.getLogger(name) for name in ("nibabel.global", "pydicom")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for kind in (ResourceWarning, DeprecationWarning, PendingDeprecationWarning):  # of no interest to users
            warnings.simplefilter("ignore", kind)
        for logger in loggers:
            logger.addFilter(keep)
        try:
            yield said
        finally:
            for logger in loggers:
                logger.removeFilter(keep)
            said += [" ".join(str(warning.message).split()) for warning in caught]
            said[:] = dict.fromkeys(said)


def source_key(source: Source, options: Options) -> str:
    """Changes with the source's files and with the options."""
    files = [file for file in (*source.files, source.label) if file and file.exists()]
    stats = [(file.name, (status := file.stat()).st_size, status.st_mtime_ns) for file in files]
    settings = [(f.name, getattr(options, f.name)) for f in fields(Options)]
    text = repr((source.name, sorted(stats), source.channels, source.values, settings, VERSION))
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:32]


def _read(source: Source, options: Options) -> Volume:
    """A volume, with all of its channels where the data set names them and none was chosen; or a flat picture."""
    if source.format == "dicom_image":
        return Volume(read_dicom_image(source.path, source.frame)[:, :, None], flat=True)
    named = bool(source.channels) and options.channel is None
    volume = read(source.format, source.files, replace(options, channel="all") if named else options, source.part)
    if named and volume.array.ndim == 4 and volume.array.shape[3] != len(source.channels):
        count = len(source.channels)
        raise BadFile(f"is 4D ({by(volume.array.shape)}) but dataset.json names {count} channels; choose --channel")
    volume.codes = options.orientation or volume.codes
    return volume


def _volume(volume: Volume, source: Source, case: Case, dest: Path, options: Options, window: Window) -> None:
    view = arrange(volume, options.slice_axis)
    label = read_label(source, volume, view, options)
    if (count := view.array.shape[2]) < options.min_slices:
        raise LeftOut(f"has {count} slices, fewer than --min_slices {options.min_slices}")
    ends = [contrast(channel) for channel in view.channels]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    if window and (high <= window[0] or low >= window[1]):
        raise BadFile(f"its intensities, {low:g} to {high:g}, lie outside the window {list(window)}; correct --window")
    view = resampled(view, options.spacing_mm)
    if min(view.array.shape[:2]) < MIN_SIDE:
        side, option = by(view.array.shape[:2]), "--slice_axis" if view.codes else "--array_axis"
        turned = sorted(view.array.shape[:3])[1] >= MIN_SIDE or any(options.spacing_mm)
        remedy = f"correct {option} or --spacing_mm, or remove it" if turned else "remove it"
        raise BadFile(f"has slices of {side} pixels, below {MIN_SIDE}; {remedy}")
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
        _write(dest / case.label, nearest(label, view.array.shape[:3]))
    case.sha256 = _write(dest / case.file, view.array)


def _picture(volume: Volume, source: Source, case: Case, dest: Path, options: Options) -> None:
    """Write one picture and its label map: image files as they are if training reads them, else as grey PNG."""
    view = arrange(volume, "auto")
    if view.array.ndim > 3:
        raise BadFile(f"is a picture of {view.array.shape[3]} channels; choose one with --channel")
    pixels = view.array[..., 0]
    copied = volume.as_file and (
        pixels.dtype.kind != "f" or options.nan_value is None
    )  # which pixels have, but not the file
    if min(pixels.shape) < MIN_SIDE:
        raise BadFile(f"has {by(pixels.shape)} pixels, below {MIN_SIDE}; remove it")
    low, high = contrast(pixels)
    label = read_label(source, volume, view, options)
    pixels = pixels if copied else pictures.grey_png(pixels, low, high)
    case.file = source.id + (source.path.suffix.lower() if copied else ".png")
    case.shape = case.original_shape = by(pixels.shape)
    case.dtype, case.minimum, case.maximum = str(pixels.dtype), f"{low:g}", f"{high:g}"
    case.notes = "; ".join(volume.notes)
    if label is not None:
        as_it_is = source.label if labels.is_copied(source.label) else None
        case.label = f"{LABELS}/{source.id}{as_it_is.suffix.lower() if as_it_is else '.png'}"
        _write_png(dest / case.label, as_it_is or labels.as_png(label[..., 0]))
    case.sha256 = _write_png(dest / case.file, source.path if copied else pixels)


def _write_png(path: Path, content: Path | np.ndarray) -> str:
    """sha256 of pixels as PNG, or of a copied image file."""
    with whole_file(path) as temporary:
        if isinstance(content, Path):
            shutil.copyfile(content, temporary)
        else:
            Image.fromarray(content).save(temporary, format="PNG")
        return _digest(temporary)


def _write(path: Path, array: np.ndarray) -> str:
    """sha256 of an NPY file. In Fortran order a slice, which is what training reads, is one piece of the file."""
    array = np.asfortranarray(array, dtype=array.dtype.newbyteorder("<"))
    with whole_file(path) as temporary:
        with open(temporary, "wb") as file:
            np.save(file, array, allow_pickle=False)
        with open(temporary, "rb") as file:
            digest = hashlib.sha256(file.read(temporary.stat().st_size - array.nbytes))
        digest.update(array.T)  # which is what follows the header: not read again
        return digest.hexdigest()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()

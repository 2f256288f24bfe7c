"""Label maps of volumes and pictures: read, turned as their image, and checked against it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from conversion.arrays import Part
from conversion.dicom_labels import read_annotation
from conversion.layouts import Source
from conversion.pictures import require_labels
from conversion.readers import read
from conversion.volume import BadFile, Options, Volume, arrange, by
from datasets.index import IMAGE_SUFFIXES

KEYED = {".npz", ".h5", ".hdf5"}  # formats that may hold an image and its label map
SPACING_TOLERANCE = 0.02  # of a label map against its image, as a share


def read_label(source: Source, volume: Volume, view: Volume, options: Options) -> np.ndarray | None:
    """[H, W, D] label map of a volume, arranged as its `view`, in an unsigned integer type where it fits.

    Of a picture D is 1. None where the source has none.
    """
    inside = bool(options.label_key) and source.path.suffix.lower() in KEYED
    if not (source.label or inside):
        return None
    path, format = (source.label, source.label_format) if source.label else (source.path, source.format)
    try:
        if format == "dicom":
            label = read_annotation(path, volume, dict(source.values))
        else:
            if format == "image":
                require_labels(path, copied=volume.flat and is_copied(path))
            key = "" if source.label else options.label_key
            part = Part(key, source.part.index) if source.part and format == "array" else None
            axes = {"array_axis": options.array_axis, "case_axis": options.case_axis}
            label = read(format, (path,), Options(channel="all", array_key=key, **axes), part)
        if label.array.ndim > 3:
            raise BadFile(f"holds {label.array.shape[3]} channels or colours; save one map of numbers")
        if label.flat != volume.flat and not label.array.shape[2] == volume.array.shape[2] == 1:
            raise BadFile(
                f"is {'a picture' if label.flat else 'a volume'}, but its image is not; give one of its shape"
            )
        label.flat = volume.flat
        label.codes = options.orientation or label.codes
        stored = label.codes or "unknown", volume.codes or "unknown"
        label = arrange(label, view.plane if view.plane and label.codes else "auto")
        spacings = (label.spacing_mm or view.spacing_mm or (), view.spacing_mm or label.spacing_mm or ())
        if label.array.shape != view.array.shape[:3] or not np.allclose(*spacings, rtol=SPACING_TOLERANCE, atol=0):
            raise BadFile(
                f"{_size(label)} do not match its image, {_size(view).replace(' voxels', '')}; find the one that "
                "belongs to it, or remove it"
            )
        moved = _distance_mm(label, view)
        dicom = source.format == "dicom" and moved is not None  # which others store in another order as a rule
        if moved or (stored[0] != stored[1] and not dicom):  # masks saved without their image's header, by mistake
            lies = f"label map stored as {stored[0]}, image as {stored[1]}: each turned by its own header"
            volume.notes.append(f"{lies}{f', {moved:.3g} mm apart' if moved else ''}, see whether they match")
        return _whole_numbers(label.array)
    except BadFile as error:
        raise BadFile(f"label {path}: {error}") from None


def is_copied(label: Path | None) -> bool:
    """Whether the label map of a picture is an image file, which is copied as it is."""
    return label is not None and label.suffix.lower() in IMAGE_SUFFIXES


def as_png(label: np.ndarray) -> np.ndarray:
    """[H, W] of a picture's label map in a type that PNG has."""
    if label.dtype not in (np.uint8, np.uint16):
        raise BadFile(f"its label values, {label.min()} to {label.max()}, must lie in 0 to 65535; correct them")
    return label


def _distance_mm(label: Volume, view: Volume) -> float | None:
    """Between the same voxels of two volumes of one shape; 0 within a voxel, None where a header does not tell."""
    if label.affine is None or view.affine is None or label.flat or view.flat:
        return None
    corners = np.array([[0, 0, 0, 1], [*view.array.shape[:3], 1]]).T
    distance = float(np.abs(((label.affine - view.affine) @ corners)[:3]).max())
    return distance if distance > min(view.spacing_mm) else 0.0


def _size(volume: Volume) -> str:
    size = f"{by(volume.array.shape[: 2 if volume.flat else 3])} {'pixels' if volume.flat else 'voxels'}"
    return size + (f" of {by(volume.spacing_mm)} mm" if volume.spacing_mm and not volume.flat else "")


def _whole_numbers(values: np.ndarray) -> np.ndarray:
    """In the smallest type that holds them. Raises BadFile for fractions."""
    if values.dtype.kind == "f":
        rounded = np.rint(values)
        if np.abs(rounded - values).max() > 1e-3:
            raise BadFile("holds numbers that are not whole, so it is not a label map; remove it")
        values = rounded
    ends = (np.min_scalar_type(int(end)) for end in (values.min(), values.max()))
    return values.astype(np.result_type(*ends), copy=False)

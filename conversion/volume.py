"""A volume as it lies in a file, and how it is turned to the planes that radiologists view."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt

# Sides of the patient towards which the row, column and slice index grows. Axial: front on top, right side on the
# left, from the feet up. Coronal: head on top, right side on the left, from front to back. Sagittal: head on top,
# front on the left, from right to left.
PLANES = {"axial": "PLS", "coronal": "ILP", "sagittal": "IPL"}
THICKEST = 1.1  # slices lie along the axis whose spacing is this many times that of the others


class BadFile(ValueError):
    """A file cannot be converted; the message says why and what to do, without the file's name."""


@dataclass
class Options:
    """Everything that the content of converted files depends on, beside the files."""

    slice_axis: Literal["auto", "axial", "coronal", "sagittal"] = "auto"
    """plane of the slices; auto: across the axis of thickest spacing, axial where all are alike"""
    orientation: str = ""
    """sides of the patient towards which the axes of the file grow, e.g. LPS, where its header says nothing or lies"""
    spacing_mm: list[NonNegativeFloat] = field(default_factory=list)
    """millimetres to resample to: [rows, columns, slices]; 0 keeps an axis; empty: no resampling"""
    channel: NonNegativeInt | Literal["all"] | None = None
    """channel of 4D volumes, counted from 0, or all: (height, width, slices, channels), and nnU-Net's _0000, _0001, ...
    together, for downstream tasks; default: all where dataset.json names them, else 4D volumes are an error"""
    channel_axis: int = -1
    """axis of 4D NPY, NPZ and HDF5 arrays that counts channels"""
    array_axis: Literal[0, 1, 2] = 2
    """axis of NPY, NPZ and HDF5 arrays that counts slices"""
    array_key: str = ""
    """name of the image in NPZ and HDF5 files; default: the only volume"""
    label_key: str = ""
    """name of the label map in the same NPZ or HDF5 file"""
    nan_value: float | None = None
    """number written in place of NaN and Inf; default: such a file is an error"""
    allow_gaps: bool = False
    """acceptance of DICOM series whose slices are not evenly spaced"""


@dataclass
class Volume:
    """A 3D array as stored, or 4D with channels last, and what it means: intensity = slope * array + intercept.

    affine: [4, 4] from indices to mm towards the right, the front and the head; None where the file does not say, and
    then the axes are rows, columns, slices.  codes: for each axis the side of the patient towards which its index grows
    (R or L, A or P, S or I), such as "LPS"; what the affine says, or "".  plane: after `arrange`, "" where the volume
    does not know its orientation.  notes: what a person should know but nothing to stop for.
    Raises BadFile for an affine without a volume.
    """

    array: np.ndarray
    affine: np.ndarray | None = None
    slope: float = 1.0
    intercept: float = 0.0
    notes: list[str] = field(default_factory=list)
    codes: str = ""
    plane: str = ""

    def __post_init__(self) -> None:
        if self.affine is None:
            return
        from nibabel import aff2axcodes

        steps, spacing = self.affine[:3, :3], self.spacing_mm
        if not np.isfinite(steps).all() or min(spacing) <= 0 or abs(np.linalg.det(steps / spacing)) < 1e-3:
            raise BadFile(f"has no usable geometry (spacing {by(spacing)} mm); correct its header")
        self.codes = self.codes or "".join(aff2axcodes(self.affine))

    @property
    def spacing_mm(self) -> tuple[float, ...] | None:
        """Millimetres between voxels along each axis."""
        return None if self.affine is None else tuple(np.linalg.norm(self.affine[:3, :3], axis=0).tolist())

    @property
    def channels(self) -> list[np.ndarray]:
        """A view [H, W, D] of each."""
        return [self.array] if self.array.ndim == 3 else [self.array[..., k] for k in range(self.array.shape[3])]


def arrange(volume: Volume, plane: str) -> Volume:
    """The volume with its axes permuted and flipped, never interpolated: rows, columns, slices (and channels).

    plane: axial, coronal, sagittal or auto: slices along the axis of thickest spacing, axial where there is none.
    A volume that does not know its orientation stays as it is.
    """
    if not volume.codes:
        if plane != "auto":
            raise BadFile(
                f"does not say how it lies in the patient, so --slice_axis {plane} needs --orientation, e.g. LPS"
            )
        return volume
    from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

    if plane == "auto":
        plane = _thickest(volume)
    turn = ornt_transform(axcodes2ornt(volume.codes), axcodes2ornt(PLANES[plane]))
    affine = None if volume.affine is None else volume.affine @ inv_ornt_aff(turn, volume.array.shape[:3])
    array = apply_orientation(volume.array, turn)
    return replace(volume, array=array, affine=affine, codes=PLANES[plane], plane=plane)


def _thickest(volume: Volume) -> str:
    if volume.spacing_mm is None:
        return "axial"
    thin, thick = sorted(volume.spacing_mm)[-2:]
    if thick < THICKEST * thin:
        return "axial"
    code = volume.codes[int(np.argmax(volume.spacing_mm))]
    return {"S": "axial", "I": "axial", "A": "coronal", "P": "coronal", "L": "sagittal", "R": "sagittal"}[code]


def channel_index(shape: tuple[int, ...], channel: int | str | None, axis: int) -> tuple[Any, ...]:
    """The index that takes one channel, or "all", out of an array; () where there is no choice of them.

    axis: counts channels; -1: the last of more than one element. Raises BadFile where a choice is missing or wrong.
    """
    squeezed = shape if axis != -1 else shape[:3] + tuple(n for n in shape[3:] if n > 1)
    if len(squeezed) < 4:
        return (..., *[0] * (len(shape) - 3)) if len(shape) > 3 else ()
    if len(squeezed) > 4:
        raise BadFile(f"is {len(squeezed)}D ({by(squeezed)}); save one volume per file")
    count = squeezed[axis]
    if channel is None:
        raise BadFile(
            f"is 4D ({by(squeezed)}): {count} channels, modalities or time points; choose one with --channel 0 to "
            f"--channel {count - 1}, or keep them together with --channel all"
        )
    if channel == "all":
        return (..., *(slice(None) if n > 1 or axis != -1 else 0 for n in shape[3:]))
    if channel >= count:
        raise BadFile(f"is 4D ({by(squeezed)}) and has no channel {channel}; choose --channel 0 to {count - 1}")
    if axis != -1:
        return tuple(channel if i == axis % 4 else slice(None) for i in range(4))
    return (..., *(channel if n > 1 else 0 for n in shape[3:]))


def by(values: Iterable[float] | None) -> str:
    """`12 x 10 x 0.5` of a shape or of millimetres, "" of None."""
    if values is None:
        return ""
    return " x ".join(f"{round(float(value), 4):g}" for value in values) or "a single number"


def reason(error: Exception) -> str:
    """The last line of what a library says, which is the one with the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__

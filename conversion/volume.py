"""A volume as readers hand it over, and how it is turned to the planes that radiologists view."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt

# Sides of the patient towards which the row, column and slice index grows. Axial: front on top, right side on the
# left, from the feet up. Coronal: head on top, right side on the left, from front to back. Sagittal: head on top,
# front on the left, from right to left.
PLANES = {"axial": "PLS", "coronal": "ILP", "sagittal": "IPL"}
ACROSS = dict(zip("SIAPLR", ("axial", "axial", "coronal", "coronal", "sagittal", "sagittal"), strict=True))
THICKEST = 1.1  # slices lie along the axis whose spacing is this many times that of the others
TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # axes of DICOM and ITK point to the left, back and up


class BadFile(ValueError):
    """A file cannot be converted; the message says why and what to do, without the file's name."""


class LeftOut(BadFile):
    """A file is not converted because an option says so."""


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
    array_axis: Literal[0, 1, 2] | None = None
    """axis of NPY, NPZ and HDF5 arrays that counts slices; default: the last, unless their shape speaks against it"""
    case_axis: NonNegativeInt | None = None
    """axis of NPY, NPZ and HDF5 arrays that counts cases, where one holds many; files of MedMNIST are known"""
    array_key: str = ""
    """name of the image in NPZ and HDF5 files; default: the only volume"""
    label_key: str = ""
    """name of the label map in the same NPZ or HDF5 file"""
    nan_value: float | None = None
    """number written in place of NaN and Inf; default: such a file is an error"""
    allow_gaps: bool = False
    """acceptance of DICOM series whose slices are not evenly spaced"""
    min_slices: PositiveInt = 1
    """slices of a volume below which it is left out, as scouts and localisers are"""


@dataclass
class Volume:
    """Intensities on three axes, or on four with channels last, and how they lie in the patient.

    Raises BadFile for an affine without a volume.
    """

    array: np.ndarray
    affine: np.ndarray | None = None  # [4, 4] from indices to mm to the right, front and head; None: not known
    notes: list[str] = field(default_factory=list)  # what a person should know but nothing to stop for
    codes: str = ""  # for each axis the side towards which its index grows, such as "LPS"; "": not known
    plane: str = ""  # after `arrange`, where codes are known
    flat: bool = False  # a picture, whose third axis is 1: no slice of a volume
    as_file: bool = False  # a picture in a file that training reads as it is

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
    """The volume with its axes permuted and flipped, never interpolated; without known orientation as it is.

    plane: axial, coronal, sagittal or auto: slices along the axis of thickest spacing, or along the only one with a
    single voxel; axial where there is none.
    """
    if not volume.codes:
        if plane != "auto":
            raise BadFile(f"does not say how it lies in the patient; {plane} slices need --orientation, e.g. LPS")
        return volume
    from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

    if plane == "auto":
        spacing = volume.spacing_mm or (1, 1, 1)
        thin, thick = sorted(spacing)[-2:]
        single = [k for k in range(3) if volume.array.shape[k] == 1]
        across = single[0] if len(single) == 1 else int(np.argmax(spacing))
        plane = "axial" if thick < THICKEST * thin and len(single) != 1 else ACROSS[volume.codes[across]]
    turn = ornt_transform(axcodes2ornt(volume.codes), axcodes2ornt(PLANES[plane]))
    affine = None if volume.affine is None else volume.affine @ inv_ornt_aff(turn, volume.array.shape[:3])
    array = apply_orientation(volume.array, turn)
    return replace(volume, array=array, affine=affine, codes=PLANES[plane], plane=plane)


def rescaled(stored: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """Intensities: whole ones in the stored type, int16 or int32, whichever holds them first; others in float32."""
    if (slope, intercept) == (1, 0):
        return stored
    if stored.dtype.kind in "iu" and float(slope).is_integer() and float(intercept).is_integer():
        slope, intercept = int(slope), int(intercept)
        ends = [slope * int(end) + intercept for end in (stored.min(), stored.max())]
        for dtype in (stored.dtype.type, np.int16, np.int32):
            limits = np.iinfo(dtype)
            if all(limits.min <= number <= limits.max for number in (*ends, slope, intercept)):
                # What wraps around here comes back, as the results fit.
                return stored.astype(dtype) * dtype(slope) + dtype(intercept)
    return np.multiply(stored, slope, dtype=np.float64).astype(np.float32) + np.float32(intercept)


def luminance(colours: np.ndarray) -> np.ndarray:
    """[...] of [..., 3 or 4] red, green, blue (and alpha) of 8 or 16 bits: PIL's, as of the pictures of training."""
    red, green, blue = (colours[..., k].astype(np.uint32) for k in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(colours.dtype)


def choose(count: int, channel: int | str | None, shape: Iterable[int]) -> int | slice:
    """The index of one of several channels, or of all. Raises BadFile where the choice is missing or wrong."""
    if count == 1:
        return 0
    if channel is None:
        raise BadFile(f"is 4D ({by(shape)}): {count} channels; choose --channel 0 to {count - 1}, or --channel all")
    if channel == "all":
        return slice(None)
    if channel >= count:
        raise BadFile(f"is 4D ({by(shape)}) and has no channel {channel}; choose --channel 0 to {count - 1}")
    return channel


def with_channels(array: Any, channel: int | str | None, axis: int = -1) -> np.ndarray:
    """An array, or what can be indexed like one, with three axes, or four of which the last counts the channels.

    axis: counts channels; -1: the only one after the third with several elements.
    """
    shape = array.shape
    several = [k for k in range(3, len(shape)) if shape[k] > 1]
    if len(shape) < 4:
        return np.asanyarray(array[...])
    if len(several) > 1 or (axis != -1 and len(shape) > 4):
        raise BadFile(f"is {len(shape)}D ({by(shape)}); save one volume per file")
    axis = axis % 4 if axis != -1 else several[0] if several else 3
    index: list[int | slice] = [slice(None) if k < 3 or len(shape) == 4 else 0 for k in range(len(shape))]
    index[axis] = choose(shape[axis], channel, [n for k, n in enumerate(shape) if k < 3 or k == axis])
    array = np.asanyarray(array[tuple(index)])
    return np.moveaxis(array, axis, 3) if array.ndim == 4 and axis < 3 else array


def by(values: Iterable[float] | None) -> str:
    """`12 x 10 x 0.5` of a shape or of millimetres, "" of None."""
    return "" if values is None else " x ".join(f"{round(float(value), 4):g}" for value in values) or "a single number"


def reason(error: Exception) -> str:
    """The last line of what a library says, which is the one with the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__

"""A volume as it lies in a file, and how it is turned to the planes that radiologists view."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

# Sides of the patient towards which the row, column and slice index grows. Axial: front on top, right side on the
# left, from the feet up. Coronal: head on top, right side on the left, from front to back. Sagittal: head on top,
# front on the left, from right to left.
PLANES = {"axial": "PLS", "coronal": "ILP", "sagittal": "IPL"}
THICKEST = 1.1  # slices lie along the axis whose spacing is this many times that of the others


class BadFile(ValueError):
    """A file cannot be converted; the message says why and what to do, without the file's name."""


@dataclass(frozen=True)
class Options:
    """Everything that the content of converted files depends on, beside the files; see prepare_data.Config."""

    slice_axis: str = "auto"
    orientation: str = ""
    spacing_mm: tuple[float, ...] = ()
    window: tuple[float, float] | None = None
    nan_value: float | None = None
    channel: int | Literal["all"] | None = None
    channel_axis: int = -1
    array_axis: int = 2
    array_key: str = ""
    label_key: str = ""
    allow_gaps: bool = False


@dataclass
class Volume:
    """A 3D array as stored, or 4D with channels last, and what it means: intensity = slope * array + intercept.

    affine: [4, 4] from indices to mm towards the right, the front and the head; None where the file does not say, and
    then the axes are rows, columns, slices.  codes: for each axis the side of the patient towards which its index grows
    (R or L, A or P, S or I), such as "LPS"; what the affine says, or "".  notes: what a person should know but nothing
    to stop for.  Raises BadFile for an affine without a volume.
    """

    array: np.ndarray
    affine: np.ndarray | None = None
    slope: float = 1.0
    intercept: float = 0.0
    notes: list[str] = field(default_factory=list)
    codes: str = ""

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
        return spacing_of(self.affine)


class View(NamedTuple):
    """A volume turned to a plane: what is written."""

    array: np.ndarray  # [rows, columns, slices], or with channels as a fourth axis; a view of the volume's
    codes: str  # "" where the volume does not know its orientation
    plane: str  # and then this is ""
    affine: np.ndarray | None  # of these axes

    @property
    def spacing_mm(self) -> tuple[float, ...] | None:
        return spacing_of(self.affine)


def arrange(volume: Volume, plane: str) -> View:
    """The volume with its axes permuted and flipped, never interpolated.

    plane: axial, coronal, sagittal or auto: slices along the axis of thickest spacing, axial where there is none.
    A volume that does not know its orientation stays as it is.
    """
    if not volume.codes:
        if plane != "auto":
            raise BadFile(
                f"does not say how it lies in the patient, so --slice_axis {plane} needs --orientation, e.g. LPS"
            )
        return View(volume.array, "", "", volume.affine)
    from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

    if plane == "auto":
        plane = _thickest(volume)
    turn = ornt_transform(axcodes2ornt(volume.codes), axcodes2ornt(PLANES[plane]))
    affine = None if volume.affine is None else volume.affine @ inv_ornt_aff(turn, volume.array.shape[:3])
    return View(apply_orientation(volume.array, turn), PLANES[plane], plane, affine)


def _thickest(volume: Volume) -> str:
    if volume.spacing_mm is None:
        return "axial"
    thin, thick = sorted(volume.spacing_mm)[-2:]
    if thick < THICKEST * thin:
        return "axial"
    code = volume.codes[int(np.argmax(volume.spacing_mm))]
    return {"S": "axial", "I": "axial", "A": "coronal", "P": "coronal", "L": "sagittal", "R": "sagittal"}[code]


def spacing_of(affine: np.ndarray | None) -> tuple[float, ...] | None:
    """Millimetres between voxels along each axis."""
    return None if affine is None else tuple(float(step) for step in np.linalg.norm(affine[:3, :3], axis=0))


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

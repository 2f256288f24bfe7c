"""Where the slices of a DICOM file lie: of a single one, of multi-frame files, of gamma cameras, of Siemens mosaics."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conversion.dicom_header import PER_FRAME, detector, frame_count, is_mosaic, numbers, value
from conversion.volume import BadFile

MEASURES = "PixelMeasuresSequence"
NOT_UNIT = 0.01  # lengths and products of directions may depart from those of unit vectors by this much
PRIVATE_B_VALUES = (
    (0x0019, "SIEMENS MR HEADER", 0x0C),
    (0x2001, "Philips Imaging DD 001", 0x03),
    (0x0043, "GEMS_PARM_01", 0x39),
)
GE_B_VALUE_OFFSET = 1e5  # GE may add a multiple of it


@dataclass(frozen=True)
class Frame:
    """One slice of a series."""

    path: Path
    header: Any  # of the file
    index: int  # in the file
    position: np.ndarray  # [3] mm
    orientation: np.ndarray  # [2, 3] unit vectors of growing column index and of growing row index
    pixel_spacing: tuple[float, float]  # mm between rows, between columns
    thickness: float  # mm

    @property
    def normal(self) -> np.ndarray:
        """[3] unit vector across the slice."""
        return np.cross(*self.orientation)


def frames_of(path: Path, header: Any) -> list[Frame]:
    """The frames of a file in its order. Raises BadFile, without the file's name, where they cannot be placed."""
    if is_mosaic(header):
        return _of_mosaic(path, header)
    if PER_FRAME not in header and frame_count(header) > 1:
        return _of_camera(path, header)
    return [_frame(path, header, i) for i in range(frame_count(header))]


def _frame(path: Path, header: Any, i: int) -> Frame:
    camera = detector(header)

    def needed(sequence: str, name: str, count: int) -> np.ndarray:
        found = numbers(value(header, i, sequence, name) or camera.get(name))
        if not found:
            raise BadFile(f"has no {name}, so its slices cannot be placed; export the series again")
        if len(found) != count or not np.isfinite(found).all():
            raise BadFile(f"has a damaged {name} ({found}); export the series again")
        return np.array(found)

    position = needed("PlanePositionSequence", "ImagePositionPatient", 3)
    orientation = needed("PlaneOrientationSequence", "ImageOrientationPatient", 6).reshape(2, 3)
    spacing = needed(MEASURES, "PixelSpacing", 2)
    if np.abs(orientation @ orientation.T - np.eye(2)).max() > NOT_UNIT:
        raise BadFile(
            "has an ImageOrientationPatient that is not two perpendicular directions; export the series again"
        )
    thickness = (numbers(value(header, i, MEASURES, name)) for name in ("SpacingBetweenSlices", "SliceThickness"))
    mm = next((abs(found[0]) for found in thickness if found and found[0]), 1.0)
    return Frame(path, header, i, position, orientation, tuple(spacing.tolist()), mm)


def _of_camera(path: Path, header: Any) -> list[Frame]:
    """Of an NM file, whose first slice alone has a position; a vector says which slice each frame is."""
    first, count = _frame(path, header, 0), frame_count(header)
    slices = numbers(header.get("SliceVector")) or tuple(range(1, count + 1))
    if len(slices) != count:
        raise BadFile(f"claims {count} frames but tells the slice of {len(slices)}; export it again")
    mm = (numbers(header.get("SpacingBetweenSlices")) or (first.thickness,))[0]  # negative: against the normal
    return [_moved(first, i, first.normal * mm * (number - 1)) for i, number in enumerate(slices)]


def _moved(frame: Frame, index: int, mm: np.ndarray) -> Frame:
    return Frame(
        frame.path, frame.header, index, frame.position + mm, frame.orientation, frame.pixel_spacing, frame.thickness
    )


def _of_mosaic(path: Path, header: Any) -> list[Frame]:
    """The tiles of a Siemens mosaic; its position is that of a slice as large as the mosaic about the same centre."""
    first, count, side = _frame(path, header, 0), *mosaic_tiles(header)
    excess = (1 - 1 / side) / 2 * np.array([header.Rows, header.Columns]) * first.pixel_spacing
    corner = excess[0] * first.orientation[1] + excess[1] * first.orientation[0]
    told = numbers(_csa(header).get("SliceNormalVector", {}).get("items"))
    turned = len(told) == 3 and np.dot(told, first.normal) < 0
    step = first.normal * first.thickness * (-1 if turned else 1)
    return [_moved(first, i, corner + step * i) for i in range(count)]


def mosaic_tiles(header: Any) -> tuple[int, int]:
    """(slices of a mosaic, tiles along each of its sides). Raises BadFile where the header does not tell."""
    told = numbers(_csa(header).get("NumberOfImagesInMosaic", {}).get("items"))
    told = told or _private(header, 0x0019, "SIEMENS MR HEADER", 0x0A)
    count = int(told[0]) if told else 0
    side = math.ceil(math.sqrt(count)) if count > 0 else 0
    if not side or int(header.Rows) % side or int(header.Columns) % side:
        raise BadFile(
            f"is a Siemens mosaic whose header does not tell how its {header.Rows} x {header.Columns} pixels hold "
            "slices; convert it with dcm2niix before it is anonymised, or export it without mosaics"
        )
    return count, side


def _csa(header: Any) -> dict[str, Any]:
    """Siemens' private header, {} where there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nibabel calls its DICOM reader experimental; this part is of 2011
        from nibabel.nicom.csareader import get_csa_header
    try:
        return (get_csa_header(header) or {}).get("tags", {})
    except Exception:  # damaged, as by anonymisers
        return {}


def _private(header: Any, group: int, creator: str, element: int) -> tuple[float, ...]:
    """The numbers of a private element, () where there are none."""
    if not any((group, block) in header for block in range(0x10, 0x20)):  # as the library is slow to find that out
        return ()
    try:
        found = header.private_block(group, creator)[element].value
        return numbers(found.decode() if isinstance(found, bytes) else found)
    except (KeyError, ValueError, TypeError):
        return ()


def b_value(frame: Frame) -> tuple[float, ...]:
    """Of diffusion images, (s/mm2,) or (); also where the vendors keep it."""
    found = numbers(value(frame.header, frame.index, "MRDiffusionSequence", "DiffusionBValue"))
    for group, creator, element in PRIVATE_B_VALUES if frame.header.get("Modality") == "MR" else ():
        found = found or _private(frame.header, group, creator, element)[:1]
    return (found[0] % GE_B_VALUE_OFFSET,) if found else ()

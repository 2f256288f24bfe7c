"""Label maps that come as DICOM: segmentations (SEG) and structure sets (RTSTRUCT), on the grid of their series."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from conversion.dicom_frames import frames_of
from conversion.dicom_header import ANNOTATIONS, data_set, in_file, value
from conversion.dicom_pixels import stored_values
from conversion.volume import TO_RAS, BadFile, Volume

OFF_GRID = 0.1  # voxels by which a segmentation may lie off the grid of its series
OFF_SLICE = 0.3  # slices by which contours may
CLOSED = {"CLOSED_PLANAR", "CLOSEDPLANAR_XOR", "CLOSED_PLANAR_XOR"}  # the others bound no area
MOST_PIXELS = 65536  # that contours may be wide, as no image is


def is_annotation(path: Path) -> bool:
    try:
        return data_set(path).get("Modality") in ANNOTATIONS
    except Exception:  # arbitrary bytes
        return False


def referenced_series(header: Any) -> str:
    """The UID of the series that a segmentation or a structure set was drawn on."""
    for name in ("ReferencedFrameOfReferenceSequence", "RTReferencedStudySequence", "RTReferencedSeriesSequence"):
        header = (header.get(name) or [header])[0]
    return str((header.get("ReferencedSeriesSequence") or [header])[0].get("SeriesInstanceUID") or "")


def _structures(header: Any) -> dict[int, str]:
    """{number: name} of what is drawn."""
    segments = [(s.SegmentNumber, s.get("SegmentLabel")) for s in header.get("SegmentSequence") or ()]
    regions = [(s.ROINumber, s.get("ROIName")) for s in header.get("StructureSetROISequence") or ()]
    named = {int(number): " ".join(str(name or number).split()) for number, name in [*segments, *regions]}
    return {number: name for number, name in named.items() if number or regions}  # segment 0 is the background


def structure_names(header: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_structures(header).values()))


def read_annotation(path: Path, image: Volume, values: Mapping[str, int]) -> Volume:
    """The label map of a DICOM volume as it was read; values: of its structures, by name.

    Where structures overlap, the smaller one is kept. Raises BadFile where the label map does not lie on the image.
    """
    shape, to_index = image.array.shape[:3], np.linalg.inv(TO_RAS @ image.affine)
    masks: dict[int, np.ndarray] = {}
    with in_file(path):
        header = data_set(path)
        names = _structures(header)
        for number, voxels in _segments(path, to_index) if header.Modality == "SEG" else _contours(header, to_index):
            if ((voxels < 0) | (voxels >= shape)).any():
                raise BadFile("does not lie on the image of its series; find the one that belongs to it, or remove it")
            if number not in names:
                raise BadFile(f"draws a structure, {number}, that it does not name; export it again")
            masks.setdefault(number, np.zeros(shape, dtype=bool))[tuple(voxels.T)] ^= True  # a hole is a contour, too
    label = np.zeros(shape, dtype=np.uint16)
    hidden = 0
    for number, mask in sorted(masks.items(), key=lambda item: -np.count_nonzero(item[1])):
        hidden += np.count_nonzero(label[mask])
        label[mask] = values[names[number]]
    if hidden:
        image.notes.append(f"structures of {path.name} overlap in {hidden} voxels, which belong to the smaller one")
    return Volume(label, image.affine)


def _segments(path: Path, to_index: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(segment, [n, 3] voxels of the image) of each frame of a segmentation."""
    data, pixels = stored_values(path)
    for frame, mask in zip(frames_of(path, data), pixels, strict=True):
        steps = frame.orientation[::-1] * np.array(frame.pixel_spacing)[:, None]  # of a row and of a column, in mm
        if data.get("SegmentationType") == "LABELMAP":
            segments = {number: mask == number for number in np.unique(mask[mask > 0]).tolist()}
        else:
            found = value(data, frame.index, "SegmentIdentificationSequence", "ReferencedSegmentNumber")
            segments = {int(found): mask > int(data.get("MaximumFractionalValue") or 1) // 2}
        for number, inside in segments.items():
            places = frame.position + np.argwhere(inside) @ steps
            exact = places @ to_index[:3, :3].T + to_index[:3, 3]
            voxels = np.rint(exact).astype(int)
            if np.abs(exact - voxels).max(initial=0) > OFF_GRID:
                raise BadFile("lies on another grid than the image of its series; resample it there, or remove it")
            yield number, voxels


def _contours(data: Any, to_index: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(region, [n, 3] voxels whose centre is inside) of each closed contour of a structure set."""
    from matplotlib.path import Path as Polygon

    for region in data.get("ROIContourSequence") or ():
        for contour in region.get("ContourSequence") or ():
            if contour.get("ContourGeometricType") not in CLOSED:
                continue
            points = np.array(contour.ContourData, dtype=float).reshape(-1, 3) @ to_index[:3, :3].T + to_index[:3, 3]
            at = int(np.rint(np.mean(points[:, 0])))
            if not np.abs(points[:, 0] - at).max() <= OFF_SLICE:  # also of NaN
                raise BadFile("has contours that do not lie in the slices of its series; draw them there, or remove it")
            low, high = np.floor(points[:, 1:].min(0)).astype(int), np.ceil(points[:, 1:].max(0)).astype(int) + 1
            if (high - low > MOST_PIXELS).any():
                raise BadFile("does not lie on the image of its series; find the one that belongs to it, or remove it")
            centres = np.stack(np.meshgrid(*map(np.arange, low, high), indexing="ij"), axis=-1).reshape(-1, 2)
            inside = centres[Polygon(points[:, 1:]).contains_points(centres)]
            yield int(region.ReferencedROINumber), np.insert(inside, 0, at, axis=1)

"""DICOM through pydicom, with every header at hand: a volume of the files of a series, a picture of a single file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from conversion.dicom_channels import SLICE_TOLERANCE, along, channels_of, shift_mm
from conversion.dicom_frames import Frame, frames_of
from conversion.dicom_header import data_set, in_file
from conversion.dicom_pixels import intensities
from conversion.volume import ACROSS, TO_RAS, BadFile, Options, Volume, by, choose

PIXEL_TOLERANCE = 0.01  # pixel spacings of one series may differ by this share
SAME_FACING = 0.01  # so may the directions of its slices


def read_dicom(files: Sequence[Path], options: Options) -> Volume:
    """The slices of one series by their positions; several at each of them (time points, echoes) are channels.

    Copies of a slice count once. Raises BadFile for gaps unless options.allow_gaps.
    """
    frames, series = [], set()
    for path in files:
        with in_file(path, len(files)):
            header = data_set(path)
            series.add(header.get("SeriesInstanceUID"))
            frames += frames_of(path, header)
    frames = _of_one_orientation(frames, options.slice_axis)
    channels, notes = channels_of(frames)
    if len(series) > 1:
        notes.append(f"{len(series)} SeriesInstanceUIDs for slices of one volume: taken as damaged by an anonymiser")
    shape = (int(header.Rows), int(header.Columns), len(channels[0]), len(channels))
    index = choose(len(channels), options.channel, shape)
    chosen = channels[index] if isinstance(index, slice) else [channels[index]]
    _require_one_grid(chosen)
    first = chosen[0]
    thickness, irregular = _distance(first, options.allow_gaps)
    affine, tilted = _affine(first, thickness)
    pixels, warned = intensities(dict.fromkeys(frame.path for channel in chosen for frame in channel))
    arrays = [np.stack([pixels[frame.path][frame.index] for frame in channel]) for channel in chosen]
    array = arrays[0] if len(arrays) == 1 else np.stack(arrays, axis=-1)
    return Volume(array, TO_RAS @ affine, notes + irregular + tilted + warned[:1])


def read_dicom_image(path: Path, frame: int | None = None) -> np.ndarray:
    """[H, W] intensities of a picture, or of a frame of a film, dark where it is shown dark."""
    with in_file(path):
        pictures = intensities([path], picture=True, frame=frame)[0][path]
        if len(pictures) > 1:
            raise BadFile(f"is a film of {len(pictures)} frames, not one picture; export the one you want as PNG")
        return pictures[0]


def _of_one_orientation(frames: list[Frame], plane: str) -> list[Frame]:
    """The frames of one orientation and pixel spacing; of several orientations those of the plane asked for."""
    facings: dict[tuple[float, ...], list[Frame]] = {}
    for frame in frames:
        flat = frame.orientation.ravel()
        near = (key for key in facings if np.abs(flat - key).max() <= SAME_FACING)
        facings.setdefault(next(near, tuple(flat.tolist())), []).append(frame)
    if len(facings) > 1:
        planes = Counter(_plane(group[0]) for group in facings.values())
        count = ", ".join(f"{len(group)} {_plane(group[0])}" for group in facings.values())
        if planes[plane] != 1:
            raise BadFile(
                f"holds slices of several orientations ({count}); choose a plane with one: --slice_axis coronal"
            )
        frames = next(group for group in facings.values() if _plane(group[0]) == plane)
    spacings = np.array([frame.pixel_spacing for frame in frames])
    if (np.abs(spacings - spacings[0]) > PIXEL_TOLERANCE * spacings[0]).any():
        raise BadFile(
            f"holds slices of several pixel spacings, {by(spacings.min(0))} to {by(spacings.max(0))} mm; convert those "
            "of each by themselves"
        )
    return frames


def _plane(frame: Frame) -> str:
    return ACROSS["LPS"[int(np.argmax(np.abs(frame.normal)))]]


def _require_one_grid(channels: Sequence[Sequence[Frame]]) -> None:
    """Raise BadFile where channels lie too far from the first to be laid on each other."""
    first, count = channels[0], len(channels)
    if count == 1 or len(first) == 1:
        return
    limits = np.array([along(first)[1] - along(first)[0], *first[0].pixel_spacing]) / 2
    moved = shift_mm(channels)
    if (moved > limits).any():
        raise BadFile(
            f"its {count} channels are shifted against each other by up to {by(moved)} mm; choose one with "
            f"--channel 0 to {count - 1}"
        )


def _distance(frames: Sequence[Frame], allow_gaps: bool) -> tuple[float, list[str]]:
    """(mm from slice to slice, notes). Raises BadFile where slices are missing."""
    if len(frames) == 1:
        return frames[0].thickness, []
    distances = np.diff(along(frames))
    usual = float(np.median(distances))
    departures = np.abs(distances - usual)
    if departures.max() <= SLICE_TOLERANCE * usual:
        return usual, []
    text = f"slices lie {distances.min():.2f} to {distances.max():.2f} mm apart (usually {usual:.2f})"
    if not allow_gaps:
        at = int(np.argmax(departures))
        raise BadFile(
            f"{text}; the largest departure is between {frames[at].path.name} and {frames[at + 1].path.name}: "
            "copy the missing slices, or accept it with --allow_gaps true"
        )
    return usual, [text]


def _affine(frames: Sequence[Frame], thickness: float) -> tuple[np.ndarray, list[str]]:
    """([4, 4] from slice, row and column to mm to the left, back and head, notes)."""
    first, notes = frames[0], []
    positions = np.array([frame.position for frame in frames]) - first.position
    height = float(positions[-1] @ first.normal) or 1.0
    line = positions[-1] / height if len(frames) > 1 else first.normal  # from slice to slice, for each mm of normal
    astray = float(np.abs(positions - np.outer(positions @ first.normal, line)).max())
    if astray > max(first.pixel_spacing):
        raise BadFile(f"has slices up to {astray:.2f} mm beside the line of the others; convert each part by itself")
    if np.linalg.norm(line - first.normal) * height > min(first.pixel_spacing) / 2:
        degrees = np.degrees(np.arccos(1 / np.linalg.norm(line)))
        notes = [f"each slice lies aside of the one before (gantry tilt {degrees:.1f} degrees), which is not corrected"]
    else:
        line = first.normal
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 3] = line * thickness, first.position
    affine[:3, 1:3] = first.orientation[::-1].T * first.pixel_spacing
    return affine, notes

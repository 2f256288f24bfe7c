"""DICOM through pydicom, with every header at hand: which files are a series, their order, gaps and intensities.

SimpleITK's GDCM decodes compressions that pydicom cannot.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conversion.volume import TO_RAS, BadFile, Options, Volume, by, choose, reason, rescaled

SLICE_TOLERANCE = 0.1  # slice distances may differ from their median by this share of it
PIXEL_TOLERANCE = 0.01  # pixel spacings of one series may differ by this share
SAME_POSITION_MM = 0.01
SAME_FACING = 0.05  # scanners round the directions of the slices of one series differently
NOT_IMAGES = {"SEG", "RTSTRUCT", "RTPLAN", "RTDOSE", "SR", "PR", "KO", "REG", "DOC"}  # modalities
NEED_POSITIONS = {"CT", "MR", "PT", "NM"}  # modalities of slices, never of single radiographs
SHARED, PER_FRAME = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"
MEASURES, VALUES = "PixelMeasuresSequence", "PixelValueTransformationSequence"


class Series(NamedTuple):
    """Files of one series, or a single radiograph."""

    files: tuple[Path, ...]
    modality: str
    patient: str  # a hash, as nobody is to be named
    digest: str  # of what the files of a series have in common; "" of a radiograph


@dataclass(frozen=True)
class Frame:
    """One slice of a series."""

    path: Path
    index: int  # in the file
    number: tuple[float, ...]  # orders slices at one position
    position: np.ndarray  # [3] mm
    orientation: np.ndarray  # [2, 3] unit vectors of growing column index and of growing row index
    pixel_spacing: tuple[float, float]  # mm between rows, between columns
    thickness: float  # mm


def read_dicom(files: Sequence[Path], options: Options) -> Volume:
    """The slices of one series by their positions; several at each of them (time points, echoes) are channels.

    Copies of a slice (equal SOPInstanceUID) count once. Raises BadFile for gaps unless options.allow_gaps.
    """
    headers = {}
    for path in files:
        header = dicom_header(path)
        headers.setdefault(header.get("SOPInstanceUID") or path, (path, header))
    groups = _at_positions([frame for path, header in headers.values() for frame in _frames(path, header)])
    copies = len(files) - len(headers)
    notes = [f"{copies} slices are there twice and count once"] if copies else []
    rows, columns = int(header.Rows), int(header.Columns)
    count = len(groups[0])
    chosen = np.atleast_1d(np.arange(count)[choose(count, options.channel, (rows, columns, len(groups), count))])
    thickness, irregular = _distance([group[chosen[0]] for group in groups], options.allow_gaps)
    arrays = [_stacked([group[number] for group in groups]) for number in chosen]
    first = groups[0][chosen[0]]
    along_row, along_column = first.orientation
    affine = np.eye(4)
    affine[:3, 0] = np.cross(along_row, along_column) * thickness
    affine[:3, 1], affine[:3, 2] = along_column * first.pixel_spacing[0], along_row * first.pixel_spacing[1]
    affine[:3, 3] = first.position
    array = arrays[0] if len(arrays) == 1 else np.stack(arrays, axis=-1)
    return Volume(array, TO_RAS @ affine, notes + irregular)


def _at_positions(frames: list[Frame]) -> list[list[Frame]]:
    """The frames at each position, in order; equally many at all."""
    if any(np.abs(frame.orientation - frames[0].orientation).max() > 0.01 for frame in frames):
        raise BadFile("holds slices of several orientations; put each orientation into a folder of its own")
    spacings = np.array([frame.pixel_spacing for frame in frames])
    if (np.abs(spacings - spacings[0]) > PIXEL_TOLERANCE * spacings[0]).any():
        raise BadFile(
            f"holds slices of several pixel spacings, {by(spacings.min(0))} to {by(spacings.max(0))} mm; convert those "
            "of each by themselves"
        )
    normal = np.cross(*frames[0].orientation)
    groups: list[list[Frame]] = []
    for frame in sorted(frames, key=lambda f: (round(float(normal @ f.position) / SAME_POSITION_MM), f.number)):
        if groups and normal @ (frame.position - groups[-1][0].position) < 2 * SAME_POSITION_MM:
            groups[-1].append(frame)
        else:
            groups.append([frame])
    counts = Counter(map(len, groups))
    usual, usually = counts.most_common(1)[0]
    if len(counts) > 1:
        raise BadFile(
            f"{len(groups) - usually} of {len(groups)} slice positions hold another number of slices than the {usual} "
            "of the others; remove the surplus slices, or copy the missing ones"
        )
    return groups


def _distance(frames: list[Frame], allow_gaps: bool) -> tuple[float, list[str]]:
    """(mm from slice to slice, notes). Raises BadFile where slices are missing."""
    if len(frames) == 1:
        return frames[0].thickness, []
    normal = np.cross(*frames[0].orientation)
    distances = np.diff([float(normal @ frame.position) for frame in frames])
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


def _stacked(frames: list[Frame]) -> np.ndarray:
    """[slices, rows, columns] intensities."""
    pictures = {path: intensities(path) for path in {frame.path for frame in frames}}
    return np.stack([pictures[frame.path][frame.index] for frame in frames])


def _frames(path: Path, header: Any) -> list[Frame]:
    count = int(header.get("NumberOfFrames") or 1)
    if count > 1 and PER_FRAME not in header:
        raise BadFile(f"{path.name}: is a film of {count} frames without positions; export it as NIfTI or PNG")

    def needed(frame: int, sequence: str, name: str) -> np.ndarray:
        value = _value(header, frame, sequence, name)
        if value is None or value == "":
            raise BadFile(f"{path.name}: has no {name}, so its slices cannot be placed; export the series again")
        return np.array(value, dtype=np.float64)

    frames = []
    for i in range(count):
        thickness = [_value(header, i, MEASURES, name) for name in ("SpacingBetweenSlices", "SliceThickness")]
        names = ("TemporalPositionIdentifier", "EchoTime", "AcquisitionNumber", "InstanceNumber")
        frames.append(
            Frame(
                path=path,
                index=i,
                number=(*(float(header.get(name) or 0) for name in names), float(i)),
                position=needed(i, "PlanePositionSequence", "ImagePositionPatient"),
                orientation=needed(i, "PlaneOrientationSequence", "ImageOrientationPatient").reshape(2, 3),
                pixel_spacing=tuple(needed(i, MEASURES, "PixelSpacing").tolist()),
                thickness=next((float(mm) for mm in thickness if mm), 1.0),
            )
        )
    return frames


def _value(header: Any, frame: int, sequence: str, name: str) -> Any:
    """A value of a header; in multi-frame files it stands in a sequence of the frame, or of all frames."""
    if PER_FRAME not in header:
        return header.get(name)
    for groups, at in ((PER_FRAME, frame), (SHARED, 0)):
        items = header[groups].value if groups in header else []
        found = items[at].get(sequence) if at < len(items) else None
        if found:
            return found[0].get(name)
    return None


def intensities(path: Path, as_shown: bool = False) -> list[np.ndarray]:
    """Of every frame the [H, W] intensities: stored values -> modality values -> display polarity, each step here only.

    Whole numbers stay whole. as_shown: MONOCHROME1, whose smallest value is shown white, is inverted, as a radiograph
    needs; slices of volumes keep their numbers, which measure something.
    """
    import pydicom
    from pydicom.pixels import apply_modality_lut

    data = pydicom.dcmread(path, force=True)
    if "PixelData" not in data:
        raise BadFile(f"{path.name}: has no pixel data; copy it again")
    if int(data.get("SamplesPerPixel", 1)) > 1:
        raise BadFile(f"{path.name}: is a colour picture; export it as PNG")
    stored = _decoded(path, data)
    frames = []
    for i, pixels in enumerate(stored if stored.ndim == 3 else [stored]):
        slope, intercept = (_value(data, i, VALUES, name) for name in ("RescaleSlope", "RescaleIntercept"))
        values = (float(1 if slope is None else slope), float(intercept or 0))
        frames.append(apply_modality_lut(pixels, data) if "ModalityLUTSequence" in data else rescaled(pixels, *values))
    if as_shown and data.get("PhotometricInterpretation") == "MONOCHROME1":
        frames = [pixels.max() - pixels + pixels.min() for pixels in frames]
    return frames


def _decoded(path: Path, data: Any) -> np.ndarray:
    """Stored values, [H, W] or [frames, H, W]."""
    import pydicom

    if "TransferSyntaxUID" not in data.file_meta:
        data.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian  # the standard's default
    try:
        return data.pixel_array
    except (NotImplementedError, RuntimeError, AttributeError):
        if not data.file_meta.TransferSyntaxUID.is_compressed:
            raise
    import SimpleITK

    # GDCM rescales some kinds of images and not others, and ITK inverts MONOCHROME1: give them nothing to do it with.
    copy = pydicom.dcmread(path, force=True)
    for name in ("RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence", SHARED, PER_FRAME):
        copy.pop(pydicom.datadict.tag_for_keyword(name), None)
    copy.PhotometricInterpretation = "MONOCHROME2"
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "slice.dcm")
        copy.save_as(file)
        return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(file, imageIO="GDCMImageIO"))


def read_dicom_image(path: Path) -> np.ndarray:
    """[H, W] intensities of a single radiograph, dark where it is shown dark."""
    if int(dicom_header(path).get("NumberOfFrames") or 1) > 1:
        raise BadFile("is a film of several frames without positions; export the frames you want as PNG")
    try:
        return intensities(path, as_shown=True)[0]
    except BadFile:
        raise
    except Exception as error:  # decoders fail in many ways on arbitrary bytes
        raise BadFile(f"cannot be read ({reason(error)}); copy it again") from None


def dicom_header(path: Path) -> Any:
    """The pydicom data set without its pixels. Raises BadFile where the file holds no image."""
    import pydicom

    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, force=True)
        modality, rows, kind = (header.get(name) for name in ("Modality", "Rows", "SOPClassUID"))
    except Exception as error:
        raise BadFile(f"is not readable DICOM ({reason(error)}); copy it again or remove it") from None
    if kind is None and rows is None:
        raise BadFile("is not a DICOM file, whatever its name says; remove it or rename it")
    if rows is None or modality in NOT_IMAGES:
        what = getattr(kind, "name", kind) or modality
        raise BadFile(f"is DICOM without an image ({what}); remove it or leave it out with --on_error skip")
    return header


def group_series(files: Iterable[Path], problems: list[str]) -> list[Series]:
    """Series and radiographs of files by their headers; what is wrong with the others goes to `problems`."""
    groups: dict[tuple[Any, ...], list[tuple[Path, str, str]]] = defaultdict(list)
    facings: dict[tuple[Any, ...], list[list[float]]] = defaultdict(list)
    for file in files:
        try:
            header = dicom_header(file)
            patient = str(header.get("PatientID") or "")
            patient = hashlib.sha256(patient.encode()).hexdigest()[:12] if patient else ""
            key = _series_key(header, file, facings)
        except BadFile as error:
            problems.append(f"{file}: {error}")
        except Exception as error:  # pydicom converts a value when it is asked for it
            problems.append(f"{file}: has a damaged DICOM header ({error}); export it again or remove it")
        else:
            groups[key].append((file, str(header.get("Modality") or ""), patient))
    series = []
    for key, members in groups.items():
        digest = hashlib.sha256(repr(key).encode()).hexdigest()[:8] if len(key) > 1 else ""
        series.append(Series(tuple(file for file, *_ in members), *members[0][1:], digest))
    return series


def _series_key(header: Any, file: Path, facings: dict[tuple[Any, ...], list[list[float]]]) -> tuple[Any, ...]:
    """What the files of a series have in common; the file alone where it is a radiograph, without a place in space.

    facings: the directions met so far, of which near ones are one.
    """
    position, facing = (header.get(name) or () for name in ("ImagePositionPatient", "ImageOrientationPatient"))
    placed = (len(position), len(facing)) == (3, 6) or PER_FRAME in header
    if not placed and header.get("Modality") not in NEED_POSITIONS:
        return (file,)
    same = (str(header.get("SeriesInstanceUID") or file.parent), int(header.Rows), int(header.Columns))
    facing = [float(x) for x in facing]
    facings[same].append(facing)
    near = (f for f in facings[same] if len(f) == len(facing) and np.allclose(f, facing, rtol=0, atol=SAME_FACING))
    return (same[0], tuple(round(x, 1) + 0.0 for x in next(near)), *same[1:])

"""DICOM through pydicom, with every header at hand: which files are a series, their order, gaps and rescaling.

SimpleITK's GDCM decodes compressions that pydicom cannot.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conversion.volume import BadFile, Options, Volume, by, channel_index, reason

SLICE_TOLERANCE = 0.1  # slice distances may differ from their median by this share of it
PIXEL_TOLERANCE = 0.01  # pixel spacings of one series may differ by this share
SAME_POSITION_MM = 0.01
SAME_FACING = 0.05  # scanners round the directions of the slices of one series differently
NOT_IMAGES = {"SEG", "RTSTRUCT", "RTPLAN", "RTDOSE", "SR", "PR", "KO", "REG", "DOC"}  # modalities
NEED_POSITIONS = {"CT", "MR", "PT", "NM"}  # modalities of slices, never of single radiographs


class Series(NamedTuple):
    """Files of one series, or a single radiograph."""

    files: tuple[Path, ...]
    modality: str
    patient: str  # a hash, as nobody is to be named
    digest: str  # of what the files of a series have in common


@dataclass(frozen=True)
class Frame:
    """One slice of a series."""

    path: Path
    index: int  # frame in the file
    number: tuple[float, ...]  # orders slices at one position
    shape: tuple[int, int]
    position: np.ndarray  # [3] mm
    orientation: np.ndarray  # [2, 3] unit vectors of growing column index and of growing row index
    pixel_spacing: tuple[float, float]  # mm between rows, between columns
    thickness: float  # mm
    scale: tuple[float, float]  # slope and intercept


def read_dicom(files: Sequence[Path], options: Options) -> Volume:
    """The slices of one series, in the order of their positions, whatever the files are called.

    Copies of a slice (equal SOPInstanceUID) count once. Several different slices at every position (time points,
    echoes) are channels; irregular distances are an error unless options.allow_gaps.
    """
    headers = {}
    for path in files:
        header = dicom_header(path)
        uid = header.get("SOPInstanceUID")
        headers.setdefault(path if uid is None else uid, (path, header))
    frames = [frame for path, header in headers.values() for frame in _frames(path, header)]
    notes = [f"{len(files) - len(headers)} slices are there twice and count once"] if len(headers) < len(files) else []
    groups = _at_positions(frames)
    index = channel_index((*frames[0].shape, len(groups), len(groups[0])), options.channel, -1)
    wanted = np.atleast_1d(np.arange(len(groups[0]))[index[-1]])
    channels = [[group[number] for group in groups] for number in wanted]
    first = channels[0][0]
    thickness, irregular = _distance(channels[0], options.allow_gaps)

    scales = {frame.scale for channel in channels for frame in channel}
    arrays = [_stacked(channel, rescale=len(scales) > 1) for channel in channels]
    slope, intercept = scales.pop() if len(scales) == 1 else (1.0, 0.0)
    along_row, along_column = first.orientation
    affine = np.eye(4)
    affine[:3, 0] = np.cross(along_row, along_column) * thickness
    affine[:3, 1], affine[:3, 2] = along_column * first.pixel_spacing[0], along_row * first.pixel_spacing[1]
    affine[:3, 3] = first.position
    towards_ras = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM's axes point to the left, back and up
    array = arrays[0] if len(arrays) == 1 else np.stack(arrays, axis=-1)
    return Volume(array, towards_ras @ affine, slope, intercept, notes + irregular)


def _at_positions(frames: list[Frame]) -> list[list[Frame]]:
    """The frames at each position, in order; equally many at all."""
    if any(np.abs(frame.orientation - frames[0].orientation).max() > 0.01 for frame in frames):
        raise BadFile("holds slices of several orientations; put each orientation into a folder of its own")
    spacings = np.array([frame.pixel_spacing for frame in frames])
    if (np.abs(spacings - spacings[0]) > PIXEL_TOLERANCE * spacings[0]).any():
        raise BadFile(
            f"holds slices of several pixel spacings, {by(spacings.min(0))} to {by(spacings.max(0))} mm; convert the "
            "slices of each by themselves"
        )
    normal = np.cross(*frames[0].orientation)
    groups: list[list[Frame]] = []
    for frame in sorted(frames, key=lambda f: (round(float(normal @ f.position) / SAME_POSITION_MM), f.number)):
        if groups and normal @ (frame.position - groups[-1][0].position) < 2 * SAME_POSITION_MM:
            groups[-1].append(frame)
        else:
            groups.append([frame])
    counts = Counter(map(len, groups))
    if len(counts) > 1:
        usual = counts.most_common(1)[0][0]
        odd = sum(count for length, count in counts.items() if length != usual)
        raise BadFile(
            f"{odd} of {len(groups)} slice positions hold another number of slices than the {usual} of the others; "
            "remove the surplus slices, or copy the missing ones"
        )
    return groups


def _distance(frames: list[Frame], allow_gaps: bool) -> tuple[float, list[str]]:
    """(mm from slice to slice, notes). Raises BadFile where slices are missing."""
    normal = np.cross(*frames[0].orientation)
    distances = np.diff([float(normal @ frame.position) for frame in frames])
    if not len(distances):
        return frames[0].thickness, []
    usual = float(np.median(distances))
    departures = np.abs(distances - usual)
    if not (departures > SLICE_TOLERANCE * usual).any():
        return usual, []
    text = f"slices lie {distances.min():.2f} to {distances.max():.2f} mm apart (usually {usual:.2f})"
    if not allow_gaps:
        at = int(np.argmax(departures))
        raise BadFile(
            f"{text}; the largest departure is between {frames[at].path.name} and {frames[at + 1].path.name}: "
            "copy the missing slices, or accept it with --allow_gaps true"
        )
    return usual, [text]


def _stacked(frames: list[Frame], rescale: bool) -> np.ndarray:
    """[slices, rows, columns] stored values, or intensities (PET has another scale in every slice)."""
    array, pixels, shown = None, None, None
    for k, frame in enumerate(frames):
        if frame.path is not shown:
            pixels, shown = _pixels(frame.path), frame.path
        picture = pixels[frame.index] if pixels.ndim == 3 else pixels
        picture = (picture * frame.scale[0] + frame.scale[1]).astype(np.float32) if rescale else picture
        if array is None:
            array = np.empty((len(frames), *picture.shape), dtype=picture.dtype)
        elif picture.dtype != array.dtype:
            array = array.astype(np.result_type(array, picture))
        array[k] = picture
    return array


def _frames(path: Path, header: Any) -> list[Frame]:
    count = int(header.get("NumberOfFrames") or 1)
    if count > 1 and "PerFrameFunctionalGroupsSequence" not in header:
        raise BadFile(f"{path.name}: is a film of {count} frames without positions; export it as NIfTI or PNG")

    def get(sequence: str, name: str, default: Any = None) -> Any:
        value = _value(header, i, sequence, name)
        if value is None or value == "":
            if default is None:
                raise BadFile(f"{path.name}: has no {name}, so its slices cannot be placed; export the series again")
            return default
        return value

    frames = []
    for i in range(count):
        measures, scaling = "PixelMeasuresSequence", "PixelValueTransformationSequence"
        thickness = float(get(measures, "SpacingBetweenSlices", 0.0) or 0.0)
        thickness = thickness or float(get(measures, "SliceThickness", 0.0) or 0.0)
        orientation = np.array(get("PlaneOrientationSequence", "ImageOrientationPatient"), dtype=np.float64)
        numbers = ("TemporalPositionIdentifier", "EchoNumbers", "AcquisitionNumber", "InstanceNumber")
        frames.append(
            Frame(
                path=path,
                index=i,
                number=(*(_number(header.get(name)) for name in numbers), float(i)),
                shape=(int(header.Rows), int(header.Columns)),
                position=np.array(get("PlanePositionSequence", "ImagePositionPatient"), dtype=np.float64),
                orientation=orientation.reshape(2, 3),
                pixel_spacing=tuple(map(float, get(measures, "PixelSpacing"))),
                thickness=thickness or 1.0,
                scale=(float(get(scaling, "RescaleSlope", 1.0)), float(get(scaling, "RescaleIntercept", 0.0))),
            )
        )
    return frames


def _value(header: Any, frame: int, sequence: str, name: str) -> Any:
    """A value of a header; in multi-frame files it stands in a sequence of the frame, or of all frames."""
    if "PerFrameFunctionalGroupsSequence" not in header:
        return header.get(name)
    for groups, at in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        items = header[groups].value if groups in header else []
        found = items[at].get(sequence) if at < len(items) else None
        if found:
            return found[0].get(name)
    return None


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0


def _pixels(path: Path) -> np.ndarray:
    """Stored values of a DICOM file, before rescaling: [H, W], or [frames, H, W]."""
    import pydicom

    data = pydicom.dcmread(path, force=True)
    if "PixelData" not in data:
        raise BadFile(f"{path.name}: has no pixel data; copy it again")
    if int(data.get("SamplesPerPixel", 1)) > 1:
        raise BadFile(f"{path.name}: is a colour picture; export it as PNG")
    if "TransferSyntaxUID" not in data.file_meta:
        data.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian  # the standard's default
    try:
        return data.pixel_array
    except (NotImplementedError, RuntimeError, AttributeError):
        if not data.file_meta.TransferSyntaxUID.is_compressed:
            raise
    # GDCM rescales some kinds of images and not others, so it is given none of the numbers to do it with.
    for name in ("RescaleSlope", "RescaleIntercept", "RescaleType"):
        if name in data:
            delattr(data, name)
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, "slice.dcm")
        data.save_as(copy)
        pixels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(copy, imageIO="GDCMImageIO"))
    return pixels[0] if pixels.shape[0] == 1 else pixels


def read_dicom_image(path: Path) -> np.ndarray:
    """[H, W] grey values of a single radiograph as stored, dark where it is shown dark."""
    header = dicom_header(path)
    if int(header.get("NumberOfFrames") or 1) > 1:
        raise BadFile("is a film of several frames without positions; export the frames you want as PNG")
    try:
        pixels = _pixels(path)
    except BadFile:
        raise
    except Exception as error:
        raise BadFile(f"cannot be read ({reason(error)}); copy it again") from None
    if pixels.ndim != 2:
        raise BadFile("is a colour picture; export it as PNG")
    if header.get("PhotometricInterpretation") == "MONOCHROME1":  # the smallest value is shown white
        pixels = pixels.max() - pixels + pixels.min()
    return pixels


def dicom_header(path: Path) -> Any:
    """The pydicom data set without its pixels. Raises BadFile where the file holds no image."""
    import pydicom

    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, force=True)
        modality, rows = header.get("Modality"), header.get("Rows")
        kind = header.get("SOPClassUID")
    except Exception as error:
        raise BadFile(f"is not readable DICOM ({reason(error)}); copy it again or remove it") from None
    if kind is None and rows is None:
        raise BadFile("is not a DICOM file, whatever its name says; remove it or rename it")
    if rows is None or modality in NOT_IMAGES:
        what = getattr(kind, "name", kind) or modality
        raise BadFile(f"is DICOM without an image ({what}); remove it or leave it out with --on_error skip")
    return header


def group_series(files: Iterable[Path], roots: Mapping[Path, Path], problems: list[str]) -> tuple[list, list]:
    """(series, radiographs) of files by their headers; what is wrong with the others goes to `problems`.

    roots: of each file the folder that makes a series of files that do not name theirs.
    """
    groups: dict[tuple[Any, ...], list[tuple[Path, str, str]]] = defaultdict(list)
    facings: dict[tuple[Any, ...], list[tuple[float, ...]]] = defaultdict(list)
    single = []
    for file in files:
        try:
            header = dicom_header(file)
            modality, patient = str(header.get("Modality") or ""), _pseudonym(header)
            key = _series_key(header, roots[file], facings) if _has_position(header, modality) else None
        except BadFile as error:
            problems.append(f"{file}: {error}")
        except Exception as error:  # pydicom converts a value when it is asked for it
            problems.append(f"{file}: has a damaged DICOM header ({error}); export it again or remove it")
        else:
            if key:
                groups[key].append((file, modality, patient))
            else:
                single.append(Series((file,), modality, patient, ""))
    series = []
    for key, members in groups.items():
        paths, (_, modality, patient) = tuple(path for path, *_ in members), members[0]
        series.append(Series(paths, modality, patient, hashlib.sha256(repr(key).encode()).hexdigest()[:8]))
    return series, single


def _series_key(header: Any, root: Path, facings: dict[tuple[Any, ...], list[tuple[float, ...]]]) -> tuple[Any, ...]:
    """What the files of a series have in common. facings: the directions met so far, of which near ones are one."""
    uid, size = str(header.get("SeriesInstanceUID") or root), (int(header.Rows), int(header.Columns))
    facing = tuple(float(x) for x in header.get("ImageOrientationPatient") or ())
    known = facings[uid, size]
    alike = [f for f in known if len(f) == len(facing) and np.allclose(f, facing, rtol=0, atol=SAME_FACING)]
    if not alike:
        known.append(facing)
    return (uid, tuple(round(x, 1) + 0.0 for x in (*alike, facing)[0]), *size)


def _has_position(header: Any, modality: str) -> bool:
    """Whether the slices of this file know their place in space, or would have to."""
    lengths = [len(header.get(name) or ()) for name in ("ImagePositionPatient", "ImageOrientationPatient")]
    return lengths == [3, 6] or "PerFrameFunctionalGroupsSequence" in header or modality in NEED_POSITIONS


def _pseudonym(header: Any) -> str:
    """Equal for the files of one patient, without naming them."""
    patient = str(header.get("PatientID") or "")
    return hashlib.sha256(patient.encode()).hexdigest()[:12] if patient else ""

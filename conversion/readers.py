"""Volumes of every accepted format as arrays with their geometry, each through a maintained reader.

NIfTI through nibabel (stored type and scaling stay apart, one channel of a 4D file is read alone, and sheared or
rounded affines, which ITK refuses, are accepted); NRRD and MHA / MHD through SimpleITK (written by ITK's own
authors); DICOM through pydicom (every header at hand, so order, gaps and rescaling are decided here), with
SimpleITK's GDCM for compressions that pydicom cannot decode; HDF5 through h5py; NPY and NPZ through numpy. The
readers are imported when a file needs them: training never does.
"""

from __future__ import annotations

import gzip
import math
import os
import tempfile
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from datasets.index import npy_header

SLICE_TOLERANCE = 0.1  # slice distances may differ from their median by this share of it
PIXEL_TOLERANCE = 0.01  # pixel spacings of one series may differ by this share
SAME_POSITION_MM = 0.01
NOT_IMAGES = {"SEG", "RTSTRUCT", "RTPLAN", "RTDOSE", "SR", "PR", "KO", "REG", "DOC"}  # DICOM modalities


class BadFile(ValueError):
    """A file cannot be converted; the message says why and what to do, without the file's name."""


@dataclass(frozen=True)
class ReadOptions:
    """What a file may need to be told about; see prepare_data.Config."""

    channel: int | None = None
    channel_axis: int = -1
    array_axis: int = 2
    array_key: str = ""
    allow_gaps: bool = False


@dataclass
class Volume:
    """A 3D array as stored and what it means: intensity = slope * array + intercept.

    codes: for each axis the side of the patient towards which its index grows (R or L, A or P, S or I), such as
    "LPS"; "" where the file does not say, and then the axes are rows, columns, slices.  spacing_mm: per axis, None
    where unknown.  notes: what a person should know but nothing to stop for.
    """

    array: np.ndarray
    codes: str = ""
    spacing_mm: tuple[float, ...] | None = None
    slope: float = 1.0
    intercept: float = 0.0
    notes: list[str] = field(default_factory=list)


def read(format: str, files: tuple[Path, ...], options: ReadOptions) -> Volume:
    """The volume in a file, or in the files of a DICOM series. Raises BadFile, whatever is wrong with the file."""
    readers = {"nifti": read_nifti, "itk": read_itk, "npy": read_npy, "npz": read_npz, "hdf5": read_hdf5}
    try:
        if format != "dicom" and files[0].stat().st_size == 0:
            raise BadFile("is empty (0 bytes); copy it again or remove it")
        volume = read_dicom(files, options) if format == "dicom" else readers[format](files[0], options)
    except (BadFile, MemoryError):
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise BadFile("is truncated or damaged: its compressed data end early; copy it again") from None
    except Exception as error:  # readers fail in many ways on arbitrary bytes
        raise BadFile(f"cannot be read ({_reason(error)}); copy it again or export it again") from None
    _check(volume)
    return volume


def read_nifti(path: Path, options: ReadOptions) -> Volume:
    """NIfTI-1 or -2, compressed or not; axes and spacing from the sform, or else the qform."""
    import nibabel
    from nibabel.arrayproxy import ArrayProxy

    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    if path.suffix.lower() == ".gz" and not compressed:
        raise BadFile("is called .gz but is not compressed; rename it to .nii, or copy it again if it is damaged")
    image = nibabel.load(path)
    header, proxy = image.header, image.dataobj
    affine = np.asarray(image.affine, dtype=np.float64)
    notes = []
    if int(header.get("qform_code", 1)) == 0 and int(header.get("sform_code", 1)) == 0:
        notes.append(
            "no orientation in the NIfTI header (qform and sform code 0): axes taken as left, anterior, superior"
        )
    unscaled = ArrayProxy(proxy.file_like, (proxy.shape, proxy.dtype, proxy.offset))
    index = _channel_index(proxy.shape, options.channel, -1)
    array = np.asanyarray(unscaled[index] if index else unscaled)
    array = array.reshape(array.shape[:3] if array.size == math.prod(array.shape[:3]) else array.shape)
    codes, spacing = _geometry(affine[:3, :3])
    return Volume(array, codes, spacing, float(proxy.slope), float(proxy.inter), notes)


def read_itk(path: Path, options: ReadOptions) -> Volume:
    """NRRD or MetaImage."""
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(os.fspath(path))
    reader.ReadImageInformation()
    size, components = list(reader.GetSize()), reader.GetNumberOfComponents()
    if len(size) < 3:
        raise BadFile(f"is {len(size)}D ({_x(size)}); save it as an image (.png), or stack the slices of a volume")
    index = _channel_index((*size, components) if components > 1 else tuple(size), options.channel, -1)
    if len(size) > 3:
        reader.SetExtractIndex([0, 0, 0, index[1] if components == 1 else 0])
        reader.SetExtractSize([*size[:3], 0])
    image = reader.Execute()
    if components > 1:
        image = SimpleITK.VectorIndexSelectionCast(image, index[-1])
    array = SimpleITK.GetArrayFromImage(image).T
    towards_ras = np.diag([-1.0, -1.0, 1.0])  # ITK's axes point to the left, back and up
    matrix = towards_ras @ np.array(image.GetDirection()).reshape(3, 3) @ np.diag(image.GetSpacing())
    return Volume(array, *_geometry(matrix))


def read_npy(path: Path, options: ReadOptions) -> Volume:
    """NPY; slices lie along options.array_axis. Nothing is unpickled."""
    try:
        shape, dtype, offset = npy_header(path)
    except ValueError as error:
        raise BadFile(str(error)) from None
    if dtype.hasobject:
        raise BadFile("holds Python objects (a pickle), which are never loaded; save a plain numeric array")
    needs = offset + dtype.itemsize * math.prod(shape)
    if path.stat().st_size < needs:
        raise BadFile(
            f"is truncated: {path.stat().st_size} bytes where {_x(shape)} {dtype} needs {needs}; copy it again"
        )
    if 0 in shape:
        raise BadFile(f"has an axis of length 0 ({_x(shape)}); export it again or remove it")
    return _from_array(np.load(path, mmap_mode="r", allow_pickle=False), options)


def read_npz(path: Path, options: ReadOptions) -> Volume:
    """One array of an NPZ archive: options.array_key, or the only volume in it."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            shapes = {}
            for name in archive.files:
                with archive.zip.open(f"{name}.npy") as file:
                    version = np.lib.format.read_magic(file)
                    read_header = np.lib.format.read_array_header_1_0
                    shapes[name] = (read_header if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)[0]
            return _from_array(archive[_pick(shapes, options.array_key)], options)
    except zipfile.BadZipFile:
        raise BadFile("is not a whole NPZ archive; copy it again") from None


def read_hdf5(path: Path, options: ReadOptions) -> Volume:
    """One array of an HDF5 file: options.array_key, or the only volume in it."""
    import h5py

    if not h5py.is_hdf5(path):
        raise BadFile("is not an HDF5 file, or is cut short; copy it again")
    with h5py.File(path, "r") as file:
        shapes: dict[str, tuple[int, ...]] = {}

        def note(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset):
                shapes[name] = item.shape or ()

        file.visititems(note)
        return _from_array(file[_pick(shapes, options.array_key)][()], options)


def read_dicom(files: tuple[Path, ...], options: ReadOptions) -> Volume:
    """The slices of one DICOM series, in the order of their positions, whatever the files are called.

    Copies of a slice (equal SOPInstanceUID) count once. Several different slices at every position (time points,
    echoes) are channels; irregular distances are an error unless options.allow_gaps.
    """
    headers, uids = [], set()
    for path in files:
        header = dicom_header(path)
        uid = header.get("SOPInstanceUID")
        if uid is None or uid not in uids:
            headers.append((path, header))
            uids.add(uid)
    frames = [frame for path, header in headers for frame in _frames(path, header)]
    notes = [f"{len(files) - len(headers)} slices are there twice and count once"] if len(headers) < len(files) else []

    orientation = frames[0].orientation
    if any(np.abs(frame.orientation - orientation).max() > 0.01 for frame in frames):
        raise BadFile("holds slices of several orientations; put each orientation into a folder of its own")
    spacings = np.array([frame.pixel_spacing for frame in frames])
    if (np.abs(spacings - spacings[0]) > PIXEL_TOLERANCE * spacings[0]).any():
        raise BadFile(
            f"holds slices of several pixel spacings, {_x(spacings.min(0))} to {_x(spacings.max(0))} mm; convert the "
            "slices of each by themselves"
        )
    along_row, along_column = orientation  # unit vectors of growing column index and of growing row index
    normal = np.cross(along_row, along_column)
    frames.sort(key=lambda frame: (round(float(normal @ frame.position) / SAME_POSITION_MM), frame.number))
    groups: list[list[_Frame]] = []
    for frame in frames:
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
    channels = len(groups[0])
    index = _channel_index((*frames[0].shape, len(groups), channels), options.channel, -1)
    ordered = [group[index[-1] if index else 0] for group in groups]

    distances = np.diff([float(normal @ frame.position) for frame in ordered])
    thickness = float(np.median(distances)) if len(distances) else ordered[0].thickness
    irregular = np.abs(distances - thickness) > SLICE_TOLERANCE * thickness
    if irregular.any():
        at = int(np.argmax(np.abs(distances - thickness)))
        text = f"slices lie {distances.min():.2f} to {distances.max():.2f} mm apart (usually {thickness:.2f})"
        if not options.allow_gaps:
            raise BadFile(
                f"{text}; the largest departure is between {ordered[at].path.name} and {ordered[at + 1].path.name}: "
                "copy the missing slices, or accept it with --allow_gaps true"
            )
        notes.append(text)

    scales = {(frame.slope, frame.intercept) for frame in ordered}
    slope, intercept = scales.pop() if len(scales) == 1 else (1.0, 0.0)
    array, pixels, shown = None, None, None
    for k, frame in enumerate(ordered):
        if frame.path is not shown:
            pixels, shown = _pixels(frame.path), frame.path
        picture = pixels[frame.index] if pixels.ndim == 3 else pixels
        if scales:  # more than one scale: PET has another in every slice
            picture = (picture * frame.slope + frame.intercept).astype(np.float32)
        if array is None:
            array = np.empty((len(ordered), *picture.shape), dtype=picture.dtype)
        if picture.dtype != array.dtype:
            array = array.astype(np.result_type(array, picture))
        array[k] = picture
    towards_ras = np.diag([-1.0, -1.0, 1.0])  # DICOM's axes point to the left, back and up
    rows_mm, columns_mm = ordered[0].pixel_spacing
    directions = np.stack([normal * thickness, along_column * rows_mm, along_row * columns_mm], axis=1)
    codes, spacing = _geometry(towards_ras @ directions)
    return Volume(array, codes, spacing, slope, intercept, notes)


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
        raise BadFile(f"cannot be read ({_reason(error)}); copy it again") from None
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
        raise BadFile(f"is not readable DICOM ({_reason(error)}); copy it again or remove it") from None
    if kind is None and rows is None:
        raise BadFile("is not a DICOM file, whatever its name says; remove it or rename it")
    if rows is None or modality in NOT_IMAGES:
        what = getattr(kind, "name", kind) or modality
        raise BadFile(f"is DICOM without an image ({what}); remove it or leave it out with --on_error skip")
    return header


def has_position(header: Any) -> bool:
    """Whether the slices of this DICOM file know their place in space."""
    lengths = [len(header.get(name) or ()) for name in ("ImagePositionPatient", "ImageOrientationPatient")]
    return lengths == [3, 6] or "PerFrameFunctionalGroupsSequence" in header


@dataclass(frozen=True)
class _Frame:
    """One slice of a DICOM series."""

    path: Path
    index: int  # frame in the file
    number: tuple[float, ...]  # orders slices at one position
    shape: tuple[int, int]
    position: np.ndarray  # [3] mm
    orientation: np.ndarray  # [2, 3]
    pixel_spacing: tuple[float, float]  # mm between rows, between columns
    thickness: float  # mm
    slope: float
    intercept: float


def _frames(path: Path, header: Any) -> list[_Frame]:
    count = int(header.get("NumberOfFrames") or 1)
    enhanced = "PerFrameFunctionalGroupsSequence" in header
    if count > 1 and not enhanced:
        raise BadFile(f"{path.name}: is a film of {count} frames without positions; export it as NIfTI or PNG")

    def get(index: int, sequence: str, name: str, default: Any = None) -> Any:
        if not enhanced:
            value = header.get(name)
        else:
            value = None
            for groups, at in (("PerFrameFunctionalGroupsSequence", index), ("SharedFunctionalGroupsSequence", 0)):
                items = header[groups].value if groups in header else []
                found = items[at].get(sequence) if at < len(items) else None
                if found:
                    value = found[0].get(name)
                    break
        if value is None or value == "":
            if default is None:
                raise BadFile(f"{path.name}: has no {name}, so its slices cannot be placed; export the series again")
            return default
        return value

    frames = []
    for i in range(count):
        between = float(get(i, "PixelMeasuresSequence", "SpacingBetweenSlices", 0.0) or 0.0)
        thickness = between or float(get(i, "PixelMeasuresSequence", "SliceThickness", 0.0) or 0.0)
        orientation = np.array(get(i, "PlaneOrientationSequence", "ImageOrientationPatient"), dtype=np.float64)
        numbers = ("TemporalPositionIdentifier", "EchoNumbers", "AcquisitionNumber", "InstanceNumber")
        frames.append(
            _Frame(
                path=path,
                index=i,
                number=(*(_number(header.get(name)) for name in numbers), float(i)),
                shape=(int(header.Rows), int(header.Columns)),
                position=np.array(get(i, "PlanePositionSequence", "ImagePositionPatient"), dtype=np.float64),
                orientation=orientation.reshape(2, 3),
                pixel_spacing=tuple(map(float, get(i, "PixelMeasuresSequence", "PixelSpacing"))),
                thickness=thickness or 1.0,
                slope=float(get(i, "PixelValueTransformationSequence", "RescaleSlope", 1.0)),
                intercept=float(get(i, "PixelValueTransformationSequence", "RescaleIntercept", 0.0)),
            )
        )
    return frames


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


def _from_array(array: np.ndarray, options: ReadOptions) -> Volume:
    """A volume without geometry, its slices moved to the last axis."""
    index = _channel_index(array.shape, options.channel, options.channel_axis)
    if index:
        array = array[index]
    return Volume(np.moveaxis(array, options.array_axis, 2) if array.ndim == 3 else array)


def _channel_index(shape: tuple[int, ...], channel: int | None, axis: int) -> tuple[Any, ...]:
    """The index that takes one channel out of a 4D array, () where the array has no choice of them."""
    squeezed = shape if axis != -1 else shape[:3] + tuple(n for n in shape[3:] if n > 1)
    if len(squeezed) < 4:
        return (..., *[0] * (len(shape) - 3)) if len(shape) > 3 else ()
    if len(squeezed) > 4:
        raise BadFile(f"is {len(squeezed)}D ({_x(squeezed)}); save one volume per file")
    count = squeezed[axis]
    if channel is None:
        raise BadFile(
            f"is 4D ({_x(squeezed)}): {count} channels, modalities or time points; choose one with --channel 0 to "
            f"--channel {count - 1}"
        )
    if channel >= count:
        raise BadFile(f"is 4D ({_x(squeezed)}) and has no channel {channel}; choose --channel 0 to {count - 1}")
    if axis != -1:
        return tuple(channel if i == axis % 4 else slice(None) for i in range(4))
    return (..., *(channel if n > 1 else 0 for n in shape[3:]))


def _pick(shapes: dict[str, tuple[int, ...]], key: str) -> str:
    """Name of the array to read."""
    listed = ", ".join(f"{name} ({_x(shape)})" for name, shape in list(shapes.items())[:8]) or "no array"
    if key:
        if key not in shapes:
            raise BadFile(f"has no array {key!r}; it holds {listed}")
        return key
    several = [name for name, shape in shapes.items() if len(shape) >= 3]
    if len(several) == 1:
        return several[0]
    what = "several volumes" if several else "no volume"
    raise BadFile(f"holds {what}: {listed}; name one with --array_key" if several else f"holds no volume: {listed}")


def _geometry(matrix: np.ndarray) -> tuple[str, tuple[float, ...]]:
    """Codes and spacing of a [3, 3] matrix whose columns are the axes' steps in mm to the right, front and up."""
    import nibabel

    spacing = np.linalg.norm(matrix, axis=0)
    if not np.isfinite(matrix).all() or spacing.min() <= 0 or abs(np.linalg.det(matrix / spacing)) < 1e-3:
        raise BadFile(f"has no usable geometry (spacing {_x(spacing)} mm); correct its header")
    affine = np.eye(4)
    affine[:3, :3] = matrix
    codes = "".join(nibabel.aff2axcodes(affine))
    return codes, tuple(float(s) for s in spacing)


def _check(volume: Volume) -> None:
    array = volume.array
    if array.dtype.fields or array.dtype.kind not in "iufbc":
        raise BadFile(f"has dtype {array.dtype}, not intensities; export it as grey values")
    if array.dtype.kind == "c":
        raise BadFile(f"is complex ({array.dtype}): k-space or raw MR data; save the magnitude, np.abs(volume)")
    if array.ndim != 3:
        remedy = "save it as an image (.png), or stack the slices of a volume" if array.ndim == 2 else "save one volume"
        raise BadFile(f"is {array.ndim}D ({_x(array.shape)}) where a volume has 3 axes; {remedy}")
    if 0 in array.shape:
        raise BadFile(f"has an axis of length 0 ({_x(array.shape)}); export it again or remove it")


def _x(values: Any) -> str:
    return " x ".join(f"{value:g}" for value in values) or "a single number"


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__

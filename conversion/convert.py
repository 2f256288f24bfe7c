"""One case of any format to its files in a prepared tree, which is what training and downstream read:

    <dest>/<id>.npy          a volume (height, width, slices), or (height, width, slices, channels); images: <id>.png ...
    <dest>/labels/<id>.npy   its label map (height, width, slices) in an unsigned integer type; of an image: <id>.png ...
    <dest>/cases.csv         a line per case with the columns of `Case`
    <dest>/dataset.yaml      what holds for all cases; a key is missing where nothing is known or cases differ

dataset.yaml: modality; window (two intensities that become 0 and 1); slice_axis (always 2); plane and orientation
(sides towards which rows, columns and slices grow, such as PLS); spacing_mm (rows, columns, slices); channels (names,
in the order of the fourth axis); structures ({name: [label values]}, which may overlap, background left out); source.

cases.csv, beside what its names say: `patient` is empty where the source does not tell it. `channels` are joined by
", ". `affine` takes voxels of the stored array to millimetres: the first three rows of the 4 x 4 matrix, row by row,
as 12 numbers with spaces between: (row, column, slice, 1) -> (to the right, to the front, to the head), nibabel's RAS,
a voxel's centre at whole numbers. So a mask of the array's shape is put back on the scan's grid by

    affine = np.vstack([np.array(case["affine"].split(), float).reshape(3, 4), [0, 0, 0, 1]])
    nibabel.Nifti1Image(mask, affine)

A volume is turned to one of three planes as radiologists view them, by permuting and flipping its axes (never by
interpolation), resampled if asked, and written slice by slice in the smallest type that holds its intensities.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from conversion.layouts import Source
from conversion.readers import BadFile, ReadOptions, Volume, read, read_dicom_image
from datasets.index import IMAGE_FORMATS, MAX_IMAGE_PIXELS, MIN_SIDE
from utils.files import whole_file

VERSION = 1  # raise it when the content of converted files changes, so that they are made again
# Sides of the patient towards which the row, column and slice index grows. Axial: front on top, right side on the
# left, from the feet up. Coronal: head on top, right side on the left, from front to back. Sagittal: head on top,
# front on the left, from right to left.
PLANES = {"axial": "PLS", "coronal": "ILP", "sagittal": "IPL"}
OPPOSITE = dict(zip("RLAPSI", "LRPAIS", strict=True))
THICKEST = 1.1  # slices lie along the axis whose spacing is this many times that of the others
SPACING_TOLERANCE = 0.02  # of a label map against its image, as a share
FEWEST_STEPS = 256  # of float32 that must lie between the lowest and the highest intensity of a float64 volume
LABELS = "labels"  # the folder of label maps: one that datasets.index never reads as data


@dataclass(frozen=True)
class Options:
    """Everything that the content of converted files depends on, beside the files."""

    slice_axis: str = "auto"  # or a plane
    orientation: str = ""  # codes of the file's axes in place of those in its header
    spacing_mm: tuple[float, ...] = ()  # rows, columns, slices; 0 keeps an axis
    window: tuple[float, float] | None = None
    nan_value: float | None = None
    label_key: str = ""
    read: ReadOptions = field(default_factory=ReadOptions)


@dataclass
class Case:
    """A converted case: one row of cases.csv. Lists are joined with " x "."""

    id: str
    source: str  # folder or file given as --source, and the path below it
    file: str  # written, relative to the data set
    label: str = ""  # written label map, relative to the data set
    modality: str = ""
    plane: str = ""
    orientation: str = ""  # sides towards which the row, column and slice index grows
    spacing_mm: str = ""  # rows x columns x slices
    shape: str = ""
    dtype: str = ""
    minimum: str = ""
    maximum: str = ""
    original_orientation: str = ""  # x, y, z of the source
    original_spacing_mm: str = ""
    original_shape: str = ""
    original_dtype: str = ""
    original_files: str = "1"
    sha256: str = ""  # of the written file
    bytes: str = ""  # of the written file
    label_bytes: str = ""
    notes: str = ""
    key: str = ""  # of the source files and the options: a case with another key is made again


def convert(source: Source, case_id: str, dest: Path, options: Options) -> Case:
    """Write one case below `dest`. Raises BadFile naming the file, whatever is wrong with it."""
    key = source_key(source, options)
    try:
        make = _convert_image if source.format in ("image", "dicom_image") else _convert_volume
        case = make(source, case_id, dest, options)
    except BadFile as error:
        raise BadFile(f"{source.path}: {error}") from None
    except MemoryError:
        raise BadFile(f"{source.path}: does not fit into memory; use fewer --workers") from None
    case.key = key
    case.original_files = str(len(source.files))
    case.modality = source.modality
    return case


def attempt(source: Source, case_id: str, dest: Path, options: Options) -> Case | str:
    """The case, or what is wrong with its files."""
    try:
        return convert(source, case_id, dest, options)
    except BadFile as error:
        return str(error)


def source_key(source: Source, options: Options) -> str:
    """Changes with the source's files and with the options."""
    files = [*source.files, *([source.label] if source.label else [])]
    try:
        stats = [(file.name, (status := file.stat()).st_size, status.st_mtime_ns) for file in files]
    except OSError as error:
        raise BadFile(f"{source.path}: cannot be read ({error.strerror}); copy it again") from None
    # The window is applied in training, so another one changes no file.
    settings = asdict(replace(options, window=None))
    text = repr((source.name, sorted(stats), sorted(settings.items()), VERSION))
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:32]


def arrange(volume: Volume, plane: str) -> tuple[np.ndarray, str, tuple[float, ...] | None, str]:
    """(view [H, W, C] of the array, its codes, its spacing, the plane), by permuting and flipping axes only.

    plane: axial, coronal, sagittal or auto: slices along the axis of thickest spacing, axial where there is none.
    A volume that does not know its orientation stays as it is.
    """
    if not volume.codes:
        if plane != "auto":
            raise BadFile(
                f"does not say how it lies in the patient, so --slice_axis {plane} needs --orientation, e.g. LPS"
            )
        return volume.array, "", volume.spacing_mm, ""
    if plane == "auto":
        plane = _thickest(volume)
    order, flips = [], []
    for code in PLANES[plane]:
        axis = volume.codes.find(code)
        flips.append(axis < 0)
        order.append(axis if axis >= 0 else volume.codes.index(OPPOSITE[code]))
    view = volume.array.transpose(order)[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
    spacing = volume.spacing_mm and tuple(volume.spacing_mm[axis] for axis in order)
    return view, PLANES[plane], spacing, plane


def outside(low: float, high: float, window: tuple[float, float] | None) -> bool:
    """Whether a window would make everything black or everything white."""
    return window is not None and (high <= window[0] or low >= window[1])


def _thickest(volume: Volume) -> str:
    if volume.spacing_mm is None:
        return "axial"
    thin, thick = sorted(volume.spacing_mm)[-2:]
    if thick < THICKEST * thin:
        return "axial"
    code = volume.codes[int(np.argmax(volume.spacing_mm))]
    return next(plane for plane, codes in PLANES.items() if codes[2] in (code, OPPOSITE[code]))


def resample(view: np.ndarray, shape: tuple[int, ...], nearest: bool) -> np.ndarray:
    """[H, W, C] to another number of voxels over the same extent; float32 or, if nearest, the array's own type.

    Linear along each axis, averaging over the larger voxels where they grow, as the store's in-plane resizing does.
    """
    import torch
    import torch.nn.functional as F

    if nearest:  # the same voxel centres as the linear kernel has
        picks = [
            np.minimum(((np.arange(n) + 0.5) * old / n).astype(int), old - 1)
            for n, old in zip(shape, view.shape, strict=True)
        ]
        return view[np.ix_(*picks)]
    out = np.empty((view.shape[2], *shape[:2]), dtype=np.float32)
    for k in range(view.shape[2]):
        pixels = torch.from_numpy(np.ascontiguousarray(view[:, :, k], dtype=np.float32))[None, None]
        out[k] = F.interpolate(pixels, size=tuple(shape[:2]), mode="bilinear", antialias=True)[0, 0].numpy()
    if shape[2] != len(out):
        columns = torch.from_numpy(out.reshape(1, 1, len(out), -1))
        size = (shape[2], columns.shape[-1])
        out = F.interpolate(columns, size=size, mode="bilinear", antialias=True).numpy().reshape(shape[2], *shape[:2])
    return out.transpose(1, 2, 0)


def _convert_volume(source: Source, case_id: str, dest: Path, options: Options) -> Case:
    volume = read(source.format, source.files, options.read)
    volume.codes = options.orientation or volume.codes
    view, codes, spacing, plane = arrange(volume, options.slice_axis)
    if min(view.shape[:2]) < MIN_SIDE:
        raise BadFile(
            f"has slices of {view.shape[0]} x {view.shape[1]} pixels, below {MIN_SIDE}; remove it, or choose another "
            "--slice_axis"
        )
    label = _read_label(source, volume, view, spacing, plane or "auto", options)
    original = volume.array.dtype.newbyteorder("=")
    low, high = _limits(view, options.nan_value)
    low, high = sorted((volume.slope * low + volume.intercept, volume.slope * high + volume.intercept))
    if low == high:
        raise BadFile(f"is constant (all voxels are {low:g}), so there is nothing to learn from it; remove it")
    if outside(low, high, options.window):
        raise BadFile(
            f"its intensities, {low:g} to {high:g}, lie outside the window {list(options.window)}; correct --window, "
            "or convert it into a data set of its own"
        )
    dtype = _smallest(original, volume.slope, volume.intercept, low, high)
    if dtype.kind == "f" and dtype != original:
        with np.errstate(all="ignore"):
            step = float(np.spacing(dtype.type(max(abs(low), abs(high)))))
        if not high - low >= FEWEST_STEPS * step:  # step is nan where float32 has no such number
            raise BadFile(
                f"its intensities, {low:.9g} to {high:.9g}, are too large or differ too little for {dtype}; subtract "
                "an offset or scale them"
            )
    shape = view.shape
    if any(options.spacing_mm):
        if spacing is None:
            raise BadFile("does not say its spacing, so it cannot be resampled; leave --spacing_mm out")
        shape = tuple(
            max(1, round(n * old / new)) if new else n
            for n, old, new in zip(view.shape, spacing, options.spacing_mm, strict=True)
        )
        if min(shape[:2]) < MIN_SIDE:
            raise BadFile(
                f"would have slices of {shape[0]} x {shape[1]} pixels, below {MIN_SIDE}; correct --spacing_mm"
            )
        spacing = tuple(n * old / m for n, old, m in zip(view.shape, spacing, shape, strict=True))

    def scaled(block: np.ndarray) -> np.ndarray:
        """Stored values of some slices to intensities."""
        if block.dtype.kind == "f" and options.nan_value is not None:
            block = np.where(np.isfinite(block), block, block.dtype.type(options.nan_value))
        if (volume.slope, volume.intercept) == (1, 0):
            return block
        return block * np.float64(volume.slope) + volume.intercept

    if shape == view.shape:
        slices = (scaled(view[:, :, k]) for k in range(shape[2]))
    else:
        intensities = np.empty(view.shape, dtype=np.float32, order="F")
        for k in range(view.shape[2]):
            intensities[:, :, k] = scaled(view[:, :, k])
        resampled = resample(intensities, shape, nearest=False)
        del intensities
        slices = (resampled[:, :, k] for k in range(shape[2]))
        label = None if label is None else resample(label, shape, nearest=True)
    notes = list(volume.notes)
    if view.shape[2] == 1:
        notes.append("has a single slice")
    case = Case(
        id=case_id,
        source=source.name,
        file=f"{case_id}.npy",
        plane=plane,
        orientation=codes,
        spacing_mm=_x(spacing),
        shape=_x(shape),
        dtype=str(dtype),
        minimum=f"{low:g}",
        maximum=f"{high:g}",
        original_orientation=volume.codes,
        original_spacing_mm=_x(volume.spacing_mm),
        original_shape=_x(volume.array.shape),
        original_dtype=str(original),
        notes="; ".join(notes),
    )
    if label is not None:  # first, so that an image with a label never stands without it
        case.label = f"{LABELS}/{case_id}.npy"
        pages = (label[:, :, k] for k in range(shape[2]))
        _, size = write_npy(dest / case.label, pages, shape, label.dtype)
        case.label_bytes = str(size)
    case.sha256, size = write_npy(dest / case.file, slices, shape, dtype)
    case.bytes = str(size)
    return case


def _read_label(
    source: Source,
    volume: Volume,
    image: np.ndarray,
    spacing: tuple[float, ...] | None,
    plane: str,
    options: Options,
) -> np.ndarray | None:
    """[H, W, C] label map of a volume arranged as `image` in `plane`, in an unsigned integer type where it fits."""
    if source.label:
        path, key, format = source.label, "", source.label_format
    elif options.label_key:
        path, key, format = source.path, options.label_key, source.format
    else:
        return None
    try:
        if format in ("image", "dicom_image", "dicom"):
            raise BadFile("is not a volume, as its image is; give a label map of the image's shape")
        label = read(format, (path,), ReadOptions(array_axis=options.read.array_axis, array_key=key))
        label.codes = options.orientation or label.codes
        view, _, label_spacing, _ = arrange(label, plane if label.codes else "auto")
        if label.codes != volume.codes:  # masks saved without their image's header lie differently by mistake
            volume.notes.append(
                f"label map stored as {label.codes or 'unknown'}, image as {volume.codes or 'unknown'}: each turned "
                "by its own header, see whether they match"
            )
        if view.shape != image.shape or not _close(label_spacing, spacing):
            raise BadFile(
                f"{_x(view.shape)} voxels of {_x(label_spacing)} mm do not match its image, {_x(image.shape)} of "
                f"{_x(spacing)} mm; find the label map that belongs to it, or remove this one"
            )
        low, high = _limits(view, None)
        low, high = sorted((label.slope * low + label.intercept, label.slope * high + label.intercept))
        dtype = np.result_type(np.min_scalar_type(round(low)), np.min_scalar_type(round(high)))
        out = np.empty(view.shape, dtype=dtype, order="F")
        for k in range(view.shape[2]):
            values = view[:, :, k] * np.float64(label.slope) + label.intercept
            out[:, :, k] = np.rint(values)
            if np.abs(out[:, :, k] - values).max() > 1e-3:
                raise BadFile("holds numbers that are not whole, so it is not a label map; remove it")
    except BadFile as error:
        raise BadFile(f"label {path}: {error}") from None
    return out


def _close(a: tuple[float, ...] | None, b: tuple[float, ...] | None) -> bool:
    return a is None or b is None or all(abs(x - y) <= SPACING_TOLERANCE * y for x, y in zip(a, b, strict=True))


def _convert_image(source: Source, case_id: str, dest: Path, options: Options) -> Case:
    """A 2D image: the file itself, copied, or a DICOM radiograph as a grey PNG."""
    path = source.path
    if source.format == "dicom_image":
        pixels = read_dicom_image(path)
        original = pixels.dtype.newbyteorder("=")
        low, high = _limits(pixels[:, :, None], None)
        if high - low > 65535:
            raise BadFile(f"its values, {low:g} to {high:g}, do not fit into 16 bits; convert it to PNG yourself")
        pixels = (pixels.astype(np.int64) - min(0, int(low))).astype(np.uint8 if low >= 0 and high < 256 else np.uint16)
        suffix = ".png"
    else:
        pixels, original, suffix = _decode(path), None, path.suffix.lower()
        low, high = float(pixels.min()), float(pixels.max())
    height, width = pixels.shape[:2]
    if min(height, width) < MIN_SIDE:
        raise BadFile(f"has {height} x {width} pixels, below {MIN_SIDE} in one direction; remove it")
    if height * width > MAX_IMAGE_PIXELS:
        raise BadFile(f"has {height} x {width} pixels, above {MAX_IMAGE_PIXELS}; reduce it or remove it")
    if not (math.isfinite(low) and math.isfinite(high)):
        raise BadFile("holds NaN or Inf; correct it or remove it")
    if low == high:
        raise BadFile(f"is constant (all pixels are {low:g}), so there is nothing to learn from it; remove it")
    case = Case(
        id=case_id,
        source=source.name,
        file=case_id + suffix,
        shape=_x(pixels.shape),
        dtype=str(pixels.dtype),
        minimum=f"{low:g}",
        maximum=f"{high:g}",
        original_shape=_x(pixels.shape),
        original_dtype=str(original or pixels.dtype),
    )
    if source.label:
        try:
            label = _decode(source.label)
            if label.shape[:2] != (height, width):
                raise BadFile(f"{_x(label.shape)} pixels do not match its image, {_x(pixels.shape)}")
        except BadFile as error:
            raise BadFile(f"label {source.label}: {error}") from None
        case.label = f"{LABELS}/{case_id}{source.label.suffix.lower()}"
        with whole_file(dest / case.label) as temporary:
            shutil.copyfile(source.label, temporary)
        case.label_bytes = str((dest / case.label).stat().st_size)
    with whole_file(dest / case.file) as temporary:
        if source.format == "dicom_image":
            Image.fromarray(pixels).save(temporary, format="PNG")
        else:
            shutil.copyfile(path, temporary)
    case.sha256 = hashlib.sha256((dest / case.file).read_bytes()).hexdigest()
    case.bytes = str((dest / case.file).stat().st_size)
    return case


def _decode(path: Path) -> np.ndarray:
    """All pixels of an image file. Raises BadFile where it is none, is broken, or is a stack."""
    try:
        if path.stat().st_size == 0:
            raise BadFile("is empty (0 bytes); copy it again or remove it")
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
            if pages > 1:
                raise BadFile(f"is a stack of {pages} pages; save it as a volume, height x width x {pages} .npy")
            return np.asarray(image)
    except BadFile:
        raise
    except Exception as error:  # decoders fail in many ways on arbitrary bytes
        raise BadFile(f"broken image data ({error or type(error).__name__}); export it again or remove it") from None


def _limits(view: np.ndarray, nan_value: float | None) -> tuple[float, float]:
    """Smallest and largest stored value, slice by slice. Raises BadFile for NaN and Inf without a replacement."""
    low, high, not_finite = math.inf, -math.inf, 0
    for k in range(view.shape[2]):
        block = view[:, :, k]
        if block.dtype.kind == "f":
            finite = np.isfinite(block)
            count = block.size - int(np.count_nonzero(finite))
            not_finite += count
            if count:
                block = np.append(block[finite], [] if nan_value is None else nan_value)
        if block.size:
            low, high = min(low, float(block.min())), max(high, float(block.max()))
    if not_finite and nan_value is None:
        raise BadFile(
            f"{not_finite} of {view.size} voxels are NaN or Inf; correct it, or say what they should become "
            "(--nan_value 0)"
        )
    return low, high


def _smallest(stored: np.dtype, slope: float, intercept: float, low: float, high: float) -> np.dtype:
    """Type to write: the stored one, but float32 for float64; whole numbers stay whole where scaling is whole."""
    if stored.kind == "b":
        return np.dtype(np.uint8)
    if stored.kind == "f":
        return (
            min(stored, np.dtype(np.float32), key=lambda dtype: dtype.itemsize)
            if (slope, intercept) == (1, 0)
            else np.dtype(np.float32)
        )
    if (slope, intercept) == (1, 0):
        return stored
    if float(slope).is_integer() and float(intercept).is_integer():
        for dtype in (stored, np.dtype(np.int16), np.dtype(np.int32)):
            if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
                return dtype
    return np.dtype(np.float32)


def write_npy(path: Path, slices: Iterator[np.ndarray], shape: tuple[int, ...], dtype: np.dtype) -> tuple[str, int]:
    """(sha256, bytes) of an NPY file of [H, W] slices, written one by one.

    In Fortran order: a slice is one piece of the file then, and slices are what training reads.
    """
    dtype = np.dtype(dtype).newbyteorder("<")
    digest, size = hashlib.sha256(), 0
    with whole_file(path) as temporary, open(temporary, "w+b") as file:
        description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": True, "shape": tuple(shape)}
        np.lib.format.write_array_header_1_0(file, description)
        file.seek(0)
        digest.update(file.read())
        for content in slices:
            if dtype.kind in "iu" and content.dtype.kind == "f":
                content = np.rint(content)
            data = np.ascontiguousarray(content.T, dtype=dtype)
            digest.update(data)
            file.write(data)
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest(), size


def _x(values: tuple[float, ...] | None) -> str:
    return "" if values is None else " x ".join(f"{round(float(value), 4):g}" for value in values)

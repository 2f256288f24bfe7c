"""Pixels of DICOM files: stored values -> modality values -> display polarity, here only and whatever decodes them."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conversion.dicom_frames import mosaic_tiles
from conversion.dicom_header import SMALL, data_set, frame_count, in_file, is_mosaic, numbers, value
from conversion.volume import BadFile, by, luminance, rescaled
from datasets.index import MAX_IMAGE_PIXELS

PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
TRANSFORMATION = "PixelValueTransformationSequence"
DENSEST = 1000  # times its compressed bytes may a large frame hold: far beyond any image that is not blank
DENSEST_RLE = 64  # two bytes tell at most 128 of one value
TOOLS = {"JPEG-LS": "dcmdjpls", "RLE": "dcmdrle", "JPEG 2000": "gdcmconv --raw", "JPEG": "dcmdjpeg"}  # decompress
PADDING_APART = 0.01  # of the range of the others; padding that is nearer than that does no harm


class Padded(NamedTuple):
    """A file some of whose stored values pad the image, to be filled when those of all files are known."""

    header: Any
    frames: list[np.ndarray]
    padding: tuple[float, float]


def intensities(
    files: Iterable[Path], picture: bool = False, frame: int | None = None
) -> tuple[dict[Path, list[np.ndarray]], list[str]]:
    """({file: [H, W] intensities of every frame}, what the decoders warned of).

    Whole numbers stay whole; padding around the image is as dark as its darkest value. frame: only this one.
    picture: as it is shown, for what has no place in space. MONOCHROME1, whose smallest value is shown white, is
    inverted, and colours become luminance. Slices of volumes keep their numbers, which measure something, and have no
    colours. Raises BadFile with the file's name where there are several.
    """
    result: dict[Path, list[np.ndarray]] = {}
    padded: dict[Path, Padded] = {}
    notes, files = [], list(files)
    for path in files:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with in_file(path, len(files)):
                header, pixels = stored_values(path, picture, frame)
                if padding := _padding(header):
                    padded[path] = Padded(header, pixels, padding)
                else:  # at once, while they are in the processor's cache
                    result[path] = _shown(header, pixels, picture, frame)
        notes += [f"{path.name}: {' '.join(str(warning.message).split())}" for warning in caught]
    _fill_padding(padded, picture)
    for path in list(padded):
        header, pixels, _ = padded.pop(path)
        result[path] = _shown(header, pixels, picture, frame)
    return result, notes


def _shown(header: Any, stored: list[np.ndarray], picture: bool, frame: int | None) -> list[np.ndarray]:
    """Intensities of stored values; frame: the only one."""
    frames = [_modality(header, i if frame is None else frame, pixels) for i, pixels in enumerate(stored)]
    if picture:
        return [a.max() - a + a.min() for a in frames] if _is_inverted(header) else frames
    return _tiles(header, frames[0]) if is_mosaic(header) else frames


def _is_inverted(header: Any) -> bool:
    return header.get("PhotometricInterpretation") == "MONOCHROME1"


def stored_values(path: Path, picture: bool = False, frame: int | None = None) -> tuple[Any, list[np.ndarray]]:
    """(header, [H, W] stored values of all frames or of one); of colours, in pictures only, their luminance."""
    data = data_set(path, pixels=True) if frame is None else _film(path, path.stat().st_mtime_ns)
    if not any(data.get(name) for name in PIXELS):
        raise BadFile("holds no pixels, only their description; copy it again or remove it")
    shown = str(data.get("PhotometricInterpretation") or "")
    colour = shown == "PALETTE COLOR" or (not shown.startswith("MONO") and int(data.get("SamplesPerPixel") or 1) > 1)
    if colour and not picture:
        raise BadFile("is in colour, which measures nothing, but has the place of a slice; leave it out")
    frames = list(_decoded(data, frame))
    for name in PIXELS if frame is None else ():  # bytes that are decoded
        data.pop(name, None)
    return data, [_luminance(data, pixels) for pixels in frames] if colour else frames


@lru_cache(maxsize=1)
def _film(path: Path, changed: int) -> Any:
    """A data set that is asked for once for each of its frames."""
    return data_set(path, pixels=True)


def _luminance(data: Any, pixels: np.ndarray) -> np.ndarray:
    """[H, W] of indices into a palette, or of [H, W, 3] red, green and blue."""
    if data.PhotometricInterpretation == "PALETTE COLOR":
        from pydicom.pixels import apply_color_lut

        pixels = apply_color_lut(pixels, data)
    return luminance(pixels)


def _fill_padding(padded: dict[Path, Padded], picture: bool) -> None:
    """Write the darkest value over padding that lies apart from all others; among them, it cannot be told."""
    ends = [_ends(pixels, padding) for _, frames, padding in padded.values() for pixels in frames]
    low, high = min((low for low, _ in ends), default=0), max((high for _, high in ends), default=0)
    for header, frames, (start, end) in padded.values() if low <= high else ():  # else all of it is padding
        if max(low - end, start - high) > PADDING_APART * max(high - low, 0):
            dark = high if picture and _is_inverted(header) else low
            for i, p in enumerate(frames):
                if end < low and dark == low:  # the usual case, and faster
                    frames[i] = np.maximum(p, p.dtype.type(low))
                else:
                    frames[i] = np.where((p >= start) & (p <= end), p.dtype.type(dark), p)


def _padding(header: Any) -> tuple[float, float] | None:
    """The smallest and the largest stored value that pads the image; None: none does."""
    ends = numbers(header.get("PixelPaddingValue"))
    if not ends:
        return None
    ends += numbers(header.get("PixelPaddingRangeLimit"))
    # Its own type in the file need not be that of the pixels: 63536 is -2000.
    span = 2.0 ** int(header.get("BitsAllocated") or 16)
    first = -span / 2 if header.get("PixelRepresentation") else 0
    values = [(x - first) % span + first for x in ends]
    return min(values), max(values)


def _ends(pixels: np.ndarray, padding: tuple[float, float] | None) -> tuple[float, float]:
    """The smallest and the largest value beside padding; infinities where there is none."""
    low, high = pixels.min().item(), pixels.max().item()
    if padding and (padding[0] <= low <= padding[1] or padding[0] <= high <= padding[1]):
        real = pixels[(pixels < padding[0]) | (pixels > padding[1])]
        return (real.min().item(), real.max().item()) if real.size else (math.inf, -math.inf)
    return low, high


def _modality(header: Any, frame: int, pixels: np.ndarray) -> np.ndarray:
    if header.get("ModalityLUTSequence"):
        from pydicom.pixels import apply_modality_lut

        return apply_modality_lut(pixels, header)
    slope, intercept = (numbers(value(header, frame, TRANSFORMATION, f"Rescale{k}")) for k in ("Slope", "Intercept"))
    return rescaled(pixels, *(slope or (1.0,)), *(intercept or (0.0,)))


def _tiles(header: Any, mosaic: np.ndarray) -> list[np.ndarray]:
    """The slices of a Siemens mosaic, row by row."""
    count, side = mosaic_tiles(header)
    rows, columns = (n // side for n in mosaic.shape)
    tiles = mosaic.reshape(side, rows, side, columns).transpose(0, 2, 1, 3).reshape(-1, rows, columns)
    return list(tiles[:count])


def _decoded(data: Any, frame: int | None) -> Iterator[np.ndarray]:
    """Stored values of all frames or of one, [H, W] or [H, W, 3], one by one, so that claims allocate nothing."""
    import pydicom
    from pydicom.encaps import get_frame

    if "TransferSyntaxUID" not in data.file_meta:
        data.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian  # the standard's default
    syntax, count = data.file_meta.TransferSyntaxUID, frame_count(data)
    if int(data.Rows) * int(data.Columns) > MAX_IMAGE_PIXELS:
        raise BadFile(f"claims {data.Rows} x {data.Columns} pixels, beyond {MAX_IMAGE_PIXELS}; reduce it or remove it")
    for i in range(count) if frame is None else [frame]:
        if not syntax.is_encapsulated:
            yield data.pixel_array if count == 1 else pydicom.pixels.pixel_array(data, index=i)
            continue
        code = get_frame(data.PixelData, i, number_of_frames=count)
        _require_pixels(data, syntax, len(code))
        try:
            yield pydicom.pixels.pixel_array(data, index=i)
        except (NotImplementedError, RuntimeError, AttributeError):
            yield _by_gdcm(data, syntax, code)


def _require_pixels(data: Any, syntax: Any, size: int) -> None:
    """Raise BadFile where a frame of `size` bytes claims more than these can hold."""
    samples = int(data.get("SamplesPerPixel") or 1)
    claim = int(data.Rows) * int(data.Columns) * samples * int(data.get("BitsAllocated") or 8) // 8
    densest = DENSEST_RLE if "RLE" in syntax.name else DENSEST
    if claim > max(densest * size, SMALL if densest == DENSEST else 0):
        shape = by((data.Rows, data.Columns))
        raise BadFile(f"claims {shape} pixels in {size} compressed bytes, which cannot hold them; copy it again")


def _by_gdcm(data: Any, syntax: Any, code: bytes) -> np.ndarray:
    """One frame that pydicom leaves to plugins, decoded by SimpleITK's GDCM."""
    import pydicom
    import SimpleITK

    # GDCM rescales some kinds of images and not others, and ITK inverts MONOCHROME1: give them nothing to do it with.
    colours = int(data.get("SamplesPerPixel") or 1) > 1
    bare = pydicom.Dataset()
    bare.file_meta = pydicom.dataset.FileMetaDataset()
    bare.file_meta.TransferSyntaxUID = syntax
    bare.SOPClassUID, bare.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", pydicom.uid.generate_uid()
    for name in ("SamplesPerPixel", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"):
        setattr(bare, name, data[name].value)
    bare.PhotometricInterpretation = "RGB" if colours else "MONOCHROME2"
    if colours:
        bare.PlanarConfiguration = int(data.get("PlanarConfiguration") or 0)
    bare.PixelData = pydicom.encaps.encapsulate([code], has_bot=False)
    bare["PixelData"].VR, bare["PixelData"].is_undefined_length = "OB", True
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "frame.dcm")
        bare.save_as(file, enforce_file_format=True)
        try:
            with _silence():
                pixels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(file, imageIO="GDCMImageIO"))
        except Exception:
            tool = next((tool for name, tool in TOOLS.items() if name in syntax.name), "")
            remedy = f", or decompress it first ({tool} IN OUT)" if tool else ", or export it as PNG"
            raise BadFile(f"its pixels ({syntax.name}) cannot be decoded; copy it again{remedy}") from None
    pixels = pixels[0] if pixels.shape[0] == 1 else pixels
    if colours and str(data.PhotometricInterpretation).startswith("YBR_FULL"):
        return pydicom.pixels.convert_color_space(pixels, "YBR_FULL", "RGB")
    return pixels


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing on standard error, where C libraries write lines that name no file."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept), os.close(nothing)

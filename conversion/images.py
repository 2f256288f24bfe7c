"""A 2D image of any format: the file itself, copied, or a DICOM radiograph as a grey PNG."""

from __future__ import annotations

import hashlib
import math
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from conversion.dicom import read_dicom_image
from conversion.layouts import Source
from conversion.table import LABELS, Case
from conversion.volume import BadFile, by
from datasets.index import IMAGE_FORMATS, MAX_IMAGE_PIXELS, MIN_SIDE
from utils.files import whole_file


def convert_image(source: Source, dest: Path) -> Case:
    """Write one image and its label map below `dest`. Raises BadFile, whatever is wrong with them."""
    path = source.path
    radiograph = source.format == "dicom_image"
    pixels = read_dicom_image(path) if radiograph else _decode(path)
    original = pixels.dtype.newbyteorder("=")
    low, high = _check(pixels)
    pixels = _grey(pixels, low, high) if radiograph else pixels
    case = Case(
        id=source.id,
        source=source.name,
        file=source.id + (".png" if radiograph else path.suffix.lower()),
        shape=by(pixels.shape),
        dtype=str(pixels.dtype),
        minimum=f"{low:g}",
        maximum=f"{high:g}",
        original_shape=by(pixels.shape),
        original_dtype=str(original),
    )
    if source.label:
        _check_label(source.label, pixels)
        case.label = f"{LABELS}/{source.id}{source.label.suffix.lower()}"
        with whole_file(dest / case.label) as temporary:
            shutil.copyfile(source.label, temporary)
        case.label_bytes = str((dest / case.label).stat().st_size)
    with whole_file(dest / case.file) as temporary:
        if radiograph:
            Image.fromarray(pixels).save(temporary, format="PNG")
        else:
            shutil.copyfile(path, temporary)
    case.sha256 = hashlib.sha256((dest / case.file).read_bytes()).hexdigest()
    case.bytes = str((dest / case.file).stat().st_size)
    return case


def _grey(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    """The pixels of a radiograph in 8 or 16 bits, from 0 up where they are negative."""
    if high - low > 65535:
        raise BadFile(f"its values, {low:g} to {high:g}, do not fit into 16 bits; convert it to PNG yourself")
    dtype = np.uint8 if low >= 0 and high < 256 else np.uint16
    return (pixels.astype(np.int64) - min(0, int(low))).astype(dtype)


def _decode(path: Path) -> np.ndarray:
    """All pixels of an image file. Raises BadFile where it is none, is broken, or is a stack."""
    try:
        if path.stat().st_size == 0:
            raise BadFile("is empty (0 bytes); copy it again or remove it")
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
            if pages > 1:
                raise BadFile(f"is a stack of {pages} pages; save it as a volume, height x width x {pages} .npy")
            if image.mode == "LAB":
                raise BadFile("is in CIELAB colours, which training cannot turn to grey; export it in grey or RGB")
            return np.asarray(image)
    except BadFile:
        raise
    except Exception as error:  # decoders fail in many ways on arbitrary bytes
        raise BadFile(f"broken image data ({error or type(error).__name__}); export it again or remove it") from None


def _check(pixels: np.ndarray) -> tuple[float, float]:
    """The range of the pixels. Raises BadFile for an image that training could not use."""
    height, width = pixels.shape[:2]
    low, high = float(pixels.min()), float(pixels.max())
    if min(height, width) < MIN_SIDE:
        raise BadFile(f"has {height} x {width} pixels, below {MIN_SIDE} in one direction; remove it")
    if height * width > MAX_IMAGE_PIXELS:
        raise BadFile(f"has {height} x {width} pixels, above {MAX_IMAGE_PIXELS}; reduce it or remove it")
    if not (math.isfinite(low) and math.isfinite(high)):
        raise BadFile("holds NaN or Inf; correct it or remove it")
    if low == high:
        raise BadFile(f"is constant (all pixels are {low:g}), so there is nothing to learn from it; remove it")
    return low, high


def _check_label(path: Path, pixels: np.ndarray) -> None:
    try:
        label = _decode(path)
        if label.shape[:2] != pixels.shape[:2]:
            raise BadFile(f"{by(label.shape)} pixels do not match its image, {by(pixels.shape)}")
    except BadFile as error:
        raise BadFile(f"label {path}: {error}") from None

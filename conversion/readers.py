"""Volumes of every accepted format as intensities with their geometry, each through a maintained reader.

The libraries are imported when a file needs them: training never does.
"""

from __future__ import annotations

import gzip
import stat
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from conversion.arrays import Part, read_array
from conversion.dicom import read_dicom
from conversion.itk import read_itk
from conversion.nifti import read_nibabel
from conversion.pictures import read_picture
from conversion.volume import BadFile, Options, Volume, by, reason

SAME_SPACING = 1e-3  # as a share; headers carry spacings in float32


def read(format: str, files: Sequence[Path], options: Options, part: Part | None = None) -> Volume:
    """The volume in a file, in the files of a DICOM series, or in one file per channel; its intensities are finite.

    part: the case that is read of an array with many. Raises BadFile, whatever is wrong with the files.
    """
    if len(files) > 1 and format != "dicom":
        volumes = []
        for file in files:
            try:
                volumes.append(read(format, (file,), replace(options, channel=None)))
            except BadFile as error:
                raise BadFile(f"{file.name}: {error}") from None
        return _stack(files, volumes)
    try:
        status = files[0].stat()
        if not stat.S_ISREG(status.st_mode):  # a FIFO would be waited for
            raise BadFile("is not a regular file; remove it")
        if status.st_size == 0:
            raise BadFile("is empty (0 bytes); copy it again or remove it")
        if format == "dicom":
            volume = read_dicom(files, options)
        else:
            volume = READERS[format](files[0], options, *[part] * (part is not None))
    except (BadFile, MemoryError):
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise BadFile("is truncated or damaged: its compressed data end early or do not agree; copy it again") from None
    except Exception as error:  # readers fail in many ways on arbitrary bytes
        raise BadFile(f"cannot be read ({reason(error)}); copy it again or export it again") from None
    volume.array = _checked(volume.array, options.nan_value)
    return volume


def _checked(array: np.ndarray, nan_value: float | None) -> np.ndarray:
    """Finite, with three or four axes, in an integer type or at most float32."""
    if array.dtype.fields or array.dtype.kind not in "iufb":
        raise BadFile(f"has dtype {array.dtype}, not intensities; save grey values, of complex ones np.abs(volume)")
    if array.ndim not in (3, 4):
        raise BadFile(f"is {array.ndim}D ({by(array.shape)}); save a slice as an image (.png), or one volume per file")
    if 0 in array.shape:
        raise BadFile(f"has an axis of length 0 ({by(array.shape)}); export it again or remove it")
    if array.dtype.kind != "f":
        return array.view(np.uint8) if array.dtype.kind == "b" else array
    with np.errstate(over="ignore"):
        array = array if array.dtype.itemsize <= 4 else array.astype(np.float32)
    if np.isfinite([array.min(), array.max()]).all():
        return array
    finite = np.isfinite(array)
    if nan_value is None:
        count = array.size - np.count_nonzero(finite)
        raise BadFile(
            f"{count} of {array.size} voxels are NaN or Inf, or beyond float32; correct it, or replace them "
            "(--nan_value 0)"
        )
    return np.where(finite, array, array.dtype.type(nan_value))


def _stack(files: Sequence[Path], volumes: Sequence[Volume]) -> Volume:
    """One volume of several that lie on each other, a channel each."""
    first = volumes[0]
    for file, volume in zip(files, volumes, strict=True):
        alike = volume.array.shape == first.array.shape and volume.codes == first.codes
        if not (alike and (first.affine is None or np.allclose(volume.spacing_mm, first.spacing_mm, SAME_SPACING))):
            what = f"{by(volume.array.shape)} voxels or their spacing or orientation"
            raise BadFile(f"{file.name}: {what} do not match {files[0].name}; copy the right file")
    return replace(first, array=np.stack([volume.array.T for volume in volumes]).T)  # slices stay in one piece


READERS = {"nifti": read_nibabel, "itk": read_itk, "array": read_array, "image": read_picture}

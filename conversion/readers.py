"""Volumes of every accepted format as intensities with their geometry, each through a maintained reader.

NIfTI through nibabel, as it reads one channel of a 4D file alone and accepts affines that ITK refuses. The libraries
are imported when a file needs them: training never does.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from conversion.dicom import read_dicom
from conversion.volume import TO_RAS, BadFile, Options, Volume, by, reason, rescaled, with_channels
from datasets.index import npy_header

SAME_SPACING = 1e-3  # as a share; headers carry spacings in float32


def read(format: str, files: Sequence[Path], options: Options) -> Volume:
    """The volume in a file, in the files of a DICOM series, or in one file per channel; its intensities are finite.

    Raises BadFile, whatever is wrong with the files.
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
        if files[0].stat().st_size == 0:
            raise BadFile("is empty (0 bytes); copy it again or remove it")
        volume = read_dicom(files, options) if format == "dicom" else READERS[format](files[0], options)
    except (BadFile, MemoryError):
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise BadFile("is truncated or damaged: its compressed data end early; copy it again") from None
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


def read_nifti(path: Path, options: Options) -> Volume:
    """NIfTI-1 or -2, compressed or not; axes and spacing from the sform, or else the qform."""
    import nibabel
    from nibabel.arrayproxy import ArrayProxy

    image = nibabel.load(path)
    proxy = image.dataobj
    coded = any(int(image.header.get(f"{kind}_code", 1)) for kind in ("qform", "sform"))
    notes = [] if coded else ["no orientation in the NIfTI header (qform and sform code 0): taken as its affine says"]
    unscaled = ArrayProxy(proxy.file_like, (proxy.shape, proxy.dtype, proxy.offset))
    array = rescaled(with_channels(unscaled, options.channel), float(proxy.slope), float(proxy.inter))
    return Volume(array, np.asarray(image.affine, dtype=np.float64), notes)


def read_itk(path: Path, options: Options) -> Volume:
    """NRRD or MetaImage."""
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    image = SimpleITK.ReadImage(os.fspath(path))
    axes, array = image.GetDimension(), SimpleITK.GetArrayFromImage(image)
    if axes < 3:
        raise BadFile(f"is {axes}D ({by(image.GetSize())}); save it as an image (.png), or stack slices to a volume")
    array = array.transpose(*range(axes)[::-1], *range(axes, array.ndim))
    steps = np.array(image.GetDirection()).reshape(axes, axes) * image.GetSpacing()
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = steps[:3, :3], image.GetOrigin()[:3]
    return Volume(with_channels(array, options.channel), TO_RAS @ affine)


def read_npy(path: Path, options: Options) -> Volume:
    """NPY; slices lie along options.array_axis. Nothing is unpickled."""
    npy_header(path)  # says better than numpy what is wrong
    return _from_array(np.load(path, mmap_mode="c", allow_pickle=False), options)


def read_npz(path: Path, options: Options) -> Volume:
    """One array of an NPZ archive: options.array_key, or the only volume in it."""
    with np.load(path, allow_pickle=False) as archive:
        return _from_array(_pick(archive, options.array_key), options)


def read_hdf5(path: Path, options: Options) -> Volume:
    """One array of an HDF5 file: options.array_key, or the only volume in it."""
    import h5py

    with h5py.File(path, "r") as file:
        arrays: dict[str, Any] = {}
        file.visititems(lambda name, item: arrays.update({name: item} if isinstance(item, h5py.Dataset) else {}))
        return _from_array(_pick(arrays, options.array_key), options)


def _from_array(array: Any, options: Options) -> Volume:
    """A volume without geometry, its slices moved to the third axis and its channels to the fourth."""
    array = with_channels(array, options.channel, options.channel_axis)
    return Volume(np.moveaxis(array, options.array_axis, 2) if array.ndim > 2 else array)


def _pick(arrays: Mapping[str, Any], key: str) -> Any:
    """The array to read."""
    if key in arrays:
        return arrays[key]
    shapes = {name: array.shape for name, array in arrays.items()}
    volumes = [name for name, shape in shapes.items() if len(shape) >= 3]
    if len(volumes) == 1 and not key:
        return arrays[volumes[0]]
    listed = ", ".join(f"{name} ({by(shape)})" for name, shape in list(shapes.items())[:8]) or "nothing"
    what = f"has no array {key!r}" if key else "has several volumes" if volumes else "has no volume"
    raise BadFile(f"{what} among {listed}; name one with --array_key")


READERS = {"nifti": read_nifti, "itk": read_itk, "npy": read_npy, "npz": read_npz, "hdf5": read_hdf5}

"""Volumes of every accepted format as arrays with their geometry, each through a maintained reader.

NIfTI through nibabel (stored type and scaling stay apart, one channel of a 4D file is read alone, and sheared or
rounded affines, which ITK refuses, are accepted); NRRD and MHA / MHD through SimpleITK (written by ITK's own
authors); HDF5 through h5py; NPY and NPZ through numpy; DICOM: conversion/dicom.py. The readers are imported when a
file needs them: training never does.
"""

from __future__ import annotations

import gzip
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from conversion.dicom import read_dicom
from conversion.volume import BadFile, Options, Volume, by, channel_index, reason
from datasets.index import npy_header

SAME_SPACING = 1e-3  # as a share; headers carry spacings in float32


def read(format: str, files: Sequence[Path], options: Options) -> Volume:
    """The volume in a file, in the files of a DICOM series, or in one file per channel.

    Raises BadFile, whatever is wrong with the files.
    """
    if format == "dicom":
        return _attempt(read_dicom, files, options)
    if len(files) == 1:
        return _attempt(_read_file, format, files[0], options)
    volumes = []
    for file in files:
        try:
            volumes.append(_attempt(_read_file, format, file, replace(options, channel=None)))
        except BadFile as error:
            raise BadFile(f"{file.name}: {error}") from None
    return _stack(files, volumes)


def _attempt(reader: Callable[..., Volume], *args: Any) -> Volume:
    try:
        volume = reader(*args)
    except (BadFile, MemoryError):
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise BadFile("is truncated or damaged: its compressed data end early; copy it again") from None
    except Exception as error:  # readers fail in many ways on arbitrary bytes
        raise BadFile(f"cannot be read ({reason(error)}); copy it again or export it again") from None
    _check(volume.array)
    return volume


def _check(array: np.ndarray) -> None:
    if array.dtype.fields or array.dtype.kind not in "iufbc":
        raise BadFile(f"has dtype {array.dtype}, not intensities; export it as grey values")
    if array.dtype.kind == "c":
        raise BadFile(f"is complex ({array.dtype}): k-space or raw MR data; save the magnitude, np.abs(volume)")
    if array.ndim not in (3, 4):
        remedy = "save it as an image (.png), or stack the slices of a volume" if array.ndim == 2 else "save one volume"
        raise BadFile(f"is {array.ndim}D ({by(array.shape)}) where a volume has 3 axes; {remedy}")
    if 0 in array.shape:
        raise BadFile(f"has an axis of length 0 ({by(array.shape)}); export it again or remove it")


def _stack(files: Sequence[Path], volumes: Sequence[Volume]) -> Volume:
    """One volume of several that lie on each other, a channel each."""
    first = volumes[0]
    for file, volume in zip(files, volumes, strict=True):
        alike = volume.array.shape == first.array.shape and volume.codes == first.codes
        if not (alike and (first.affine is None or np.allclose(volume.spacing_mm, first.spacing_mm, SAME_SPACING))):
            raise BadFile(
                f"{file.name}: {by(volume.array.shape)} voxels of {by(volume.spacing_mm)} mm, {volume.codes}, do not "
                f"match {by(first.array.shape)} of {by(first.spacing_mm)} mm, {first.codes}, of {files[0].name}"
            )
    arrays = [volume.array for volume in volumes]
    slope, intercept = first.slope, first.intercept
    if len({(volume.slope, volume.intercept) for volume in volumes}) > 1:
        arrays = [(v.array * v.slope + v.intercept).astype(np.float32) for v in volumes]
        slope, intercept = 1.0, 0.0
    stacked = np.stack([array.T for array in arrays]).T  # slices stay in one piece
    return Volume(stacked, first.affine, slope, intercept, first.notes)


def _read_file(format: str, path: Path, options: Options) -> Volume:
    if path.stat().st_size == 0:
        raise BadFile("is empty (0 bytes); copy it again or remove it")
    readers = {"nifti": read_nifti, "itk": read_itk, "npy": read_npy, "npz": read_npz, "hdf5": read_hdf5}
    return readers[format](path, options)


def read_nifti(path: Path, options: Options) -> Volume:
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
    index = channel_index(proxy.shape, options.channel, -1)
    array = np.asanyarray(unscaled[index] if index else unscaled)
    return Volume(array, affine, float(proxy.slope), float(proxy.inter), notes)


def read_itk(path: Path, options: Options) -> Volume:
    """NRRD or MetaImage."""
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(os.fspath(path))
    reader.ReadImageInformation()
    size, components = reader.GetSize(), reader.GetNumberOfComponents()
    if len(size) < 3:
        raise BadFile(f"is {len(size)}D ({by(size)}); save it as an image (.png), or stack the slices of a volume")
    index = channel_index((*size, components) if components > 1 else size, options.channel, -1)
    image = reader.Execute()
    array = SimpleITK.GetArrayFromImage(image)
    array = array.transpose(*range(len(size))[::-1], *range(len(size), array.ndim))
    steps = np.array(image.GetDirection()).reshape(len(size), -1) * image.GetSpacing()
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = steps[:3, :3], image.GetOrigin()[:3]
    towards_ras = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK's axes point to the left, back and up
    return Volume(array[index] if index else array, towards_ras @ affine)


def read_npy(path: Path, options: Options) -> Volume:
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
            f"is truncated: {path.stat().st_size} bytes where {by(shape)} {dtype} needs {needs}; copy it again"
        )
    if 0 in shape:
        raise BadFile(f"has an axis of length 0 ({by(shape)}); export it again or remove it")
    return _from_array(np.load(path, mmap_mode="r", allow_pickle=False), options)


def read_npz(path: Path, options: Options) -> Volume:
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


def read_hdf5(path: Path, options: Options) -> Volume:
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


def _from_array(array: np.ndarray, options: Options) -> Volume:
    """A volume without geometry, its slices moved to the third axis and its channels to the fourth."""
    index = channel_index(array.shape, options.channel, options.channel_axis)
    array = array[index] if index else array
    if array.ndim == 4:
        array = np.moveaxis(array, options.channel_axis, 3)
    return Volume(np.moveaxis(array, options.array_axis, 2) if array.ndim > 2 else array)


def _pick(shapes: dict[str, tuple[int, ...]], key: str) -> str:
    """Name of the array to read."""
    listed = ", ".join(f"{name} ({by(shape)})" for name, shape in list(shapes.items())[:8]) or "no array"
    if key:
        if key not in shapes:
            raise BadFile(f"has no array {key!r}; it holds {listed}")
        return key
    several = [name for name, shape in shapes.items() if len(shape) >= 3]
    if len(several) == 1:
        return several[0]
    what = "several volumes" if several else "no volume"
    raise BadFile(f"holds {what}: {listed}; name one with --array_key" if several else f"holds no volume: {listed}")

"""Arrays to files: their range and the smallest type that holds it, resampling, NPY files written slice by slice."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from conversion.volume import BadFile
from utils.files import whole_file

FEWEST_STEPS = 256  # of float32 that must lie between the lowest and the highest intensity of a float64 volume


def stored_range(array: np.ndarray, nan_value: float | None = None) -> tuple[float, float]:
    """Smallest and largest value of [H, W, D], slice by slice. Raises BadFile for NaN and Inf without a replacement."""
    low, high, not_finite = math.inf, -math.inf, 0
    for k in range(array.shape[2]):
        block = array[:, :, k]
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
            f"{not_finite} of {array.size} voxels are NaN or Inf; correct it, or say what they should become "
            "(--nan_value 0)"
        )
    return low, high


def type_to_write(stored: np.dtype, slope: float, intercept: float, low: float, high: float) -> np.dtype:
    """The stored type, but float32 for float64; whole numbers stay whole where scaling is whole.

    low, high: of the intensities. Raises BadFile where float32 could not tell them apart.
    """
    single = np.dtype(np.float32)
    if stored.kind == "b":
        return np.dtype(np.uint8)
    if (slope, intercept) == (1, 0) and (stored.kind in "iu" or stored.itemsize <= single.itemsize):
        return stored
    if stored.kind in "iu" and float(slope).is_integer() and float(intercept).is_integer():
        for dtype in (stored, np.dtype(np.int16), np.dtype(np.int32)):
            if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
                return dtype
    if stored == single:
        return single
    with np.errstate(all="ignore"):
        step = float(np.spacing(single.type(max(abs(low), abs(high)))))
    if not high - low >= FEWEST_STEPS * step:  # step is nan where float32 has no such number
        raise BadFile(
            f"its intensities, {low:.9g} to {high:.9g}, are too large or differ too little for {single}; subtract "
            "an offset or scale them"
        )
    return single


def resample(array: np.ndarray, shape: tuple[int, ...], nearest: bool = False) -> np.ndarray:
    """[H, W, D] to another number of voxels over the same extent; float32 or, if nearest, the array's own type.

    Linear along each axis, averaging over the larger voxels where they grow, as the store's in-plane resizing does.
    """
    import torch
    import torch.nn.functional as F

    if nearest:  # the same voxel centres as the linear kernel has
        picks = [
            np.minimum(((np.arange(n) + 0.5) * old / n).astype(int), old - 1)
            for n, old in zip(shape, array.shape, strict=True)
        ]
        return array[np.ix_(*picks)]
    out = np.empty((array.shape[2], *shape[:2]), dtype=np.float32)
    for k in range(array.shape[2]):
        pixels = torch.from_numpy(np.ascontiguousarray(array[:, :, k], dtype=np.float32))[None, None]
        out[k] = F.interpolate(pixels, size=tuple(shape[:2]), mode="bilinear", antialias=True)[0, 0].numpy()
    if shape[2] != len(out):
        columns = torch.from_numpy(out.reshape(1, 1, len(out), -1))
        size = (shape[2], columns.shape[-1])
        out = F.interpolate(columns, size=size, mode="bilinear", antialias=True).numpy().reshape(shape[2], *shape[:2])
    return out.transpose(1, 2, 0)


def write_npy(path: Path, slices: Iterable[np.ndarray], shape: tuple[int, ...], dtype: np.dtype) -> tuple[str, int]:
    """(sha256, bytes) of an NPY file of [H, W] slices, written one by one; with channels: channel after channel.

    In Fortran order: a slice is one piece of the file then, and slices are what training reads.
    """
    dtype = np.dtype(dtype).newbyteorder("<")
    digest = hashlib.sha256()
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
    return digest.hexdigest(), size

"""What a cache file of the slice store holds: one volume or image, normalised to 0..1 and resized in plane."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from datasets.index import IMAGE_FORMATS, Sample
from utils.errors import UserError

FORMAT = 2  # of the cache files; raise it when their content changes, so that old ones are not used
PERCENTILES = (0.5, 99.5)
SAMPLED_VOXELS = 2**20  # the 0.5th percentile of so many is off by 0.007 percentage points (one standard deviation)
SLICES_AT_ONCE = 8  # of a conversion in float: what they take stays in the processor's cache
TURNED_AT_ONCE = 2**28  # bytes of a file with interleaved slices that are brought into slice order in one go
VOXELS_AT_ONCE = 2**24


class BadContent(UserError):
    """The header of a source file is good but its content is not.

    lasting: whether that is so until the file changes, and not a disk that failed to answer.
    """

    def __init__(self, sample: Sample, reason: str, lasting: bool = True) -> None:
        super().__init__(f"{sample.path}: {reason}")
        self.reason, self.lasting = reason, lasting


def content_size(height: int, width: int, size: int) -> tuple[int, int]:
    """(h, w) in pixels of a slice whose longer side is brought to `size` with its aspect ratio kept."""
    longer = max(height, width)
    return max(1, round(height * size / longer)), max(1, round(width * size / longer))


def render(sample: Sample, size: int) -> np.ndarray:
    """The content of a cache file: [D, h, w] float16 in 0..1, max(h, w) = size.

    Intensities are linear between the limits of the sample's window, or else between the 0.5th and 99.5th
    percentile of its voxels, and clipped. The percentiles of a large volume are taken over every k-th voxel, about
    a million. Where they coincide (a vessel-only volume can be 99.9 % zeros) minimum and maximum stand in
    for them. Slices are resized bilinearly, with antialiasing when they shrink. Raises BadContent for NaN or
    Inf, no contrast and unreadable data.
    """
    try:
        source = open_volume(sample) if sample.kind == "volume" else open_image(sample)
        if min(source.strides) == source.strides[0] and source.nbytes <= TURNED_AT_ONCE:
            source = np.ascontiguousarray(source)  # a slice alone touches every page of such a file
        low, high = intensity_limits(source, sample)
    except OSError as error:
        raise BadContent(sample, f"cannot be read ({error}); copy it again or remove it", lasting=False) from None
    h, w = content_size(sample.height, sample.width, size)
    out = np.empty((sample.slices, h, w), dtype=np.float16)
    working = np.result_type(source.dtype, np.float32)  # float64 for what float32 cannot hold: 32-bit integers
    for first in range(0, sample.slices, SLICES_AT_ONCE):
        part = slice(first, first + SLICES_AT_ONCE)
        # The copy in slice order first: arithmetic on a strided view takes twice as long.
        shifted = np.subtract(np.ascontiguousarray(source[part]), low, dtype=working)
        with np.errstate(over="ignore"):  # far outside the limits: clipped below
            scaled = np.divide(shifted, high - low, out=np.empty(shifted.shape, np.float32), casting="same_kind")
        pixels = torch.from_numpy(scaled)[:, None].clamp_(0, 1)
        if (h, w) != (sample.height, sample.width):
            pixels = F.interpolate(pixels, size=(h, w), mode="bilinear", antialias=True)
        out[part] = pixels[:, 0].clamp(0, 1).numpy()
    return out


def open_volume(sample: Sample) -> np.ndarray:
    """[D, H, W] memory map of a volume in its own dtype."""
    try:
        array = np.load(sample.path, mmap_mode="r", allow_pickle=False)
    except ValueError:
        array = None
    if array is None or array.ndim != 3:
        raise BadContent(sample, "has changed since it was scanned; start again", lasting=False)
    array = np.moveaxis(array, sample.slice_axis, 0)
    if array.shape != (sample.slices, sample.height, sample.width):
        raise BadContent(sample, "has changed since it was scanned; start again", lasting=False)
    return array


def open_image(sample: Sample) -> np.ndarray:
    """[1, H, W] grey values of an image: its own if it has one channel of 8, 16 or 32 bits, else luminance."""
    try:
        with Image.open(sample.path, formats=IMAGE_FORMATS) as image:
            own = image.mode in ("L", "I", "F") or image.mode.startswith("I;16")
            array = np.asarray(image if own else image.convert("L"))
    except Exception as error:  # decoders fail in many ways on damaged data
        reason = str(error) or type(error).__name__
        raise BadContent(sample, f"broken image data ({reason}); export it again or remove it") from None
    if array.shape != (sample.height, sample.width):
        raise BadContent(sample, "has changed since it was scanned; start again", lasting=False)
    return array[None]


def intensity_limits(source: np.ndarray, sample: Sample) -> tuple[float, float]:
    """The intensities of [D, H, W] that become 0 and 1. Raises BadContent where none make sense."""
    unit = "voxels" if sample.kind == "volume" else "pixels"
    low, high, not_finite = math.inf, -math.inf, 0
    flat = _in_memory_order(source)
    for first in range(0, flat.size, VOXELS_AT_ONCE):
        block = flat[first : first + VOXELS_AT_ONCE]
        lowest, highest = float(block.min()), float(block.max())  # NaN if any is
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            not_finite += block.size - int(np.count_nonzero(np.isfinite(block)))
        low, high = min(low, lowest), max(high, highest)
    if not_finite:
        raise BadContent(
            sample,
            f"{not_finite} of {flat.size} {unit} are NaN or Inf; replace them (np.nan_to_num) "
            "or remove the file, or leave such files out with --on_bad skip",
        )
    if low == high:
        raise BadContent(
            sample,
            f"is constant (all {unit} are {low:g}), so there is nothing to learn from it; "
            "remove it, or leave such files out with --on_bad skip",
        )
    if high - low > 1e38:  # near the end of float32, where the scaling would overflow
        raise BadContent(sample, f"its range, {low:g} to {high:g}, is too wide; clip it or remove the file")
    if sample.window:
        if high <= sample.window[0] or low >= sample.window[1]:
            raise BadContent(
                sample,
                f"its intensities, {low:g} to {high:g}, lie outside the window {sample.window} "
                "of dataset.yaml; correct the window, or leave such files out with --on_bad skip",
            )
        return sample.window
    # A stride that shares no factor with the shape: any other would visit some rows, columns or slices only.
    stride = max(1, math.ceil(flat.size / SAMPLED_VOXELS))
    while math.gcd(stride, flat.size) > 1:
        stride += 1
    p_low, p_high = np.percentile(flat[::stride].astype(np.float64), PERCENTILES)
    return (float(p_low), float(p_high)) if p_low < p_high else (low, high)


def _in_memory_order(array: np.ndarray) -> np.ndarray:
    """All elements as a 1D view in the order in which they lie on disk, where the array is contiguous."""
    axes = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
    return array.transpose(axes).reshape(-1)

"""What a cache file of the slice store holds: one volume or image, normalised to 0..1 and resized in plane."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from datasets.index import IMAGE_FORMATS, ORIENTATION, Sample, orientation

FORMAT = 3  # of the cache files; raise it when their content changes, so that old ones are not used
PERCENTILES = (0.5, 99.5)
SAMPLED_VOXELS = 2**20  # the 0.5th percentile of so many is off by 0.007 percentage points (one standard deviation)
SLICES_AT_ONCE = 8  # of a conversion in float: what they take stays in the processor's cache
AT_ONCE = 2**28  # bytes of a file up to which interleaved slices are brought into slice order in one go
CHANGED = "has changed since it was scanned; start again"


class BadSource(ValueError):
    """A source file cannot be used: what is wrong with it and what to do, without its name."""


def content_size(height: int, width: int, size: int) -> tuple[int, int]:
    """(h, w) in pixels of a slice whose longer side is brought to `size` with its aspect ratio kept."""
    longer = max(height, width)
    return max(1, round(height * size / longer)), max(1, round(width * size / longer))


def render(sample: Sample, size: int) -> np.ndarray:
    """The content of a cache file: [D, h, w] float16 in 0..1, max(h, w) = size.

    Intensities are linear in the sample's window or else between `robust_limits`, and clipped. Slices are resized
    bilinearly, with antialiasing when they shrink. Raises BadSource for NaN or Inf, no contrast and unreadable data.
    """
    source = open_source(sample)
    require_contrast(source, sample)
    low, high = sample.window or robust_limits(source)
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


def open_source(sample: Sample) -> np.ndarray:
    """[D, H, W] of a file in its own dtype: the first channel of a volume, grey values of an image.

    Raises BadSource where it cannot be read or is no longer what the scan found.
    """
    changed = BadSource(CHANGED)
    if sample.kind == "image":
        array = read_grey(sample.path)[None]
    else:
        try:
            array = np.load(sample.path, allow_pickle=False)  # not mapped: a mapped file that is cut kills the process
            array = np.moveaxis(array[..., 0] if sample.channel_names else array, sample.slice_axis, 0)
        except OSError as error:
            raise BadSource(f"cannot be read ({error.strerror or error}); copy it again or remove it") from None
        except (ValueError, IndexError, EOFError):
            raise changed from None
    if array.shape != (sample.slices, sample.height, sample.width):
        raise changed
    # A slice alone touches every page of a file with interleaved ones.
    interleaved = min(array.strides) == array.strides[0] and array.nbytes <= AT_ONCE
    return np.ascontiguousarray(array) if interleaved else array


def read_grey(path: Path) -> np.ndarray:
    """[H, W] grey values of an image, upright: its own if it has one channel of 8, 16 or 32 bits, else luminance."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return grey_of(image)
    except Exception as error:  # decoders fail in many ways on damaged data
        reason = str(error) or type(error).__name__
        raise BadSource(f"broken image data ({reason}); export it again or remove it") from None


def grey_of(image: Image.Image) -> np.ndarray:
    """What `read_grey` returns, of the page at which an open image stands."""
    if image.format == "TIFF" and image.tag_v2.get(ORIENTATION, 1) > 4 and image.info.get("compression") == "raw":
        raise ValueError("stored on its side, which Pillow reads wrongly without compression: save it upright")
    upright = ImageOps.exif_transpose(image) if orientation(image) > 1 else image
    own = upright.mode in ("L", "I", "F") or upright.mode.startswith("I;16")
    colours = upright.convert("RGB") if upright.mode == "LAB" else upright  # LAB has no direct way to grey
    return np.asarray(upright if own else colours.convert("L"))


def contrast(array: np.ndarray) -> tuple[float, float]:
    """(minimum, maximum). Raises BadSource where they say that training would learn nothing from the array."""
    low, high = float(array.min()), float(array.max())  # NaN if any is
    if not (math.isfinite(low) and math.isfinite(high)):
        count = array.size - int(np.count_nonzero(np.isfinite(array)))
        raise BadSource(f"{count} of {array.size} values are NaN or Inf; replace them (np.nan_to_num)")
    if low == high:
        raise BadSource(f"is constant (all values are {low:g}), so there is nothing to learn from it; remove it")
    if high - low > 1e38:  # near the end of float32, where the scaling would overflow
        raise BadSource(f"its range, {low:g} to {high:g}, is too wide; clip it")
    return low, high


def require_contrast(source: np.ndarray, sample: Sample) -> tuple[float, float]:
    """(minimum, maximum) of [D, H, W], within the sample's window, too. Raises BadSource."""
    try:
        low, high = contrast(source)
        if sample.window and (high <= sample.window[0] or low >= sample.window[1]):
            outside = f"lie outside the window {sample.window} of dataset.yaml; correct the window"
            raise BadSource(f"its intensities, {low:g} to {high:g}, {outside}")
    except BadSource as error:
        raise BadSource(f"{error}, or leave such files out with --on_bad skip") from None
    return low, high


def robust_limits(array: np.ndarray) -> tuple[float, float]:
    """The 0.5th and 99.5th percentile of finite values, in an array of any shape.

    Where they coincide (a vessel-only volume can be 99.9 % zeros) minimum and maximum stand in for them.
    """
    low, high = np.percentile(sampled(array), PERCENTILES).tolist()
    return (low, high) if low < high else (float(array.min()), float(array.max()))


def sampled(array: np.ndarray) -> np.ndarray:
    """[n] float64: the values, of a large array every k-th, about a million from all rows, columns and slices."""
    axes = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))  # as they lie in memory: no copy
    flat = array.transpose(axes).reshape(-1)
    # A stride that shares no factor with the shape: any other would visit some rows, columns or slices only.
    stride = max(1, math.ceil(flat.size / SAMPLED_VOXELS))
    while math.gcd(stride, flat.size) > 1:
        stride += 1
    return flat[::stride].astype(np.float64)

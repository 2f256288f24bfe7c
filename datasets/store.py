"""The working copy of the data that training reads: normalised, resized, memory-mapped, built once.

A raw CT volume is hundreds of megabytes and a step needs a few slices of it. So every file is turned once into
a [D, h, w] float16 array in a cache folder, and slices are read from there.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from datasets.index import IMAGE_FORMATS, Sample, bad_files, describe, fingerprint, npy_header, scan
from utils.distributed import gather_objects, raise_everywhere, rank, world_size
from utils.errors import UserError

FORMAT = 1  # of the cache files; raise it when their content changes, so that old ones are not used
PERCENTILES = (0.5, 99.5)
SAMPLED_VOXELS = 4_000_000  # percentiles of a larger volume are taken over about this many of its voxels
SLICES_AT_ONCE = 32  # bounds the memory of a conversion: 32 slices of 512 x 512 in float64 are 67 MB
VOXELS_AT_ONCE = 2**24
FILES_PER_ROUND = 16  # per process; processes meet after each round, so none waits into the collective's time-out


def prepare(
    data_path: str | Path,
    size: int,
    cache_path: str | Path | None = None,
    on_bad: Literal["error", "skip"] = "error",
    progress: bool = True,
) -> tuple[list[Sample], SliceStore]:
    """Scan data_path and build its cache: (samples, store), the same on every process.

    on_bad: what to do with files whose header is good but whose content is not (NaN or Inf, no contrast,
    broken image data): `error` raises one UserError that lists them, `skip` leaves them out and prints each on
    process 0. progress: show the building and, at the end, a table of the data sets. The other arguments are those of
    SliceStore.
    """
    samples: list[Sample] = []
    error = None
    try:
        samples = scan(data_path)
    except UserError as e:
        error = e
    raise_everywhere(error)
    if len(set(gather_objects(fingerprint(samples)))) > 1:
        raise UserError(f"data_path: processes see different files below {data_path}; give all the same data")
    store = SliceStore(samples, size, cache_path, on_bad)
    store.build(progress)
    if progress and rank() == 0:
        print(describe(store.samples), flush=True)
    return store.samples, store


class SliceStore:
    """Slices of all samples as float32 squares in 0..1, read from a cache on disk.

    samples: from `datasets.index.scan`.  size: side S of the square in-plane canvas, pixels.
    cache_path: folder of the cache, or None for `.cache` inside the data tree.
    on_bad: see `prepare`; with `skip`, `build` removes bad files from `samples`, so that index i always means
    `store.samples[i]`.

    Has `samples` (what the index counts), `size`, and `extents`: [N, 2] int32, height and width in canvas pixels
    of the content of each sample.
    """

    def __init__(
        self,
        samples: list[Sample],
        size: int,
        cache_path: str | Path | None = None,
        on_bad: Literal["error", "skip"] = "error",
    ) -> None:
        if on_bad not in ("error", "skip"):
            raise UserError(f"on_bad: {on_bad!r} is not one of error, skip")
        if size < 1:
            raise UserError(f"size: {size} pixels is not a canvas; give a positive number, e.g. 224")
        if not samples:
            raise UserError("there are no samples to build a cache for")
        self.size = size
        self.on_bad = on_bad
        base = samples[0].data_path / ".cache" if cache_path is None else Path(cache_path).expanduser()
        self.folder = base / f"slices_{size}px_v{FORMAT}"
        self._take(samples)

    def _take(self, samples: list[Sample]) -> None:
        self.samples = list(samples)
        self.files = [self.folder / f"{_key(sample)}.npy" for sample in samples]
        extents = [content_size(s.height, s.width, self.size) for s in samples]
        self.extents = np.array(extents, dtype=np.int32).reshape(-1, 2)

    def build(self, progress: bool = True) -> None:
        """Make every cache file that is missing or damaged; the files are shared out over the processes.

        Several runs may build the same cache at once: each file appears complete, in one rename. Raises
        UserError on all processes: for bad files (`on_bad="error"`) when all the good ones are done, so that
        the next start goes on from there, and at once when the cache folder cannot be written.
        """
        bad: dict[int, str] = {}
        show = progress and rank() == 0 and sys.stderr.isatty()
        with tqdm(total=len(self.samples), desc="preparing data", unit="file", disable=not show) as bar:
            for shares in self._rounds():
                mine, fatal = {}, None
                for i in shares[rank()]:
                    try:
                        self._make(i)
                    except _BadContent as error:
                        mine[i] = str(error)
                    except UserError as error:
                        fatal = error
                        break
                raise_everywhere(fatal)
                for other in gather_objects(mine):
                    bad |= other
                bar.update(sum(map(len, shares)))

        if world_size() > 1:
            self._complete([i for i in range(len(self.samples)) if i not in bad])

        if bad and self.on_bad == "error":
            raise bad_files([bad[i] for i in sorted(bad)], f"data_path {self.samples[0].data_path}")
        if len(bad) == len(self.samples):
            raise UserError(f"no usable file is left below {self.samples[0].data_path}; the first: {bad[0]}")
        if rank() == 0:
            for i in sorted(bad):
                print(f"warning: left out {bad[i]}", file=sys.stderr)
        self._take([sample for i, sample in enumerate(self.samples) if i not in bad])

    def read(self, index: int, start: int, stop: int) -> np.ndarray:
        """Slices start..stop-1 of a sample: [stop - start, S, S] float32 in 0..1, centred, zeros around them.

        Only these slices are read from disk. Raises IndexError for slices that the sample does not have.
        """
        sample = self.samples[index]
        if not 0 <= start < stop <= sample.slices:
            raise IndexError(f"{sample.path}: slices {start}..{stop} of {sample.slices} were asked for")
        try:
            content = np.load(self.files[index], mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.files[index]}: the cached copy of {sample.path} cannot be read ({error}); start again, "
                "which rebuilds it"
            ) from None
        height, width = content.shape[1:]
        top, left = (self.size - height) // 2, (self.size - width) // 2
        canvas = np.zeros((stop - start, self.size, self.size), dtype=np.float32)
        canvas[:, top : top + height, left : left + width] = content[start:stop]
        return canvas

    def _rounds(self) -> Iterator[list[range]]:
        """The indices of each process, round after round: a function of the counts alone, so equal on all."""
        step = FILES_PER_ROUND * world_size()
        for first in range(0, len(self.samples), step):
            last = min(first + step, len(self.samples))
            yield [range(first + r, last, world_size()) for r in range(world_size())]

    def _complete(self, indices: list[int]) -> None:
        """Make what this process cannot see although another made it: machines without a common disk.

        Every process starts at another place and looks again before each file, so the processes of one machine
        share this work out too.
        """
        start = rank() * len(indices) // world_size()
        fatal = None
        try:
            for i in indices[start:] + indices[:start]:
                self._make(i)
        except UserError as error:
            fatal = error
        raise_everywhere(fatal)

    def _make(self, index: int) -> None:
        """Write one cache file unless it is there. Raises _BadContent (source) or UserError (cache folder)."""
        sample, target = self.samples[index], self.files[index]
        try:
            if _is_whole(target, (sample.slices, *map(int, self.extents[index]))):
                return
            # Before the conversion, so that a folder that cannot be made costs no time.
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._cannot_write(error) from None
        content = render(sample, self.size)
        # Unique per process and machine, in the same folder: a rename is atomic only within one file system.
        temporary = target.with_name(f".{target.stem}.{uuid.uuid4().hex}.tmp")
        try:
            with open(temporary, "xb") as file:
                np.save(file, content, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except OSError as error:
            raise self._cannot_write(error) from None
        finally:
            temporary.unlink(missing_ok=True)

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(
            f"{self.folder}: the cache of prepared slices cannot be written ({error.strerror or error}); "
            "free some space, or name another folder with --cache_path"
        )


class _BadContent(UserError):
    """The header of a source file is good but its content is not."""


def content_size(height: int, width: int, size: int) -> tuple[int, int]:
    """(h, w) in pixels of a slice whose longer side is brought to `size` with its aspect ratio kept."""
    longer = max(height, width)
    return max(1, round(height * size / longer)), max(1, round(width * size / longer))


def render(sample: Sample, size: int) -> np.ndarray:
    """The content of a cache file: [D, h, w] float16 in 0..1, max(h, w) = size.

    Intensities are linear between the limits of the sample's window, or else between the 0.5th and 99.5th
    percentile of its voxels, and clipped. The percentiles of a large volume are taken over every k-th voxel, 4
    million at most. Where they coincide (a vessel-only volume can be 99.9 % zeros) minimum and maximum stand in
    for them. Slices are resized bilinearly, with antialiasing when they shrink. Raises UserError for NaN or Inf,
    no contrast and unreadable data.
    """
    try:
        source = _open_volume(sample) if sample.kind == "volume" else _open_image(sample)
        low, high = _limits(source, sample)
    except OSError as error:
        raise _BadContent(f"{sample.path}: cannot be read ({error}); copy it again or remove it") from None
    h, w = content_size(sample.height, sample.width, size)
    out = np.empty((sample.slices, h, w), dtype=np.float16)
    working = np.result_type(source.dtype, np.float32)  # float64 for what float32 cannot hold: 32-bit integers
    for first in range(0, sample.slices, SLICES_AT_ONCE):
        part = slice(first, first + SLICES_AT_ONCE)
        # The copy in slice order first: arithmetic on a strided view takes twice as long.
        scaled = np.subtract(np.ascontiguousarray(source[part]), low, dtype=working)
        scaled /= high - low
        pixels = torch.from_numpy(scaled.clip(0, 1, out=scaled).astype(np.float32, copy=False))[:, None]
        if (h, w) != (sample.height, sample.width):
            pixels = F.interpolate(pixels, size=(h, w), mode="bilinear", antialias=True)
        out[part] = pixels[:, 0].clamp(0, 1).numpy()
    return out


def _open_volume(sample: Sample) -> np.ndarray:
    """[D, H, W] memory map of a volume in its own dtype."""
    try:
        array = np.load(sample.path, mmap_mode="r", allow_pickle=False)
    except ValueError:
        array = None
    if array is None or array.ndim != 3:
        raise _BadContent(f"{sample.path}: has changed since it was scanned; start again")
    array = np.moveaxis(array, sample.slice_axis, 0)
    if array.shape != (sample.slices, sample.height, sample.width):
        raise _BadContent(f"{sample.path}: has changed since it was scanned; start again")
    return array


def _open_image(sample: Sample) -> np.ndarray:
    """[1, H, W] grey values of an image: its own if it has one channel of 8, 16 or 32 bits, else luminance."""
    try:
        with Image.open(sample.path, formats=IMAGE_FORMATS) as image:
            own = image.mode in ("L", "I", "F") or image.mode.startswith("I;16")
            array = np.asarray(image if own else image.convert("L"))
    except Exception as error:  # decoders fail in many ways on damaged data
        reason = str(error) or type(error).__name__
        raise _BadContent(f"{sample.path}: broken image data ({reason}); export it again or remove it") from None
    if array.shape != (sample.height, sample.width):
        raise _BadContent(f"{sample.path}: has changed since it was scanned; start again")
    return array[None]


def _limits(source: np.ndarray, sample: Sample) -> tuple[float, float]:
    """The intensities that become 0 and 1. Raises _BadContent where none make sense."""
    unit = "voxels" if sample.kind == "volume" else "pixels"
    low, high, not_finite = math.inf, -math.inf, 0
    flat = _in_memory_order(source)
    for first in range(0, flat.size, VOXELS_AT_ONCE):
        block = flat[first : first + VOXELS_AT_ONCE]
        if block.dtype.kind == "f":
            finite = np.isfinite(block)
            not_finite += block.size - int(np.count_nonzero(finite))
            if not finite.all():
                block = block[finite]
        if block.size:
            low, high = min(low, float(block.min())), max(high, float(block.max()))
    if not_finite:
        raise _BadContent(
            f"{sample.path}: {not_finite} of {flat.size} {unit} are NaN or Inf; replace them (np.nan_to_num) "
            "or remove the file, or leave such files out with --on_bad skip"
        )
    if low == high:
        raise _BadContent(
            f"{sample.path}: is constant (all {unit} are {low:g}), so there is nothing to learn from it; "
            "remove it, or leave such files out with --on_bad skip"
        )
    if high - low > 1e38:  # near the end of float32, where the scaling would overflow
        raise _BadContent(f"{sample.path}: its range, {low:g} to {high:g}, is too wide; clip it or remove the file")
    if sample.window:
        if high <= sample.window[0] or low >= sample.window[1]:
            raise _BadContent(
                f"{sample.path}: its intensities, {low:g} to {high:g}, lie outside the window {sample.window} "
                "of dataset.yaml; correct the window, or leave such files out with --on_bad skip"
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


def _is_whole(file: Path, shape: tuple[int, ...]) -> bool:
    """Whether a cache file is there, of the expected shape, and as long as its header says."""
    try:
        found, dtype, offset = npy_header(file)
    except (FileNotFoundError, ValueError):
        return False
    return found == shape and dtype == np.float16 and file.stat().st_size == offset + dtype.itemsize * math.prod(shape)


def _key(sample: Sample) -> str:
    """Name of a cache file: changes with the source file and every setting that its content depends on."""
    source = os.path.realpath(sample.path), sample.size_bytes, sample.mtime_ns
    settings = sample.window, sample.slice_axis, FORMAT
    return hashlib.sha256(os.fsencode(repr((*source, *settings)))).hexdigest()[:32]

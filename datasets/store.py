"""The working copy of the data that training reads: normalised, resized, built once, read slice by slice.

A raw CT volume is hundreds of megabytes and a step needs a few slices of it. So every file is turned once into
a [D, h, w] float16 array in a cache folder (`datasets/render.py`), and slices are read from there.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from datasets.cache import BadSource, cache_folder, cached, is_whole, key_of, make_room
from datasets.headers import header_warnings
from datasets.index import Sample, bad_files, describe, fingerprint, inspect_tree, scan
from datasets.render import FORMAT, content_size, render
from utils.distributed import everywhere, gather_objects, rank, world_size
from utils.errors import UserError

NPY_HEADER = 128  # bytes that numpy.save writes before the data of a 3D array
MEETING_SECONDS = 20.0  # processes that build a cache meet this often, so none waits into the collectives' time-out
OnBad = Literal["error", "skip"]


def prepare(
    data_path: str | Path,
    size: int,
    cache_path: str | Path | None = None,
    on_bad: OnBad = "error",
    workers: int = 1,
    progress: bool = True,
    target_shape: tuple[int, int, int] | None = None,
    only: str | None = None,
) -> tuple[list[Sample], SliceStore]:
    """Scan data_path, check it by its headers, and build its cache: (samples, store), the same on every process.

    on_bad: what to do with files that cannot be used, by their header or by their content (NaN or Inf, no contrast,
    broken image data): `error` raises one UserError that lists them, `skip` leaves them out and prints each on
    process 0. workers: threads that build, per process. progress: show what looks odd about the data (check_data.py
    tells more), the building and, at the end, a table of the data sets. target_shape: slices, height and width of a
    view of volumes, for these warnings. only: the one data set that is taken; None: all. The other arguments are those
    of SliceStore.
    """
    samples, bad = everywhere(lambda: _usable(data_path, only) if on_bad == "skip" else (scan(data_path, only), []))
    if len(set(gather_objects(fingerprint(samples)))) > 1:
        raise UserError(f"data_path: processes see different files below {data_path}; give all the same data")
    notes = [f"left out {problem}" for problem in bad]
    if progress:
        notes += [*_first_channels(samples), *header_warnings(samples, target_shape)]
    _warn(notes)
    store = SliceStore(samples, size, cache_path, on_bad)
    store.build(workers, progress)
    if progress and rank() == 0:
        print(describe(store.samples), flush=True)
    return store.samples, store


class SliceStore:
    """Slices of all samples as squares with values in 0..1, read from a cache on disk.

    samples: from `datasets.index.scan`.  size: side S of the square in-plane canvas, pixels.
    cache_path: folder of the cache, or None for `.cache` inside the data tree.
    on_bad: see `prepare`; with `skip`, `build` removes bad files from `samples`, so that index i always means
    `store.samples[i]`.

    Has `samples` (what the index counts), `size`, and `extents`: [N, 2] int32, height and width in canvas pixels
    of the content of each sample.
    """

    def __init__(
        self, samples: list[Sample], size: int, cache_path: str | Path | None = None, on_bad: OnBad = "error"
    ) -> None:
        self.size, self.on_bad = size, on_bad
        self.folder = cache_folder(samples[0].data_path, cache_path) / f"slices_{size}px_v{FORMAT}"
        self._take(samples)

    def _take(self, samples: list[Sample]) -> None:
        self.samples = list(samples)
        self.files = [self.folder / f"{_key(sample)}.npy" for sample in samples]
        extents = [content_size(s.height, s.width, self.size) for s in samples]
        self.extents = np.array(extents, dtype=np.int32).reshape(-1, 2)

    def read(self, index: int, start: int, stop: int, half: bool = False) -> np.ndarray:
        """Slices start..stop-1 of a sample: [stop - start, S, S] float32 in 0..1, centred, zeros around them.

        half: float16 instead, as they are stored: a quarter of the time, and half as much to move to a GPU.
        Only these slices are read from disk, into memory that is freed with the result (no memory map: a file cut
        short under a map kills the process). Raises IndexError for slices that the sample does not have, UserError
        where the cached copy is gone or cut short.
        """
        sample = self.samples[index]
        if not 0 <= start < stop <= sample.slices:
            raise IndexError(f"{sample.path}: slices {start}..{stop} of {sample.slices} were asked for")
        height, width = map(int, self.extents[index])
        try:
            count = (stop - start) * height * width
            offset = NPY_HEADER + start * height * width * 2
            content = np.fromfile(self.files[index], np.float16, count, offset=offset)
            content = content.reshape(stop - start, height, width)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.files[index]}: the cached copy of {sample.path} cannot be read ({error}); start again, "
                "which rebuilds it"
            ) from None
        if not half:
            content = torch.from_numpy(content).float().numpy()  # numpy needs ten times as long
        if height == width == self.size:
            return content
        top, left = (self.size - height) // 2, (self.size - width) // 2
        canvas = np.zeros((stop - start, self.size, self.size), dtype=content.dtype)
        canvas[:, top : top + height, left : left + width] = content
        return canvas

    def build(self, workers: int = 1, progress: bool = True) -> None:
        """Make every cache file that is missing or damaged, on `workers` threads of every process.

        Any number of processes, of this run and of others, may build the same cache (`datasets/cache.py`). Processes
        without a common disk each make all.
        Raises UserError on all processes: for bad files (`on_bad="error"`) when all the good ones are done, so
        that the next start goes on from there, and at once when the cache folder has no room or cannot be written.
        """
        todo = everywhere(lambda: self._look_around(progress))
        first = rank() * len(todo) // world_size()  # processes begin at different places and so seldom meet
        waiting = deque(todo[first:] + todo[:first])
        bad: dict[int, str] = {}
        show = progress and rank() == 0 and sys.stderr.isatty()
        workers = max(1, min(workers, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # for the pool: threads that are new to torch take over what was set last
        try:
            with (
                tqdm(total=len(todo), desc="preparing data", unit="file", disable=not show) as bar,
                ThreadPoolExecutor(workers) as pool,
            ):
                while any(gather_objects(len(waiting))):
                    everywhere(lambda: self._make_for_a_while(waiting, bad, pool, 4 * workers, bar))
        finally:
            torch.set_num_threads(threads)
        for other in gather_objects(bad):
            bad |= other

        problems = [bad[i] for i in sorted(bad)]
        if bad and self.on_bad == "error":
            raise bad_files(problems, f"data_path {self.samples[0].data_path}")
        if len(bad) == len(self.samples):
            raise UserError(f"no usable file is left below {self.samples[0].data_path}; the first: {problems[0]}")
        _warn([f"left out {problem}" for problem in problems])
        self._take([sample for i, sample in enumerate(self.samples) if i not in bad])

    def _look_around(self, progress: bool) -> list[int]:
        """What is to be made; UserError where there is no room for it."""
        todo = [i for i, file in enumerate(self.files) if not is_whole(file, self._shape(i))]
        need = sum(NPY_HEADER + 2 * math.prod(self._shape(i)) for i in todo)
        size = make_room(self.folder, need, f"prepared slices of {len(todo)} files")
        if todo and progress and rank() == 0:
            print(f"preparing {len(todo)} files in {self.folder}: {size}", flush=True)
        return todo

    def _make_for_a_while(
        self, waiting: deque[int], bad: dict[int, str], pool: ThreadPoolExecutor, at_once: int, bar: tqdm
    ) -> None:
        """Take files from `waiting` until it is empty or the processes should meet; note the bad ones in `bad`."""
        until = time.monotonic() + MEETING_SECONDS
        while waiting and time.monotonic() < until:
            batch = [waiting.popleft() for _ in range(min(at_once, len(waiting)))]
            others_at_it = []
            for i, result in zip(batch, pool.map(self._make, batch), strict=True):
                if result is None:
                    others_at_it.append(i)
                elif isinstance(result, BadSource):
                    bad[i] = f"{self.samples[i].path}: {result}"
            bar.update(len(batch) - len(others_at_it))
            waiting.extend(others_at_it)  # last, to see whether they were made
            if len(others_at_it) == len(batch):
                time.sleep(0.05)

    def _make(self, index: int) -> Path | BadSource | None:
        """Write one cache file unless it is there; None where another process is at it."""

        def make(temporary: Path) -> None:
            np.save(temporary, render(self.samples[index], self.size))

        try:
            whole = partial(is_whole, shape=self._shape(index))
            return cached(self.folder, self.files[index].stem, make, whole=whole, wait=False)
        except BadSource as error:
            return error

    def _shape(self, index: int) -> tuple[int, int, int]:
        return self.samples[index].slices, *self.extents[index].tolist()


def unused_files(samples: list[Sample], cache_path: str | Path | None = None) -> list[Path]:
    """Cache files, slices of whatever size and embeddings of whatever weights, whose source has changed or is gone."""
    keys = {_key(sample) for sample in samples}
    cache = cache_folder(samples[0].data_path, cache_path)
    folders = [*cache.glob("slices_*px_v*"), *cache.glob("embeddings_*_v*")]
    return [
        file
        for folder in sorted(folders)
        for file in sorted(folder.iterdir())
        if not file.name.startswith(".")
        and not (file.stem.split("_")[0] in keys and folder.name.endswith(f"_v{FORMAT}"))
    ]


def _usable(data_path: str | Path, only: str | None) -> tuple[list[Sample], list[str]]:
    """(good samples, one line for each bad file). Raises UserError for a bad dataset.yaml, which changes good files."""
    samples, bad_sets, bad = inspect_tree(data_path, only)
    if bad_sets:
        raise bad_files(bad_sets, f"data_path {Path(data_path).expanduser()}")
    if not samples:
        raise UserError(f"no usable file is left below {data_path}; the first: {bad[0]}")
    return samples, bad


def _first_channels(samples: list[Sample]) -> list[str]:
    """A line for each data set with several channels."""
    names = {sample.dataset: sample.channel_names[0] for sample in samples if sample.channels > 1}
    return [f"pre-training reads channel 0 ({name}) of {dataset}" for dataset, name in names.items()]


def _warn(lines: list[str]) -> None:
    if rank() == 0:
        for line in lines:
            print(f"warning: {line}", file=sys.stderr, flush=True)


def _key(sample: Sample) -> str:
    """Name of a cache file: changes with the source file and every setting that its content depends on.

    Not with where the data tree lies: one that is moved, or copied with its times, takes its cache along.
    """
    return key_of(sample.name, sample.size_bytes, sample.mtime_ns, sample.window, sample.slice_axis, FORMAT)

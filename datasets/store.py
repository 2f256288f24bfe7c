"""The working copy of the data that training reads: normalised, resized, built once, read slice by slice.

A raw CT volume is hundreds of megabytes and a step needs a few slices of it. So every file is turned once into
a [D, h, w] float16 array in a cache folder (`datasets/render.py`), and slices are read from there.
"""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from datasets.cache import (
    NPY_HEADER,
    cache_folder,
    cached,
    content_of,
    is_whole,
    key_of,
    make_room,
    read_sealed,
    seal,
    sealed_shape,
    source_of,
)
from datasets.check import header_findings
from datasets.index import THREADS, Sample, bad_files, describe, fingerprint, scan
from datasets.render import CHANGED, FORMAT, BadSource, content_size, render
from utils import signals
from utils.distributed import everywhere, gather_objects, rank, world_size
from utils.errors import UserError
from utils.files import shown

CACHE_FOLDER = re.compile(r"(slices_\d+px|embeddings_[0-9a-f]+)_v\d+")
CACHE_FILE = re.compile(r"\.?([0-9a-f]{32})(_\d+_\d+)?(\.[0-9a-f]{32})?(\.tmp)?\.npy")  # whole or being made
MEETING_SECONDS = 20.0  # processes that build a cache meet this often, so none waits into the collectives' time-out


def prepare(
    data_path: str | Path,
    size: int,
    cache_path: str | Path | None = None,
    on_bad: Literal["error", "skip"] = "error",
    workers: int = 1,
    progress: bool = True,
    target_shape: tuple[int, int, int] | None = None,
    only: str | None = None,
) -> SliceStore:
    """Scan data_path, check it by its headers, and build its cache; what is in it is the same on every process.

    on_bad: `error` raises one UserError that lists all files that cannot be used, by header or content, when the good
    ones are done; `skip` leaves them out and prints each.  workers: threads that build, per process.  progress: show
    what looks odd, the building and a table of the data sets.  target_shape: slices, height and width of a view of
    volumes.  only: the one data set that is taken.
    """

    def usable(good: list[Sample], problems: list[str]) -> list[Sample]:
        if problems and (on_bad == "error" or not good):
            raise bad_files(problems, f"data_path {data_path}")
        _warn([f"left out {problem}" for problem in problems])
        return good

    def require_same(samples: list[Sample]) -> None:
        if len(set(gather_objects(fingerprint(samples)))) > 1:
            raise UserError(
                f"data_path: processes see different files, or dataset.yaml, below {data_path}; give all the same data"
            )

    samples = everywhere(lambda: usable(*scan(data_path, only)))
    require_same(samples)
    if progress:
        several = {sample.dataset: sample.channel_names[0] for sample in samples if sample.channel_names}
        _warn([f"pre-training reads channel 0 ({name}) of {dataset}" for dataset, name in several.items()])
        _warn([finding.message for finding in header_findings(samples, target_shape)])
    store = SliceStore(samples, size, cache_path)
    bad = store.build(workers, progress)
    if bad:
        samples = usable([sample for i, sample in enumerate(samples) if i not in bad], list(bad.values()))
        store = SliceStore(samples, size, cache_path)
    store.samples = everywhere(store.with_contents)
    require_same(store.samples)
    if progress and rank() == 0:
        print(describe(store.samples), flush=True)
    return store


class SliceStore:
    """Slices of all samples as squares with values in 0..1, read from a cache on disk.

    size: side S of the square in-plane canvas, pixels.  cache_path: folder of the cache; None: .cache in the data tree.
    Has `samples` (what the index counts) and `extents`: [N, 2] height and width in pixels of the content of each.
    """

    def __init__(self, samples: Sequence[Sample], size: int, cache_path: str | Path | None = None) -> None:
        self.samples, self.size = samples, size
        self.folder = cache_folder(samples[0].data_path, cache_path) / f"slices_{size}px_v{FORMAT}"
        self.files = [self.folder / f"{_key(sample)}.npy" for sample in samples]
        self.extents = np.array([content_size(s.height, s.width, size) for s in samples])
        bytes_each = 2 * self.extents.prod(axis=1)  # of a slice, float16
        self.shapes = [sealed_shape(s.slices, int(n)) for s, n in zip(samples, bytes_each, strict=True)]  # of the files

    def read(self, index: int, start: int, stop: int, half: bool = False) -> np.ndarray:
        """Slices start..stop-1 of a sample: [stop - start, S, S] float32 in 0..1, centred, zeros around them.

        half: float16 instead, as they are stored: a quarter of the time, and half as much to move to a GPU.
        Only these slices are read. Raises IndexError for slices that the sample does not have, UserError where the
        cached copy is gone, cut short or damaged.
        """
        sample = self.samples[index]
        if not 0 <= start < stop <= sample.slices:
            raise IndexError(f"{sample.path}: slices {start}..{stop} of {sample.slices} were asked for")
        height, width = self.extents[index].tolist()
        try:
            content = read_sealed(self.files[index], np.float16, (height, width), start, stop)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.files[index]}: the cached copy of {shown(sample.path)} cannot be read ({error}); delete it "
                "if it is still there, and start again, which rebuilds it"
            ) from None
        if not half:
            content = torch.from_numpy(content).float().numpy()  # numpy needs ten times as long
        if height == width == self.size:
            return content
        top, left = (self.size - height) // 2, (self.size - width) // 2
        canvas = np.zeros((stop - start, self.size, self.size), dtype=content.dtype)
        canvas[:, top : top + height, left : left + width] = content
        return canvas

    def build(self, workers: int = 1, progress: bool = True) -> dict[int, str]:
        """Make every cache file that is missing or damaged; returns what is wrong with the samples that have none.

        Any number of processes, of this run and of others, may build the same cache, on `workers` threads each.
        Raises UserError on all processes at once when the cache folder has no room or cannot be written.
        """
        todo = everywhere(lambda: self._missing(progress))
        first = rank() * len(todo) // world_size()  # processes begin at different places and so seldom meet
        waiting, bad = deque(todo[first:] + todo[:first]), {}
        show = progress and rank() == 0 and sys.stderr.isatty()
        workers = max(1, min(workers, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # for the pool: threads that are new to torch take over what was set last
        try:
            with (
                tqdm(total=len(todo), desc="preparing data", unit="file", disable=not show) as bar,
                ThreadPoolExecutor(workers) as pool,
            ):

                def make_for_a_while() -> None:
                    until = time.monotonic() + MEETING_SECONDS
                    while waiting and time.monotonic() < until and not signals.waiting():
                        batch = [waiting.popleft() for _ in range(min(4 * workers, len(waiting)))]
                        results = pool.map(self._make, [i for i in batch if i not in bad])
                        bad.update(problem for problem in results if problem)
                        bar.update(len(batch))

                while any(gather_objects(len(waiting))):
                    everywhere(make_for_a_while)
                    for other in gather_objects(bad):
                        bad.update(other)
        finally:
            torch.set_num_threads(threads)
        return dict(sorted(bad.items()))

    def _missing(self, progress: bool) -> list[int]:
        """What is to be made; UserError where there is no room for it."""
        todo = [i for i, file in enumerate(self.files) if not is_whole(file, self.shapes[i])]
        need = sum(NPY_HEADER + 8 * math.prod(self.shapes[i]) for i in todo)
        size = make_room(self.folder, need, f"prepared slices of {len(todo)} files")
        if todo and progress and rank() == 0:
            print(f"preparing {len(todo)} files in {self.folder}: {size}", flush=True)
        return todo

    def _make(self, index: int) -> tuple[int, str] | None:
        """Write one cache file unless it is there, or say what is wrong with its source."""
        sample, key = self.samples[index], self.files[index].stem

        def make(file: Path) -> None:
            try:
                content, rendered, now = content_of(sample.path), render(sample, self.size), sample.path.stat()
            except OSError as error:
                raise BadSource(f"cannot be read ({error.strerror}); copy it again or remove it") from None
            if (now.st_size, now.st_mtime_ns) != (sample.size_bytes, sample.mtime_ns):
                raise BadSource(CHANGED)
            np.save(file, seal(rendered, content))

        try:
            cached(self.folder, key, make, self.shapes[index])
        except BadSource as error:
            return index, f"{shown(sample.path)}: {error}"

    def with_contents(self) -> list[Sample]:
        """The samples with what their files hold, of which each cached copy has kept a note. Raises UserError."""

        def content(index: int) -> str:
            try:
                return f"{source_of(self.files[index], 2 * int(self.extents[index].prod())):016x}"
            except (OSError, IndexError) as error:
                raise UserError(f"{self.files[index]}: cannot be read ({error}); delete it and start again") from None

        with ThreadPoolExecutor(THREADS) as pool:
            contents = pool.map(content, range(len(self.samples)))
            return [replace(s, content=content) for s, content in zip(self.samples, contents, strict=True)]


def unused_files(samples: Sequence[Sample], cache_path: str | Path | None = None) -> list[Path]:
    """Cache files, slices of whatever size and embeddings of whatever weights, whose source has changed or is gone.

    Nothing behind a link is listed (see `links_in_cache`): it may be anything.
    """
    keys, links = {_key(sample) for sample in samples}, set(links_in_cache(samples, cache_path))
    cache, *folders = _cache_folders(samples, cache_path)
    unused = []
    for folder in [f for f in folders if not {f, cache} & links]:
        for file in sorted(folder.iterdir()):
            named = CACHE_FILE.fullmatch(file.name)
            current = named and named[1] in keys and folder.name.endswith(f"_v{FORMAT}")
            if named and not current and file.is_file() and not file.is_symlink():
                unused.append(file)
    return unused


def links_in_cache(samples: Sequence[Sample], cache_path: str | Path | None = None) -> list[Path]:
    """The cache's folder and those in it that are links."""
    return [folder for folder in _cache_folders(samples, cache_path) if folder.is_symlink()]


def _cache_folders(samples: Sequence[Sample], cache_path: str | Path | None) -> list[Path]:
    cache = cache_folder(samples[0].data_path, cache_path)
    return [cache, *sorted(f for f in cache.glob("*") if CACHE_FOLDER.fullmatch(f.name))]


def _warn(lines: list[str]) -> None:
    if rank() == 0:
        for line in lines:
            print(f"warning: {line}", file=sys.stderr, flush=True)


def _key(sample: Sample) -> str:
    """Name of a cache file: changes with its source and settings, not where the data tree moves with its cache."""
    return key_of(sample.name, sample.size_bytes, sample.mtime_ns, sample.window, sample.slice_axis, FORMAT)

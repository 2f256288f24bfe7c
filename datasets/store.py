"""The working copy of the data that training reads: normalised, resized, built once, read slice by slice.

A raw CT volume is hundreds of megabytes and a step needs a few slices of it. So every file is turned once into
a [D, h, w] float16 array in a cache folder (`datasets/render.py`), and slices are read from there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import shutil
import sys
import time
import uuid
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from datasets.check import header_warnings
from datasets.index import Sample, bad_files, describe, fingerprint, npy_header, scan, scan_usable
from datasets.render import FORMAT, BadContent, content_size, render
from utils.distributed import gather_objects, raise_everywhere, rank, world_size
from utils.errors import UserError

NPY_HEADER = 128  # bytes that numpy.save writes before the data of a 3D array
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
) -> tuple[list[Sample], SliceStore]:
    """Scan data_path, check it by its headers, and build its cache: (samples, store), the same on every process.

    on_bad: what to do with files that cannot be used, by their header or by their content (NaN or Inf, no contrast,
    broken image data): `error` raises one UserError that lists them, `skip` leaves them out and prints each on
    process 0. workers: threads that build, per process. progress: show what looks odd about the data (check_data.py
    tells more), the building and, at the end, a table of the data sets. target_shape: slices, height and width of a
    view of volumes, for these warnings. only: the one data set of the tree that is taken; None: all. The other
    arguments are those of SliceStore.
    """
    samples: list[Sample] = []
    bad: list[str] = []
    error = None
    try:
        samples, bad = scan_usable(data_path, only) if on_bad == "skip" else (scan(data_path, only), [])
        if not samples:
            raise UserError(f"no usable file is left below {data_path}; the first: {bad[0]}")
    except UserError as e:
        error = e
    raise_everywhere(error)
    if rank() == 0:
        for problem in bad:
            print(f"warning: left out {problem}", file=sys.stderr)
    if len(set(gather_objects(fingerprint(samples)))) > 1:
        raise UserError(f"data_path: processes see different files below {data_path}; give all the same data")
    if progress and rank() == 0:
        for line in header_warnings(samples, target_shape):
            print(f"warning: {line}", file=sys.stderr, flush=True)
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

        Any number of processes, of this run and of others, may build the same cache: each file is made by the one
        that locks it first, and appears complete, in one rename. Processes without a common disk each make all.
        Raises UserError on all processes: for bad files (`on_bad="error"`) when all the good ones are done, so
        that the next start goes on from there, and at once when the cache folder has no room or cannot be written.
        """
        todo = [i for i in range(len(self.samples)) if not self._is_whole(i)]
        error = None
        try:
            self._prepare_folder()
            self._check_room(todo, progress)
        except UserError as e:
            error = e
        raise_everywhere(error)
        first = rank() * len(todo) // world_size()  # processes begin at different places and so seldom meet
        waiting = deque(todo[first:] + todo[:first])
        bad: dict[int, str] = {}
        show = progress and rank() == 0 and sys.stderr.isatty()
        workers = max(1, min(workers, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        with (
            tqdm(total=len(todo), desc="preparing data", unit="file", disable=not show) as bar,
            _single_threads(workers) as pool,
        ):
            while True:
                error = None
                try:
                    self._make_for_a_while(waiting, bad, pool, workers, bar)
                except UserError as e:
                    error = e
                except BaseException:  # a signal: leave after the files at hand, not after all that were handed out
                    pool.shutdown(cancel_futures=True)
                    raise
                raise_everywhere(error)
                if not any(gather_objects(len(waiting))):
                    break
        for other in gather_objects(bad):
            bad |= other

        if bad and self.on_bad == "error":
            raise bad_files([bad[i] for i in sorted(bad)], f"data_path {self.samples[0].data_path}")
        if len(bad) == len(self.samples):
            raise UserError(f"no usable file is left below {self.samples[0].data_path}; the first: {bad[0]}")
        if rank() == 0:
            for i in sorted(bad):
                print(f"warning: left out {bad[i]}", file=sys.stderr)
        self._take([sample for i, sample in enumerate(self.samples) if i not in bad])

    def _make_for_a_while(
        self, waiting: deque[int], bad: dict[int, str], pool: ThreadPoolExecutor, workers: int, bar: tqdm
    ) -> None:
        """Take files from `waiting` until it is empty or the processes should meet; note the bad ones in `bad`."""
        until = time.monotonic() + MEETING_SECONDS
        while waiting and time.monotonic() < until:
            batch = [waiting.popleft() for _ in range(min(4 * workers, len(waiting)))]
            jobs = [(i, pool.submit(self._make, i)) for i in batch]
            others_at_it = []
            for i, job in jobs:
                try:
                    if not job.result():
                        others_at_it.append(i)
                except BadContent as error:
                    bad[i] = str(error)
            bar.update(len(batch) - len(others_at_it))
            waiting.extend(others_at_it)  # last, to see whether they were made
            if len(others_at_it) == len(batch):
                time.sleep(0.05)

    def _make(self, index: int) -> bool:
        """Write one cache file unless it is there; False where another process is at it.

        Nothing is flushed to the disk: what a power failure spoils has not its full length, and is made again.
        Raises BadContent (source) or UserError (cache folder).
        """
        sample, target = self.samples[index], self.files[index]
        verdict = target.with_suffix(".bad")
        try:
            with claim(target) as temporary:
                if temporary is None:
                    return False
                try:
                    if self._is_whole(index):
                        return True
                    if verdict.exists():  # the name changes with the source, so this is still so
                        raise BadContent(sample, verdict.read_text(encoding="utf-8"))
                    try:
                        content = render(sample, self.size)
                    except BadContent as error:
                        if error.lasting:
                            temporary.write_text(error.reason, encoding="utf-8")
                            os.replace(temporary, verdict)
                        raise
                    with open(temporary, "wb") as file:
                        np.save(file, content, allow_pickle=False)
                    os.replace(temporary, target)
                finally:
                    temporary.unlink(missing_ok=True)
        except OSError as error:
            raise self._cannot_write(error) from None
        return True

    def _is_whole(self, index: int) -> bool:
        """Whether the cache file is there, of the expected shape, and as long as its header says."""
        file, sample = self.files[index], self.samples[index]
        shape = (sample.slices, *map(int, self.extents[index]))
        try:
            found, dtype, offset = npy_header(file)
            size = os.stat(file).st_size
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return False
        except OSError as error:
            raise self._cannot_write(error) from None
        return (found, dtype, offset) == (shape, np.float16, NPY_HEADER) and size == offset + 2 * math.prod(shape)

    def _prepare_folder(self) -> None:
        """Make the folder, and remove the temporary files of processes that were killed: those that nobody locks."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            names = [entry.path for entry in os.scandir(self.folder) if entry.name.endswith(".tmp")]
        except OSError as error:
            raise self._cannot_write(error) from None
        for name in names:
            with contextlib.suppress(OSError), open(name, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(name)

    def _check_room(self, todo: list[int], progress: bool) -> None:
        """Say how much will be written, or raise UserError where the disk has less room than that."""
        if not todo:
            return
        need = sum(NPY_HEADER + 2 * self.samples[i].slices * int(self.extents[i].prod()) for i in todo)
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise UserError(
                f"{self.folder}: the cache of prepared slices needs {shown_size(need)} for {len(todo)} files, but only "
                f"{shown_size(free)} are free; free some space, or name another folder with --cache_path"
            )
        if progress and rank() == 0:
            print(
                f"preparing {len(todo)} files: {shown_size(need)} in {self.folder} ({shown_size(free)} free)",
                flush=True,
            )

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(
            f"{self.folder}: the cache of prepared slices cannot be written ({error.strerror or error}); "
            "free some space, or name another folder with --cache_path"
        )


def cache_folder(data_path: Path, cache_path: str | Path | None = None) -> Path:
    """Where the caches of a data tree are: inside it, or in a folder of their own in `cache_path`."""
    if cache_path is None:
        return data_path / ".cache"
    root = os.path.realpath(data_path)
    digest = hashlib.sha256(os.fsencode(root)).hexdigest()[:8]
    return Path(cache_path).expanduser() / f"{os.path.basename(root)}_{digest}"


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


@contextlib.contextmanager
def claim(target: Path) -> Iterator[Path | None]:
    """The temporary file in which this thread alone may write what becomes `target`; None: another is at it.

    The lock lies on that file, and the system ends it with its process, however that dies. On a file system without
    locks everybody gets a file of their own, at the price of work done twice.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    descriptor = os.open(temporary, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine: Path | None = temporary if _is_open_at(descriptor, temporary) else None
        except BlockingIOError:
            mine = None
        except OSError:
            mine = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        yield mine
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _single_threads(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool in which torch starts no threads of its own.

    torch keeps what any thread sets for those that use it for the first time later: without the last line, a training
    that begins by preparing its data would run on a single core.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _is_open_at(descriptor: int, path: Path) -> bool:
    """Whether the open file still has this name: its owner may have finished and renamed it before the lock was won."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def shown_size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _key(sample: Sample) -> str:
    """Name of a cache file: changes with the source file and every setting that its content depends on.

    Not with where the data tree lies: one that is moved, or copied with its times, takes its cache along.
    """
    source = sample.name, sample.size_bytes, sample.mtime_ns
    settings = sample.window, sample.slice_axis, FORMAT
    return hashlib.sha256(os.fsencode(repr((*source, *settings)))).hexdigest()[:32]

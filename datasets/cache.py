"""The one cache on disk: files named by what their content depends on, each made once and never half there."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import shutil
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasets.index import npy_header
from utils.errors import UserError

CHECKED = (".npy", ".npz")  # files that say themselves how long they are; others are flushed to the disk
WAIT = 0.05  # seconds between two looks at a file that another process makes


class BadSource(ValueError):
    """A source file cannot be used: what is wrong with it and what to do, without its name (files are moved).

    lasting: whether that is so until the file changes, and not a disk that failed to answer.
    """

    def __init__(self, reason: str, lasting: bool = True) -> None:
        super().__init__(reason)
        self.lasting = lasting


def is_whole(path: Path, shape: tuple[int, ...] | None = None) -> bool:
    """Whether a file is there and as long as an NPY's header says, or with the directory that ends an NPZ.

    shape: also whether the NPY holds an array of this shape. Raises UserError where the folder cannot be read.
    """
    try:
        if path.suffix == ".npy":
            found, dtype, offset = npy_header(path)
            size = offset + dtype.itemsize * math.prod(found)
            return path.stat().st_size == size and found == (shape or found)
        return zipfile.is_zipfile(path) if path.suffix == ".npz" else path.exists()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError as error:
        raise cannot_write(path.parent, error) from None


def cannot_write(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"{folder}: the cache cannot be written ({error.strerror or error}); free some space, or name another folder "
        "with --cache_path"
    )


def cached(
    folder: Path,
    key: str,
    make: Callable[[Path], Any],
    suffix: str = ".npy",
    whole: Callable[[Path], bool] = is_whole,
    wait: bool = True,
) -> Path | None:
    """The whole file `<folder>/<key><suffix>`; where there is none, `make(temporary)` writes it under another name.

    key: changes with everything that the content depends on; see `key_of`.  make: e.g. `lambda temporary:
    np.savez(temporary, **arrays)`; an OSError of its own counts as one of writing.  whole: whether a file is good; one
    that a power failure has spoilt is made again.

    One thread of one process makes a file; others wait for it or, unless `wait`, get None. Raises what `make` does: a
    BadSource that lasts is remembered in `<key>.bad` and raised again without a call of `make`. Raises UserError where
    the folder cannot be written.
    """
    path = folder / f"{key}{suffix}"
    try:
        while not whole(path):
            folder.mkdir(parents=True, exist_ok=True)
            with _claimed(folder, key, suffix) as temporary:
                if temporary and not whole(path):  # not made since
                    _make(make, temporary, path, folder / f"{key}.bad")
                    return path
            if not wait:
                return None
            time.sleep(WAIT)
    except OSError as error:
        raise cannot_write(folder, error) from None
    return path


def _make(make: Callable[[Path], Any], temporary: Path, path: Path, verdict: Path) -> None:
    """Make a file, or what is to be said about its source."""
    if verdict.exists():
        raise BadSource(verdict.read_text(encoding="utf-8"))
    try:
        make(temporary)
    except BadSource as error:
        if error.lasting:
            temporary.write_text(str(error), encoding="utf-8")
            os.replace(temporary, verdict)
        raise
    if path.suffix not in CHECKED:
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
    os.replace(temporary, path)


def key_of(*parts: Any) -> str:
    """32 hexadecimal digits that change with any part (numbers, strings and tuples of them)."""
    return hashlib.sha256(os.fsencode(repr(parts))).hexdigest()[:32]


def cache_folder(data_path: Path, cache_path: str | Path | None = None) -> Path:
    """Where the caches of a data tree are: inside it, or in a folder of their own in `cache_path`."""
    if cache_path is None:
        return data_path / ".cache"
    root = os.path.realpath(data_path)
    digest = hashlib.sha256(os.fsencode(root)).hexdigest()[:8]
    return Path(cache_path).expanduser() / f"{os.path.basename(root)}_{digest}"


def make_room(folder: Path, need: int, what: str, remedy: str = "") -> str:
    """Make a folder for `need` more bytes, and say how much that is. Raises UserError where the disk has less.

    what: needs them, e.g. "prepared slices".  remedy: what to do beside freeing space, e.g. "lower --n, ".
    Removes what killed processes left there: temporary files that nobody locks.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = [entry.path for entry in os.scandir(folder) if entry.name.startswith(".") and ".tmp" in entry.name]
        for name in names:
            with contextlib.suppress(OSError), open(name, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(name)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise cannot_write(folder, error) from None
    if need > free:
        raise UserError(
            f"{what} need {shown_size(need)} more in {folder}, but only {shown_size(free)} are free; {remedy}free some "
            "space, or name another folder with --cache_path"
        )
    return f"{shown_size(need)} ({shown_size(free)} free)"


def shown_size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


@contextlib.contextmanager
def _claimed(folder: Path, key: str, suffix: str) -> Iterator[Path | None]:
    """The temporary file in which this thread alone may write, gone at the end; None: another is at it.

    The lock lies on that file, and the system ends it with its process, however that dies. On a file system without
    locks everybody gets a file of their own, at the price of work done twice.
    """
    mine: Path | None = folder / f".{key}.tmp{suffix}"  # with its suffix, which np.save and np.savez would append
    descriptor = os.open(mine, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = mine if _is_open_at(descriptor, mine) else None
        except BlockingIOError:
            mine = None
        except OSError:
            mine.unlink(missing_ok=True)
            mine = folder / f".{key}.{uuid.uuid4().hex}.tmp{suffix}"
        yield mine
    finally:
        if mine:
            mine.unlink(missing_ok=True)
        os.close(descriptor)


def _is_open_at(descriptor: int, path: Path) -> bool:
    """Whether the open file still has this name: its owner may have finished and renamed it before the lock was won."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False

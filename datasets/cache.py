"""The one cache on disk: NPY files named by what their content depends on, each made once and never half there."""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets.index import npy_header
from utils.errors import UserError


def is_whole(path: Path, shape: tuple[int, ...] | None = None) -> bool:
    """Whether an NPY is there, as long as its header says and, if given, of this shape. Raises UserError."""
    try:
        found, dtype, offset = npy_header(path)
        return path.stat().st_size == offset + dtype.itemsize * math.prod(found) and found == (shape or found)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError as error:
        raise _cannot_write(path.parent, error) from None


def cached(folder: Path, key: str, make: Callable[[Path], Any], shape: tuple[int, ...] | None = None) -> Path:
    """The whole file `<folder>/<key>.npy` with an array of this shape; where there is none, `make(temporary)` saves it.

    key: changes with everything that the content depends on; see `key_of`.  One thread of one process makes a file and
    others wait for it: the system ends the lock on the temporary file with its process, however that dies.
    Raises what `make` does; UserError where nothing can be written.
    """
    path, temporary = folder / f"{key}.npy", folder / f".{key}.tmp.npy"
    try:
        while not is_whole(path, shape):
            folder.mkdir(parents=True, exist_ok=True)
            with open(temporary, "ab") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    mine = temporary
                except OSError:  # a file system without locks: several may do the same work
                    mine = folder / f".{key}.{uuid.uuid4().hex}.tmp.npy"
                if mine == temporary and not os.fstat(file.fileno()).st_nlink:
                    continue  # its owner failed and removed it
                try:
                    if not is_whole(path, shape):
                        make(mine)
                        os.replace(mine, path)
                finally:
                    mine.unlink(missing_ok=True)
                    temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from None
    return path


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
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _cannot_write(folder, error) from None
    if need > free:
        raise UserError(
            f"{what} need {shown_size(need)} more in {folder}, but only {shown_size(free)} are free; {remedy}free some "
            "space, or name another folder with --cache_path"
        )
    return f"{shown_size(need)} ({shown_size(free)} free)"


def shown_size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _cannot_write(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"{folder}: the cache cannot be written ({error.strerror or error}); free some space, or name another folder "
        "with --cache_path"
    )

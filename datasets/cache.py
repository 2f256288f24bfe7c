"""The one cache on disk: NPY files named by what their content depends on, each made once and never half there."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from datasets.index import npy_header
from utils.errors import UserError
from utils.locks import Lock

NPY_HEADER = 128  # bytes that numpy.save writes before the data of a short shape
WORD = 8  # bytes
SEAL = 0x9E3779B97F4A7C15  # what the check of a row of zeros is: a row that was lost reads as zeros, check and all


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
    others wait for it (`utils.locks`).  Raises what `make` does; UserError where nothing can be written.
    """
    path, temporary = folder / f"{key}.npy", folder / f".{key}.tmp.npy"
    try:
        while not is_whole(path, shape):
            with Lock(folder / f".{key}.lock", f"makes {path.name}").held() as lock:
                if is_whole(path, shape):
                    break
                temporary.unlink(missing_ok=True)  # of a killed process, or of one that is frozen and may write on
                try:
                    make(temporary)
                    if lock.mine():  # else another process, which took this one for dead, is making it
                        os.replace(temporary, path)
                finally:
                    if lock.mine():
                        temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from None
    return path


def sealed_shape(rows: int, row_bytes: int) -> tuple[int, int]:
    """Of the array that `seal` makes of so many rows."""
    return rows, -(-row_bytes // WORD) + 2


def seal(rows: np.ndarray, source: int = 0) -> np.ndarray:
    """[n, ...] -> [n, words + 2] uint64: each row's bytes, their check, and a number that says what they are made of.

    The check is the sum of a row's words: a tenth of the time of a CRC, and read with the row that it stands beside.
    """
    content = np.ascontiguousarray(rows).reshape(len(rows), -1).view(np.uint8)
    sealed = np.zeros(sealed_shape(*content.shape), np.uint64)
    sealed.view(np.uint8)[:, : content.shape[1]] = content
    sealed[:, -2], sealed[:, -1] = _checks(sealed), source
    return sealed


def read_sealed(path: Path, dtype: DTypeLike, shape: tuple[int, ...], start: int, stop: int) -> np.ndarray:
    """Rows start..stop-1 of a file of `seal`, each of this dtype and shape: [stop - start, *shape].

    Not by a memory map: a file cut short under a map kills the process. Raises OSError; ValueError where a row is gone
    or not what was written, after removing the file, so that it is made anew when it is next asked for.
    """
    row_bytes = np.dtype(dtype).itemsize * math.prod(shape)
    words = sealed_shape(1, row_bytes)[1]
    found = np.fromfile(path, np.uint64, (stop - start) * words, offset=NPY_HEADER + start * words * WORD)
    found = found.reshape(stop - start, words)
    if not np.array_equal(found[:, -2], _checks(found)):
        with contextlib.suppress(OSError):
            path.unlink()
        raise ValueError("its content is not what was written: a fault of the disk, or somebody changed it")
    return found.view(np.uint8)[:, :row_bytes].view(dtype).reshape(stop - start, *shape)


def source_of(path: Path, row_bytes: int) -> int:
    """What `seal` was told of the source of a file with rows of so many bytes. Raises OSError, ValueError."""
    return int(np.fromfile(path, np.uint64, 1, offset=NPY_HEADER + (sealed_shape(1, row_bytes)[1] - 1) * WORD)[0])


def _checks(sealed: np.ndarray) -> np.ndarray:
    return sealed[:, :-2].sum(axis=1, dtype=np.uint64) + np.uint64(SEAL)


def content_of(path: Path) -> int:
    """64 bits that change with the content of a file."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(2**20):
            digest.update(block)
    return int.from_bytes(digest.digest()[:WORD], "big")


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

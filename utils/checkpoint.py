"""Checkpoints: all that a run needs to go on as if it had never stopped."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import pickletools
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from utils.distributed import broadcast_object, gather_objects, rank
from utils.errors import UserError
from utils.files import temporary_file, whole_file

LATEST, PREVIOUS = "checkpoint.pth", "checkpoint_previous.pth"
SEAL = b"\nsha256 "  # ends a checkpoint, before the digest of all that precedes it; zip readers ignore what follows
SEAL_BYTES = len(SEAL) + 64
PLAIN = re.compile(r"collections OrderedDict|torch \w+Storage|torch\._utils _rebuild_tensor_v2")  # in a pickle


def write(state: dict[str, Any], path: Path) -> None:
    """torch.save to a temporary file in the same folder, flushed to disk, then renamed: never half a file at `path`."""
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)


def save(state: dict[str, Any], folder: Path, keep_as: str | None = None) -> None:
    """Write the newest checkpoint of a run and keep the one before it; `keep_as` also keeps this one for good.

    The file ends with the sha256 of its content; torch.load(path, weights_only=True) reads it as well.
    """
    latest = folder / LATEST

    with whole_file(latest) as temporary:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            file.write(SEAL + _digest(temporary, file.tell()).encode())
        # Links, not moves: a run killed anywhere in between still has a newest checkpoint, and the one before.
        if keep_as:
            _link(temporary, folder / keep_as)
        if latest.exists():
            _link(latest, folder / PREVIOUS)


def load(folder: Path) -> dict[str, Any] | None:
    """The newest whole checkpoint of a run, on the CPU, the same on every process; None when there is none.

    A damaged newest file is reported and the one before it is used. All processes call it together: where they have
    disks of their own, those without the newest checkpoint get it from one that has it.
    Raises UserError on all of them when there are files but none can be read.
    """
    state, seal, reasons = None, b"", []
    for path in (folder / LATEST, folder / PREVIOUS):
        try:
            state, seal = read(path)
            break
        except (FileNotFoundError, NotADirectoryError):
            continue
        except UserError as error:
            reasons.append(str(error))
            if rank() == 0:
                print(f"warning: {error}; trying the checkpoint before it", flush=True)
    error = None
    if state and reasons and rank() == 0:
        try:
            # The next save keeps the newest file as the previous one: it must not put a damaged one over this.
            _link(path, folder / LATEST)
        except UserError as read_only:
            error = read_only
    places = gather_objects(((state["epoch"], state["seen"]) if state else (-1, 0), seal, reasons, error))
    newest = max(place for place, *_ in places)
    source = [place for place, *_ in places].index(newest)
    for *_, failed in places:
        if failed:
            raise failed
    if newest[0] < 0:
        if any(reasons for *_, reasons, _ in places):
            reasons = next(reasons for *_, reasons, _ in places if reasons)
            raise UserError(f"no checkpoint in {folder} can be read ({'; '.join(reasons)}); delete them to start again")
        return None
    if len({seal for _, seal, *_ in places}) == 1:
        return state
    data = broadcast_object(path.read_bytes() if rank() == source else None, source)
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def read(path: Path) -> tuple[dict[str, Any], bytes]:
    """A checkpoint and its digest. Nothing in it is executed, and no more memory taken than the file is long.

    Raises FileNotFoundError or NotADirectoryError, or UserError that says what is wrong with the file.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size - SEAL_BYTES
            file.seek(max(0, size))
            seal = file.read()
        if size < 0 or not seal.startswith(SEAL):
            raise UserError(f"{path}: is cut short or not a checkpoint of this project (it has no checksum at its end)")
        if seal != SEAL + _digest(path, size).encode():
            raise UserError(f"{path}: is damaged (its checksum differs from its content)")
        with zipfile.ZipFile(path) as archive:
            # torch.save compresses nothing; a compressed record could claim any size.
            if any(i.compress_type or i.file_size != i.compress_size or i.file_size > size for i in archive.infolist()):
                raise UserError(f"{path}: is not a checkpoint of this project (its records are compressed)")
            # What does not begin as an archive torch.load reads in its old format, past these checks.
            pickled = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickled) != 1 or min(i.header_offset for i in archive.infolist()):
                raise UserError(f"{path}: is not a checkpoint of this project (no archive of torch.save)")
            if not _is_plain(archive.read(pickled[0])):
                raise UserError(f"{path}: needs more than tensors and plain values, which is never loaded")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, NotADirectoryError, UserError):
        raise
    except pickle.UnpicklingError:
        raise UserError(f"{path}: needs more than tensors and plain values, which is never loaded") from None
    except Exception as error:  # torch and zipfile fail in many ways on arbitrary bytes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read ({reason})") from None
    if not (isinstance(state, dict) and "learner" in state and _is_place(state.get("epoch"), state.get("seen"))):
        raise UserError(f"{path}: is not a checkpoint of this project")
    return state, seal


def _is_plain(pickled: bytes) -> bool:
    """Whether a pickle names nothing beyond tensors and ordered dictionaries.

    Stricter than torch's weights_only, which lets a few bytes ask for a bytearray of any size.
    """
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL") and not PLAIN.fullmatch(str(argument)):
            return False
    return True


def _is_place(epoch: Any, seen: Any) -> bool:
    return type(epoch) is int and type(seen) is int and epoch >= 0 and seen >= 0


def _digest(path: Path, size: int) -> str:
    """sha256 (hex) of the first `size` bytes of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while size > 0 and (block := file.read(min(size, 2**20))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()


def _link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, replacing it in one move."""
    with temporary_file(target) as link:
        try:
            os.link(source, link)
        except OSError:  # a file system without hard links
            shutil.copy2(source, link)
        os.replace(link, target)

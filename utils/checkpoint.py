"""Checkpoints: all that a run needs to go on as if it had never stopped, and when it may."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from utils import tensors
from utils.config import to_dict
from utils.distributed import Run, broadcast_object, gather_objects, on_main, rank
from utils.errors import UserError
from utils.files import require_ordinary, temporary_file, whole_file

LATEST, PREVIOUS = "checkpoint.pth", "checkpoint_previous.pth"
SEAL = b"\nsha256 "  # ends a checkpoint, before the digest of all that precedes it; zip readers ignore what follows
SEAL_BYTES = len(SEAL) + 64


def save(state: dict[str, Any], folder: Path, keep_as: str | None = None) -> None:
    """Write the newest checkpoint of a run and keep the one before it; `keep_as` also keeps this one for good.

    The file ends with the sha256 of its content; torch.load(path, weights_only=True) reads it as well.
    """
    latest = folder / LATEST
    with whole_file(latest) as temporary:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            file.write(SEAL + _digest(temporary, file.tell()))
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
    # The next save keeps the newest file as the previous one: it must not put a damaged one over this.
    on_main(lambda: _link(path, folder / LATEST) if state and reasons else None)
    places = gather_objects(((state["epoch"], state["seen"]) if state else (-1, 0), seal, reasons))
    newest = max(place for place, *_ in places)
    if newest[0] < 0:
        if reasons := next((reasons for *_, reasons in places if reasons), []):
            raise UserError(f"no checkpoint in {folder} can be read ({'; '.join(reasons)}); delete them to start again")
        return None
    if len({seal for _, seal, _ in places}) == 1:
        return state
    source = [place for place, *_ in places].index(newest)
    data = broadcast_object(path.read_bytes() if rank() == source else None, source)
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def read(path: Path) -> tuple[dict[str, Any], bytes]:
    """A checkpoint, of tensors and plain values only, and its digest. Nothing in it is executed.

    Raises FileNotFoundError or NotADirectoryError, or UserError that says what is wrong with the file.
    """
    require_ordinary(path)
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is a folder or a pipe, not a checkpoint; move it away")
        with open(path, "rb") as file:
            size = max(0, os.fstat(file.fileno()).st_size - SEAL_BYTES)
            file.seek(size)
            seal = file.read()
        if seal != SEAL + _digest(path, size):
            raise UserError(f"{path}: is damaged, cut short, or not a checkpoint (its end is no checksum of the rest)")
        with tensors.opened(path):  # before torch.load makes room for what the file claims
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, NotADirectoryError, UserError):
        raise
    except Exception as error:  # torch fails in many ways on arbitrary bytes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read as tensors and plain values ({reason})") from None
    if not (isinstance(state, dict) and {"learner", "epoch", "seen"} <= state.keys()):
        raise UserError(f"{path}: is not a checkpoint of this project")
    return state, seal


def check_same_run(state: dict[str, Any], config: Any, run: Run, data: str, folder: Path) -> str:
    """Raises UserError unless the run may go on with these options; what is said of another number of processes.

    Options whose field says `may_change` are free. Another number of processes is welcome, with the same batch on each
    or with the same global batch.  data: fingerprint of the files.
    """
    old, new = state["config"], to_dict(config)
    fixed = [f.name for f in dataclasses.fields(config) if not f.metadata.get("may_change")]
    changed = [f"{name}: {old.get(name)} -> {new[name]}" for name in fixed if old.get(name) != new[name]]
    before, now = (old["batch_size"], state["processes"]), (config.batch_size, run.world_size)
    batches = f"{before[0] * before[1]} -> {now[0] * now[1]}"
    if before[0] != now[0] and before[0] * before[1] != now[0] * now[1]:
        changed.append(f"batch_size: {before[0]} -> {now[0]} (x processes: {batches})")
    if not data.startswith(state["data"]):  # earlier versions knew less of the data
        changed.append("the files below data_path, or window or slice_axis in dataset.yaml")
    if (state["epoch"], state["seen"]) > (config.epochs, 0):
        begun = state["epoch"] + (state["seen"] > 0)
        raise UserError(f"epochs: {folder} has begun {begun} epochs already, more than {config.epochs}")
    if changed:
        raise UserError(
            f"dump_path: {folder} holds a run made with other options ({'; '.join(changed)}); "
            "choose another --dump_path, or delete that folder to start again"
        )
    return "" if before[1] == now[1] else f"processes: {before[1]} -> {now[1]}, global batch: {batches}"


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """A state that does not fit this version's modules is the user's to solve."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"dump_path: the checkpoint in {folder} does not fit this version of the project ({type(error).__name__}: "
            f"{str(error).split(chr(10))[0]}); go on with the version that wrote it, or choose another --dump_path"
        ) from None


def _digest(path: Path, size: int) -> bytes:
    """sha256 (hex) of the first `size` bytes of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while size > 0 and (block := file.read(min(size, 2**20))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest().encode()


def _link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, replacing it in one move."""
    with temporary_file(target) as link:
        try:
            os.link(source, link)
        except OSError:  # a file system without hard links
            shutil.copy2(source, link)
        os.replace(link, target)

"""Checkpoints: all that a run needs to go on as if it had never stopped."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from utils.errors import UserError

LATEST, PREVIOUS = "checkpoint.pth", "checkpoint_previous.pth"


def write(state: dict[str, Any], path: Path) -> None:
    """torch.save to a temporary file in the same folder, flushed to disk, then renamed: never half a file at `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _written(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextlib.contextmanager
def _written(path: Path, temporary: Path) -> Iterator[None]:
    """Leaves no temporary file behind and says which file could not be written."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({reason}); free space or choose another folder") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save(state: dict[str, Any], folder: Path, keep_as: str | None = None) -> None:
    """Write the newest checkpoint of a run and keep the one before it; `keep_as` also keeps this one for good."""
    latest, previous = folder / LATEST, folder / PREVIOUS
    if latest.exists():
        # A link, not a move: a run killed between the two steps still has a newest checkpoint.
        _link(latest, previous)
    write(state, latest)
    if keep_as:
        _link(latest, folder / keep_as)


def _link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, replacing it in one move."""
    link = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with _written(target, link):
        try:
            os.link(source, link)
        except OSError:  # a file system without hard links
            shutil.copy2(source, link)
        os.replace(link, target)


def load(folder: Path) -> dict[str, Any] | None:
    """The newest readable checkpoint of a run, on the CPU; None when the folder has none.

    A damaged newest file is reported and the previous one is used. Raises UserError when none can be read.
    """
    reasons = []
    for path in (folder / LATEST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or "learner" not in state:
                raise ValueError("not a checkpoint of this project")
        except Exception as error:
            reasons.append(f"{path}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            print(f"warning: {reasons[-1]}; trying the checkpoint before it", flush=True)
            continue
        if reasons:
            # The next save keeps the newest file as the previous one: it must not put a damaged one over this.
            _link(path, folder / LATEST)
        return state
    if reasons:
        raise UserError(f"no checkpoint in {folder} can be read ({'; '.join(reasons)}); delete them to start again")
    return None

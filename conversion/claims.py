"""What a header claims, checked against its file before memory is taken for it or another file is opened."""

from __future__ import annotations

import os
from pathlib import Path

from conversion.volume import BadFile
from datasets.cache import shown_size

DEFLATE = 1032  # no byte of a compressed stream (zlib, gzip) stands for more


def require_room(claimed: int, stored: int, compressed: bool = False) -> None:
    """Raises BadFile for more bytes of voxels than `stored` bytes of a file can hold, or than there is memory."""
    if claimed > stored * (DEFLATE if compressed else 1):
        holds = f"{stored} compressed bytes cannot hold as many" if compressed else f"the file holds {stored}"
        raise BadFile(f"is truncated or damaged: its header promises {claimed} bytes of voxels, {holds}; copy it again")
    require_memory(claimed)


def require_memory(claimed: int) -> None:
    """Raises BadFile for more bytes than the machine has."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if claimed > memory:
        raise BadFile(
            f"has {shown_size(claimed)} of voxels, more than the {shown_size(memory)} of memory here; crop it, or "
            "convert it on a larger machine"
        )


def beside(header: Path, name: str) -> Path:
    """The data file that a header names. Raises BadFile unless it lies in the header's folder."""
    if name != os.path.basename(name) or name in ("", ".", ".."):
        raise BadFile(
            f"takes its voxels from {name!r}, outside its folder; put that file beside it and correct the name in it"
        )
    file = header.parent / name
    if not file.is_file():
        raise BadFile(f"its data file {name} is missing; copy it into the same folder")
    return file

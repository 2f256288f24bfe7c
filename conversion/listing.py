"""The files below the given places: which formats they have by their names, and what is no data."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from conversion.pictures import SUFFIXES
from datasets.index import LABEL_FOLDERS, SIDE_FILES, leads_into, walk
from utils.errors import UserError

FORMATS = {
    **dict.fromkeys((".nii", ".nii.gz", ".hdr", ".hdr.gz", ".mgh", ".mgz", ".mnc", ".par"), "nifti"),
    **dict.fromkeys((".nrrd", ".nhdr", ".mha", ".mhd"), "itk"),
    **dict.fromkeys((".npy", ".npz", ".h5", ".hdf5"), "array"),
    **dict.fromkeys((".dcm", ".dcm.gz", ".dicom", ".ima"), "dicom"),
    **dict.fromkeys(SUFFIXES, "image"),
}
COMPANIONS = {  # files of voxels, by the headers that may stand beside them
    **dict.fromkeys((".raw", ".zraw"), (".mhd", ".nhdr")),
    **{".img": (".hdr",), ".img.gz": (".hdr.gz",), ".mat": (".hdr",), ".rec": (".par",)},
}
HEADERS = {end for ends in COMPANIONS.values() for end in ends}
NOT_DATA_NAMES = {"LICENSE", "LICENCE", "COPYING", "NOTICE", "README", "DICOMDIR", "MD5SUMS", "SHA256SUMS"}
ARCHIVES = {".7z", ".bz2", ".gz", ".rar", ".tar", ".tgz", ".xz", ".zip"}
NOT_DATA = SIDE_FILES | {".bval", ".bvec", ".docx", ".html", ".log", ".pdf", ".py", ".sh", ".tsv", ".xlsx", ".xml"}


def list_files(places: Sequence[Path], problems: list[str]) -> dict[Path, tuple[str, bool]]:
    """{file: (name, whether it lies in a folder of label maps)} of every file that is not hidden.

    problems: what is wrong with files that are left out is appended. Raises UserError where a place is missing.
    """
    files: dict[Path, tuple[str, bool]] = {}  # places may overlap
    for place in (Path(os.path.abspath(place.expanduser())) for place in places):
        if not place.exists():
            raise UserError(f"source: {place} does not exist; give files or a folder")
        root = place if place.is_dir() else place.parent
        behind_link = {root: False}  # by folder
        for file in walk(place) if place.is_dir() else [place]:
            way = file.relative_to(root)
            name = f"{root.name}/{way.as_posix()}"
            try:
                status = os.lstat(file)
                if linked := stat.S_ISLNK(status.st_mode):
                    status = os.stat(file)
                regular = stat.S_ISREG(status.st_mode)
            except OSError as error:
                problems.append(f"{file}: cannot be read ({error.strerror}); copy it again or remove it")
                continue
            if not regular:  # a FIFO would be waited for
                problems.append(f"{file}: is not a regular file; remove it")
            elif os.fsencode(name).decode(errors="replace") != name:  # as from archives of other systems
                problems.append(f"{os.fsencode(file)!r}: has a name that is not UTF-8; rename it")
            else:
                of_labels = any(part.lower() in LABEL_FOLDERS for part in way.parts[:-1])
                if linked or _behind_link(file.parent, behind_link):
                    of_labels = of_labels or leads_into(file, root, LABEL_FOLDERS)
                files.setdefault(file, (name, of_labels))
    return files


def _behind_link(folder: Path, known: dict[Path, bool]) -> bool:
    if folder not in known:
        known[folder] = folder.is_symlink() or _behind_link(folder.parent, known)
    return known[folder]


def unknown(suffix: str) -> str:
    """What is wrong with a file of no accepted format."""
    if suffix in ARCHIVES:
        return "is an archive; unpack it"
    if suffix in COMPANIONS:
        return f"holds voxels alone; copy its header ({' or '.join(COMPANIONS[suffix])}) beside it, or give that"
    what = suffix or "no suffix, and no DICOM"
    return f"is of no format that is read ({what}); convert it to one of docs/DATA.md, or remove it"

"""Which DICOM files belong together: series by their headers, also where an anonymiser damaged them, and pictures."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from conversion.dicom_header import (
    ANNOTATIONS,
    data_set,
    frame_count,
    is_mosaic,
    numbers,
    require_image,
)
from conversion.dicom_labels import referenced_series, structure_names
from conversion.volume import BadFile

SAME_FACING = 0.05  # scanners round the directions of the slices of one series differently
FEWEST = 3  # files of one series each that are taken as the slices of one


class Series(NamedTuple):
    """Files of one series, or a picture."""

    files: tuple[Path, ...]
    modality: str
    patient: str  # a hash, as nobody is to be named
    digest: str = ""  # of what the files of a series have in common; "" of a picture
    frame: int | None = None  # of a film, which has a picture in each
    label: Path | None = None  # segmentation or structure set of it
    structures: tuple[str, ...] = ()  # that are drawn there, by name


class _File(NamedTuple):
    """What the header of a file with a place in space says."""

    path: Path
    modality: str
    patient: str
    uid: str
    study: str
    facing: tuple[float, ...]
    shape: tuple[int, int]
    place: tuple[float, ...]


class _Annotation(NamedTuple):
    """What a segmentation or a structure set says."""

    path: Path
    patient: str
    uid: str  # of the series it was drawn on
    names: tuple[str, ...]


def group_series(files: Iterable[Path], problems: list[str]) -> list[Series]:
    """Series, and pictures, of files by their headers; what is wrong with the others goes to `problems`."""
    slices: list[_File] = []
    pictures: list[Series] = []
    annotations: list[_Annotation] = []
    flat: set[str] = set()  # series of pictures
    facings: dict[tuple[Any, ...], list[tuple[float, ...]]] = defaultdict(list)
    for file in files:
        try:
            header = data_set(file)
            if header.get("Modality") in ANNOTATIONS:
                names = structure_names(header)
                annotations.append(_Annotation(file, _patient(header), referenced_series(header), names))
                continue
            if require_image(header):
                slices.append(_file(file, header, facings))
            else:
                count, what = frame_count(header), (str(header.get("Modality") or ""), _patient(header))
                pictures += [Series((file,), *what, frame=i if count > 1 else None) for i in range(count)]
                flat.add(str(header.get("SeriesInstanceUID") or ""))
        except BadFile as error:
            problems.append(f"{file}: {error}")
        except Exception as error:  # pydicom converts a value when it is asked for it
            problems.append(f"{file}: has a damaged DICOM header ({error}); export it again or remove it")
    groups = _joined(_split(slices))
    return pictures + _with_labels(groups, annotations, flat, problems)


def _patient(header: Any) -> str:
    found = str(header.get("PatientID") or "")
    return hashlib.sha256(found.encode()).hexdigest()[:12] if found else ""


def _file(path: Path, header: Any, facings: dict[tuple[Any, ...], list[tuple[float, ...]]]) -> _File:
    """facings: the directions met so far, of which near ones are one."""
    modality, uid, study = (
        str(header.get(name) or "") for name in ("Modality", "SeriesInstanceUID", "StudyInstanceUID")
    )
    facing, place = (numbers(header.get(name)) for name in ("ImageOrientationPatient", "ImagePositionPatient"))
    shape = (int(header.Rows), int(header.Columns))
    known = facings[(uid, *shape)]
    near = (
        f
        for f in known
        if len(f) == len(facing) and all(abs(a - b) <= SAME_FACING for a, b in zip(f, facing, strict=True))
    )
    facing = next(near, facing)
    known += [] if facing in known else [facing]
    return _File(path, modality, _patient(header), uid, study, facing, shape, place)


def _split(slices: Sequence[_File]) -> dict[tuple[Any, ...], list[_File]]:
    """The files of each series; by patient, study and folder, too, where its UID is not its own."""
    owners: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for file in slices:
        owners[file.uid].add((file.patient, file.study))
    groups: dict[tuple[Any, ...], list[_File]] = defaultdict(list)
    for file in slices:
        facing = tuple(round(x, 1) + 0.0 for x in file.facing)
        more = () if len(owners[file.uid]) == 1 else (file.patient, file.study)
        groups[(file.uid, facing, *file.shape, *more)].append(file)
    result: dict[tuple[Any, ...], list[_File]] = defaultdict(list)
    for key, members in groups.items():
        apart = not key[0] or len(owners[key[0]]) > 1 or _repeats(members)
        for file in members:
            result[(*key, file.path.parent) if apart else key].append(file)
    return result


def _repeats(members: Sequence[_File]) -> bool:
    """Whether folders repeat the numbers of other images: a number is given once in a series."""
    if len({file.path.parent for file in members}) == 1:
        return False
    names: dict[Any, dict[Path, str]] = defaultdict(dict)
    taken: Counter[tuple[Path, str]] = Counter()
    for file in members:
        header, folder = data_set(file.path), file.path.parent
        name = str(header.get("SOPInstanceUID"))
        names[numbers(header.get("InstanceNumber")) or file.place][folder] = name
        taken[folder, name] += 1
    shared = max(taken.values()) > 1
    return any(len(folders) > 1 and (shared or len(set(folders.values())) > 1) for folders in names.values())


def _joined(groups: dict[tuple[Any, ...], list[_File]]) -> list[tuple[str, list[_File]]]:
    """[(digest, files)] of each series; files of a series each that are the slices of one are joined."""
    alike: dict[tuple[Any, ...], list[tuple[Any, ...]]] = defaultdict(list)
    for key, members in groups.items():
        one = members[0]
        if len(members) == 1 and one.place:
            header = data_set(one.path)
            about = (str(header.get(name) or "") for name in ("SeriesNumber", "SeriesDescription", "ProtocolName"))
            if not is_mosaic(header):
                alike[(one.path.parent, one.modality, one.patient, *key[1:4], *about)].append(key)
    joined = []
    for common, keys in alike.items():
        if len(keys) >= FEWEST and len({groups[key][0].place for key in keys}) == len(keys):
            joined.append((common[1:], [groups.pop(key)[0] for key in keys]))
    found = [(tuple(part for part in key if not isinstance(part, Path)), files) for key, files in groups.items()]
    return [(hashlib.sha256(repr(key).encode()).hexdigest()[:8], files) for key, files in [*found, *joined]]


def _with_labels(
    groups: Sequence[tuple[str, list[_File]]], annotations: Sequence[_Annotation], flat: set[str], problems: list[str]
) -> list[Series]:
    """The series with their segmentations; one of a series that is not there, or of pictures (flat), is a problem."""
    labels: dict[int, _Annotation] = {}
    for annotation in annotations:
        path, patient, uid, _ = annotation
        # Of one series, as of a volume and its scout, the largest part is meant; of several with one UID the patient's.
        drawn_on = [i for i, (_, files) in enumerate(groups) if files[0].uid == uid]
        if len({(groups[i][1][0].patient, groups[i][1][0].study) for i in drawn_on}) > 1:
            drawn_on = [i for i in drawn_on if groups[i][1][0].patient == patient]
        at = max(drawn_on, key=lambda i: len(groups[i][1]), default=None)
        if at is None and uid in flat - {""}:
            problems.append(
                f"{path}: is a segmentation of pictures, which have no place in space; save their masks as PNG, called "
                "as they are, in a folder labels"
            )
        elif at is None or not uid:
            problems.append(f"{path}: is a segmentation of a series that is not there; copy that, or leave it out")
        elif len({(groups[i][1][0].facing, groups[i][1][0].shape) for i in drawn_on}) < len(drawn_on):
            problems.append(
                f"{path}: is a segmentation of a series whose UID several have; save its label map as NIfTI"
            )
        elif at in labels:
            problems.append(
                f"{path}: is a second segmentation of the series of {labels[at].path.name}; remove one of them"
            )
        else:
            labels[at] = annotation
    series = []
    for i, (digest, files) in enumerate(groups):
        label, names = (labels[i].path, labels[i].names) if i in labels else (None, ())
        series.append(Series(tuple(f.path for f in files), *files[0][1:3], digest, label=label, structures=names))
    return series

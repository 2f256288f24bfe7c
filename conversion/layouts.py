"""What there is to convert: files and DICOM series below the given places, their label maps, and their ids."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from conversion.readers import BadFile, dicom_header, has_position
from datasets.index import IMAGE_SUFFIXES, LABEL_FOLDERS, MONTAGE, SIDE_FILES
from utils.errors import UserError

FORMATS = {
    ".nii": "nifti", ".nii.gz": "nifti", ".nrrd": "itk", ".nhdr": "itk", ".mha": "itk", ".mhd": "itk", ".npy": "npy",
    ".npz": "npz", ".h5": "hdf5", ".hdf5": "hdf5", ".dcm": "dicom", ".dicom": "dicom", ".ima": "dicom",
    **dict.fromkeys(IMAGE_SUFFIXES, "image"),
}  # fmt: skip
COMPANIONS = {".raw", ".zraw"}  # pixels of .mhd and .nhdr headers
NEED_POSITIONS = {"CT", "MR", "PT", "NM"}  # DICOM modalities of slices, never of single radiographs
MODALITIES = {"MRI": "MR", "PET": "PT"}  # other names of DICOM's modalities
LOOKS_LIKE_LABEL = re.compile(r"(^|[_.-])(seg|segmentations?|labels?|masks?|gt)([_.-]?\d+)?$", re.IGNORECASE)
SAME_FACING = 0.05  # scanners round the directions of the slices of one series differently
NNUNET_CHANNEL = re.compile(r"_\d{4}$")


@dataclass(frozen=True)
class Source:
    """One case: a file, or the files of a DICOM series.

    name: the last part of the place given and the path below it, the same on every machine; a series adds "#" and
    eight hexadecimal digits of its UID's hash.  stem: the shortest id that says what it is.
    """

    name: str
    stem: str
    format: str
    files: tuple[Path, ...]
    modality: str = ""
    label: Path | None = None
    label_format: str = ""

    @property
    def path(self) -> Path:
        """The file, or the folder of a series."""
        return self.files[0] if len(self.files) == 1 else self.files[0].parent


@dataclass
class Found:
    """What `find` found. problems stop a run or are skipped, notes are printed, ignored counts files by suffix."""

    sources: list[Source] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    description: dict[str, Any] = field(default_factory=dict)  # of the data set, from dataset.json

    @property
    def structures(self) -> dict[int, str]:
        """Names of label values: {"0": "background"} in the Decathlon, {"background": 0} in nnU-Net."""
        labels = self.description.get("labels")
        pairs = labels.items() if isinstance(labels, dict) else []
        out = {}
        for key, value in pairs:
            number, name = (value, key) if isinstance(value, int) else (key, value)
            if str(number).isdigit():
                out[int(number)] = str(name)
        return out

    def modality(self, channel: int | None, stem: str) -> str:
        """Of the channel that the end of nnU-Net's file names tells (_0000), or else of the given one.

        "" where dataset.json does not say, or says several and none was chosen.
        """
        names = self.description.get("modality") or self.description.get("channel_names")
        if not isinstance(names, dict) or not names:
            return ""
        number = NNUNET_CHANNEL.search(stem)
        if number and str(int(number[0][1:])) in names:
            channel = int(number[0][1:])
        name = str(names.get(str(channel or 0), "")) if channel is not None or len(names) == 1 else ""
        return MODALITIES.get(name.upper(), name)


def find(
    places: Sequence[Path],
    images: str = "*",
    labels: str = "",
    modality: str = "",
    channel: int | None = None,
    progress: Callable[[Iterable[Path]], Iterable[Path]] = iter,
) -> Found:
    """Everything to convert in files and folders, in a fixed order.

    images, labels: patterns of file names. With `labels`, the label of an image is the file for which its "*"
    stands for the same text; else label maps lie in folders of labels beside the images and have their names.
    progress: wraps the files whose DICOM headers are read. Raises UserError where a place is missing.
    """
    found = Found()
    listed = _list(places, found)
    plain, dicom, label_files = [], [], []
    with_headers = {file.parent for file, _, _ in listed if file.suffix.lower() in (".mhd", ".nhdr")}
    for file, name, root in listed:
        stem, suffix = split_suffix(file.name)
        is_label = fnmatch.fnmatch(file.name, labels) if labels else _in_label_folder(name)
        format = FORMATS.get(suffix)
        if format is None and not is_label and suffix not in SIDE_FILES | COMPANIONS and _is_dicom(file):
            format = "dicom"
        if suffix in COMPANIONS and file.parent in with_headers:
            continue
        if format is None or file.name == "DICOMDIR":
            found.ignored[suffix or "without suffix"] += 1
        elif is_label:
            label_files.append((file, name, format))
        elif not fnmatch.fnmatch(file.name, images):
            found.ignored[f"{suffix} not called {images}"] += 1
        elif format == "dicom":
            dicom.append((file, name, root))
        else:
            plain.append(Source(name, stem, format, (file,)))

    if len(places) == 1 and (places[0] / "dataset.json").is_file():
        _read_description(places[0] / "dataset.json", found)
    paired = _pair(plain, label_files, images, labels, found)
    modality = MODALITIES.get(modality.upper(), modality)
    series = _series(dicom, found, progress)
    sources = [replace(s, modality=modality or found.modality(channel, s.stem) or s.modality) for s in paired + series]
    found.sources = sorted(sources, key=lambda s: os.fsencode(s.name))
    twice = [name for name, count in Counter(s.name for s in sources).items() if count > 1]
    if twice:
        raise UserError(f"source: two of the places hold a {twice[0]}; give the folder above them instead")
    suspects = [
        s.name
        for s in sources
        if s.label is None
        and (LOOKS_LIKE_LABEL.search(s.stem) or any(map(LOOKS_LIKE_LABEL.match, s.name.split("/")[1:-1])))
    ]
    if suspects:
        found.notes.append(
            f"{len(suspects)} files look like label maps but are taken as images ({suspects[0]}); choose images and "
            "label maps by name, e.g. --images '*_flair.nii.gz' --labels '*_seg.nii.gz'"
        )
    return found


def split_suffix(name: str) -> tuple[str, str]:
    """("case.v2", ".nii.gz") of "case.v2.nii.gz"; the suffix in lower case."""
    end = ".nii.gz" if name.lower().endswith(".nii.gz") else os.path.splitext(name)[1]
    return name[: len(name) - len(end)], end.lower()


def assign_ids(sources: Sequence[Source], known: dict[str, str]) -> dict[str, str]:
    """{source name: id}: letters, digits, ".", "_" and "-", unique on any file system.

    An id is the file's name; where several files want the same one, all of them get their whole path instead, and
    a hash of it should that not tell them apart. known: ids of earlier runs, which stay.
    """
    known = {**known, "": split_suffix(MONTAGE)[0]}  # a name that is taken
    ids = {s.name: known[s.name] for s in sources if s.name in known}
    taken = Counter(identifier.lower() for identifier in known.values())
    fresh = [s for s in sources if s.name not in ids]
    for proposal in (lambda s: s.stem, lambda s: split_suffix(s.name)[0].replace("/", "__"), _hashed):
        wanted = {s.name: clean(proposal(s)) for s in fresh}
        count = taken + Counter(identifier.lower() for identifier in wanted.values())
        for source in fresh:
            if count[wanted[source.name].lower()] == 1:
                ids[source.name] = wanted[source.name]
        taken = Counter(identifier.lower() for identifier in {**known, **ids}.values())
        fresh = [s for s in fresh if s.name not in ids]
    return ids


def clean(text: str) -> str:
    """The text with nothing in it that a file system could mind."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).lstrip(".") or "case"


def _hashed(source: Source) -> str:
    return f"{source.stem}_{hashlib.sha256(os.fsencode(source.name)).hexdigest()[:8]}"


def _list(places: Sequence[Path], found: Found) -> list[tuple[Path, str, Path]]:
    """(file, name, root) of every file that is not hidden."""
    files: list[tuple[Path, str, Path]] = []
    listed = set()

    def add(file: Path, name: str, root: Path) -> None:
        if file in listed:  # places may overlap
            return
        listed.add(file)
        try:
            name.encode()
        except UnicodeEncodeError:  # as from archives of other systems
            shown = os.fsencode(file).decode(errors="backslashreplace")
            found.problems.append(f"{shown}: has a name that is not UTF-8, which no table can hold; rename it")
            return
        files.append((file, name, root))

    for place in places:
        place = Path(os.path.abspath(place.expanduser()))
        if place.is_file():
            add(place, f"{place.parent.name}/{place.name}", place.parent)
            continue
        if not place.is_dir():
            raise UserError(f"source: {place} does not exist; give files or a folder")

        def report(error: OSError) -> None:
            found.problems.append(f"{error.filename}: cannot be listed ({error.strerror}); change its permissions")

        seen = set()
        for parent, folders, names in os.walk(place, followlinks=True, onerror=report):
            real = os.path.realpath(parent)
            if real in seen:  # a link that leads back up
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                if not name.startswith(".") and not (name == MONTAGE and Path(parent) == place):
                    file = Path(parent) / name
                    add(file, f"{place.name}/{file.relative_to(place).as_posix()}", place)
    return files


def _in_label_folder(name: str) -> bool:
    return any(part.lower() in LABEL_FOLDERS for part in name.split("/")[1:-1])


def _is_dicom(file: Path) -> bool:
    try:
        with open(file, "rb") as f:
            return f.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _pair(
    sources: list[Source], label_files: list[tuple[Path, str, str]], images: str, labels: str, found: Found
) -> list[Source]:
    """The sources with their label maps; label maps without an image are problems, the opposite is noted."""
    wanted = defaultdict(list)
    for i, source in enumerate(sources):
        folder = source.name.rpartition("/")[0]
        if labels:
            wanted[folder, _star(images, source.files[0].name, source.stem)].append(i)
            continue
        for stem in {source.stem, NNUNET_CHANNEL.sub("", source.stem)}:
            wanted[folder, stem].append(i)  # images beside the folder of labels,
            wanted[folder.rpartition("/")[0], stem].append(i)  # or in a folder beside it
    by_path = {os.path.abspath(source.path): i for i, source in enumerate(sources)}
    of_label = {label: by_path[image] for image, label in _listed_pairs(found) if image in by_path}
    labelled: dict[int, tuple[Path, str]] = {}
    for file, name, format in label_files:
        stem = split_suffix(file.name)[0]
        folder = name.rpartition("/")[0]
        if os.path.abspath(file) in of_label:
            matches = [of_label[os.path.abspath(file)]]
        elif labels:
            matches = wanted[folder, _star(labels, file.name, stem)]
        else:
            matches = wanted[folder.rpartition("/")[0], stem]
            subset = folder.lower()[-2:]
            if subset in ("tr", "ts"):  # imagesTs may have the same names as imagesTr
                other = {"tr": "ts", "ts": "tr"}[subset]
                matches = [i for i in matches if not sources[i].name.lower().split("/")[-2].endswith(f"images{other}")]
        if not matches:
            where = " in its folder" if labels else ""
            found.problems.append(f"{file}: is a label map without an image{where}; copy its image, or remove it")
        for i in matches:
            if i in labelled:
                found.problems.append(f"{file}: is a second label map of {sources[i].path}; remove one of them")
            labelled[i] = (file, format)
    bare = [
        s.path
        for i, s in enumerate(sources)
        if i not in labelled
        and ((label_files and not s.name.lower().split("/")[-2].endswith("ts")) or "/imagesTr/" in s.name)
    ]
    if bare:
        found.notes.append(
            f"{len(bare)} images have no label map ({bare[0]}{', ...' if len(bare) > 1 else ''}); they are converted "
            "all the same, since pre-training needs none"
        )
    return [
        replace(s, label=labelled[i][0], label_format=labelled[i][1]) if i in labelled else s
        for i, s in enumerate(sources)
    ]


def _star(pattern: str, name: str, stem: str) -> str:
    """What the "*" of a pattern stands for in a name; the stem where the pattern has not exactly one."""
    if pattern == "*" or pattern.count("*") != 1:
        return stem
    before, after = pattern.split("*")
    return name[len(before) : len(name) - len(after)]


def _read_description(path: Path, found: Found) -> None:
    """Keep dataset.json of the Medical Segmentation Decathlon or of nnU-Net; report the files that it lacks."""
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); correct it or remove it") from None
    found.description = description if isinstance(description, dict) else {}
    found.description["_folder"] = str(path.parent)
    listed = [file for pair in _listed_pairs(found, tests=True) for file in pair if file]
    missing = [file for file in listed if not os.path.exists(file)]
    found.problems += [f"{file}: is listed in {path.name} but does not exist; copy it" for file in missing]
    found.ignored[".json"] -= 1


def _listed_pairs(found: Found, tests: bool = False) -> list[tuple[str, str]]:
    """(image, label or "") as absolute paths, in the order of dataset.json."""
    folder = found.description.get("_folder", "")
    training = found.description.get("training")
    entries = list(training) if isinstance(training, list) else []
    test = found.description.get("test")
    entries += list(test) if tests and isinstance(test, list) else []
    pairs = []
    for entry in entries:
        image, label = (entry.get("image"), entry.get("label")) if isinstance(entry, dict) else (entry, None)
        if isinstance(image, str):
            pairs.append(tuple(os.path.abspath(os.path.join(folder, p)) if p else "" for p in (image, label)))
    return pairs


def _series(
    files: list[tuple[Path, str, Path]], found: Found, progress: Callable[[Iterable[Path]], Iterable[Path]]
) -> list[Source]:
    """DICOM files grouped into series by their headers, and single radiographs."""
    groups: dict[tuple[Any, ...], list[tuple[Path, str, str]]] = defaultdict(list)
    single = []
    facings: dict[tuple[Any, ...], list[tuple[float, ...]]] = defaultdict(list)
    by_path = {file: (name, root) for file, name, root in files}
    for file in progress(list(by_path)):
        name, root = by_path[file]
        try:
            header = dicom_header(file)
            modality = str(header.get("Modality") or "")
            key = ()
            if has_position(header) or modality in NEED_POSITIONS:
                uid, size = str(header.get("SeriesInstanceUID") or root), (int(header.Rows), int(header.Columns))
                facing = tuple(float(x) for x in header.get("ImageOrientationPatient") or ())
                known = facings[uid, size]
                alike = [f for f in known if len(f) == len(facing) and np.allclose(f, facing, rtol=0, atol=SAME_FACING)]
                if not alike:
                    known.append(facing)
                key = (uid, tuple(round(x, 1) + 0.0 for x in (*alike, facing)[0]), *size)
        except BadFile as error:
            found.problems.append(f"{file}: {error}")
            continue
        except Exception as error:  # pydicom converts a value when it is asked for it
            found.problems.append(f"{file}: has a damaged DICOM header ({error}); export it again or remove it")
            continue
        if key:
            groups[key].append((file, name, modality))
        else:
            single.append(Source(name, split_suffix(file.name)[0], "dicom_image", (file,), modality))
    per_folder = Counter(folder for members in groups.values() for folder in {m[0].parent for m in members})
    series = []
    for key, members in groups.items():
        folder = members[0][1].rpartition("/")[0]
        alone = len({m[0].parent for m in members}) == 1 and per_folder[members[0][0].parent] == 1
        digest = hashlib.sha256(repr(key).encode()).hexdigest()[:8]
        stem = folder.rpartition("/")[2] or "series"
        paths = tuple(m[0] for m in members)
        series.append(
            Source(f"{folder}#{digest}", stem if alone else f"{stem}_{digest}", "dicom", paths, members[0][2])
        )
    return series + single

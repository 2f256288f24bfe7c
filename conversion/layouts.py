"""What there is to convert: files and DICOM series below the given places, with their label maps and channels."""

from __future__ import annotations

import fnmatch
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from conversion.description import MODALITIES, NNUNET_CHANNEL, Description, Preset, read_description
from conversion.dicom import group_series
from datasets.index import IMAGE_SUFFIXES, LABEL_FOLDERS, MONTAGE, SIDE_FILES
from utils.errors import UserError

FORMATS = {
    ".nii": "nifti", ".nii.gz": "nifti", ".nrrd": "itk", ".nhdr": "itk", ".mha": "itk", ".mhd": "itk", ".npy": "npy",
    ".npz": "npz", ".h5": "hdf5", ".hdf5": "hdf5", ".dcm": "dicom", ".dicom": "dicom", ".ima": "dicom",
    **dict.fromkeys(IMAGE_SUFFIXES, "image"),
}  # fmt: skip
COMPANIONS = {".raw", ".zraw"}  # pixels of .mhd and .nhdr headers
LOOKS_LIKE_LABEL = re.compile(r"(^|[_.-])(seg|segmentations?|labels?|masks?|gt)([_.-]?\d+)?$", re.IGNORECASE)

Progress = Callable[[Iterable[Path]], Iterable[Path]]


@dataclass(frozen=True)
class Source:
    """One case: a file, a file per channel, or the files of a DICOM series.

    name: the last part of the place given and the path below it, the same on every machine; a series adds "#" and
    eight hexadecimal digits of its UID's hash.  stem: the shortest id that says what it is.  channels: their names,
    where the data set tells them.
    """

    name: str
    stem: str
    format: str
    files: tuple[Path, ...]
    modality: str = ""
    patient: str = ""
    channels: tuple[str, ...] = ()
    label: Path | None = None
    text: str = ""  # what the "*" of its pattern stands for

    @property
    def path(self) -> Path:
        """The file, the first of several channels, or the folder of a series."""
        return self.files[0].parent if self.format == "dicom" and len(self.files) > 1 else self.files[0]

    @property
    def folder(self) -> str:
        return self.name.rpartition("/")[0]

    @property
    def label_format(self) -> str:
        return FORMATS[split_suffix(self.label.name)[1]]


@dataclass
class Found:
    """What `find` found. problems stop a run or are skipped, notes are printed, ignored counts files by suffix."""

    sources: list[Source] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    description: Description = field(default_factory=Description)


class Listed(NamedTuple):
    """A file below one of the places."""

    file: Path
    name: str  # as in Source
    root: Path  # the place
    text: str = ""  # what the "*" of its pattern stands for, or its stem
    number: int = 0  # of the pattern it matches

    @property
    def stem(self) -> str:
        return split_suffix(self.file.name)[0]

    @property
    def suffix(self) -> str:
        return split_suffix(self.file.name)[1]

    @property
    def folder(self) -> str:
        return self.name.rpartition("/")[0]


def find(
    places: Sequence[Path],
    images: Sequence[str] = ("*",),
    labels: str = "",
    modality: str = "",
    channel: int | str | None = None,
    preset: Preset | None = None,
    progress: Progress = iter,
) -> Found:
    """Everything to convert in files and folders, in a fixed order.

    images: patterns of file names; several: one for each channel of a case.  labels: a pattern, too; the label of an
    image is the file for which its "*" stands for the same text. Without it, label maps lie in folders of labels beside
    the images and have their names.  channel: "all" makes one case of nnU-Net's CASE_0000, CASE_0001, ...
    preset: replaces images and labels.  progress: wraps the files whose DICOM headers are read.
    Raises UserError where a place is missing.
    """
    if preset:
        images, labels, modality = list(preset.images.values()), preset.labels, modality or preset.modality
    if len(images) > 1 and isinstance(channel, int):
        if channel >= len(images):
            raise UserError(f"channel: there is no channel {channel}; choose 0 to {len(images) - 1}, or all")
        images = images[channel : channel + 1]
    found = Found()
    listed = _list(places, found)
    if len(places) == 1 and (places[0] / "dataset.json").is_file():
        found.description = read_description(places[0] / "dataset.json")
        found.ignored[".json"] -= 1
        files = [file for pair in found.description.pairs("training", "test") for file in pair if file]
        missing = [file for file in files if not os.path.exists(file)]
        found.problems += [f"{file}: is listed in dataset.json but does not exist; copy it" for file in missing]
    plain, dicom, label_files = _sort(listed, images, labels, found)
    names = tuple(preset.images) if preset and len(preset.images) > 1 else found.description.channels
    sources = _pair(_cases(plain, images, names, channel == "all", found), label_files, bool(labels), found)
    if preset:
        sources = [replace(source, patient=source.text) for source in sources]
    sources += _of_dicom(dicom, found, progress)
    sources = _described(sources, MODALITIES.get(modality.upper(), modality), channel, found)
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


def _list(places: Sequence[Path], found: Found) -> list[Listed]:
    """Every file that is not hidden."""
    files: dict[Path, Listed] = {}  # places may overlap
    for place in places:
        place = Path(os.path.abspath(place.expanduser()))
        if place.is_file():
            files.setdefault(place, Listed(place, f"{place.parent.name}/{place.name}", place.parent))
            continue
        if not place.is_dir():
            raise UserError(f"source: {place} does not exist; give files or a folder")
        for file in _below(place, found):
            files.setdefault(file, Listed(file, f"{place.name}/{file.relative_to(place).as_posix()}", place))
    good = []
    for item in files.values():
        if os.fsencode(item.name).decode(errors="replace") == item.name:
            good.append(item)
        else:  # as from archives of other systems
            shown = os.fsencode(item.file).decode(errors="backslashreplace")
            found.problems.append(f"{shown}: has a name that is not UTF-8, which no table can hold; rename it")
    return good


def _below(place: Path, found: Found) -> Iterator[Path]:
    failed: list[OSError] = []
    seen = set()
    for parent, folders, names in os.walk(place, followlinks=True, onerror=failed.append):
        real = os.path.realpath(parent)
        if real in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and not (name == MONTAGE and Path(parent) == place):
                yield Path(parent) / name
    found.problems += [f"{e.filename}: cannot be listed ({e.strerror}); change its permissions" for e in failed]


def _sort(
    listed: Sequence[Listed], images: Sequence[str], labels: str, found: Found
) -> tuple[list[Listed], list[Listed], list[Listed]]:
    """(files of images and volumes, DICOM files, label maps)."""
    plain, dicom, label_files = [], [], []
    with_headers = {item.file.parent for item in listed if item.file.suffix.lower() in (".mhd", ".nhdr")}
    for item in listed:
        name, suffix = item.file.name, item.suffix
        in_label_folder = any(part.lower() in LABEL_FOLDERS for part in item.name.split("/")[1:-1])
        label = _star(labels, name) if labels else item.stem if in_label_folder else None
        format = FORMATS.get(suffix)
        if format is None and label is None and suffix not in SIDE_FILES | COMPANIONS and _is_dicom(item.file):
            format = "dicom"
        texts = [_star(pattern, name) for pattern in images]
        number = next((i for i, text in enumerate(texts) if text is not None), None)
        if suffix in COMPANIONS and item.file.parent in with_headers:
            continue
        if format is None or name == "DICOMDIR":
            found.ignored[suffix or "without suffix"] += 1
        elif label is not None:
            label_files.append(item._replace(text=label))
        elif number is None:
            found.ignored[f"{suffix} not called {' or '.join(images)}"] += 1
        else:
            (dicom if format == "dicom" else plain).append(item._replace(text=texts[number], number=number))
    return plain, dicom, label_files


def _star(pattern: str, name: str) -> str | None:
    """What the "*" of a pattern stands for in a file's name, with or without suffix, or its stem; None: no match."""
    stem = split_suffix(name)[0]
    for text in (name, stem):
        if fnmatch.fnmatch(text, pattern):
            if pattern == "*" or pattern.count("*") != 1:
                return stem
            before, after = pattern.split("*")
            return text[len(before) : len(text) - len(after)]
    return None


def _is_dicom(file: Path) -> bool:
    try:
        with open(file, "rb") as f:
            return f.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _cases(
    plain: Sequence[Listed], images: Sequence[str], names: tuple[str, ...], together: bool, found: Found
) -> list[Source]:
    """A source of every file, or of the files of its channels: where there are patterns for these, or `together`."""
    first_channels = {(item.root, item.folder, item.stem) for item in plain if FORMATS[item.suffix] != "image"}
    groups: dict[tuple[Path, str, str], list[tuple[int, Listed]]] = defaultdict(list)
    several = False
    for item in plain:
        base, end = item.stem[:-5], NNUNET_CHANNEL.search(item.stem)
        of_nnunet = bool(end) and (item.root, item.folder, f"{base}_0000") in first_channels
        several |= of_nnunet and int(end[1]) > 0
        if len(images) > 1:
            groups[item.root, item.folder, images[0].split("*")[0] + item.text].append((item.number, item))
        elif of_nnunet and together:
            groups[item.root, item.folder, base].append((int(end[1]), item))
        else:
            groups[item.file, "", item.stem].append((0, item))
    if several and not together and len(images) == 1:
        found.notes.append(
            "nnU-Net's channels (_0000, _0001, ...) become volumes of their own; --channel all keeps them together"
        )
    count = max([len(images), *(number + 1 for members in groups.values() for number, _ in members)])
    sources = []
    for (place, _, stem), members in groups.items():
        members.sort(key=lambda member: member[0])
        first, files = members[0][1], tuple(item.file for _, item in members)
        if place == first.file or [number for number, _ in members] == list(range(count)):
            sources.append(Source(first.name, stem, FORMATS[first.suffix], files, channels=names, text=first.text))
        else:
            found.problems.append(f"{first.file}: its case has {len(files)} of {count} channels; add the others")
    return sources


def _pair(sources: list[Source], label_files: Sequence[Listed], by_pattern: bool, found: Found) -> list[Source]:
    """The sources with their label maps; label maps without an image are problems, the opposite is noted."""
    wanted = defaultdict(list)
    for i, source in enumerate(sources):
        above = source.folder.rpartition("/")[0]  # images lie beside the folder of labels, or in a folder beside it
        stems = {source.stem, NNUNET_CHANNEL.sub("", source.stem)}
        keys = {(folder, stem) for folder in (source.folder, above) for stem in stems}
        for key in {(source.folder, source.text)} if by_pattern else keys:
            wanted[key].append(i)
    by_path = {os.path.abspath(source.path): i for i, source in enumerate(sources)}
    of_label = {label: by_path[image] for image, label in found.description.pairs("training") if image in by_path}
    labelled: dict[int, Path] = {}
    for item in label_files:
        if os.path.abspath(item.file) in of_label:
            matches = [of_label[os.path.abspath(item.file)]]
        elif by_pattern:
            matches = wanted[item.folder, item.text]
        else:
            # imagesTs may have the same names as imagesTr
            other = {"tr": "imagests", "ts": "imagestr"}.get(item.folder.lower()[-2:])
            matches = wanted[item.folder.rpartition("/")[0], item.text]
            matches = [i for i in matches if not (other and sources[i].folder.lower().endswith(other))]
        if not matches:
            where = " in its folder" if by_pattern else ""
            found.problems.append(f"{item.file}: is a label map without an image{where}; copy its image, or remove it")
        for i in matches:
            if i in labelled:
                found.problems.append(f"{item.file}: is a second label map of {sources[i].path}; remove one of them")
            labelled[i] = item.file
    bare = [
        s.path
        for i, s in enumerate(sources)
        if i not in labelled and ((label_files and not s.folder.lower().endswith("ts")) or "/imagesTr/" in s.name)
    ]
    if bare:
        found.notes.append(
            f"{len(bare)} images have no label map ({bare[0]}{', ...' if len(bare) > 1 else ''}); they are converted "
            "all the same, since pre-training needs none"
        )
    return [replace(source, label=labelled.get(i)) for i, source in enumerate(sources)]


def _of_dicom(dicom: Sequence[Listed], found: Found, progress: Progress) -> list[Source]:
    """DICOM files grouped into series by their headers, and single radiographs."""
    listed = {item.file: item for item in dicom}
    series, single = group_series(progress(list(listed)), {item.file: item.root for item in dicom}, found.problems)
    per_folder = Counter(folder for s in series for folder in {file.parent for file in s.files})
    sources = []
    for s in series:
        folder = listed[s.files[0]].folder
        alone = len({file.parent for file in s.files}) == 1 and per_folder[s.files[0].parent] == 1
        stem = folder.rpartition("/")[2] or "series"
        stem = stem if alone else f"{stem}_{s.digest}"
        sources.append(Source(f"{folder}#{s.digest}", stem, "dicom", s.files, s.modality, s.patient))
    for s in single:
        item = listed[s.files[0]]
        sources.append(Source(item.name, item.stem, "dicom_image", s.files, s.modality, s.patient))
    return sources


def _described(sources: list[Source], modality: str, channel: int | str | None, found: Found) -> list[Source]:
    """With modality and patient, as the user or dataset.json say."""
    about, people = found.description, found.description.patients
    named = [people.get(s.stem) or people.get(NNUNET_CHANNEL.sub("", s.stem)) or s.patient for s in sources]
    missing = [s.stem for s, person in zip(sources, named, strict=True) if not person]
    if people and missing:
        found.notes.append(f"dataset.json does not name the patients of {len(missing)} cases, e.g. {missing[0]}")
    return [
        replace(s, modality=modality or about.modality(channel, s.stem) or s.modality, patient=person)
        for s, person in zip(sources, named, strict=True)
    ]

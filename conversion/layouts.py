"""What there is to convert: files and DICOM series below the given places, with their label maps and channels."""

from __future__ import annotations

import fnmatch
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from conversion.description import MODALITIES, NNUNET_CHANNEL, PRESETS, Description, Preset, read_description
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
    label_format: str = ""

    @property
    def path(self) -> Path:
        """The file, the first of several channels, or the folder of a series."""
        return self.files[0].parent if self.format == "dicom" and len(self.files) > 1 else self.files[0]

    @property
    def folder(self) -> str:
        return self.name.rpartition("/")[0]


class Listed(NamedTuple):
    """A file below one of the places."""

    file: Path
    name: str  # the last part of the place, and the path below it
    root: Path  # the place

    @property
    def folder(self) -> str:
        return self.name.rpartition("/")[0]


@dataclass
class Found:
    """What `find` found. problems stop a run or are skipped, notes are printed, ignored counts files by suffix."""

    sources: list[Source] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    description: Description = field(default_factory=Description)


def find(
    places: Sequence[Path],
    images: str = "*",
    labels: str = "",
    modality: str = "",
    channel: int | str | None = None,
    preset: str = "none",
    progress: Callable[[Iterable[Path]], Iterable[Path]] = iter,
) -> Found:
    """Everything to convert in files and folders, in a fixed order.

    images, labels: patterns of file names. With `labels`, the label of an image is the file for which its "*"
    stands for the same text; else label maps lie in folders of labels beside the images and have their names.
    channel: "all" makes one case of nnU-Net's CASE_0000, CASE_0001, ...  preset: one of PRESETS, or none.
    progress: wraps the files whose DICOM headers are read. Raises UserError where a place is missing.
    """
    found = Found()
    listed = _list(places, found)
    if len(places) == 1 and (places[0] / "dataset.json").is_file():
        found.description = read_description(places[0] / "dataset.json")
        found.ignored[".json"] -= 1
        files = [file for pair in found.description.pairs("training", "test") for file in pair if file]
        missing = [file for file in files if not os.path.exists(file)]
        found.problems += [f"{file}: is listed in dataset.json but does not exist; copy it" for file in missing]
    if preset != "none":
        sources = _of_preset(listed, PRESETS[preset], preset, channel, found)
    else:
        plain, dicom, label_files = _sort(listed, images, labels, found)
        sources = _pair(plain, label_files, images, labels, found)
        sources = _with_channels(sources, channel, found) + _of_dicom(dicom, found, progress)
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
    listed = []
    for item in files.values():
        try:
            item.name.encode()
            listed.append(item)
        except UnicodeEncodeError:  # as from archives of other systems
            shown = os.fsencode(item.file).decode(errors="backslashreplace")
            found.problems.append(f"{shown}: has a name that is not UTF-8, which no table can hold; rename it")
    return listed


def _below(place: Path, found: Found) -> Iterable[Path]:
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
    listed: Sequence[Listed], images: str, labels: str, found: Found
) -> tuple[list[Source], list[Listed], list[Listed]]:
    """(files that are a case each, DICOM files, label maps)."""
    plain, dicom, label_files = [], [], []
    with_headers = {item.file.parent for item in listed if item.file.suffix.lower() in (".mhd", ".nhdr")}
    for item in listed:
        stem, suffix = split_suffix(item.file.name)
        is_label = fnmatch.fnmatch(item.file.name, labels) if labels else _in_label_folder(item.name)
        format = FORMATS.get(suffix)
        if format is None and not is_label and suffix not in SIDE_FILES | COMPANIONS and _is_dicom(item.file):
            format = "dicom"
        if suffix in COMPANIONS and item.file.parent in with_headers:
            continue
        if format is None or item.file.name == "DICOMDIR":
            found.ignored[suffix or "without suffix"] += 1
        elif is_label:
            label_files.append(item)
        elif not fnmatch.fnmatch(item.file.name, images):
            found.ignored[f"{suffix} not called {images}"] += 1
        elif format == "dicom":
            dicom.append(item)
        else:
            plain.append(Source(item.name, stem, format, (item.file,)))
    return plain, dicom, label_files


def _in_label_folder(name: str) -> bool:
    return any(part.lower() in LABEL_FOLDERS for part in name.split("/")[1:-1])


def _is_dicom(file: Path) -> bool:
    try:
        with open(file, "rb") as f:
            return f.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _pair(sources: list[Source], label_files: list[Listed], images: str, labels: str, found: Found) -> list[Source]:
    """The sources with their label maps; label maps without an image are problems, the opposite is noted."""
    wanted = defaultdict(list)
    for i, source in enumerate(sources):
        if labels:
            wanted[source.folder, _star(images, source.files[0].name, source.stem)].append(i)
            continue
        for stem in {source.stem, NNUNET_CHANNEL.sub("", source.stem)}:
            wanted[source.folder, stem].append(i)  # images beside the folder of labels,
            wanted[source.folder.rpartition("/")[0], stem].append(i)  # or in a folder beside it
    by_path = {os.path.abspath(source.path): i for i, source in enumerate(sources)}
    of_label = {label: by_path[image] for image, label in found.description.pairs("training") if image in by_path}
    labelled: dict[int, Path] = {}
    for item in label_files:
        stem, path = split_suffix(item.file.name)[0], os.path.abspath(item.file)
        if path in of_label:
            matches = [of_label[path]]
        elif labels:
            matches = wanted[item.folder, _star(labels, item.file.name, stem)]
        else:
            matches = _same_subset(wanted[item.folder.rpartition("/")[0], stem], sources, item.folder)
        if not matches:
            where = " in its folder" if labels else ""
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
    return [_labelled(s, labelled[i]) if i in labelled else s for i, s in enumerate(sources)]


def _labelled(source: Source, label: Path) -> Source:
    return replace(source, label=label, label_format=FORMATS[split_suffix(label.name)[1]])


def _same_subset(matches: list[int], sources: Sequence[Source], folder: str) -> list[int]:
    """Without images of the other subset: imagesTs may have the same names as imagesTr."""
    other = {"tr": "ts", "ts": "tr"}.get(folder.lower()[-2:])
    return [i for i in matches if not (other and sources[i].folder.lower().endswith(f"images{other}"))]


def _star(pattern: str, name: str, stem: str) -> str:
    """What the "*" of a pattern stands for in a name; the stem where the pattern has not exactly one."""
    if pattern == "*" or pattern.count("*") != 1:
        return stem
    before, after = pattern.split("*")
    return name[len(before) : len(name) - len(after)]


def _with_channels(sources: list[Source], channel: int | str | None, found: Found) -> list[Source]:
    """With the names of their channels and, where all are wanted, nnU-Net's files of a case together."""
    names = found.description.channels
    sources = [replace(s, channels=names) if s.format != "image" else s for s in sources]
    groups: dict[tuple[str, str], list[Source]] = defaultdict(list)
    for source in sorted(sources, key=lambda s: s.name):
        if NNUNET_CHANNEL.search(source.stem) and source.format != "image":
            groups[source.folder, NNUNET_CHANNEL.sub("", source.stem)].append(source)
    groups = {key: members for key, members in groups.items() if max(len(names), len(members)) > 1}
    if not groups:
        return sources
    count = len(names) or max(map(len, groups.values()))
    if channel != "all":
        found.notes.append(
            f"{len(groups)} cases have up to {count} channels in files of their own (_0000, _0001, ...), which become "
            "volumes of their own; --channel all keeps them together"
        )
        return sources
    together = []
    for (_, stem), members in groups.items():
        if len(members) == count:
            together.append(replace(members[0], stem=stem, files=tuple(s.files[0] for s in members)))
        else:
            found.problems.append(f"{members[0].path}: {stem} has {len(members)} of {count} channels; copy the others")
    grouped = {member.name for members in groups.values() for member in members}
    return [s for s in sources if s.name not in grouped] + together


def _of_preset(
    listed: Sequence[Listed], preset: Preset, name: str, channel: int | str | None, found: Found
) -> list[Source]:
    """The cases of a public data set by the endings of its file names."""
    cases: dict[str, dict[str, Listed]] = defaultdict(dict)
    endings = (*preset.channels, preset.label)
    for item in listed:
        stem, suffix = split_suffix(item.file.name)
        ending = next((e for e in endings if stem.startswith(preset.prefix) and stem.endswith(e)), None)
        if FORMATS.get(suffix) == "nifti" and ending:
            cases[stem.removesuffix(ending)][ending] = item
        else:
            found.ignored[f"{suffix or 'without suffix'} not of {name}"] += 1
    if not cases:
        wanted = " ".join(f"{preset.prefix}CASE{ending}.nii.gz" for ending in endings)
        raise UserError(f"preset: there is no file of {name}; its files are called {wanted}")
    if isinstance(channel, int) and channel >= len(preset.channels):
        raise UserError(f"channel: {name} has no channel {channel}; choose 0 to {len(preset.channels) - 1}, or all")
    chosen = preset.channels[channel : channel + 1] if isinstance(channel, int) else preset.channels
    sources = []
    for case, items in cases.items():
        absent = " and no ".join(f"{case}{ending}.nii.gz" for ending in (*chosen, preset.label) if ending not in items)
        if absent:
            found.problems.append(f"{next(iter(items.values())).file.parent}: {case} has no {absent}; add it")
            continue
        files = tuple(items[ending].file for ending in chosen)
        source = Source(items[chosen[0]].name, case, "nifti", files, preset.modality, case)
        names = tuple(ending.strip("_") for ending in chosen) if len(chosen) > 1 else ()
        sources.append(_labelled(replace(source, channels=names), items[preset.label].file))
    return sources


def _of_dicom(dicom: list[Listed], found: Found, progress: Callable[[Iterable[Path]], Iterable[Path]]) -> list[Source]:
    """DICOM files grouped into series by their headers, and single radiographs."""
    names = {item.file: item.name for item in dicom}
    series, single = group_series(progress(list(names)), {item.file: item.root for item in dicom}, found.problems)
    per_folder = Counter(folder for s in series for folder in {file.parent for file in s.files})
    sources = []
    for s in series:
        folder = names[s.files[0]].rpartition("/")[0]
        alone = len({file.parent for file in s.files}) == 1 and per_folder[s.files[0].parent] == 1
        stem = folder.rpartition("/")[2] or "series"
        stem = stem if alone else f"{stem}_{s.digest}"
        sources.append(Source(f"{folder}#{s.digest}", stem, "dicom", s.files, s.modality, s.patient))
    for s in single:
        name = names[s.files[0]]
        sources.append(Source(name, split_suffix(s.files[0].name)[0], "dicom_image", s.files, s.modality, s.patient))
    return sources


def _described(sources: list[Source], modality: str, channel: int | str | None, found: Found) -> list[Source]:
    """With modality and patient, as the user or dataset.json say."""
    about, people = found.description, found.description.patients()
    named = [people.get(s.stem) or people.get(NNUNET_CHANNEL.sub("", s.stem)) or s.patient for s in sources]
    missing = [s.stem for s, person in zip(sources, named, strict=True) if not person]
    if people and missing:
        found.notes.append(f"dataset.json does not name the patients of {len(missing)} cases, e.g. {missing[0]}")
    return [
        replace(s, modality=modality or about.modality(channel, s.stem) or s.modality, patient=person)
        for s, person in zip(sources, named, strict=True)
    ]

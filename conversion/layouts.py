"""What there is to convert: files and DICOM series below the given places, with their label maps and channels."""

from __future__ import annotations

import fnmatch
import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from tqdm import tqdm

from conversion.arrays import Part, cases_in
from conversion.description import (
    MODALITIES,
    NAME,
    NNUNET_CHANNEL,
    Description,
    patient_of,
    read_description,
    split_suffix,
)
from conversion.dicom_header import is_dicom
from conversion.dicom_labels import is_annotation
from conversion.dicom_series import group_series
from conversion.listing import COMPANIONS, FORMATS, HEADERS, NOT_DATA, NOT_DATA_NAMES, list_files, unknown
from conversion.volume import Options
from utils.errors import UserError

LOOKS_LIKE_LABEL = re.compile(r"(^|[_.-])(seg|segmentations?|labels?|masks?|gt)([_.-]?\d+)?$", re.IGNORECASE)


@dataclass(frozen=True)
class Preset:
    """A public data set with one scan of each patient: what its label values mean, and how its files are called."""

    modality: str
    structures: dict[str, list[int]]
    images: dict[str, str]  # patterns by channel
    labels: str


_MMWHS = {
    "left ventricle": [500],
    "right ventricle": [600],
    "left atrium": [420],
    "right atrium": [550],
    "myocardium": [205],
    "ascending aorta": [820],
    "pulmonary artery": [850],
}
# 1 necrotic and non-enhancing core, 2 oedema, 4 enhancing tumour; the challenge scores three nested regions.
_BRATS = {"whole tumour": [1, 2, 4], "tumour core": [1, 4], "enhancing tumour": [4]}
PRESETS = {
    "mmwhs_ct": Preset("CT", _MMWHS, {"CT": "ct_*_image"}, "ct_*_label"),
    "mmwhs_mr": Preset("MR", _MMWHS, {"MR": "mr_*_image"}, "mr_*_label"),
    "brats2018": Preset("MR", _BRATS, {name: f"*_{name}" for name in ("flair", "t1", "t1ce", "t2")}, "*_seg"),
}


@dataclass(frozen=True)
class Source:
    """One case: a file, a file per channel, or the files of a DICOM series; or a label map.

    name: the last part of the place given and the path below it, the same on every machine; a series adds "#" and
    eight hexadecimal digits of its UID's hash, a case of an array with many its name and number.
    """

    name: str
    stem: str  # the shortest id that says what it is
    format: str
    files: tuple[Path, ...]
    modality: str = ""
    patient: str = ""
    channels: tuple[str, ...] = ()  # names, where the data set tells them
    label: Path | None = None
    id: str = ""  # in the data set, see conversion.table.assign_ids
    text: str = ""  # what the "*" of its pattern stands for, or its stem
    number: int = 0  # of the pattern
    part: Part | None = None  # of an array that holds many cases
    frame: int | None = None  # of a film
    structures: tuple[str, ...] = ()  # by name, of a label map that comes as DICOM
    values: tuple[tuple[str, int], ...] = ()  # of these in the data set, see conversion.table.assign_values

    @property
    def path(self) -> Path:
        """The file, the first of several channels, or the folder of a series."""
        return self.files[0].parent if self.format == "dicom" and len(self.files) > 1 else self.files[0]

    @property
    def folder(self) -> str:
        return above(self.name)

    @property
    def label_format(self) -> str:
        return FORMATS.get(split_suffix(self.label.name)[1], "dicom")


@dataclass
class Found:
    """What `find` found. problems stop a run or are skipped, notes are printed, ignored counts files by suffix.

    description: of all that was given, where a single dataset.json says it.
    """

    sources: list[Source] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    description: Description = field(default_factory=Description)
    image_of: dict[str, str] = field(default_factory=dict)  # by label map, as absolute paths


def find(
    places: Sequence[Path], images: Sequence[str], labels: str, modality: str, options: Options, preset: Preset | None
) -> Found:
    """Everything to convert in files and folders, in a fixed order. Raises UserError where a place is missing.

    images: patterns of file names; several: one for each channel of a case.  labels: a pattern whose "*" stands for the
    same text as the image's; "": label maps lie in folders of labels beside the images and have their names.
    options: with channel "all" nnU-Net's CASE_0000, CASE_0001, ... are one case.  preset: replaces images and labels.
    """
    channel = options.channel
    if preset:
        images, labels, modality = list(preset.images.values()), preset.labels, modality or preset.modality
    if len(images) > 1 and isinstance(channel, int):
        if channel >= len(images):
            raise UserError(f"channel: there is no channel {channel}; choose 0 to {len(images) - 1}, or all")
        images = images[channel : channel + 1]
    found = Found()
    listed = list_files(places, found.problems)
    described = _described(places, listed, found)
    plain, dicom, label_files = _sort(listed, images, labels, found)
    plain = [case for source in plain for case in _parts(source, options)]
    names = tuple(preset.images) if preset and len(preset.images) > 1 else found.description.channels
    sources = _cases(plain, len(images), names, channel == "all", found)
    if preset:
        sources = [replace(source, patient=source.text) for source in sources]
    sources = _pair([*sources, *_of_dicom(dicom, found)], label_files, bool(labels), found)
    modality = MODALITIES.get(modality.upper(), modality)
    for s in sorted(sources, key=lambda s: os.fsencode(s.name)):
        about = [described[folder] for folder in s.files[0].parents if folder in described]
        told = (name for one in about if (name := one.modality(channel, s.stem)))
        what, person = modality or next(told, s.modality), patient_of(s.path, s.name, about, s.patient)
        found.sources.append(replace(s, modality=what, patient=person))
    _require_one_name(found)
    _note_doubts(found)
    return found


def _require_one_name(found: Found) -> None:
    counts = Counter(s.name for s in found.sources)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise UserError(f"source: two of the places hold a {twice[0]}; give the folder above them instead")


def _note_doubts(found: Found) -> None:
    """Note what may not be meant: label maps among the images, copies of a file, cases of unknown patients."""
    if suspects := [s.name for s in found.sources if s.label is None and LOOKS_LIKE_LABEL.search(s.stem)]:
        found.notes.append(
            f"{len(suspects)} files look like label maps but are taken as images ({suspects[0]}); choose images and "
            "label maps by name, e.g. --images '*_flair.nii.gz' --labels '*_seg.nii.gz'"
        )
    names = {s.name for s in found.sources}
    if twins := [name for name in names if name.lower().endswith(".gz") and name[:-3] in names]:
        found.notes.append(
            f"{len(twins)} files are there compressed and not ({min(twins)}); remove one if they are copies"
        )
    if (unknown := [s.name for s in found.sources if not s.patient]) and len(unknown) < len(found.sources):
        found.notes.append(
            f"{len(unknown)} of {len(found.sources)} cases have no patient, e.g. {unknown[0]}; write it into "
            "cases.csv, as splits by patient need it"
        )


def above(name: str) -> str:
    return name.rpartition("/")[0]


def _described(places: Sequence[Path], listed: dict[Path, tuple[str, bool]], found: Found) -> dict[Path, Description]:
    """What dataset.json files say, by the folder below which it holds; those above a place, if they name its files."""
    described = {file.parent: read_description(file) for file in listed if file.name == NAME}
    found.ignored[".json"] -= len(described)
    missing = [file for about in described.values() for file in about.files if not os.path.exists(file)]
    found.problems += [f"{file}: is listed in dataset.json but does not exist; copy it" for file in missing]
    for place in (Path(os.path.abspath(place.expanduser())) for place in places):
        for folder in place.parents[:2]:
            if folder not in described and (folder / NAME).is_file():
                about = read_description(folder / NAME)
                if any(Path(file) in listed for file in about.files):
                    described[folder] = about
    said = list(described.values())
    alike = all((about.structures, about.modalities) == (said[0].structures, said[0].modalities) for about in said)
    if said and alike:
        found.description = replace(
            said[0], about="; ".join(dict.fromkeys(about.about for about in said if about.about))
        )
    elif said:
        found.notes.append(
            f"{len(said)} dataset.json files differ in labels or modalities: write those into dataset.yaml"
        )
    found.image_of = {label: image for about in said for label, image in about.image_of.items()}
    return described


def _sort(
    listed: dict[Path, tuple[str, bool]], images: Sequence[str], labels: str, found: Found
) -> tuple[list[Source], list[Source], list[Source]]:
    """(files of images and volumes, DICOM files, label maps)."""
    plain, dicom, label_files = [], [], []
    headers = set()  # by name, and by suffix alone
    masks: Counter[Path] = Counter()  # DICOM that is no annotation, by folder
    for file in listed:
        stem, suffix = split_suffix(file.name)
        if suffix in HEADERS:
            headers |= {(file.parent, (stem, suffix)), (file.parent, suffix)}
    for file, (name, of_labels) in listed.items():
        stem, suffix = split_suffix(file.name)
        label = _star(labels, file.name) if labels else stem if of_labels else None
        format = FORMATS.get(suffix, "")
        if not format and suffix not in NOT_DATA | COMPANIONS.keys() and os.access(file, os.R_OK) and is_dicom(file):
            format = "dicom"
        texts = [_star(pattern, file.name) for pattern in images]
        number = next((i for i, text in enumerate(texts) if text is not None), None)
        source = Source(name, stem, format, (file,), text=label or (stem if number is None else texts[number]))
        if any((file.parent, end if "raw" in suffix else (stem, end)) in headers for end in COMPANIONS.get(suffix, ())):
            continue
        if suffix in NOT_DATA or file.name.upper() in NOT_DATA_NAMES:
            found.ignored[suffix or file.name] += 1
        elif not format:
            found.problems.append(f"{file}: {unknown(suffix)}")
        elif label is not None and format != "dicom":
            label_files.append(source)
        elif label is not None and not is_annotation(file):
            masks[file.parent] += 1
        elif number is None:
            found.ignored[f"{suffix} not called {' or '.join(images)}"] += 1
        else:
            (dicom if format == "dicom" else plain).append(replace(source, number=number))
    found.problems += [
        f"{folder}: {count} DICOM files in the place of label maps are neither SEG nor RTSTRUCT; save the masks as "
        "NIfTI, those of pictures as PNG"
        for folder, count in masks.items()
    ]
    return plain, dicom, label_files


def _parts(source: Source, options: Options) -> list[Source]:
    """The source, or one for each case of an array that holds many."""
    many = source.format == "array" and (options.case_axis is not None or source.path.suffix.lower() == ".npz")
    parts = cases_in(source.path, options.case_axis, options.array_key) if many else []
    cases = []
    for part in parts:
        end = f"{part.array.removesuffix('_images').replace('/', '_')}_{part.index:05d}".lstrip("_")
        stem = f"{source.stem}_{end}"
        cases.append(replace(source, name=f"{source.name}#{end}", stem=stem, text=stem, part=part))
    return cases or [source]


def _star(pattern: str, name: str) -> str | None:
    """What the "*" of a pattern stands for in a file's name, with or without suffix, or its stem; None: no match."""
    stem = split_suffix(name)[0]
    for text in (name, stem):
        if fnmatch.fnmatch(text, pattern):
            if pattern == "*" or pattern.count("*") != 1:
                return stem
            parts = (re.sub(r"\\[zZ]$", "", fnmatch.translate(part)) for part in pattern.split("*"))
            return re.fullmatch("(.*)".join(parts), text, re.DOTALL)[1]
    return None


def _cases(
    plain: Sequence[Source], patterns: int, names: tuple[str, ...], together: bool, found: Found
) -> list[Source]:
    """A source of every file, or of the files of its channels: where there are patterns for these, or `together`."""
    first_channels = {(item.path.parent, item.stem) for item in plain if item.format != "image"}
    groups: dict[tuple[Path, str], list[tuple[int, Source]]] = defaultdict(list)
    for item in plain:
        base, end = item.stem[:-5], NNUNET_CHANNEL.search(item.stem)
        of_nnunet = bool(end) and (item.path.parent, f"{base}_0000") in first_channels
        if patterns > 1:
            groups[item.path.parent, item.text].append((item.number, item))
        elif of_nnunet and together:
            groups[item.path.parent, base].append((int(end[1]), item))
        else:
            groups[item.path, item.text if item.part else item.stem].append((-1, item))
    count = max([patterns, *(number + 1 for members in groups.values() for number, _ in members)])
    sources = []
    for (_, stem), members in groups.items():
        members.sort(key=lambda member: member[0])
        first, files = members[0][1], tuple(item.path for _, item in members)
        if members[0][0] < 0 or [number for number, _ in members] == list(range(count)):
            sources.append(replace(first, stem=stem, files=files, channels=names))
        else:
            found.problems.append(f"{first.path}: its case has {len(files)} of {count} channels; add the others")
    return sources


def _pair(sources: list[Source], label_files: Sequence[Source], by_pattern: bool, found: Found) -> list[Source]:
    """The sources with their label maps; label maps without an image are problems, the opposite is noted."""
    wanted = defaultdict(list)
    for source in sources:
        # images lie beside the folder of labels, or in a folder beside it
        stems = {source.stem, NNUNET_CHANNEL.sub("", source.stem)}
        folders = [source.folder, above(source.folder)]
        if source.format == "dicom":  # a folder, or a file that is a volume
            folders.insert(0, source.name.rpartition("#")[0])
            stems |= {source.text} if len(source.files) == 1 else set()
        elif source.part:  # a label map with as many cases
            stems.add(split_suffix(source.path.name)[0])
        texts = {source.text} if by_pattern and source.format != "dicom" else stems
        for key in product(folders[:-1] if by_pattern else folders, texts):
            wanted[key].append(source)
    by_path = {os.path.abspath(source.path): source for source in sources}
    labelled = {source.name: source.label for source in sources if source.label}  # as their headers say
    for item in label_files:
        matches = wanted[item.folder if by_pattern else above(item.folder), item.text]
        if not by_pattern:  # a_mask is of a, and imagesTs may have the same names as imagesTr
            matches = matches or wanted[above(item.folder), LOOKS_LIKE_LABEL.sub("", item.text)]
            other = {"tr": "imagests", "ts": "imagestr"}.get(item.folder.lower()[-2:], "/")
            matches = [source for source in matches if not source.folder.lower().endswith(other)]
        image = by_path.get(found.image_of.get(os.path.abspath(item.path), ""))
        most = max((len(source.files) for source in matches), default=0)  # a series, not the scout beside it
        matches = [image] if image else [source for source in matches if len(source.files) == most]
        if not matches:
            found.problems.append(
                f"{item.path}: is a label map without an image of its name; copy it, name both alike, or remove this"
            )
        for source in matches:
            if source.name in labelled:
                found.problems.append(f"{item.path}: is a second label map of {source.path}; remove one of them")
            labelled[source.name] = item.path
    if bare := [source.path for source in sources if source.name not in labelled and label_files]:
        found.notes.append(f"{len(bare)} images have no label map, e.g. {bare[0]}; pre-training needs none")
    return [replace(source, label=labelled.get(source.name)) for source in sources]


def _of_dicom(dicom: Sequence[Source], found: Found) -> list[Source]:
    """DICOM files grouped into series by their headers, and single radiographs."""
    listed, sources = {item.path: item for item in dicom}, []
    progress = tqdm(listed, desc="reading DICOM headers", unit="file", disable=None, leave=False)
    for s in group_series(progress, found.problems):
        source = replace(listed[s.files[0]], files=s.files, modality=s.modality, patient=s.patient, frame=s.frame)
        if s.digest:
            stem = source.folder.rpartition("/")[2]
            name = f"{source.folder}#{s.digest}"
            sources.append(replace(source, name=name, stem=stem, label=s.label, structures=s.structures))
        else:
            end = "" if s.frame is None else f"_{s.frame:03d}"
            names = {key: getattr(source, key) + end for key in ("name", "stem", "text")}
            sources.append(replace(source, format="dicom_image", **names))
    return sources

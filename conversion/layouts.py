"""What there is to convert: files and DICOM series below the given places, with their label maps and channels."""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from conversion.dicom_header import is_dicom
from conversion.dicom_labels import is_annotation
from conversion.dicom_series import group_series
from datasets.index import IMAGE_SUFFIXES, LABEL_FOLDERS, SIDE_FILES, walk
from utils.errors import UserError

FORMATS = {
    ".nii": "nifti", ".nii.gz": "nifti", ".nrrd": "itk", ".nhdr": "itk", ".mha": "itk", ".mhd": "itk", ".npy": "npy",
    ".npz": "npz", ".h5": "hdf5", ".hdf5": "hdf5", ".dcm": "dicom", ".dicom": "dicom", ".ima": "dicom",
    ".dcm.gz": "dicom", **dict.fromkeys(IMAGE_SUFFIXES, "image"),
}  # fmt: skip
COMPANIONS = {".raw", ".zraw"}  # pixels of .mhd and .nhdr headers
LOOKS_LIKE_LABEL = re.compile(r"(^|[_.-])(seg|segmentations?|labels?|masks?|gt)([_.-]?\d+)?$", re.IGNORECASE)
MODALITIES = {"MRI": "MR", "PET": "PT"}  # other names of DICOM's modalities
NNUNET_CHANNEL = re.compile(r"_(\d{4})$")


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


@dataclass
class Description:
    """What the dataset.json of the Decathlon or of nnU-Net says; empty where there is none."""

    about: str = ""
    structures: dict[str, list[int]] = field(default_factory=dict)  # without the background
    modalities: dict[str, str] = field(default_factory=dict)  # by channel
    patients: dict[str, str] = field(default_factory=dict)  # by case
    files: list[str] = field(default_factory=list)  # absolute paths
    image_of: dict[str, str] = field(default_factory=dict)  # by label map

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels of a case, where there are several."""
        names = [self.modalities.get(str(number), "") for number in range(len(self.modalities))]
        return tuple(names) if len(names) > 1 and all(names) else ()

    def modality(self, channel: int | str | None, stem: str) -> str:
        """Of the channel that nnU-Net's file name tells (_0000), else of the given or the only one, else ""."""
        end = NNUNET_CHANNEL.search(stem)
        if end and str(int(end[1])) in self.modalities:
            channel = int(end[1])
        only = "0" if len(self.modalities) == 1 else ""
        name = self.modalities.get(str(channel) if isinstance(channel, int) else only, "")
        return MODALITIES.get(name.upper(), name)


def read_description(path: Path) -> Description:
    """The dataset.json at `path`. Raises UserError where it is no JSON."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); correct it or remove it") from None

    def get(key: str, kind: type) -> Any:
        value = content.get(key) if isinstance(content, dict) else None
        return value if isinstance(value, kind) else kind()

    found = Description("; ".join(text for key in ("name", "reference", "licence") if (text := get(key, str))))
    for key, value in get("labels", dict).items():  # {"1": "lesion"} (Decathlon), {"lesion": 1 or [1, 2]} (nnU-Net)
        name, values = (str(value), [key]) if str(key).isdigit() else (str(key), value)
        values = [str(number) for number in (values if isinstance(values, list) else [values])]
        if all(map(str.isdigit, values)) and set(values) != {"0"}:
            found.structures[name] = list(map(int, values))
    names = get("modality", dict) or get("channel_names", dict)
    found.modalities = {str(number): str(name).replace(",", "") for number, name in names.items()}
    found.patients = {str(case): str(person) for case, person in get("patient", dict).items()}
    for entry in [*get("training", list), *get("test", list)]:
        parts = [entry.get("image"), entry.get("label")] if isinstance(entry, dict) else [entry]
        paths = [os.path.abspath(path.parent / part) for part in parts if part and isinstance(part, str)]
        found.files += paths
        if len(paths) == 2:
            found.image_of[paths[1]] = paths[0]
    return found


@dataclass(frozen=True)
class Source:
    """One case: a file, a file per channel, or the files of a DICOM series; or a label map.

    name: the last part of the place given and the path below it, the same on every machine; a series adds "#" and
    eight hexadecimal digits of its UID's hash.
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
    frame: int | None = None  # of a film
    structures: tuple[str, ...] = ()  # names for the values 1, 2, ... of a label map that comes as DICOM

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
    """What `find` found. problems stop a run or are skipped, notes are printed, ignored counts files by suffix."""

    sources: list[Source] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    description: Description = field(default_factory=Description)


def find(
    places: Sequence[Path],
    images: Sequence[str],
    labels: str,
    modality: str,
    channel: int | str | None,
    preset: Preset | None,
) -> Found:
    """Everything to convert in files and folders, in a fixed order. Raises UserError where a place is missing.

    images: patterns of file names; several: one for each channel of a case.  labels: a pattern whose "*" stands for the
    same text as the image's; "": label maps lie in folders of labels beside the images and have their names.
    channel: "all" makes one case of nnU-Net's CASE_0000, CASE_0001, ...  preset: replaces images and labels.
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
        missing = [file for file in found.description.files if not os.path.exists(file)]
        found.problems += [f"{file}: is listed in dataset.json but does not exist; copy it" for file in missing]
    plain, dicom, label_files = _sort(listed, images, labels, found)
    names = tuple(preset.images) if preset and len(preset.images) > 1 else found.description.channels
    sources = _pair(_cases(plain, len(images), names, channel == "all", found), label_files, bool(labels), found)
    if preset:
        sources = [replace(source, patient=source.text) for source in sources]
    sources += _of_dicom(dicom, found)
    about, modality = found.description, MODALITIES.get(modality.upper(), modality)
    for s in sorted(sources, key=lambda s: os.fsencode(s.name)):
        person = about.patients.get(s.stem) or about.patients.get(NNUNET_CHANNEL.sub("", s.stem)) or s.patient
        what = modality or about.modality(channel, s.stem) or s.modality
        found.sources.append(replace(s, modality=what, patient=person))
    if twice := [name for name, count in Counter(s.name for s in sources).items() if count > 1]:
        raise UserError(f"source: two of the places hold a {twice[0]}; give the folder above them instead")
    if suspects := [s.name for s in found.sources if s.label is None and LOOKS_LIKE_LABEL.search(s.stem)]:
        found.notes.append(
            f"{len(suspects)} files look like label maps but are taken as images ({suspects[0]}); choose images and "
            "label maps by name, e.g. --images '*_flair.nii.gz' --labels '*_seg.nii.gz'"
        )
    return found


def above(name: str) -> str:
    return name.rpartition("/")[0]


def split_suffix(name: str) -> tuple[str, str]:
    """("case.v2", ".nii.gz") of "case.v2.nii.gz"; the suffix in lower case."""
    end = next((s for s in (".nii.gz", ".dcm.gz") if name.lower().endswith(s)), os.path.splitext(name)[1])
    return name[: len(name) - len(end)], end.lower()


def _list(places: Sequence[Path], found: Found) -> dict[Path, str]:
    """{file: name} of every file that is not hidden."""
    files: dict[Path, str] = {}  # places may overlap
    for place in (Path(os.path.abspath(place.expanduser())) for place in places):
        if not place.exists():
            raise UserError(f"source: {place} does not exist; give files or a folder")
        root = place if place.is_dir() else place.parent
        for file in walk(place) if place.is_dir() else [place]:
            name = f"{root.name}/{file.relative_to(root).as_posix()}"
            if os.fsencode(name).decode(errors="replace") == name:
                files.setdefault(file, name)
            else:  # as from archives of other systems
                found.problems.append(f"{os.fsencode(file)!r}: has a name that is not UTF-8; rename it")
    return files


def _sort(
    listed: dict[Path, str], images: Sequence[str], labels: str, found: Found
) -> tuple[list[Source], list[Source], list[Source]]:
    """(files of images and volumes, DICOM files, label maps)."""
    plain, dicom, label_files = [], [], []
    with_headers = {file.parent for file in listed if file.suffix.lower() in (".mhd", ".nhdr")}
    for file, name in listed.items():
        stem, suffix = split_suffix(file.name)
        in_label_folder = any(part.lower() in LABEL_FOLDERS for part in name.split("/")[1:-1])
        label = _star(labels, file.name) if labels else stem if in_label_folder else None
        format = FORMATS.get(suffix, "")
        other = format or label is not None or suffix in SIDE_FILES | COMPANIONS
        if not other and os.access(file, os.R_OK) and is_dicom(file):
            format = "dicom"
        texts = [_star(pattern, file.name) for pattern in images]
        number = next((i for i, text in enumerate(texts) if text is not None), None)
        source = Source(name, stem, format, (file,), text=label or (stem if number is None else texts[number]))
        if suffix in COMPANIONS and file.parent in with_headers:
            continue
        if not format or file.name == "DICOMDIR":
            found.ignored[suffix or "without suffix"] += 1
        elif label is not None and not (format == "dicom" and is_annotation(file)):
            label_files.append(source)
        elif number is None:
            found.ignored[f"{suffix} not called {' or '.join(images)}"] += 1
        else:
            (dicom if format == "dicom" else plain).append(replace(source, number=number))
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
            groups[item.path, item.stem].append((-1, item))
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
        keys = {(folder, stem) for folder in (source.folder, above(source.folder)) for stem in stems}
        for key in {(source.folder, source.text)} if by_pattern else keys:
            wanted[key].append(source)
    by_path = {os.path.abspath(source.path): source for source in sources}
    labelled: dict[str, Path] = {}
    for item in label_files:
        matches = wanted[item.folder if by_pattern else above(item.folder), item.text]
        if not by_pattern:  # imagesTs may have the same names as imagesTr
            other = {"tr": "imagests", "ts": "imagestr"}.get(item.folder.lower()[-2:], "/")
            matches = [source for source in matches if not source.folder.lower().endswith(other)]
        image = by_path.get(found.description.image_of.get(os.path.abspath(item.path), ""))
        matches = [image] if image else matches
        if not matches:
            found.problems.append(f"{item.path}: is a label map without an image; copy its image, or remove it")
        for source in matches:
            if source.name in labelled:
                found.problems.append(f"{item.path}: is a second label map of {source.path}; remove one of them")
            labelled[source.name] = item.path
    if bare := [source.path for source in sources if source.name not in labelled and label_files]:
        found.notes.append(f"{len(bare)} images have no label map, e.g. {bare[0]}; pre-training needs none")
    return [replace(source, label=labelled.get(source.name)) for source in sources]


def _of_dicom(dicom: Sequence[Source], found: Found) -> list[Source]:
    """DICOM files grouped into series by their headers, and single radiographs."""
    listed = {item.path: item for item in dicom}
    progress = tqdm(listed, desc="reading DICOM headers", unit="file", disable=None, leave=False)
    sources, names = [], found.description.structures
    taken = max((value for values in names.values() for value in values), default=0)
    for s in group_series(progress, found.problems):
        source = replace(listed[s.files[0]], files=s.files, modality=s.modality, patient=s.patient, frame=s.frame)
        if s.digest:
            stem = source.folder.rpartition("/")[2]
            name, structures = f"{source.folder}#{s.digest}", taken * ("",) + s.structures
            sources.append(replace(source, name=name, stem=stem, label=s.label, structures=structures))
            names |= {text: [taken + 1 + i] for i, text in enumerate(s.structures)}
        else:
            end = "" if s.frame is None else f"_{s.frame:03d}"
            sources.append(replace(source, format="dicom_image", name=source.name + end, stem=source.stem + end))
    return sources

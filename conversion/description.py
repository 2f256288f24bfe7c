"""What the dataset.json files of the Decathlon, nnU-Net and others say about the files below their folders."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import read_json

NAME = "dataset.json"
MODALITIES = {"MRI": "MR", "PET": "PT"}  # other names of DICOM's modalities
NNUNET_CHANNEL = re.compile(r"_(\d{4})$")
BIDS_SUBJECT = re.compile(r"(?:^|/)(sub-[A-Za-z0-9]+)(?=[_/])")
LISTS = ("training", "validation", "test", "cases")  # of files, or of mappings with image, label and patient
DOUBLE = re.compile(r"\.(nii|hdr|img|dcm)\.gz$", re.IGNORECASE)


@dataclass
class Description:
    """The content of a dataset.json; empty where there is none."""

    about: str = ""
    structures: dict[str, list[int]] = field(default_factory=dict)  # without the background
    modalities: dict[str, str] = field(default_factory=dict)  # by channel
    patients: dict[str, str] = field(default_factory=dict)  # by case, a stem or an absolute path without suffix
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


def patient_of(path: Path, name: str, described: Iterable[Description], own: str) -> str:
    """The patient of a case: as a dataset.json says, else its `own`, else the subject in its name, as BIDS has it.

    name: the last part of the place given and the path below it.
    """
    whole = split_suffix(os.path.abspath(path))[0]
    keys = [whole, os.path.basename(whole)]
    keys += [short for key in keys if (short := NNUNET_CHANNEL.sub("", key)) != key]
    told = (about.patients[key] for about in described for key in keys if key in about.patients)
    subject = BIDS_SUBJECT.search(name)
    return next(told, own or (subject[1] if subject else ""))


def split_suffix(name: str) -> tuple[str, str]:
    """("case.v2", ".nii.gz") of "case.v2.nii.gz"; the suffix in lower case."""
    double = DOUBLE.search(name)
    end = double[0] if double else os.path.splitext(name)[1]
    return name[: len(name) - len(end)], end.lower()


def read_description(path: Path) -> Description:
    """The dataset.json at `path`. Raises UserError where it is no JSON."""
    try:
        content = read_json(path)
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
            found.structures.setdefault(name, []).extend(map(int, values))
    names = get("modality", dict) or get("channel_names", dict)
    found.modalities = {str(number): str(name).replace(",", "") for number, name in names.items()}
    for key in ("patient", "patients"):
        found.patients |= _by_case(get(key, dict), path.parent)
    for entry in (entry for key in LISTS for entry in get(key, list)):
        entry = entry if isinstance(entry, dict) else {"image": entry}
        images, label = _paths(entry.get("image"), path.parent), _paths(entry.get("label"), path.parent)
        found.files += images + label
        found.image_of |= dict.fromkeys(label, *images[:1])
        if person := entry.get("patient") or entry.get("patient_id") or entry.get("subject"):
            found.patients |= {split_suffix(image)[0]: str(person) for image in images}
    return found


def _paths(value: Any, folder: Path) -> list[str]:
    """Absolute paths of a name or a list of names."""
    names = value if isinstance(value, list) else [value]
    return [os.path.abspath(folder / name) for name in names if name and isinstance(name, str)]


def _by_case(people: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """{case: patient} of {case: patient} or of {patient: [cases]}."""
    pairs = [(case, key) for key, cases in people.items() if isinstance(cases, list) for case in cases]
    pairs += [(key, person) for key, person in people.items() if person and not isinstance(person, list | dict)]
    cases = ((str(case), str(person)) for case, person in pairs)
    return {split_suffix(os.path.abspath(folder / case) if "/" in case else case)[0]: who for case, who in cases}

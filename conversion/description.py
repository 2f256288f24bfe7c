"""What is known of a data set beside its files: dataset.json of the Decathlon or of nnU-Net, or a preset."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.errors import UserError

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
    """The content of a dataset.json; empty where there is none."""

    content: dict[str, Any] = field(default_factory=dict)
    folder: Path = Path()

    @property
    def about(self) -> str:
        return "; ".join(str(self.content[key]) for key in ("name", "reference", "licence") if self.content.get(key))

    @property
    def structures(self) -> dict[str, list[int]]:
        """Label values of {"1": "lesion"} (Decathlon) or {"lesion": 1 or [1, 2]} (nnU-Net); not of the background."""
        labels = self.content.get("labels")
        out: dict[str, list[int]] = {}
        for key, value in labels.items() if isinstance(labels, dict) else []:
            name, values = (str(value), [key]) if str(key).isdigit() else (str(key), value)
            values = values if isinstance(values, list) else [values]
            if all(str(number).isdigit() for number in values) and [int(number) for number in values] != [0]:
                out[name] = [int(number) for number in values]
        return out

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels of a case, where there are several."""
        names = self._modalities()
        numbers = [str(number) for number in range(len(names))]
        return tuple(names[number] for number in numbers) if len(names) > 1 and set(numbers) == set(names) else ()

    def modality(self, channel: int | str | None, stem: str) -> str:
        """Of the channel that the end of nnU-Net's file names tells (_0000), or else of the given one.

        "" where dataset.json does not say, or says several and none was chosen.
        """
        names = self._modalities()
        number = NNUNET_CHANNEL.search(stem)
        if number and str(int(number[1])) in names:
            channel = int(number[1])
        one = channel if isinstance(channel, int) else 0 if len(names) == 1 else None
        name = names.get(str(one), "")
        return MODALITIES.get(name.upper(), name)

    @property
    def patients(self) -> dict[str, str]:
        """Of cases by their names: the map `patient`, or a `patient` of each entry of a list of cases."""
        people = self.content.get("patient")
        out = {str(case): str(who) for case, who in people.items()} if isinstance(people, dict) else {}
        for entry in self._entries("training", "test", "cases"):
            if isinstance(entry, dict) and entry.get("patient") and isinstance(entry.get("image"), str):
                out.setdefault(Path(entry["image"]).name.split(".")[0], str(entry["patient"]))
        return out

    def pairs(self, *lists: str) -> list[tuple[str, str]]:
        """(image, label or "") as absolute paths of the files in these lists, in their order."""
        pairs = []
        for entry in self._entries(*lists):
            image, label = (entry.get("image"), entry.get("label")) if isinstance(entry, dict) else (entry, None)
            if isinstance(image, str):
                pairs.append(tuple(os.path.abspath(os.path.join(self.folder, p)) if p else "" for p in (image, label)))
        return pairs

    def _entries(self, *lists: str) -> list[Any]:
        found = [self.content.get(name) for name in lists]
        return [entry for entries in found if isinstance(entries, list) for entry in entries]

    def _modalities(self) -> dict[str, str]:
        names = self.content.get("modality") or self.content.get("channel_names")
        pairs = names.items() if isinstance(names, dict) else []
        return {str(key): str(name).replace(",", "") for key, name in pairs}


def read_description(path: Path) -> Description:
    """The dataset.json at `path`. Raises UserError where it is no JSON."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); correct it or remove it") from None
    return Description(content if isinstance(content, dict) else {}, path.parent)

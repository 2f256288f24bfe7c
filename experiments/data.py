"""Lay out the developers' data for the experiments: what is pre-trained on, what is tested, by patient.

    python -m experiments.data --source ../shared/data --dest runs/experiments/data

Writes splits/<task>.json (fixed: train is the pool of labelled cases, validation, test), pretrain/ (a tree for the
training scripts: volumes and images of train and validation patients only, without labels) and tasks/ (what the
downstream scripts read). The same command again makes only what is missing.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import prepare_data
from downstream.features import read_nifti
from downstream.splits import Split, check_split, make_split, read_split, write_split
from utils import config as options
from utils import files
from utils.errors import UserError

VOLUMES = {"heart_la": (0.6, 0.15, 0.25), "hippocampus": (0.75, 0.05, 0.2)}  # patients in train, validation, test
SLICES = (0.6, 0.1, 0.3)
XRAY = (0.5, 0.1, 0.4)
STACK = 11  # slices: 8 stacks of every heart_la volume
FINDINGS = ("COVID-19", "No finding")  # told apart; the other images have no label that is worth a test
SCAN = re.compile(r"^(.*?)(?:_(?:t1ce|t1|t2|flair))?_frame_")  # of slices_png: what stands before the slice number


@dataclass
class Config:
    source: str = "../shared/data"
    """folder with heart_la, hippocampus, misc_nifti, slices_png and chest_xray"""
    dest: str = "runs/experiments/data"
    """receives splits/, pretrain/ and tasks/"""


def main(cfg: Config) -> None:
    source, dest = Path(cfg.source).expanduser().resolve(), Path(cfg.dest).expanduser().resolve()
    for name in (*VOLUMES, "misc_nifti", "slices_png", "chest_xray"):
        if not (source / name).is_dir():
            raise UserError(f"source: {source} has no folder {name}")
    for name, fractions in VOLUMES.items():
        patients = patients_of_volumes(source / name)
        split = _fixed(dest, name, make_split(list(patients), list(patients.values()), fractions, 0), patients)
        _link(source / name, dest / "tasks" / name)
        _convert([source / name / "imagesTr" / f"{case}.nii.gz" for case in allowed(split, patients)], dest, name)
    _stacks(source / "heart_la", dest)
    _convert(sorted((source / "misc_nifti").glob("*.nii.gz")), dest, "misc_nifti")

    patients, organs = slices(source / "slices_png")
    split = _fixed(dest, "slices_png", stratified(patients, organs, SLICES, 0), patients)
    _copy(patients, source / "slices_png", dest / "tasks" / "slices_png")
    _copy(allowed(split, patients), source / "slices_png", dest / "pretrain")

    everyone, findings = xrays(source / "chest_xray")
    patients = {case: everyone[case] for case, finding in findings.items() if finding in FINDINGS}
    split = _fixed(dest, "chest_xray", stratified(patients, findings, XRAY, 0), patients)
    _copy(everyone, source / "chest_xray", dest / "tasks" / "chest_xray")
    shutil.copyfile(source / "chest_xray" / "labels.csv", dest / "tasks" / "chest_xray.csv")
    _copy(allowed(split, everyone), source / "chest_xray", dest / "pretrain" / "chest_xray")
    print(f"wrote {dest}")


def patients_of_volumes(folder: Path) -> dict[str, str]:
    """Case -> patient, of a data set in Decathlon's layout whose dataset.json names the patients."""
    return json.loads((folder / "dataset.json").read_text())["patient"]


def slices(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Slice -> scan or patient, and slice -> organ; slices are named <organ>/<file>. Slices without contrast are left
    out."""
    patients, organs = {}, {}
    for path in sorted(folder.glob("*/*.png")):
        pixels = np.asarray(Image.open(path))
        found = SCAN.match(path.name)
        if found is None:
            raise UserError(f"{path}: does not name its scan (<scan>_frame_<number>.png)")
        if pixels.min() < pixels.max():
            case = f"{path.parent.name}/{path.name}"
            patients[case], organs[case] = f"{path.parent.name}/{found[1]}", path.parent.name
    return patients, organs


def xrays(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Image -> patient, and image -> finding, of labels.csv."""
    with open(folder / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {row["filename"]: row["patient"] for row in rows}, {row["filename"]: row["finding"] for row in rows}


def stratified(patients: Mapping[str, str], labels: Mapping[str, str], fractions: Sequence[float], seed: int) -> Split:
    """A split by patient in which every label has its share; a patient counts with the label of his first case."""
    of_patient: dict[str, str] = {}
    for case in sorted(patients):
        of_patient.setdefault(patients[case], labels[case])
    parts = []
    for label in sorted(set(of_patient.values())):
        own = [case for case in patients if of_patient[patients[case]] == label]
        parts.append(make_split(own, [patients[case] for case in own], fractions, seed))
    joined = {name: [getattr(part, name) for part in parts] for name in ("train", "validation", "test")}
    return Split(**{name: sorted(itertools.chain(*lists)) for name, lists in joined.items()})


def allowed(split: Split, patients: Mapping[str, str]) -> list[str]:
    """The cases that pre-training may see: none of a patient who has a case in the test."""
    tested = {patients[case] for case in split.test}
    return sorted(case for case, patient in patients.items() if patient not in tested)


def _fixed(dest: Path, name: str, drawn: Split, patients: Mapping[str, str]) -> Split:
    """The split in its file, which is made when it is not there."""
    path = dest / "splits" / f"{name}.json"
    if not path.is_file():
        write_split(drawn, path)
    split = read_split(path)
    check_split(split, patients)
    print(f"{name}: {len(split.train)} train, {len(split.validation)} validation, {len(split.test)} test cases")
    return split


def _stacks(folder: Path, dest: Path) -> None:
    """A task of whole volumes: is the atrium in a stack of slices, and does it begin or end there?

    Every volume is cut into stacks of STACK slices (the rest is left out), labelled `inside` (all slices show the
    atrium), `edge` (some) or `none`, and split as its volume is.
    """
    name = f"{folder.name}_stacks"
    path = dest / "tasks" / f"{name}.csv"
    if path.is_file():  # which is written last
        return
    (dest / "tasks" / name).mkdir(parents=True, exist_ok=True)
    patients, stacks, rows = patients_of_volumes(folder), {}, ["case,patient,label"]
    for case, patient in sorted(patients.items()):
        image, label = (read_nifti(folder / kind / f"{case}.nii.gz") for kind in ("imagesTr", "labelsTr"))
        shown = label.any(axis=(0, 1))
        stacks[case] = [f"{case}_{k}.npy" for k in range(len(shown) // STACK)]
        for k, stack in enumerate(stacks[case]):
            part = slice(k * STACK, (k + 1) * STACK)
            np.save(dest / "tasks" / name / stack, image[:, :, part].astype(np.int16), allow_pickle=False)
            kind = "inside" if shown[part].all() else "edge" if shown[part].any() else "none"
            rows.append(f"{stack},{patient},{kind}")
    split = read_split(dest / "splits" / f"{folder.name}.json")
    parts = {field: [stack for case in getattr(split, field) for stack in stacks[case]] for field in vars(split)}
    write_split(Split(**parts), dest / "splits" / f"{name}.json")
    files.write_text("\n".join(rows) + "\n", path)


def _convert(files: Sequence[Path], dest: Path, name: str) -> None:
    prepare_data.main(
        prepare_data.Config(source=[str(file) for file in files], dest=str(dest / "pretrain" / name), workers=1)
    )


def _copy(cases: Iterable[str], source: Path, dest: Path) -> None:
    for case in cases:
        (dest / case).parent.mkdir(parents=True, exist_ok=True)
        if not (dest / case).is_file():
            shutil.copyfile(source / case, dest / case)


def _link(source: Path, dest: Path) -> None:
    dest.parent.mkdir(parents=True, exist_ok=True)
    if not dest.exists():
        dest.symlink_to(source, target_is_directory=True)


if __name__ == "__main__":
    options.main(main, Config, __doc__)

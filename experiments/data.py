"""Lay out the developers' data for the experiments: what is pre-trained on, what is tested, by patient.

    python -m experiments.data --source ../shared/data --dest runs/experiments/data

Writes tasks/ (prepared trees and folders of images, which the downstream scripts read), splits/<task>.json (fixed:
train is the pool of labelled cases, validation, test) and pretrain/ (what training reads: volumes and images
of train and validation patients only, without labels). The same command again makes only what is missing.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

import prepare_data
from downstream.splits import PARTS, Split, check_split, make_split, read_split, write_split
from utils import config as options
from utils.errors import UserError
from utils.files import write_csv

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
    """receives tasks/, splits/ and pretrain/"""


def main(cfg: Config) -> None:
    source, dest = Path(cfg.source).expanduser(), Path(cfg.dest).expanduser()
    for name in (*VOLUMES, "misc_nifti", "slices_png", "chest_xray"):
        if not (source / name).is_dir():
            raise UserError(f"source: {source} has no folder {name}")
    for name, fractions in VOLUMES.items():
        _prepare(source / name, dest / "tasks" / name)
        patients = patients_of_volumes(source / name)
        split = _fixed(dest, name, make_split(list(patients), list(patients.values()), fractions, 0), patients)
        files = [f"{case}.npy" for case in allowed(split, patients)]
        _link(["dataset.yaml", *files], dest / "tasks" / name, dest / "pretrain" / name)
    _prepare(source / "misc_nifti", dest / "pretrain" / "misc_nifti")
    _stacks(dest, patients_of_volumes(source / "heart_la"))

    patients, organs = slices(source / "slices_png")
    split = _fixed(dest, "slices_png", stratified(patients, organs, SLICES, 0), patients)
    _copy(patients, source / "slices_png", dest / "tasks" / "slices_png")
    _link(allowed(split, patients), dest / "tasks" / "slices_png", dest / "pretrain")

    everyone, findings = xrays(source / "chest_xray")
    patients = {case: everyone[case] for case, finding in findings.items() if finding in FINDINGS}
    split = _fixed(dest, "chest_xray", stratified(patients, findings, XRAY, 0), patients)
    _copy(everyone, source / "chest_xray", dest / "tasks" / "chest_xray")
    shutil.copyfile(source / "chest_xray" / "labels.csv", dest / "tasks" / "chest_xray.csv")
    _link(allowed(split, everyone), dest / "tasks" / "chest_xray", dest / "pretrain" / "chest_xray")
    print(f"wrote {dest}")


def patients_of_volumes(folder: Path) -> dict[str, str]:
    """Case -> patient, of a data set in Decathlon's layout whose dataset.json names the patients."""
    return options.read_yaml(folder / "dataset.json")["patient"]


def slices(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Slice -> scan or patient, and slice -> organ; slices are <organ>/<file>, those without contrast left out."""
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
    rows = pd.read_csv(folder / "labels.csv", dtype=str).set_index("filename")
    return rows.patient.to_dict(), rows.finding.to_dict()


def stratified(patients: Mapping[str, str], labels: Mapping[str, str], fractions: Sequence[float], seed: int) -> Split:
    """A split by patient in which every label has its share; a patient counts with the label of his first case."""
    of_patient: dict[str, str] = {}
    for case in sorted(patients):
        of_patient.setdefault(patients[case], labels[case])
    parts = []
    for label in sorted(set(of_patient.values())):
        own = [case for case in patients if of_patient[patients[case]] == label]
        parts.append(make_split(own, [patients[case] for case in own], fractions, seed))
    return Split(*(sorted(itertools.chain(*(getattr(part, name) for part in parts))) for name in PARTS))


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


def _stacks(dest: Path, patients: Mapping[str, str]) -> None:
    """A task of whole volumes: is the atrium in a stack of slices, and does it begin or end there?

    Every volume of heart_la is cut into stacks of STACK slices (the rest is left out), labelled `inside` (all slices
    show the atrium), `edge` (some) or `none`, and split as its volume is.
    """
    heart, folder = dest / "tasks" / "heart_la", dest / "tasks" / "heart_la_stacks"
    if folder.with_suffix(".csv").is_file():  # which is written last
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows, stacks = [], {}
    for case, patient in sorted(patients.items()):
        image, label = (np.load(heart / kind / f"{case}.npy", mmap_mode="r") for kind in ("", "labels"))
        shown = label.any(axis=(0, 1))
        stacks[case] = [f"{case}_{k}.npy" for k in range(len(shown) // STACK)]
        for k, stack in enumerate(stacks[case]):
            part = slice(k * STACK, (k + 1) * STACK)
            np.save(folder / stack, image[:, :, part], allow_pickle=False)
            kind = "inside" if shown[part].all() else "edge" if shown[part].any() else "none"
            rows.append({"case": stack, "patient": patient, "label": kind})
    split = read_split(dest / "splits" / "heart_la.json")
    parts = ([stack for case in getattr(split, part) for stack in stacks[case]] for part in PARTS)
    write_split(Split(*parts), dest / "splits" / "heart_la_stacks.json")
    write_csv(rows, folder.with_suffix(".csv"))


def _prepare(source: Path, dest: Path) -> None:
    prepare_data.main(prepare_data.Config(source=str(source), dest=str(dest), workers=1))


def _copy(files: Iterable[str], source: Path, dest: Path, how=shutil.copyfile) -> None:
    for file in files:
        (dest / file).parent.mkdir(parents=True, exist_ok=True)
        if not (dest / file).exists():
            how(source / file, dest / file)


def _link(files: Iterable[str], source: Path, dest: Path) -> None:
    """The same files in another folder, where they take no room."""
    _copy(files, source, dest, os.link)


if __name__ == "__main__":
    options.main(main, Config, __doc__)

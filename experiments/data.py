"""Lay out the developers' data for the experiments: what is pre-trained on, what is tested, by patient.

    python -m experiments.data --source ../shared/data --dest runs/experiments/data

Writes tasks/ (what the downstream scripts read), splits/<task>.json (fixed: train is the pool of labelled cases),
pretrain/ and pretrain_volumes/ (trees for the training scripts: without labels, and without any patient who has a case
in a test). The same command again makes only what is missing.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

import prepare_data
from downstream.splits import PARTS, Split, make_split, write_split
from utils import config as options
from utils.errors import UserError
from utils.files import whole_file, write_text

SETS = {  # shares of the patients in train, validation and test
    "heart_la": (0.6, 0.15, 0.25),
    "hippocampus": (0.75, 0.05, 0.2),
    "slices_png": (0.6, 0.1, 0.3),
    "chest_xray": (0.5, 0.1, 0.4),
    "acdc": (0.65, 0.05, 0.3),
    "fdgpet_cdi": (0.5, 0.1, 0.4),
}
UNLABELLED = ("misc_nifti", "sunnybrook")  # pre-training only
VOLUMES = ("acdc", "fdgpet_cdi", "heart_la", "sunnybrook")  # what volumes.yaml is pre-trained on
IMAGES = {*SETS, "misc_nifti"} - {"acdc", "fdgpet_cdi"}  # what main.yaml is pre-trained on
STACK = 11  # slices: 8 stacks of every heart_la volume
FINDINGS = ("COVID-19", "No finding")  # told apart; the other images have no label that is worth a test
SCAN = re.compile(r"^(.*?)(?:_(?:t1ce|t1|t2|flair))?_frame_")  # of slices_png: what stands before the slice number


@dataclass
class Config:
    source: str = "../shared/data"
    """folder with a folder of each set"""
    dest: str = "runs/experiments/data"
    """receives tasks/, splits/ and pretrain/"""


def main(cfg: Config) -> None:
    source, dest = Path(cfg.source).expanduser(), Path(cfg.dest).expanduser()
    for name in (*SETS, *UNLABELLED):
        if not (source / name).is_dir():
            raise UserError(f"source: {source} has no folder {name}")
    for name in UNLABELLED:
        for tree in trees(name):
            prepare(source / name, dest / tree / name)
    for name, shares in SETS.items():
        task = dest / "tasks" / name
        table = read_cases(source / name)
        if volumes := (source / name / "imagesTr").is_dir():
            prepare(source / name, task)
        else:
            copy(table.index, source / name, task)
        split = stratified(table[table.label != ""], shares)
        write_split(split, dest / "splits" / f"{name}.json")
        allowed = table.index[~table.patient.isin(table.patient[split.test])]
        files = ["dataset.yaml", *(f"{case}.npy" for case in allowed)] if volumes else list(allowed)
        for tree in trees(name):
            copy(files, task, dest / tree if name == "slices_png" else dest / tree / name)
        if name == "heart_la":
            cut_stacks(dest, table.patient, split)
        print(f"{name}: {', '.join(f'{len(getattr(split, part))} {part}' for part in PARTS)}")
    with whole_file(dest / "tasks" / "chest_xray.csv") as temporary:
        shutil.copyfile(source / "chest_xray" / "labels.csv", temporary)
    if "fdgpet_cdi" in SETS:
        pet = read_cases(source / "fdgpet_cdi").rename_axis("case").reset_index()
        write_text(pet.assign(case=pet.case + ".npy").to_csv(index=False), dest / "tasks" / "fdgpet_cdi.csv")
    print(f"wrote {dest}")


def trees(name: str) -> list[str]:
    """Which trees for pre-training a set belongs to."""
    return ["pretrain"] * (name in IMAGES) + ["pretrain_volumes"] * (name in VOLUMES)


def read_cases(folder: Path) -> pd.DataFrame:
    """Patient and label of each case: its finding, "" where that is not told apart; or its organ. Volumes count alike.

    Of slices named <organ>/<scan>_frame_<number>.png the scan is the patient; those without contrast are left out.
    """
    if (folder / "dataset.json").is_file():
        about = options.read_yaml(folder / "dataset.json")
        cases = about.get("cases", [])
        patients = about.get("patient") or {Path(c["image"]).name.removesuffix(".nii.gz"): c["patient"] for c in cases}
        return pd.DataFrame({"patient": pd.Series(patients), "label": "volume"})
    if (folder / "labels.csv").is_file():
        table = pd.read_csv(folder / "labels.csv", dtype=str)
        if "AD" in table:  # a scan of each subject
            label = table.AD.map({"1": "Alzheimer's", "0": "control"})
            return pd.DataFrame({"patient": table.name, "label": label}).set_index(table.name.rename(None))
        table = table.set_index("filename")
        return pd.DataFrame({"patient": table.patient, "label": table.finding.where(table.finding.isin(FINDINGS), "")})
    rows = {}
    for path in sorted(folder.glob("*/*.png")):
        organ = path.parent.name
        if np.ptp(np.asarray(Image.open(path))):
            rows[f"{organ}/{path.name}"] = {"patient": f"{organ}/{SCAN.match(path.name)[1]}", "label": organ}
    return pd.DataFrame.from_dict(rows, orient="index")


def stratified(table: pd.DataFrame, shares: Sequence[float], seed: int = 0) -> Split:
    """A split by patient in which every label has its share; a patient counts with the label of his first case."""
    label = table.sort_index().drop_duplicates("patient").set_index("patient").label
    of = table.patient.map(label)
    parts = [make_split(list(own.index), list(own.patient), shares, seed) for _, own in table.groupby(of)]
    return Split(*(sorted(itertools.chain(*(getattr(part, name) for part in parts))) for name in PARTS))


def cut_stacks(dest: Path, patients: pd.Series, split: Split) -> None:
    """A task of whole volumes: is the atrium in a stack of slices, and does it begin or end there?

    Every volume of heart_la is cut into stacks of STACK slices (the rest is left out), labelled `inside` (all slices
    show the atrium), `edge` (some) or `none`, and split as its volume is.
    """
    heart, folder = dest / "tasks" / "heart_la", dest / "tasks" / "heart_la_stacks"
    if folder.with_suffix(".csv").is_file():  # which is written last
        return
    rows = []
    for volume, patient in patients.sort_index().items():
        image, label = (np.load(heart / kind / f"{volume}.npy", mmap_mode="r") for kind in ("", "labels"))
        shown = label.any(axis=(0, 1))
        for k in range(len(shown) // STACK):
            case, part = f"{volume}_{k}.npy", slice(k * STACK, (k + 1) * STACK)
            with whole_file(folder / case) as temporary, open(temporary, "wb") as file:
                np.save(file, image[:, :, part], allow_pickle=False)
            kind = "inside" if shown[part].all() else "edge" if shown[part].any() else "none"
            rows.append({"case": case, "patient": patient, "label": kind, "volume": volume})
    table = pd.DataFrame(rows)
    parts = (table.case[table.volume.isin(getattr(split, part))].tolist() for part in PARTS)
    write_split(Split(*parts), dest / "splits" / "heart_la_stacks.json")
    write_text(table.drop(columns="volume").to_csv(index=False), folder.with_suffix(".csv"))


def prepare(source: Path, dest: Path) -> None:
    prepare_data.main(prepare_data.Config(source=str(source), dest=str(dest), workers=1))


def copy(files: Iterable[str], source: Path, dest: Path) -> None:
    """Those files that are not there."""
    for file in files:
        if not (dest / file).exists():
            with whole_file(dest / file) as temporary:  # what is there counts as copied
                shutil.copyfile(source / file, temporary)


if __name__ == "__main__":
    options.main(main, Config, __doc__)

"""Classify images, volumes, or the nodule candidates of LUNA16, from any weights, and test once.

    python -m downstream.classify --data_path chest_xray --labels chest_xray/labels.csv --weights weights/swav3D.pth
    python -m downstream.classify --task luna16 --data_path LUNA16 --labels candidates.csv --annotations annotations.csv

Labels are a CSV (`case,label` and, where a patient has several cases, `patient`); docs/CLASSIFICATION.md shows all.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from tqdm import tqdm

from datasets.augment import Ranges, VolumeViews
from downstream.encoders import describe_weights, load_encoder, load_joint_encoder
from downstream.features import (
    CandidateCrops,
    Cases,
    encode_slices,
    encode_volumes,
    mean_of_cases,
    open_cases,
    pad,
    without_suffix,
)
from downstream.splits import Split, check_split, choose_labelled, make_split, read_split, write_split
from models.encoder import JointEncoder
from models.resnet import GreyResNet, pooled
from utils import config as options
from utils import distributed
from utils.errors import UserError

CASE_COLUMNS = ("case", "file", "filename", "image")
LABEL_COLUMNS = ("label", "finding", "class")
PATIENT_COLUMNS = ("patient", "subject", "patient_id")
FROC_RATES = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)  # false positives per scan, as LUNA16 asks
SAME_NODULE_MM = 10.0  # without annotations: class-1 candidates this close are taken for one nodule
EXCLUDED_MM = 10.0  # diameter of an excluded finding whose own is not given (-1 in LUNA16's file)
COSTS = tuple(10.0 ** np.arange(-4, 3))  # inverse regularisation C of the logistic regression, chosen on validation


@dataclass
class Config:
    data_path: str
    """images or volumes: a data tree, one folder, or NIfTI files; for luna16 the folder with the .mhd files"""
    labels: str
    """CSV with a line per case; for luna16 its candidates.csv (seriesuid,coordX,coordY,coordZ,class)"""
    task: Literal["images", "volumes", "luna16"] = "images"
    """what is classified: 2D images, whole volumes, or crops around candidates"""
    weights: str = "random"
    """where the encoder starts: a weights file, random, or imagenet"""
    arch: str | None = None
    """torchvision ResNet; null: what the record beside the weights says"""
    model: Literal["intra", "joint"] = "intra"
    """the slice encoder alone (features averaged over slices), or also the transformer's volume embedding"""
    features: Literal["pooled", "multi_scale"] = "pooled"
    """of f_intra, when frozen: the last stage, or all four stages"""
    mode: Literal["linear", "finetune"] = "linear"
    """logistic regression on frozen features, or train the whole network"""
    labelled: NonNegativeInt = 0
    """training cases (luna16: scans) whose labels are used, the classes by turns; 0: all"""
    seed: NonNegativeInt = 0
    """of random weights, the choice of labelled cases and training"""

    classes: list[str] = field(default_factory=list)
    """labels to tell apart, cases with other labels are left out; empty: all labels in the file"""
    positive: str | None = None
    """one label against all others; a cell may then hold several, as in Effusion|Mass"""
    case_column: str | None = None
    """column with the case; null: the first of case, file, filename, image"""
    label_column: str | None = None
    """column with the label; null: the first of label, finding, class"""
    patient_column: str | None = None
    """column with the patient; null: the first of patient, subject, patient_id, if there is one"""
    patient_pattern: str | None = None
    """regular expression whose first group, found in the file name, is the patient"""
    split: str | None = None
    """YAML or JSON file with the lists train, validation, test (luna16: of scans); null: drawn by patient"""
    fractions: list[NonNegativeFloat] = field(default_factory=lambda: [0.6, 0.2, 0.2])
    """of the patients in train, validation and test, where the split is drawn"""
    split_seed: NonNegativeInt = 0
    """of the split that is drawn: the same test cases whatever the seed above"""

    size: PositiveInt = 224
    """side in pixels that images and slices are resized to"""
    slices: NonNegativeInt = 32
    """evenly spaced slices of a volume that are used; 0: all"""
    annotations: str | None = None
    """luna16: annotations.csv; a nodule is found by any candidate inside it, and missed where there is none"""
    excluded: str | None = None
    """luna16: annotations_excluded.csv; candidates on these findings count neither way"""
    crop_mm: PositiveFloat = 40.0
    """luna16: side of the cube around a candidate"""
    crop_size: PositiveInt = 64
    """luna16: pixels of a crop's slices"""
    crop_slices: PositiveInt = 16
    """luna16: slices of a crop"""
    window: list[float] = field(default_factory=lambda: [-1000.0, 400.0])
    """luna16: HU that become 0 and 1"""
    negatives: NonNegativeInt = 50
    """luna16: negative candidates per scan in training and validation; 0: all. The test always has all"""

    epochs: PositiveInt = 30
    """of fine-tuning; the best by validation is tested"""
    batch_size: PositiveInt = 16
    """cases per step of fine-tuning"""
    base_lr: PositiveFloat = 1e-4
    """AdamW, cosine to 0; the new layer gets ten times as much"""
    wd: NonNegativeFloat = 0.01
    """weight decay of fine-tuning"""
    bootstrap: NonNegativeInt = 1000
    """resamplings of the test patients for the 95 % intervals; 0: none"""

    dump_path: str = "runs/classify"
    """receives results.json, cases.csv (every test case), split.json and config.yaml"""
    cache_path: str | None = None
    """folder for the working copy of the data; null: .cache in data_path"""
    on_bad: Literal["error", "skip"] = "error"
    """unusable files, and luna16 candidates without a scan: stop, or name them and go on without"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute"""


def main(cfg: Config) -> None:
    result = run(cfg)
    print(f"\ntest: {result['cases']} cases of {result['patients']} patients; weights {result['weights']}")
    for name, value in result["metrics"].items():
        low, high = result["intervals"].get(name, (math.nan, math.nan))
        interval = "" if math.isnan(low) else f"   95 % [{low:.3f}, {high:.3f}]"
        reason = f"   ({result['reasons'][name]})" if name in result["reasons"] else ""
        print(f"{name:<22}{value:6.3f}{interval}{reason}")
    print(f"wrote {cfg.dump_path}/results.json, cases.csv, split.json, config.yaml")


def run(cfg: Config) -> dict[str, Any]:
    """Train on the labelled cases, choose by validation, test once, write everything to `dump_path`.

    Returns metrics (name -> value), intervals (95 %, over patients), reasons (of metrics that are nan or left a class
    out), cases and patients of the test, chosen (C or epoch), weights. Raises UserError before anything is trained.
    """
    device = distributed.start(cfg.device, cfg.seed).device
    luna = _read_luna16(cfg) if cfg.task == "luna16" else None
    items = luna.items if luna else _open_items(cfg)
    split = draw_split(cfg.split, cfg.fractions, items.patients, cfg.split_seed)
    parts = _parts(cfg, items, split)
    encoder = open_encoder(cfg.weights, cfg.arch, cfg.model, cfg.seed)
    if isinstance(items.cases, CandidateCrops):
        items.cases.prepare([items.index[i] for part in parts for i in part])
    say = ", ".join(f"{name} {count}" for name, count in items.counts().items())
    print(f"{len(items.labels)} cases of {len(set(items.patients.values()))} patients: {say}")
    print(f"train {len(parts.train)} (labelled), validation {len(parts.validation)}, test {len(parts.test)} cases")
    folder = Path(cfg.dump_path)
    folder.mkdir(parents=True, exist_ok=True)
    options.save_yaml(options.to_dict(cfg), folder / "config.yaml")
    write_split(split, folder / "split.json")

    people = [items.patients[items.units[i]] for i in parts.test]
    known = sorted(set(items.labels[parts.train].tolist()))
    if len(known) < 2:
        probability, chosen = np.full((len(parts.test), len(items.classes)), np.nan), {}
        scores, intervals = Scores.undefined(f"the labelled training cases are all {items.classes[known[0]]!r}"), {}
    else:
        fit = _fit_linear if cfg.mode == "linear" else _finetune
        probability, chosen = fit(cfg, encoder, items, parts, device)
        truth = items.labels[parts.test]
        scores = classification_scores(truth, probability, items.classes)
        intervals = score_intervals(truth, probability, items.classes, people, cfg.bootstrap, cfg.seed)
    values, reasons = dict(scores.values), dict(scores.reasons)
    if luna and len(known) < 2:
        values |= dict.fromkeys(FROC_NAMES, math.nan)
        reasons |= dict.fromkeys(FROC_NAMES, reasons["auc"])
    elif luna:
        froc_values, froc_reasons, froc_intervals = _test_froc(luna, parts.test, split, probability[:, 1], cfg)
        values |= froc_values
        reasons |= froc_reasons
        intervals |= froc_intervals
    result = {
        "metrics": values,
        "intervals": intervals,
        "reasons": reasons,
        "cases": len(parts.test),
        "patients": len(set(people)),
        "chosen": chosen,
        "weights": describe_weights(cfg.weights),
    }
    _write_cases(folder / "cases.csv", items, parts.test, probability)
    (folder / "results.json").write_text(json.dumps(without_nan(result), indent=2) + "\n")
    return result


# ---------------------------------------------------------------------------------------------------- cases and labels


@dataclass(frozen=True)
class Items:
    """What is classified. Lists and arrays run over the items."""

    cases: Cases
    index: list[int]  # position in `cases`
    names: list[str]
    units: list[str]  # what is split and labelled: the case itself, or the scan of a candidate
    labels: np.ndarray  # position in `classes`
    classes: list[str]
    patients: dict[str, str]  # of every unit, those without items too
    for_test_only: np.ndarray  # bool: left out of training and validation

    def counts(self) -> dict[str, int]:
        return {name: int((self.labels == k).sum()) for k, name in enumerate(self.classes)}


class Parts(NamedTuple):
    """Positions of items."""

    train: np.ndarray  # labelled
    validation: np.ndarray
    test: np.ndarray


class LabelRow(NamedTuple):
    """A line of the labels file: the case's position among the names, its label, its patient (None: not told)."""

    case: int
    label: str
    patient: str | None


def read_labels(
    path: str | Path,
    names: Sequence[str],
    case_column: str | None = None,
    label_column: str | None = None,
    patient_column: str | None = None,
) -> list[LabelRow]:
    """The labels of the cases `names` from a CSV file with a header.

    A case is named by its path below the data folder or, where that is unique, its file name; with or without suffix.
    Raises UserError for a missing file or column, an unknown or ambiguous case, a case named twice, an empty label.
    """
    path = Path(path)
    rows = _read_csv(path, "labels")
    columns = list(rows[0])

    def column(wanted: str | None, known: tuple[str, ...], option: str, needed: bool = True) -> str | None:
        found = wanted if wanted in columns else None if wanted else next((c for c in known if c in columns), None)
        if found is None and (needed or wanted):
            raise UserError(
                f"labels: {path} has no column {wanted or ' or '.join(known)}, but {', '.join(columns)}; "
                f"name the right one with --{option}"
            )
        return found

    case_name = column(case_column, CASE_COLUMNS, "case_column")
    label_name = column(label_column, LABEL_COLUMNS, "label_column")
    patient_name = column(patient_column, PATIENT_COLUMNS, "patient_column", needed=False)
    places: dict[str, set[int]] = defaultdict(set)
    for i, name in enumerate(names):
        for key in {name, without_suffix(name), Path(name).name, without_suffix(Path(name).name)}:
            places[key].add(i)
    result: list[LabelRow] = []
    lines: dict[int, int] = {}
    for line, row in enumerate(rows, start=2):
        case, label = row[case_name], row[label_name]
        found = sorted(places.get(case) or places.get(without_suffix(case)) or ())
        if not found:
            raise UserError(
                f"labels: {path}, line {line}: {case!r} is none of the {len(names)} cases in data_path (the first is "
                f"{names[0]}); correct it or remove the line"
            )
        if len(found) > 1:
            both = " and ".join(names[i] for i in found[:2])
            raise UserError(f"labels: {path}, line {line}: {case!r} may be {both}; write the path below data_path")
        if found[0] in lines:
            raise UserError(f"labels: {path}: {case!r} stands in lines {lines[found[0]]} and {line}; keep one")
        lines[found[0]] = line
        for name in (label_name, patient_name):
            if name and not row[name]:
                raise UserError(f"labels: {path}, line {line}: {case!r} has no {name}; write one or remove the line")
        result.append(LabelRow(found[0], label, row[patient_name] if patient_name else None))
    return result


def name_patients(names: Sequence[str], pattern: str | None) -> list[str]:
    """The patient of each case: the first group of `pattern` in its file name; without a pattern, the case itself."""
    if pattern is None:
        return list(names)
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"patient_pattern: {pattern!r} is not a regular expression ({error})") from None
    if expression.groups < 1:
        raise UserError(f"patient_pattern: {pattern!r} has no group; put the patient's part in parentheses")
    patients = []
    for name in names:
        match = expression.search(Path(name).name)
        if match is None or not match[1]:
            raise UserError(f"patient_pattern: {pattern!r} finds no patient in the file name {Path(name).name}")
        patients.append(match[1])
    return patients


def _read_csv(path: Path, option: str) -> list[dict[str, str]]:
    """Lines of a CSV file as dictionaries of stripped texts. Raises UserError for anything that is not one."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            rows = list(reader)
    except OSError as error:
        raise UserError(f"{option}: {path}: cannot be read ({error.strerror}); name an existing CSV file") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{option}: {path}: is not a CSV text file ({error}); export it again, as UTF-8") from None
    if not rows:
        raise UserError(f"{option}: {path}: has no lines below its header; write one per case")
    for line, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise UserError(f"{option}: {path}, line {line}: has not the header's {len(reader.fieldnames)} fields")
    return [{key.strip(): value.strip() for key, value in row.items()} for row in rows]


def label_items(
    cases: Cases,
    rows: Sequence[LabelRow],
    classes: Sequence[str] = (),
    positive: str | None = None,
    patient_pattern: str | None = None,
    source: str = "labels",
) -> Items:
    """What is classified: the cases that have one of the labels `classes` (none given: all labels).

    positive, patient_pattern: as in `Config`.  source: where the labels come from, for messages.  Raises UserError for
    a class without cases, and where there are not two classes.
    """
    found = {part for row in rows for part in (row.label.split("|") if positive else [row.label])}
    for wanted in [*classes, *([positive] if positive else [])]:
        if wanted not in (found if wanted == positive else {row.label for row in rows}):
            raise UserError(f"classes, positive: no case in {source} has the label {wanted!r}, only {_some(found)}")
    if classes:
        rows = [row for row in rows if row.label in classes]
    if positive:
        labels = [int(positive in row.label.split("|")) for row in rows]
        classes = [f"not {positive}", positive]
    else:
        classes = classes or sorted(found)
        labels = [classes.index(row.label) for row in rows]
    if len(set(labels)) < 2:
        raise UserError(f"labels: all cases in {source} have the same label; two are needed to tell apart")
    names = [cases.names[row.case] for row in rows]
    patients = [row.patient for row in rows]
    if patient_pattern or None in patients:
        patients = name_patients(names, patient_pattern)
    return Items(
        cases=cases,
        index=[row.case for row in rows],
        names=names,
        units=names,
        labels=np.array(labels),
        classes=list(classes),
        patients=dict(zip(names, patients, strict=True)),
        for_test_only=np.zeros(len(names), dtype=bool),
    )


def _open_items(cfg: Config) -> Items:
    """The labelled images or volumes below data_path."""
    cases = open_cases(cfg.data_path, cfg.size, cfg.slices, cfg.cache_path, cfg.on_bad)
    rows = read_labels(cfg.labels, cases.names, cfg.case_column, cfg.label_column, cfg.patient_column)
    return label_items(cases, rows, cfg.classes, cfg.positive, cfg.patient_pattern, cfg.labels)


def draw_split(file: str | None, fractions: Sequence[float], patients: Mapping[str, str], seed: int) -> Split:
    """The split in a file, or one drawn by patient; checked. patients: of every case."""
    split = read_split(file) if file else make_split(list(patients), list(patients.values()), fractions, seed)
    check_split(split, patients)
    for part in ("train", "test"):
        if not getattr(split, part):
            raise UserError(f"split: there is nothing in {part}; change {file or '--fractions'}")
    return split


def choose_by_turns(train: Sequence[str], labels: Mapping[str, int], count: int, seed: int) -> list[str]:
    """`count` training cases (0: all) that take the classes by turns, so that few labels show every class.

    Nested for one seed, as `choose_labelled`, whose order each class keeps. Raises UserError for more than there are.
    """
    choose_labelled(train, count, seed)  # checks the count
    classes = sorted({labels[case] for case in train})
    queues = [choose_labelled([case for case in train if labels[case] == k], 0, seed) for k in classes]
    longest = max(map(len, queues))
    turns = [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]
    return turns[: count or len(turns)]


def _parts(cfg: Config, items: Items, split: Split) -> Parts:
    """Which items train, validate and test."""
    if cfg.task == "luna16":
        chosen = choose_labelled(split.train, cfg.labelled, cfg.seed)
    else:
        chosen = choose_by_turns(split.train, dict(zip(items.units, items.labels, strict=True)), cfg.labelled, cfg.seed)
    units = np.array(items.units)
    train, validation, test = (np.isin(units, part) for part in (chosen, split.validation, split.test))
    parts = Parts(
        *(np.flatnonzero(part) for part in (train & ~items.for_test_only, validation & ~items.for_test_only, test))
    )
    if not len(parts.train) or not len(parts.test):
        raise UserError("split: no labelled case is left for training, or none for the test; change the split")
    return parts


# -------------------------------------------------------------------------------------------------------- LUNA16


class Luna(NamedTuple):
    """Candidates as items, and what FROC needs beside them."""

    items: Items
    hit: np.ndarray  # of each candidate: position of the nodule it lies in, NO_NODULE or EXCLUDED
    nodule_scan: list[str]  # of each nodule


NO_NODULE, EXCLUDED = -1, -2
FROC_NAMES = ("cpm", *(f"sensitivity@{rate:g}" for rate in FROC_RATES))
Place = tuple[str, tuple[float, float, float]]  # scan, world coordinates x, y, z in mm
Sphere = tuple[str, tuple[float, float, float], float]  # scan, centre, radius in mm


def _read_luna16(cfg: Config) -> Luna:
    """Candidates and nodules of the scans below data_path."""
    scans = find_scans(cfg.data_path)
    path = Path(cfg.labels)
    rows: list[tuple[str, tuple[float, float, float], int]] = []
    names = []
    lines: dict[Place, int] = {}
    unknown, repeated = set(), 0
    for line, (scan, xyz, label) in enumerate(_read_places(path, "labels", "class"), start=2):
        if label not in (0, 1):
            raise UserError(f"labels: {path}, line {line}: class must be 0 or 1, not {label:g}")
        if (scan, xyz) in lines:
            if cfg.on_bad == "error":
                raise UserError(
                    f"labels: {path}: lines {lines[scan, xyz]} and {line} are the same candidate; keep one, or leave "
                    "repetitions out with --on_bad skip"
                )
            repeated += 1
            continue
        lines[scan, xyz] = line
        if scan in scans:
            rows.append((scan, xyz, int(label)))
            names.append(f"{scan}/{line}")
        else:
            unknown.add(scan)
    if unknown and (cfg.on_bad == "error" or not rows):
        raise UserError(
            f"labels: {path} names {len(unknown)} scans that have no .mhd below {cfg.data_path}, e.g. "
            f"{min(unknown)}; add them, or leave their candidates out with --on_bad skip"
        )
    if unknown:
        print(f"left out the candidates of {len(unknown)} scans that are not below {cfg.data_path}")
    if repeated:
        print(f"left out {repeated} candidates that stand in {path} twice")
    labels = np.array([label for *_, label in rows])
    if len(set(labels)) < 2:
        raise UserError(f"labels: the candidates in {path} are all of class {labels[0]}; both classes are needed")
    places = [(scan, xyz) for scan, xyz, _ in rows]
    cases = CandidateCrops(
        names, places, scans, cfg.crop_size, cfg.crop_slices, cfg.crop_mm, cfg.window, cfg.cache_path or cfg.data_path
    )
    if cfg.annotations:
        nodules = [(s, xyz, d / 2) for s, xyz, d in _read_places(Path(cfg.annotations), "annotations", "diameter_mm")]
        hit = hit_nodules(places, nodules)
    else:
        print(f"without annotations, class-1 candidates within {SAME_NODULE_MM:g} mm count as one nodule")
        hit, nodules = _group_positives(places, labels)
    if cfg.excluded:
        others = _read_places(Path(cfg.excluded), "excluded", "diameter_mm")
        others = [(scan, xyz, (d if d > 0 else EXCLUDED_MM) / 2) for scan, xyz, d in others]
        hit[(hit == NO_NODULE) & (hit_nodules(places, others) != NO_NODULE)] = EXCLUDED
    test_only = np.zeros(len(rows), dtype=bool)
    if cfg.negatives:
        by_scan: dict[str, list[int]] = defaultdict(list)
        for i in np.flatnonzero(labels == 0):
            by_scan[rows[i][0]].append(int(i))
        for scan, members in sorted(by_scan.items()):
            order = np.random.default_rng(_number(scan)).permutation(members)
            test_only[order[cfg.negatives :]] = True
    items = Items(
        cases=cases,
        index=list(range(len(rows))),
        names=names,
        units=[scan for scan, *_ in rows],
        labels=labels,
        classes=["no nodule", "nodule"],
        patients={scan: scan for scan in sorted(scans)},
        for_test_only=test_only,
    )
    return Luna(items, hit, [scan for scan, *_ in nodules])


def hit_nodules(places: Sequence[Place], nodules: Sequence[Sphere]) -> np.ndarray:
    """For each candidate the nodule whose sphere it lies in, the nearest of several, or NO_NODULE: [candidates]."""
    of_scan: dict[str, list[int]] = defaultdict(list)
    for k, (scan, *_) in enumerate(nodules):
        of_scan[scan].append(k)
    hit = np.full(len(places), NO_NODULE)
    for i, (scan, xyz) in enumerate(places):
        inside = [(d, k) for k in of_scan[scan] if (d := math.dist(xyz, nodules[k][1])) < nodules[k][2]]
        if inside:
            hit[i] = min(inside)[1]
    return hit


def _group_positives(places: Sequence[Place], labels: np.ndarray) -> tuple[np.ndarray, list[Sphere]]:
    """(nodule of each candidate, nodules) where chains of near class-1 candidates of a scan are a nodule each."""
    hit = np.full(len(places), NO_NODULE)
    positives = np.flatnonzero(labels == 1)
    scans = np.array([places[i][0] for i in positives])
    nodules: list[Sphere] = []
    for scan in sorted(set(scans)):
        members = positives[scans == scan]
        xyz = np.array([places[i][1] for i in members])
        near = np.linalg.norm(xyz[:, None] - xyz, axis=-1) <= SAME_NODULE_MM
        count, group = connected_components(near, directed=False)
        hit[members] = len(nodules) + group
        nodules += [(scan, tuple(xyz[group == g].mean(axis=0).tolist()), SAME_NODULE_MM) for g in range(count)]
    return hit, nodules


def froc(
    score: np.ndarray,
    scan: np.ndarray,
    hit: np.ndarray,
    nodule_scan: np.ndarray,
    scans: int,
    counts: np.ndarray | None = None,
    rates: Sequence[float] = FROC_RATES,
) -> np.ndarray:
    """Sensitivity at `rates` false positives per scan; the mean over FROC_RATES is LUNA16's CPM.

    score, scan, hit: [n] of each candidate its score, its scan (0 to scans - 1), and the nodule it lies in,
    NO_NODULE (a false positive) or EXCLUDED (neither).  nodule_scan: [m] scan of each nodule, found or not.
    counts: [scans] how often each scan counts (bootstrap); None: once.
    A nodule counts once, with the best of its candidates; one without candidates is missed. At each rate the lowest
    threshold is taken at which the false positives per scan do not exceed it, so nothing is interpolated (LUNA16's own
    script is linear between operating points, which differs where few false positives are allowed).
    Returns [rates], nan where there are no nodules.
    """
    counts = np.ones(scans) if counts is None else counts
    best = np.full(len(nodule_scan), -np.inf)
    found = hit >= 0
    np.maximum.at(best, hit[found], score[found])
    false = np.flatnonzero(hit == NO_NODULE)
    false = false[np.argsort(-score[false], kind="stable")]
    per_scan = np.cumsum(counts[scan[false]]) / counts.sum()
    nodules = counts[nodule_scan]
    if nodules.sum() == 0:
        return np.full(len(rates), np.nan)
    sensitivity = []
    for rate in rates:
        first_too_many = int(np.searchsorted(per_scan, rate + 1e-9, side="right"))
        threshold = score[false[first_too_many]] if first_too_many < len(false) else -np.inf
        sensitivity.append(nodules[best > threshold].sum() / nodules.sum())
    return np.array(sensitivity)


def _test_froc(
    luna: Luna, test: np.ndarray, split: Split, score: np.ndarray, cfg: Config
) -> tuple[dict[str, float], dict[str, str], dict[str, tuple[float, float]]]:
    """FROC of the test scans, those without candidates too: values, reasons, intervals over scans."""
    number = {scan: k for k, scan in enumerate(split.test)}
    nodules = [k for k, scan in enumerate(luna.nodule_scan) if scan in number]
    place = np.full(len(luna.nodule_scan) + 2, 0)  # two more: NO_NODULE and EXCLUDED stand for themselves
    place[nodules] = np.arange(len(nodules))
    place[[NO_NODULE, EXCLUDED]] = NO_NODULE, EXCLUDED
    scan = np.array([number[luna.items.units[i]] for i in test])
    nodule_scan = np.array([number[luna.nodule_scan[k]] for k in nodules], dtype=int)
    hit = place[luna.hit[test]]

    def values(counts: np.ndarray | None = None) -> dict[str, float]:
        curve = froc(score, scan, hit, nodule_scan, len(number), counts)
        return dict(zip(FROC_NAMES, [float(curve.mean()), *curve.tolist()], strict=True))

    found = values()
    why = f"no nodule in the {len(number)} test scans"
    reasons = {name: why for name, value in found.items() if math.isnan(value)}
    return found, reasons, bootstrap(values, len(number), cfg.bootstrap, cfg.seed)


def find_scans(data_path: str | Path) -> dict[str, Path]:
    """The .mhd file of every seriesuid below a folder (LUNA16: subset0 ... subset9)."""
    root = Path(data_path).expanduser()
    files = sorted(root.rglob("*.mhd"))
    if not files:
        raise UserError(f"data_path: {root} has no .mhd files; give the folder that holds LUNA16's subset0 ... subset9")
    scans = {file.stem: file for file in files}
    if len(scans) < len(files):
        twice = next(file for file in files if scans[file.stem] != file)
        raise UserError(f"data_path: {twice} and {scans[twice.stem]} are the same scan; remove one")
    return scans


def _read_places(path: Path, option: str, value: str) -> list[Sphere]:
    """Scan, world coordinates and the column `value` of each line of a LUNA16 file."""
    rows = _read_csv(path, option)
    wanted = ("seriesuid", "coordX", "coordY", "coordZ", value)
    missing = [name for name in wanted if name not in rows[0]]
    if missing:
        raise UserError(f"{option}: {path} has no column {', '.join(missing)}; LUNA16's has {','.join(wanted)}")
    places = []
    for line, row in enumerate(rows, start=2):
        try:
            x, y, z, number = (float(row[name]) for name in wanted[1:])
        except ValueError as error:
            raise UserError(f"{option}: {path}, line {line}: {error}") from None
        if not all(map(math.isfinite, (x, y, z, number))):
            raise UserError(f"{option}: {path}, line {line}: holds a number that is not finite")
        places.append((row["seriesuid"], (x, y, z), number))
    return places


# -------------------------------------------------------------------------------------------------------- metrics


class Scores(NamedTuple):
    """Metrics by name, and for those that are nan, or leave a class out, why."""

    values: dict[str, float]
    reasons: dict[str, str]

    @classmethod
    def undefined(cls, why: str) -> Scores:
        names = ("auc", "average_precision", "accuracy", "balanced_accuracy")
        return cls(dict.fromkeys(names, math.nan), dict.fromkeys(names, why))


def classification_scores(truth: np.ndarray, probability: np.ndarray, classes: Sequence[str]) -> Scores:
    """AUC, average precision, accuracy and balanced accuracy of one split.

    truth: [n] class numbers.  probability: [n, K].  AUC and average precision are those of the second of two classes,
    or the mean over more, each against the others; a class that the split has not is left out of the mean and named in
    `reasons`. Balanced accuracy is the mean recall of the classes that are there.
    All but the accuracy are nan, with the reason, where the split holds one class only.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    predicted = probability.argmax(axis=1)
    values = {"auc": math.nan, "average_precision": math.nan}
    values["accuracy"] = float((predicted == truth).mean())
    values["balanced_accuracy"] = math.nan
    there = sorted(set(truth.tolist()))
    if len(there) < 2:
        why = f"the split holds only {classes[there[0]]!r}"
        return Scores(values, {name: why for name, value in values.items() if math.isnan(value)})
    values["balanced_accuracy"] = float(np.mean([(predicted[truth == k] == k).mean() for k in there]))
    asked = [1] if len(classes) == 2 else there
    values["auc"] = float(np.mean([roc_auc_score(truth == k, probability[:, k]) for k in asked]))
    precision = [average_precision_score(truth == k, probability[:, k]) for k in asked]
    values["average_precision"] = float(np.mean(precision))
    absent = [name for k, name in enumerate(classes) if k not in there]
    if not absent:
        return Scores(values, {})
    return Scores(values, dict.fromkeys(("auc", "average_precision", "balanced_accuracy"), f"without {_some(absent)}"))


def bootstrap(
    statistic: Callable[[np.ndarray], Mapping[str, float]], patients: int, repeats: int, seed: int
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals over patients, drawn with replacement.

    statistic: from how often each patient was drawn [patients] to metrics. Draws on which a metric is nan do not count
    for it; where more than half are, so is its interval.
    """
    rng = np.random.default_rng(seed)
    drawn = [statistic(rng.multinomial(patients, [1 / patients] * patients)) for _ in range(repeats)]
    intervals = {}
    for name in drawn[0] if drawn else ():
        values = np.array([metrics[name] for metrics in drawn])
        defined = values[~np.isnan(values)]
        enough = 2 * len(defined) > len(values)
        intervals[name] = tuple(np.percentile(defined, [2.5, 97.5]).tolist()) if enough else (math.nan, math.nan)
    return intervals


def score_intervals(
    truth: np.ndarray, probability: np.ndarray, classes: Sequence[str], people: Sequence[str], repeats: int, seed: int
) -> dict[str, tuple[float, float]]:
    """`bootstrap` of `classification_scores`; people: the patient of each case."""
    names, patient = np.unique(people, return_inverse=True)

    def resampled(counts: np.ndarray) -> dict[str, float]:
        drawn = np.repeat(np.arange(len(truth)), counts[patient])
        return classification_scores(truth[drawn], probability[drawn], classes).values

    return bootstrap(resampled, len(names), repeats, seed)


# -------------------------------------------------------------------------------------------------------- classifiers


def open_encoder(
    weights: str, arch: str | None, model: Literal["intra", "joint"], seed: int
) -> GreyResNet | JointEncoder:
    """The slice encoder alone, or with the transformer over slices."""
    return load_encoder(weights, arch, seed) if model == "intra" else load_joint_encoder(weights, arch, seed)


def frozen_features(
    encoder: GreyResNet | JointEncoder,
    cases: Cases,
    indices: Sequence[int],
    features: Literal["pooled", "multi_scale"],
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """[cases, C]: the mean over slices of f_intra and, from a joint encoder, its volume embedding behind it."""
    joint = isinstance(encoder, JointEncoder)
    encoder.to(device)
    slices = encode_slices(encoder.encoder if joint else encoder, cases, indices, device)
    parts = [mean_of_cases(getattr(slices, features), slices.case)]
    if joint:
        parts.append(encode_volumes(encoder, slices))
    return torch.cat(parts, dim=1).numpy()


def fit_logistic_regression(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    test: np.ndarray,
    classes: int,
) -> tuple[np.ndarray, float]:
    """Probabilities [n, classes] for the features `test`, and the C that validation chose.

    train, validation: features [n, C] and class numbers [n], of at least two classes in train.  Features are
    standardised by the training cases; classes weigh the same. C is the smallest of those with the best
    `validation_score`, and 1 without validation cases.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def probabilities(model: Any, x: np.ndarray) -> np.ndarray:
        result = np.zeros((len(x), classes))
        result[:, model.classes_] = model.predict_proba(x)
        return result

    def fitted(cost: float) -> Any:
        regression = LogisticRegression(C=cost, class_weight="balanced", max_iter=5000)
        return make_pipeline(StandardScaler(), regression).fit(*train)

    if not len(validation[1]):
        return probabilities(fitted(1.0), test), 1.0
    models = {cost: fitted(cost) for cost in COSTS}
    best = max(COSTS, key=lambda cost: validation_score(validation[1], probabilities(models[cost], validation[0])))
    return probabilities(models[best], test), float(best)


def validation_score(truth: np.ndarray, probability: np.ndarray) -> tuple[float, float]:
    """(AUC, minus the log loss), higher is better; the AUC of a validation set of one class counts as 0."""
    classes = [str(k) for k in range(probability.shape[1])]
    auc = classification_scores(truth, probability, classes).values["auc"]
    likelihood = np.log(probability[np.arange(len(truth)), truth].clip(1e-7))
    return 0.0 if math.isnan(auc) else round(auc, 6), float(likelihood.mean())


def _fit_linear(
    cfg: Config, encoder: GreyResNet | JointEncoder, items: Items, parts: Parts, device: torch.device
) -> tuple[np.ndarray, dict[str, Any]]:
    """Logistic regression on frozen features: probabilities of the test items, what was chosen."""
    used = np.concatenate(parts)
    x = frozen_features(encoder, items.cases, [items.index[i] for i in used], cfg.features, device)
    train, validation, test = np.split(x, np.cumsum([len(part) for part in parts])[:2])
    probability, cost = fit_logistic_regression(
        (train, items.labels[parts.train]), (validation, items.labels[parts.validation]), test, len(items.classes)
    )
    return probability, {"C": cost}


class Classifier(nn.Module):
    """A new linear layer on the whole encoder: volumes [B, D, H, W], mask [B, D] -> logits [B, classes].

    Its input is the mean over real slices of f_intra's last stage, and f_inter's volume embedding where there is one,
    each brought to unit variance (LayerNorm without parameters), as their scales have nothing in common.
    """

    def __init__(self, encoder: GreyResNet | JointEncoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        joint = isinstance(encoder, JointEncoder)
        width = encoder.encoder.num_features + encoder.projection.out_features if joint else encoder.num_features
        self.head = nn.Linear(width, classes)

    def forward(self, volumes: Tensor, mask: Tensor) -> Tensor:
        case = mask.nonzero()[:, 0]  # of every real slice
        if isinstance(self.encoder, JointEncoder):
            slices, tokens = self.encoder.tokens(volumes, mask)
            parts = [mean_of_cases(slices, case), self.encoder.holistic(tokens, mask)]
        else:
            parts = [mean_of_cases(pooled(self.encoder(volumes[mask].unsqueeze(1))), case)]
        return self.head(torch.cat([F.layer_norm(part.float(), part.shape[1:]) for part in parts], dim=1))


def _finetune(
    cfg: Config, encoder: GreyResNet | JointEncoder, items: Items, parts: Parts, device: torch.device
) -> tuple[np.ndarray, dict[str, Any]]:
    """Train everything, keep the best epoch by validation: probabilities of the test items, what was chosen."""
    torch.manual_seed(cfg.seed)
    model = Classifier(encoder, len(items.classes)).to(device)
    groups = [
        {"params": model.encoder.parameters(), "lr": cfg.base_lr},
        {"params": model.head.parameters(), "lr": 10 * cfg.base_lr},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=cfg.wd)
    steps = math.ceil(len(parts.train) / cfg.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.epochs * steps)
    counts = np.bincount(items.labels[parts.train], minlength=len(items.classes))
    weight = torch.tensor(np.divide(1, counts, out=np.zeros(len(counts)), where=counts > 0), dtype=torch.float32)
    # Geometry and gamma only: what else training's policies do would drown small findings.
    ranges = Ranges(crop_area=(0.7, 1.0), anisotropy_p=0, blur_p=0, bias_p=0, noise_p=0)
    size = items.cases.size
    augment = VolumeViews(size, size, "strong", cfg.seed, ranges)
    best: tuple[tuple[float, float], int, dict[str, Tensor]] | None = None
    bar = tqdm(range(cfg.epochs), desc="fine-tuning", disable=None)
    for epoch in bar:
        model.train()
        order = np.random.default_rng((cfg.seed, epoch)).permutation(parts.train)
        for batch in np.array_split(order, steps):
            volumes, mask = _load(items, batch)
            extents = torch.tensor([items.cases.extent(items.index[i]) for i in batch])
            views = augment(volumes.to(device), mask, extents, torch.from_numpy(batch), epoch, views=1)[0]
            logits = model(views, mask.to(device))
            loss = F.cross_entropy(logits, torch.from_numpy(items.labels[batch]).to(device), weight.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if len(parts.validation):
            score = validation_score(
                items.labels[parts.validation], _predict(model, items, parts.validation, cfg, device)
            )
            bar.set_postfix(auc=f"{score[0]:.3f}")
            if best is None or score > best[0]:
                best = score, epoch + 1, {key: value.clone() for key, value in model.state_dict().items()}
    if best:
        model.load_state_dict(best[2])
    return _predict(model, items, parts.test, cfg, device), {"epoch": best[1] if best else cfg.epochs}


@torch.no_grad()
def _predict(model: Classifier, items: Items, part: np.ndarray, cfg: Config, device: torch.device) -> np.ndarray:
    """[n, classes] probabilities."""
    model.eval()
    batches = [part[first : first + cfg.batch_size] for first in range(0, len(part), cfg.batch_size)]
    logits = [model(*(t.to(device) for t in _load(items, batch))) for batch in batches]
    return torch.cat(logits).softmax(dim=1).cpu().double().numpy()


def _load(items: Items, batch: np.ndarray) -> tuple[Tensor, Tensor]:
    """Volumes [B, D, S, S] and mask [B, D] of a few items."""
    return pad([torch.from_numpy(items.cases.read(items.index[i])) for i in batch])


def _write_cases(path: Path, items: Items, test: np.ndarray, probability: np.ndarray) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "patient", "label", *(f"p({name})" for name in items.classes)])
        for i, row in zip(test.tolist(), probability.tolist(), strict=True):
            patient = items.patients[items.units[i]]
            writer.writerow([items.names[i], patient, items.classes[items.labels[i]], *(f"{p:.6f}" for p in row)])


def without_nan(value: Any) -> Any:
    """For JSON, which has no nan: None in its place."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _some(names: Sequence[str] | set[str], count: int = 5) -> str:
    listed = sorted(names)
    return ", ".join(listed[:count]) + (", ..." if len(listed) > count else "")


if __name__ == "__main__":
    options.main(main, Config, __doc__)

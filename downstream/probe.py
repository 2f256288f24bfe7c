"""How much do frozen features tell? k-nearest-neighbour and linear probes at several label fractions.

    python -m downstream.probe --data_path Training_Data --weights weights/swav3D_encoder.pth
    python -m downstream.probe --data_path slices --level slice --labels labels.csv --label_fractions "[0.05, 0.25, 1]"

What a case shows is its folder (the data set: often the organ), or what a CSV says. docs/PROBES.md explains the output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from downstream.classify import fit_logistic_regression, open_encoder
from downstream.encoders import describe_weights
from downstream.features import encode_slices, frozen_features, open_cases
from downstream.labels import Items, LabelRow, label_items, read_labels
from downstream.scores import Scores, classification_scores, score_intervals
from downstream.splits import choose_by_turns, draw_split, write_split
from models.encoder import JointEncoder
from models.resnet import GreyResNet
from utils import config as options
from utils import distributed
from utils.errors import UserError
from utils.files import write_json

METRICS = ("balanced_accuracy", "accuracy", "auc", "average_precision")


@dataclass
class Config:
    data_path: str = "Training_Data"
    """a data tree, one folder of images or volumes, or NIfTI files"""
    labels: str | None = None
    """CSV with a label per case, as for classify; null: the first-level folder, that is the data set"""
    level: Literal["slice", "volume"] = "volume"
    """what a feature stands for: every slice of a volume, or their mean; images are the same in both"""
    weights: str = "random"
    """a weights file, random, or imagenet"""
    arch: str | None = None
    """torchvision ResNet; null: what the record beside the weights says"""
    model: Literal["intra", "joint"] = "intra"
    """the slice encoder alone, or also the transformer's volume embedding (level volume)"""
    features: Literal["pooled", "multi_scale"] = "pooled"
    """of f_intra: the last stage, or all four stages"""
    k: PositiveInt = 5
    """neighbours that vote, by cosine similarity; all labelled ones where there are fewer"""
    labelled: NonNegativeInt = 0
    """training cases whose labels are used, the classes by turns; 0: all"""
    label_fractions: list[PositiveFloat] = field(default_factory=list)
    """instead: these parts of the training cases, one after the other, the smaller ones within the larger"""
    seed: NonNegativeInt = 0
    """of random weights and the choice of labelled cases"""

    classes: list[str] = field(default_factory=list)
    """labels to tell apart, cases with other labels are left out; empty: all"""
    case_column: str | None = None
    """column with the case; null: the first of case, file, filename, image"""
    label_column: str | None = None
    """column with the label; null: the first of label, finding, class"""
    patient_column: str | None = None
    """column with the patient; null: the first of patient, subject, patient_id, if there is one"""
    patient_pattern: str | None = None
    """regular expression whose first group, found in the file name, is the patient or scan"""
    split: str | None = None
    """YAML or JSON file with the lists train, validation, test; null: drawn by patient"""
    fractions: list[NonNegativeFloat] = field(default_factory=lambda: [0.6, 0.15, 0.25])
    """of the patients in train, validation and test, where the split is drawn"""
    split_seed: NonNegativeInt = 0
    """of the split that is drawn: the same test cases whatever the seed above"""

    size: PositiveInt = 224
    """side in pixels that images and slices are resized to"""
    slices: NonNegativeInt = 32
    """evenly spaced slices of a volume that are used; 0: all"""
    bootstrap: NonNegativeInt = 200
    """resamplings of the test patients for the 95 % intervals; 0: none"""
    dump_path: str = "runs/probe"
    """receives results.json, split.json and config.yaml"""
    cache_path: str | None = None
    """folder for the working copy of the data; null: .cache in data_path"""
    on_bad: Literal["error", "skip"] = "error"
    """unusable files: stop, or name them and go on without"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute"""


def main(cfg: Config) -> None:
    result = run(cfg)
    print(f"\ntest: {result['cases']} cases of {result['patients']} patients; weights {result['weights']}")
    print(f"{'probe':<16}{'labelled':>9}" + "".join(f"{name:>20}" for name in METRICS))
    for name, values in result["metrics"].items():
        numbers = "".join(f"{values[metric]:20.3f}" for metric in METRICS)
        low, high = result["intervals"].get(name, {}).get(METRICS[0], (math.nan, math.nan))
        interval = "" if math.isnan(low) else f"   95 % [{low:.3f}, {high:.3f}]"
        print(f"{name:<16}{result['labelled'][name]:>9}{numbers}{interval}")
    for name, reasons in result["reasons"].items():
        for why in sorted(set(reasons.values())):
            print(f"{name}: {why}")
    print(f"the interval is that of {METRICS[0]}, over patients")
    print(f"wrote {cfg.dump_path}/results.json, split.json, config.yaml")


def run(cfg: Config) -> dict[str, Any]:
    """Encode the cases once, then fit both probes on each labelled part and test them.

    Returns metrics {probe: {metric: value}}, where a probe is `knn` or `linear`, followed by @fraction where fractions
    were asked for; intervals and reasons likewise; labelled (cases per probe), cases, patients, weights. Raises
    UserError before anything is encoded.
    """
    device = distributed.start(cfg.device, cfg.seed).device
    if cfg.level == "slice" and cfg.model == "joint":
        raise UserError("model: joint describes whole volumes; use --level volume, or --model intra for slices")
    if cfg.label_fractions and (cfg.labelled or max(cfg.label_fractions) > 1):
        raise UserError(
            f"label_fractions: {cfg.label_fractions} must be parts, at most 1, and stand without --labelled, which "
            "takes a number of cases"
        )
    cases = open_cases(cfg.data_path, cfg.size, cfg.slices, cfg.cache_path, cfg.on_bad)
    if cfg.labels:
        rows = read_labels(cfg.labels, cases.names, cfg.case_column, cfg.label_column, cfg.patient_column)
    else:
        rows = [LabelRow(i, dataset, None) for i, dataset in enumerate(cases.datasets)]
    items = label_items(cases, rows, cfg.classes, None, cfg.patient_pattern, cfg.labels or cfg.data_path)
    split = draw_split(cfg.split, cfg.fractions, items.patients, cfg.split_seed, needed=("train", "test"))
    of = dict(zip(items.names, items.labels.tolist(), strict=True))
    chosen = _labelled_parts(cfg, split.train, of)
    encoder = open_encoder(cfg.weights, cfg.arch, cfg.model, cfg.seed)
    say = ", ".join(f"{name} {count}" for name, count in items.counts().items())
    print(f"{len(items.names)} cases of {len(set(items.patients.values()))} patients: {say}")
    folder = Path(cfg.dump_path)
    folder.mkdir(parents=True, exist_ok=True)
    options.save_yaml(options.to_dict(cfg), folder / "config.yaml")
    write_split(split, folder / "split.json")

    longest = max(chosen.values(), key=len)
    parts = (longest, split.validation, split.test)
    names = [name for part in parts for name in part]
    x, owner = _features(cfg, encoder, items, names, device)
    y = np.array([of[name] for name in names])[owner]
    ends = np.cumsum([len(part) for part in parts])
    validation, test = (owner >= ends[0]) & (owner < ends[1]), owner >= ends[1]
    people = [items.patients[names[place]] for place in owner[test]]
    result: dict[str, Any] = {"metrics": {}, "intervals": {}, "reasons": {}, "labelled": {}}
    for suffix, part in chosen.items():
        train = owner < len(part)  # the labelled parts are nested
        for probe in ("knn", "linear"):
            name = probe + suffix
            if len(set(y[train].tolist())) < 2:
                scores, intervals = Scores.undefined("the labelled cases are all of one class"), {}
            else:
                if probe == "knn":
                    probability = vote(x[train], y[train], x[test], len(items.classes), cfg.k)
                else:
                    probability, _ = fit_logistic_regression(
                        (x[train], y[train]), (x[validation], y[validation]), x[test], len(items.classes)
                    )
                scores = classification_scores(y[test], probability, items.classes)
                intervals = score_intervals(y[test], probability, items.classes, people, cfg.bootstrap, cfg.seed)
            result["metrics"][name], result["labelled"][name] = scores.values, len(part)
            result["intervals"][name] = intervals
            if scores.reasons:
                result["reasons"][name] = scores.reasons
    result |= {"cases": len(split.test), "patients": len(set(people)), "weights": describe_weights(cfg.weights)}
    write_json(result, folder / "results.json")
    return result


def vote(train: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: int, k: int) -> np.ndarray:
    """Shares [n, classes] of the k nearest training features by cosine similarity, each weighted by exp(s / 0.07).

    Features are centred on the training mean first: pooled features are all positive, and their common mean would hide
    the differences. Source of the weights: Wu et al. 2018 (instance discrimination), as k-NN evaluations use them.
    """
    mean = train.mean(axis=0)
    bank, queries = (torch.nn.functional.normalize(torch.from_numpy(x - mean), dim=1) for x in (train, test))
    similarity, nearest = (queries @ bank.T).topk(min(k, len(bank)), dim=1)
    weight = torch.exp((similarity - similarity[:, :1]) / 0.07)
    votes = weight.new_zeros(len(test), classes).scatter_add_(1, torch.from_numpy(labels)[nearest], weight)
    return (votes / votes.sum(dim=1, keepdim=True)).double().numpy()


def _labelled_parts(cfg: Config, train: list[str], labels: dict[str, int]) -> dict[str, list[str]]:
    """Name suffix of the probes -> labelled training cases; each part is the beginning of every larger one."""
    if not cfg.label_fractions:
        return {"": choose_by_turns(train, labels, cfg.labelled, cfg.seed)}
    return {
        f"@{fraction:g}": choose_by_turns(train, labels, max(1, round(fraction * len(train))), cfg.seed)
        for fraction in cfg.label_fractions
    }


def _features(
    cfg: Config, encoder: GreyResNet | JointEncoder, items: Items, names: list[str], device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """(features [n, C], place in `names` of the case of each [n])."""
    place = dict(zip(items.names, items.index, strict=True))
    indices = [place[name] for name in names]
    if cfg.level == "volume":
        return frozen_features(encoder, items.cases, indices, cfg.features, device), np.arange(len(names))
    slices = encode_slices(encoder, items.cases, indices, device)
    return getattr(slices, cfg.features).numpy(), slices.case.numpy()


if __name__ == "__main__":
    options.main(main, Config, __doc__)

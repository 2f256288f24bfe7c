"""Classify images or volumes, by frozen features or by training the whole network, from any weights, and test once.

    python -m downstream.classify --data_path chest_xray --labels chest_xray/labels.csv --weights weights/swav3D.pth
    python -m downstream.classify --mode knn --level slice --label_fractions "[0.05, 0.25, 1]"

Labels are a CSV (`case,label` and, where a patient has several cases, `patient`), or the data sets themselves.
docs/DOWNSTREAM.md shows all.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from datasets.augment import Ranges, VolumeViews
from downstream import task
from downstream.encoders import load_encoder, load_joint_encoder
from downstream.features import Cases, Features, StackEncoder, fit_logistic_regression, frozen_features, pad, vote
from downstream.labels import Items, LabelRow, label_items, read_labels
from downstream.options import Data, Running, Start, Training, WorkingCopy
from downstream.scores import (
    METRICS,
    Scores,
    classification_scores,
    format_table,
    score_intervals,
    validation_score,
)
from downstream.splits import choose_by_turns
from downstream.task import Outcome, Task, fingerprint
from models.encoder import JointEncoder
from models.resnet import GreyResNet, wide
from utils import config, options
from utils.errors import UserError


@dataclass(kw_only=True)
class Classifying(options.Group):
    """Options of classification."""

    labels: str | None = options.data(None, "CSV with a label per case; null: the data set that a case is of")
    classes: list[str] = options.data(
        [], "labels to tell apart, cases with other labels are left out; empty: all labels in the file"
    )
    positive: str | None = options.data(
        None, "one label against all others; a cell may then hold several, as in Effusion|Mass"
    )
    case_column: str | None = options.data(None, "column with the case; null: the first of case, file, filename, image")
    label_column: str | None = options.data(None, "column with the label; null: the first of label, finding, class")
    patient_column: str | None = options.data(
        None, "column with the patient; null: the first of patient, subject, patient_id, if there is one"
    )
    patient_pattern: str | None = options.data(
        None, "regular expression whose first group, found in the file name, is the patient or scan"
    )
    label_fractions: list[PositiveFloat] = options.data(
        [], "shares of the training cases whose labels are used, one after the other (knn, linear); empty: see labelled"
    )
    size: PositiveInt = options.data(224, "side in pixels that images and slices are resized to")
    slices: NonNegativeInt = options.data(32, "evenly spaced slices of a volume that are used; 0: all")
    mode: Literal["knn", "linear", "finetune"] = options.model(
        "linear",
        "vote of nearest neighbours or logistic regression on frozen features, or training of the whole network",
    )
    level: Literal["slice", "volume"] = options.model(
        "volume", "what gets a label: a whole volume, or each of its slices; images are the same in both"
    )
    model: Literal["intra", "joint"] = options.model(
        "intra", "the slice encoder alone (features averaged over slices), or also the transformer's volume embedding"
    )
    features: Features = options.model("pooled", "frozen features: the ResNet's last stage, or all four stages")
    k: PositiveInt = options.model(
        5, "neighbours that vote, by cosine similarity; all labelled ones where there are fewer"
    )
    bootstrap: NonNegativeInt = options.running(
        1000, "resamplings of the test patients for the 95 % intervals; 0: none"
    )


@options.constants
class Config(Running, Training, Start, Classifying, WorkingCopy, Data):
    data_path = "Training_Data"
    fractions = [0.6, 0.2, 0.2]
    epochs = 30
    wd = 0.01
    dump_path = "runs/classify"


def main(cfg: Config) -> None:
    run(cfg)


def run(cfg: Config) -> dict[str, Any]:
    """Fit on the labelled cases, choose by validation, test once, write everything to `dump_path`; see `task.run`.

    Metrics are those of `classification_scores`, each followed by @fraction where label_fractions are given. Beside
    them the result has intervals (95 %, over patients), reasons (of metrics that are nan or left a class out),
    patients (of the test), chosen (C of the regressions) and, where fractions are given, their numbers of labels.
    """
    return task.run(Classification, cfg)


def check(cfg: Config) -> None:
    """Raise UserError for whatever would stop `run`."""
    task.check(Classification, cfg)


class Classification(Task):
    """Labels of stacks of slices: whole cases, or with level `slice` single slices."""

    needed = ("train", "test")

    def __init__(self, cfg: Config, device: torch.device) -> None:
        super().__init__(cfg, device)
        if cfg.level == "slice" and cfg.model == "joint":
            raise UserError("model: joint describes whole volumes; use --level volume, or --model intra for slices")
        if cfg.label_fractions and (cfg.labelled or max(cfg.label_fractions) > 1 or cfg.mode == "finetune"):
            raise UserError(
                f"label_fractions: {cfg.label_fractions} must be parts, at most 1, of --mode knn or linear, and stand "
                "without --labelled, which takes a number of cases"
            )
        self.items = open_items(cfg)
        self.patients = self.items.patients
        self.fingerprint = fingerprint(sample.path for sample in self.items.cases.samples)

    def choose(self, train: list[str]) -> list[str]:
        """The classes by turns: the labels of a smaller fraction are the first of a larger one's."""
        items, cfg = self.items, self.cfg
        test_only = {name for name, only in zip(items.names, items.test_only, strict=True) if only}
        train = [case for case in train if case not in test_only]
        if not train:
            raise UserError("split: no case is left for training; change the split, or test_only in the labels")
        sizes = {f"@{share:g}": max(1, round(share * len(train))) for share in cfg.label_fractions}
        self.sizes = sizes or {"": cfg.labelled or len(train)}  # suffix of the metrics -> labelled cases
        return choose_by_turns(train, items.label_of, max(self.sizes.values()), cfg.seed)

    def stacks(self, cases: list[str], test: bool = False) -> np.ndarray:
        """Positions of the items of these cases."""
        wanted = set(cases)
        return np.flatnonzero([name in wanted for name in self.items.names] & (test | ~self.items.test_only))

    @functools.cached_property
    def train(self) -> np.ndarray:
        """Positions of the labelled items."""
        return self.stacks(self.labelled)

    @property
    def epochs(self) -> int:
        several = len(set(self.items.labels[self.train].tolist())) > 1
        return self.cfg.epochs if self.cfg.mode == "finetune" and several else 0

    @property
    def steps(self) -> int:
        return self.cfg.steps_per_epoch or math.ceil(len(self.train) / self.cfg.batch_size)

    @property
    def warmup_steps(self) -> int:
        return 0

    def build(self) -> nn.Module:
        cfg = self.cfg
        load = load_encoder if cfg.model == "intra" else load_joint_encoder
        encoder = load(cfg.weights, cfg.arch, cfg.seed)
        if not self.epochs:
            return encoder
        torch.manual_seed(cfg.seed)
        return Classifier(encoder, len(self.items.classes))

    def examine(self) -> None:
        """Nothing is left to find: every case was read when the working copy was made."""

    def describe(self) -> str:
        labels = list(self.items.label_of.values())
        counts = ", ".join(f"{name} {labels.count(k)}" for k, name in enumerate(self.items.classes))
        return (
            f"{len(labels)} cases of {len(set(self.patients.values()))} patients: {counts}\n"
            f"train {len(self.labelled)} (labelled), validation {len(self.split.validation)}, "
            f"test {len(self.split.test)} cases"
        )

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The new layer learns ten times as fast."""
        parts = ((model.encoder, 1.0), (model.head, 10.0))
        return [{"params": list(m.parameters()), "weight_decay": self.cfg.wd, "share": share} for m, share in parts]

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Augmented stacks [B, D, S, S], mask [B, D], labels [B]."""
        cfg, items, train = self.cfg, self.items, self.train
        random = np.random.default_rng((cfg.seed, epoch))
        passes = math.ceil(self.steps * cfg.batch_size / len(train)) if cfg.steps_per_epoch else 1
        order = np.concatenate([random.permutation(train) for _ in range(passes)])[: self.steps * cfg.batch_size]
        chosen = np.array_split(order, self.steps)[step]
        volumes, mask = self.read(chosen)
        extents = torch.tensor([items.cases.extent(i) for i in items.index[chosen]])
        # Geometry and gamma only: what else training's policies do would drown small findings.
        ranges = Ranges(crop_area=(0.7, 1.0), anisotropy_p=0, blur_p=0, bias_p=0, noise_p=0)
        augment = VolumeViews(cfg.size, cfg.size, "strong", cfg.seed, ranges)
        views = augment(volumes, mask.cpu(), extents, torch.from_numpy(chosen), epoch, views=1)[0]
        return views, mask, torch.from_numpy(items.labels[chosen]).to(self.device)

    def read(self, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        """Stacks [B, D, S, S] and mask [B, D] of a few items."""
        volumes, mask = pad([torch.from_numpy(self.items.cases.read(i)) for i in self.items.index[chosen]])
        return volumes.to(self.device), mask.to(self.device)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Cross-entropy in which all classes weigh the same."""
        views, mask, labels = batch
        counts = np.bincount(self.items.labels[self.train], minlength=len(self.items.classes))
        weight = np.divide(1, counts, out=np.zeros(len(counts)), where=counts > 0)
        return F.cross_entropy(model(views, mask), labels, torch.tensor(weight, dtype=torch.float32).to(self.device))

    def validate(self, model: nn.Module) -> dict[str, float]:
        validation = self.stacks(self.split.validation)
        auc, likelihood = validation_score(self.items.labels[validation], self.probabilities(model, validation))
        return {"auc": auc, "log_likelihood": likelihood}

    def probabilities(self, model: nn.Module, chosen: np.ndarray) -> np.ndarray:
        """[n, classes] of a trained network. Raises UserError where training has diverged."""
        logits = []
        for first in range(0, len(chosen), self.cfg.batch_size):
            with self.precision.autocast():
                logits.append(model(*self.read(chosen[first : first + self.cfg.batch_size])))
        found = torch.cat(logits).softmax(dim=1).cpu().double().numpy()
        if not np.isfinite(found).all():
            raise UserError("fine-tuning gives NaN or Inf; lower --base_lr, or change --weights")
        return found

    def test(self, model: nn.Module, folder: Path) -> Outcome:
        items, test = self.items, self.stacks(self.split.test, test=True)
        people = [self.patients[items.names[i]] for i in test]
        found, chosen = ({"": self.probabilities(model, test)}, {}) if self.epochs else self.by_features(model, test)
        values, intervals, reasons = {}, {}, {}
        for suffix, probability in found.items():
            if np.isnan(probability).any():
                scores, spread = Scores.undefined("the labelled training cases are all of one class"), {}
            else:
                truth = items.labels[test], probability, items.classes
                scores = classification_scores(*truth)
                spread = score_intervals(*truth, people, self.cfg.bootstrap, self.cfg.seed)
            values |= {name + suffix: scores.values[name] for name in METRICS}
            reasons |= {name + suffix: why for name, why in scores.reasons.items()}
            intervals |= {name + suffix: interval for name, interval in spread.items()}
        about = {"intervals": intervals, "reasons": reasons, "patients": len(set(people)), "chosen": chosen}
        table = format_table(values, intervals, reasons)
        if self.cfg.label_fractions:
            about["label_counts"] = self.sizes
            table = "\n".join([*(f"{suffix}: {size} labelled" for suffix, size in self.sizes.items()), table])
        return Outcome(values, self.rows(test, found), table, about)

    def by_features(
        self, encoder: GreyResNet | JointEncoder, test: np.ndarray
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Probabilities of the test items [n, classes] by the suffix of their metrics, and what was chosen.

        They are nan where the labelled cases are of one class.
        """
        items, cfg = self.items, self.cfg
        train, validation = self.train, self.stacks(self.split.validation)
        found = {suffix: np.full((len(test), len(items.classes)), np.nan) for suffix in self.sizes}
        if len(set(items.labels[train].tolist())) < 2:
            return found, {}
        used = items.index[np.concatenate([train, validation, test])]
        x = frozen_features(encoder, items.cases, used, cfg.features, self.device)
        x_train, x_validation, x_test = np.split(x, np.cumsum([len(train), len(validation)]))
        chosen = {}
        for suffix, size in self.sizes.items():
            own = np.isin(train, self.stacks(self.labelled[:size]))
            labelled = x_train[own], items.labels[train[own]]
            if len(set(labelled[1].tolist())) < 2:
                continue
            if cfg.mode == "knn":
                found[suffix] = vote(*labelled, x_test, len(items.classes), cfg.k)
            else:
                judges = x_validation, items.labels[validation]
                found[suffix], cost = fit_logistic_regression(labelled, judges, x_test, len(items.classes))
                chosen[f"C{suffix}"] = cost
        return found, chosen

    def rows(self, test: np.ndarray, found: dict[str, np.ndarray]) -> list[dict[str, Any]]:
        """Of cases.csv: a line per test item."""
        items, rows = self.items, []
        for place, i in enumerate(test.tolist()):
            row = {"case": items.names[i], "patient": self.patients[items.names[i]]}
            if self.cfg.level == "slice":
                row["slice"] = int(items.cases.stacks[items.index[i]][0, 1])
            row["label"] = items.classes[items.labels[i]]
            for suffix, probability in found.items():
                values = zip(items.classes, probability[place].tolist(), strict=True)
                row |= {f"p({name}){suffix}": f"{p:.6f}" for name, p in values}
            rows.append(row)
        return rows


def open_items(cfg: Config) -> Items:
    """The labelled images or volumes below data_path."""
    cases = Cases(cfg.data_path, cfg.size, cfg.slices, cfg.cache_path, cfg.on_bad, cfg.level)
    if cfg.labels:
        rows = read_labels(cfg.labels, cases.names, cfg.case_column, cfg.label_column, cfg.patient_column)
    else:
        rows = [LabelRow(i, sample.dataset) for i, sample in enumerate(cases.samples)]
    return label_items(cases, rows, cfg.classes, cfg.positive, cfg.patient_pattern, cfg.labels or cfg.data_path)


class Classifier(StackEncoder):
    """A new linear layer on the whole encoder: volumes [B, D, S, S], mask [B, D] -> logits [B, classes].

    Each part of its input is brought to unit variance (LayerNorm without parameters): they have no scale in common.
    """

    def __init__(self, encoder: GreyResNet | JointEncoder, classes: int) -> None:
        super().__init__(encoder)
        joint = isinstance(encoder, JointEncoder)
        width = encoder.encoder.num_features + encoder.projection.out_features if joint else encoder.num_features
        self.head = nn.Linear(width, classes)

    def forward(self, volumes: Tensor, mask: Tensor) -> Tensor:
        parts = [F.layer_norm(part, part.shape[1:]) for part in self.parts(volumes, mask)]
        return wide(self.head(torch.cat(parts, dim=1)))


if __name__ == "__main__":
    config.main(main, Config, __doc__)

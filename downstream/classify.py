"""Classify images or volumes, by frozen features or by training the whole network, from any weights, and test once.

    python -m downstream.classify --data_path chest_xray --labels chest_xray/labels.csv --weights weights/swav3D.pth
    python -m downstream.classify --mode knn --level slice --label_fractions "[0.05, 0.25, 1]"

Labels are a CSV (`case,label` and, where a patient has several cases, `patient`), or the data sets themselves.
docs/DOWNSTREAM.md shows all.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from datasets.augment import Ranges, VolumeViews
from downstream import results, task
from downstream.encoders import load_encoder, load_joint_encoder
from downstream.features import Cases, Features, StackEncoder, fit_logistic_regression, frozen_features, vote
from downstream.labels import label_items
from downstream.metrics import classification_intervals, classification_scores, undefined, validation_score
from downstream.splits import choose_by_turns
from models.encoder import JointEncoder
from models.resnet import GreyResNet, wide
from utils import config
from utils.errors import UserError
from utils.options import FREE, constants, data, running
from utils.options import model as network


@constants
class Config(task.Options):
    """Options of classification."""

    data_path = "Training_Data"
    fractions = [0.6, 0.2, 0.2]
    epochs = 30
    wd = 0.01
    dump_path = "runs/classify"

    cache_path: str | None = data(None, "folder for the working copy of the data; null: .cache in data_path", FREE)
    on_bad: Literal["error", "skip"] = data("error", "unusable files: stop before training, or leave them out")
    labels: str | None = data(None, "CSV with a label per case; null: the data set that a case is of")
    classes: list[str] = data([], "labels to tell apart, cases with others are left out; empty: all labels")
    positive: str | None = data(None, "one label against all others; a cell may then hold several: Effusion|Mass")
    case_column: str | None = data(None, "column of the case; null: the first of case, file, filename, image")
    label_column: str | None = data(None, "column of the label; null: the first of label, finding, class")
    patient_column: str | None = data(None, "column of the patient; null: patient, subject or patient_id, if any")
    patient_pattern: str | None = data(None, "regular expression whose first group, in the file name, is the patient")
    label_fractions: list[PositiveFloat] = data([], "shares of the training labels to use, in turn (knn, linear)")
    size: PositiveInt = data(224, "side in pixels that images and slices are resized to")
    slices: NonNegativeInt = data(32, "evenly spaced slices of a volume that are used; 0: all")
    mode: Literal["knn", "linear", "finetune"] = network(
        "linear", "nearest neighbours or logistic regression on frozen features, or training of the whole network"
    )
    level: Literal["slice", "volume"] = network("volume", "what gets a label: whole volumes, or each of their slices")
    model: Literal["intra", "joint"] = network("intra", "the slice encoder, or also the transformer's volume embedding")
    features: Features = network("pooled", "frozen features: the ResNet's last stage, or all four stages")
    k: PositiveInt = network(5, "neighbours that vote, by cosine similarity; all labelled ones where there are fewer")
    bootstrap: NonNegativeInt = running(1000, "resamplings of the test patients for the 95 % intervals; 0: none")


class Classification(task.Task):
    """Labels of stacks of slices: whole cases, or with level `slice` single slices.

    Metrics are those of `classification_scores`, each followed by @fraction where label_fractions are given. Beside
    them the result has intervals (95 %, over patients), reasons (of metrics that are nan or left a class out),
    patients (of the test), chosen (C of the regressions) and, where fractions are given, their numbers of labels.
    """

    needed = ("train", "test")

    def __init__(self, cfg: Config, device: torch.device) -> None:
        super().__init__(cfg, device)
        if cfg.level == "slice" and cfg.model == "joint":
            raise UserError("model: joint describes whole volumes; use --level volume, or --model intra for slices")
        if cfg.label_fractions and (cfg.labelled or max(cfg.label_fractions) > 1 or cfg.mode == "finetune"):
            raise UserError("label_fractions: must be at most 1, of --mode knn or linear, and stand without --labelled")
        self.cases = cases = Cases(cfg.data_path, cfg.size, cfg.slices, cfg.cache_path, cfg.on_bad, cfg.level)
        self.items, self.classes = label_items(cases, cfg)
        self.labels, self.stack = self.items.label.to_numpy(), self.items["stack"].to_numpy()
        self.patients = dict(zip(self.items.case, self.items.patient, strict=True))
        self.sources = dict(zip(cases.names, (sample.path for sample in cases.samples), strict=True))
        self.fingerprint = results.fingerprint(sample.path for sample in cases.samples)

    def choose(self, train: list[str]) -> list[str]:
        """The classes by turns: the labels of a smaller fraction are the first of a larger one's."""
        cfg, left_out = self.cfg, set(self.items.case[self.items.test_only])
        train = [case for case in train if case not in left_out]
        if not train:
            raise UserError("split: no case is left for training; change the split, or test_only in the labels")
        sizes = {f"@{share:g}": max(1, round(share * len(train))) for share in cfg.label_fractions}
        self.sizes = sizes or {"": cfg.labelled or len(train)}  # suffix of the metrics -> labelled cases
        labels = dict(zip(self.items.case, self.labels.tolist(), strict=True))
        return choose_by_turns(train, labels, max(self.sizes.values()), cfg.seed)

    def stacks(self, cases: list[str], test: bool = False) -> np.ndarray:
        """Positions of the items of these cases."""
        return np.flatnonzero(self.items.case.isin(cases) & (test | ~self.items.test_only))

    @functools.cached_property
    def train(self) -> np.ndarray:
        """Positions of the labelled items."""
        return self.stacks(self.labelled)

    @property
    def epochs(self) -> int:
        return self.cfg.epochs if self.cfg.mode == "finetune" and len(set(self.labels[self.train])) > 1 else 0

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
        return Classifier(encoder, len(self.classes))

    def describe(self) -> str:
        counts = self.items.drop_duplicates("case").label.value_counts()
        listed = ", ".join(f"{name} {counts.get(k, 0)}" for k, name in enumerate(self.classes))
        shares = [f"{share}: {n} labelled" for share, n in self.sizes.items() if share]
        return "\n".join([f"{counts.sum()} cases of {self.items.patient.nunique()} patients: {listed}", *shares])

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The new layer learns ten times as fast."""
        parts = ((model.encoder, 1.0, self.head_start), (model.head, 10.0, 0))
        common = {"weight_decay": self.cfg.wd}
        return [common | {"params": [*m.parameters()], "share": share, "start": start} for m, share, start in parts]

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Augmented stacks [B, D, S, S], mask [B, D], labels [B]."""
        cfg, train = self.cfg, self.train
        random = np.random.default_rng((cfg.seed, epoch))
        passes = math.ceil(self.steps * cfg.batch_size / len(train)) if cfg.steps_per_epoch else 1
        order = np.concatenate([random.permutation(train) for _ in range(passes)])[: self.steps * cfg.batch_size]
        chosen = np.array_split(order, self.steps)[step]
        volumes, mask = self.cases.read_batch(self.stack[chosen], self.device)
        # Geometry and gamma only: what else training's policies do would drown small findings.
        ranges = Ranges(crop_area=(0.7, 1.0), anisotropy_p=0, blur_p=0, bias_p=0, noise_p=0)
        augment = VolumeViews(cfg.size, cfg.size, "strong", cfg.seed, ranges)
        extents = self.cases.extents[self.stack[chosen]]
        views = augment(volumes, mask.cpu(), extents, torch.from_numpy(chosen), epoch, views=1)[0]
        return views, mask, torch.from_numpy(self.labels[chosen]).to(self.device)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Cross-entropy in which all classes weigh the same."""
        views, mask, labels = batch
        weight = torch.tensor(1 / np.bincount(self.labels[self.train], minlength=len(self.classes)).clip(1))
        return F.cross_entropy(model(views, mask), labels, weight.float().to(self.device))

    def validate(self, model: nn.Module) -> dict[str, float]:
        validation = self.stacks(self.split.validation)
        auc, likelihood = validation_score(self.labels[validation], self.probabilities(model, validation))
        return {"auc": auc, "log_likelihood": likelihood}

    def probabilities(self, model: nn.Module, chosen: np.ndarray) -> np.ndarray:
        """[n, classes] of a trained network. Raises UserError where training has diverged."""
        logits = []
        for first in range(0, len(chosen), self.cfg.batch_size):
            some = self.stack[chosen[first : first + self.cfg.batch_size]]
            with self.precision.autocast():
                logits.append(model(*self.cases.read_batch(some, self.device)))
        found = torch.cat(logits).softmax(dim=1).cpu().double().numpy()
        if not np.isfinite(found).all():
            raise UserError("fine-tuning gives NaN or Inf; lower --base_lr, or change --weights")
        return found

    def test(self, model: nn.Module) -> task.Outcome:
        test = self.stacks(self.split.test, test=True)
        people = self.items.patient.iloc[test].tolist()
        found, chosen = ({"": self.probabilities(model, test)}, {}) if self.epochs else self.by_features(model, test)
        values, intervals, reasons = {}, {}, {}
        for suffix, probability in found.items():
            if np.isnan(probability).any():
                scores, why = undefined("the labelled training cases are all of one class")
                spread = {}
            else:
                truth = self.labels[test], probability, self.classes
                scores, why = classification_scores(*truth)
                spread = classification_intervals(*truth, people, self.cfg.bootstrap, self.cfg.seed)
            for table, part in ((values, scores), (intervals, spread), (reasons, why)):
                table |= {name + suffix: value for name, value in part.items()}
        about = {"intervals": intervals, "reasons": reasons, "patients": len(set(people)), "chosen": chosen}
        about |= {"label_counts": self.sizes} if self.cfg.label_fractions else {}
        return task.Outcome(values, self.rows(test, found), about)

    def by_features(
        self, encoder: GreyResNet | JointEncoder, test: np.ndarray
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Probabilities [n, classes] by the suffix of their metrics, nan where all labels are alike; the chosen C."""
        cfg, labels, classes = self.cfg, self.labels, len(self.classes)
        train, validation = self.train, self.stacks(self.split.validation)
        used = self.stack[np.concatenate([train, validation, test])]
        x = frozen_features(encoder, self.cases, used, cfg.features, self.device)
        x_train, x_validation, x_test = np.split(x, np.cumsum([len(train), len(validation)]))
        found, chosen = {}, {}
        for suffix, size in self.sizes.items():
            own = np.isin(train, self.stacks(self.labelled[:size]))
            labelled = x_train[own], labels[train[own]]
            if len(set(labelled[1])) < 2:
                found[suffix] = np.full((len(test), classes), np.nan)
            elif cfg.mode == "knn":
                found[suffix] = vote(*labelled, x_test, classes, cfg.k)
            else:
                judges = x_validation, labels[validation]
                found[suffix], chosen[f"C{suffix}"] = fit_logistic_regression(labelled, judges, x_test, classes)
        return found, chosen

    def rows(self, test: np.ndarray, found: dict[str, np.ndarray]) -> list[dict[str, Any]]:
        """Of cases.csv: a line per test item."""
        items = self.items.iloc[test]
        table = items[["case", "patient"]].copy()
        if self.cfg.level == "slice":
            table["slice"] = [int(self.cases.stacks[i][0, 1]) for i in items["stack"]]
        table["label"] = [self.classes[k] for k in items.label]
        for suffix, probability in found.items():
            for name, column in zip(self.classes, probability.T, strict=True):
                table[f"p({name}){suffix}"] = [f"{p:.6f}" for p in column]
        return table.to_dict("records")


run, check = functools.partial(task.run, Classification), functools.partial(task.check, Classification)


class Classifier(StackEncoder):
    """A new linear layer on the whole encoder: volumes [B, D, S, S], mask [B, D] -> logits [B, classes].

    Each part of its input is brought to unit variance (LayerNorm without parameters): they have no scale in common.
    """

    def __init__(self, encoder: GreyResNet | JointEncoder, classes: int) -> None:
        super().__init__(encoder)
        joint = isinstance(encoder, JointEncoder)
        width = encoder.resnet.num_features + encoder.projection.out_features if joint else encoder.num_features
        self.head = nn.Linear(width, classes)

    def forward(self, volumes: Tensor, mask: Tensor) -> Tensor:
        parts = [F.layer_norm(part, part.shape[1:]) for part in self.parts(volumes, mask)]
        return wide(self.head(torch.cat(parts, dim=1)))


if __name__ == "__main__":
    config.main(run, Config, __doc__)

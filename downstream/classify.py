"""Classify images, volumes, or the nodule candidates of LUNA16, from any weights, and test once.

    python -m downstream.classify --data_path chest_xray --labels chest_xray/labels.csv --weights weights/swav3D.pth
    python -m downstream.classify --task luna16 --data_path LUNA16 --labels candidates.csv --annotations annotations.csv

Labels are a CSV (`case,label` and, where a patient has several cases, `patient`); docs/CLASSIFICATION.md shows all.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from tqdm import tqdm

from datasets.augment import Ranges, VolumeViews
from downstream.encoders import describe_weights, load_encoder, load_joint_encoder
from downstream.features import frozen_features, mean_of_cases, open_cases, pad
from downstream.labels import Items, label_items, read_labels
from downstream.luna16 import FROC_NAMES, CandidateCrops, froc_scores, read_luna16
from downstream.scores import Scores, classification_scores, score_intervals, validation_score
from downstream.splits import Split, choose_by_turns, choose_labelled, draw_split, write_split
from models.encoder import JointEncoder
from models.resnet import GreyResNet, pooled
from utils import config as options
from utils import distributed
from utils.errors import UserError
from utils.files import write_json

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
    luna = read_luna16(cfg) if cfg.task == "luna16" else None
    items = luna.items if luna else _open_items(cfg)
    split = draw_split(cfg.split, cfg.fractions, items.patients, cfg.split_seed, needed=("train", "test"))
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
        froc_values, froc_reasons, froc_intervals = froc_scores(
            luna, parts.test, split.test, probability[:, 1], cfg.bootstrap, cfg.seed
        )
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
    write_json(result, folder / "results.json")
    return result


class Parts(NamedTuple):
    """Positions of items."""

    train: np.ndarray  # labelled
    validation: np.ndarray
    test: np.ndarray


def _open_items(cfg: Config) -> Items:
    """The labelled images or volumes below data_path."""
    cases = open_cases(cfg.data_path, cfg.size, cfg.slices, cfg.cache_path, cfg.on_bad)
    rows = read_labels(cfg.labels, cases.names, cfg.case_column, cfg.label_column, cfg.patient_column)
    return label_items(cases, rows, cfg.classes, cfg.positive, cfg.patient_pattern, cfg.labels)


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


def open_encoder(
    weights: str, arch: str | None, model: Literal["intra", "joint"], seed: int
) -> GreyResNet | JointEncoder:
    """The slice encoder alone, or with the transformer over slices."""
    return load_encoder(weights, arch, seed) if model == "intra" else load_joint_encoder(weights, arch, seed)


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
    """[n, classes] probabilities. Raises UserError where training has diverged."""
    model.eval()
    batches = [part[first : first + cfg.batch_size] for first in range(0, len(part), cfg.batch_size)]
    logits = [model(*(t.to(device) for t in _load(items, batch))) for batch in batches]
    probability = torch.cat(logits).softmax(dim=1).cpu().double().numpy()
    if not np.isfinite(probability).all():
        raise UserError("fine-tuning gives NaN or Inf; lower --base_lr, or change --weights")
    return probability


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


if __name__ == "__main__":
    options.main(main, Config, __doc__)

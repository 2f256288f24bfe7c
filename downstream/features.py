"""Frozen features of images and volumes, from files read and normalised as in training, and what tells them apart."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from datasets.loaders import Slices
from datasets.store import prepare
from downstream.metrics import validation_score
from downstream.splits import without_suffix
from models.encoder import JointEncoder, real_rows, spread
from models.resnet import GreyResNet, multi_scale, pooled, wide
from utils.errors import UserError

COSTS = tuple(10.0 ** np.arange(-4, 3))  # inverse regularisation C of the logistic regression, chosen on validation
SLICES_AT_ONCE = 64  # through the ResNet: 64 slices of 224 x 224 keep half a gigabyte of ResNet-50's maps
Features = Literal["pooled", "multi_scale"]  # of f_intra: its last stage, or all four


class Cases:
    """Images and volumes, normalised as in training, as stacks of slices on a square canvas.

    data_path: a data tree, or the folder of a single data set.  size: S, side of the canvas in pixels.
    slices: evenly spaced ones of a volume that are used, at most; 0: all.  level: a stack is a case, or a slice of one.
    Has samples (the cases), names (theirs, relative to data_path), and of each stack owner (the position of its case)
    and extents (height and width in pixels of what the canvas shows, centred). Raises UserError for unusable files.
    """

    def __init__(
        self,
        data_path: str | Path,
        size: int,
        slices: int = 32,
        cache_path: str | Path | None = None,
        on_bad: Literal["error", "skip"] = "error",
        level: Literal["slice", "volume"] = "volume",
    ) -> None:
        root = Path(os.path.realpath(Path(data_path).expanduser()))
        if not root.is_dir():
            raise UserError(f"data_path: {root} is not a folder; give the one that holds the images or volumes")
        files = [file.name for file in root.iterdir() if file.is_file()]
        alone = "dataset.yaml" in files or any(without_suffix(name) != name for name in files)
        if alone and cache_path is None:
            cache_path = root / ".cache"
        tree, only = (root.parent, root.name) if alone else (root, None)
        self.store = prepare(tree, size, cache_path, on_bad, progress=False, only=only)
        self.samples = self.store.samples
        self.names = [sample.name.split("/", 1)[1] if alone else sample.name for sample in self.samples]
        items = np.asarray(Slices(self.store, slices).items)  # [n, 2]: sample and slice, sample by sample
        ends = np.arange(1, len(items)) if level == "slice" else np.flatnonzero(np.diff(items[:, 0])) + 1
        self.stacks = np.split(items, ends)
        self.owner = np.array([stack[0, 0] for stack in self.stacks])
        self.extents = torch.from_numpy(self.store.extents[self.owner])

    def read(self, index: int) -> np.ndarray:
        """A stack [D, S, S] float32 in 0..1; D = 1 for an image."""
        return np.concatenate([self.store.read(case, s, s + 1) for case, s in self.stacks[index].tolist()])

    def read_batch(self, indices: Sequence[int], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Stacks [B, D, S, S] with zeros behind the shorter ones, mask [B, D]: True for real slices."""
        stacks = [torch.from_numpy(self.read(i)) for i in indices]
        batch = pad_sequence(stacks, batch_first=True)
        mask = torch.arange(batch.shape[1]) < torch.tensor([[len(stack)] for stack in stacks])
        return batch.to(device), mask.to(device)


class StackEncoder(nn.Module):
    """Stacks of slices to their features: [B, D, S, S] in 0..1, mask [B, D] True for real slices -> a list of [B, C].

    The first is the mean over slices of f_intra, its last stage or, with `multi_scale`, all four stages, each of unit
    length; the second, of a joint encoder, f_inter's embedding of the whole stack, of unit length.
    """

    def __init__(self, encoder: GreyResNet | JointEncoder, features: Features = "pooled") -> None:
        super().__init__()
        self.encoder, self.features = encoder, {"pooled": pooled, "multi_scale": multi_scale}[features]

    def parts(self, volumes: Tensor, mask: Tensor) -> list[Tensor]:
        joint = self.encoder if isinstance(self.encoder, JointEncoder) else None
        resnet = joint.resnet if joint else self.encoder
        rows = real_rows(mask)
        images = volumes.flatten(0, 1)[rows].unsqueeze(1)
        slices, scales = [], []
        for some in images.split(len(images) if self.training else SLICES_AT_ONCE):  # BatchNorm is trained on all
            stages = resnet(some)
            slices.append(wide(self.features(stages)))
            if joint:
                scales.append(joint.projection(multi_scale(stages)))
        parts = [spread(torch.cat(slices), rows, mask.shape).sum(dim=1) / mask.sum(dim=1, keepdim=True)]
        if joint:
            parts.append(joint.holistic(spread(torch.cat(scales), rows, mask.shape), mask))
        return parts


@torch.no_grad()
def frozen_features(
    encoder: GreyResNet | JointEncoder,
    cases: Cases,
    indices: Sequence[int],
    features: Features = "pooled",
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """[stacks, C] of the stacks at `indices`: the features of `StackEncoder`, joined. UserError for NaN and Inf."""
    network = StackEncoder(encoder, features).eval().to(device)
    rows = []
    ends = np.cumsum([len(cases.stacks[i]) for i in indices])
    for some in np.split(indices, np.flatnonzero(np.diff((ends - 1) // SLICES_AT_ONCE)) + 1):
        rows.append(torch.cat(network.parts(*cases.read_batch(some, device)), dim=1).cpu())
        if not rows[-1].isfinite().all():
            raise UserError("weights: they give features of NaN or Inf; the file is of a training that diverged")
    return torch.cat(rows).numpy()


def vote(train: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: int, k: int) -> np.ndarray:
    """Shares [n, classes] of the k nearest training features by cosine similarity, each weighted by exp(s / 0.07).

    Features are centred on the training mean: pooled ones are all positive, and their common mean would hide the
    differences. Source of the weights: Wu et al. 2018 (instance discrimination).
    """
    mean, k = train.mean(axis=0), min(k, len(train))
    model = KNeighborsClassifier(k, weights=lambda distance: np.exp(-distance / 0.07), metric="cosine")
    return _probabilities(model.fit(train - mean, labels), test - mean, classes)


def fit_logistic_regression(
    train: tuple[np.ndarray, np.ndarray], validation: tuple[np.ndarray, np.ndarray], test: np.ndarray, classes: int
) -> tuple[np.ndarray, float]:
    """Probabilities [n, classes] for the features `test`, and the C that validation chose.

    train, validation: features [n, C] and class numbers [n].  Features are standardised by the training cases; classes
    weigh the same. C is the smallest of those with the best `validation_score`, and 1 without validation cases.
    """

    def fitted(cost: float) -> Any:
        regression = LogisticRegression(C=cost, class_weight="balanced", max_iter=5000)
        return make_pipeline(StandardScaler(), regression).fit(*train)

    x, truth = validation
    if not len(truth):
        return _probabilities(fitted(1.0), test, classes), 1.0
    models = {cost: fitted(cost) for cost in COSTS}
    best = max(COSTS, key=lambda cost: validation_score(truth, _probabilities(models[cost], x, classes)))
    return _probabilities(models[best], test, classes), float(best)


def _probabilities(model: Any, x: np.ndarray, classes: int) -> np.ndarray:
    """[n, classes] of a scikit-learn model that has not seen all classes; 0 for these."""
    result = np.zeros((len(x), classes))
    result[:, model.classes_] = model.predict_proba(x)
    return result

"""Frozen features of images and volumes, from files read and normalised as in training.

cases = open_cases("Training_Data", size=224)
slices = encode_slices(load_encoder("weights/swav3D_encoder.pth"), cases, range(len(cases.names)))
features = mean_of_stacks(slices.pooled, slices.stack)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from datasets.index import LABEL_FOLDERS
from datasets.loaders import Slices
from datasets.store import prepare
from downstream.scores import validation_score
from downstream.splits import without_suffix
from models.encoder import JointEncoder
from models.resnet import GreyResNet, multi_scale, pooled
from utils.errors import UserError

COSTS = tuple(10.0 ** np.arange(-4, 3))  # inverse regularisation C of the logistic regression, chosen on validation
SLICES_AT_ONCE = 64  # through the ResNet: 64 slices of 224 x 224 keep half a gigabyte of ResNet-50's maps


class Cases:
    """Images and volumes of a data tree or of one data set, as stacks of slices on a square canvas.

    A volume is at most `slices` evenly spaced slices (0: all of them). A stack is a case or, at level `slice`, a single
    slice of one.  names: of the cases, relative to data_path.  datasets: the data set of each case.
    owner: [stacks] position of the case that a stack is of.  size: S, side of the canvas in pixels.
    """

    def __init__(
        self,
        data_path: Path,
        size: int,
        slices: int,
        cache_path: str | Path | None,
        on_bad: Literal["error", "skip"],
        level: Literal["slice", "volume"],
    ) -> None:
        alone = is_data_set(data_path)
        tree, only = (data_path.resolve().parent, data_path.resolve().name) if alone else (data_path, None)
        cache = cache_path or (data_path / ".cache" if alone else None)
        samples, self.store = prepare(tree, size, cache, on_bad, progress=False, only=only)
        self.size = size
        self.names = [sample.name.split("/", 1)[1] if alone else sample.name for sample in samples]
        self.datasets = [sample.dataset for sample in samples]
        items = np.asarray(Slices(samples, self.store, slices).items)  # [n, 2]: sample and slice, sample by sample
        ends = np.arange(1, len(items)) if level == "slice" else np.flatnonzero(np.diff(items[:, 0])) + 1
        self.stacks = np.split(items, ends)
        self.owner = np.array([stack[0, 0] for stack in self.stacks])

    def read(self, index: int) -> np.ndarray:
        """A stack [D, S, S] float32 in 0..1; D = 1 for an image."""
        return self.read_slices(self.stacks[index])

    def read_slices(self, items: np.ndarray) -> np.ndarray:
        """Slices [n, S, S] of a part of the rows of `stacks`, joined."""
        return np.concatenate([self.store.read(sample, place, place + 1) for sample, place in items.tolist()])

    def extent(self, index: int) -> tuple[int, int]:
        """Height and width in pixels of what the canvas shows of a stack; it is centred."""
        height, width = self.store.extents[self.owner[index]].tolist()
        return height, width


def open_cases(
    data_path: str | Path,
    size: int,
    slices: int = 32,
    cache_path: str | Path | None = None,
    on_bad: Literal["error", "skip"] = "error",
    level: Literal["slice", "volume"] = "volume",
) -> Cases:
    """The cases of a data tree as training reads it, or of a single folder of images or volumes.

    Intensities, windows (`dataset.yaml`) and in-plane size are those of training (`datasets.render`). Folders of
    labels are not entered. on_bad: as in `datasets.store.prepare`. Raises UserError naming what cannot be used.
    """
    root = Path(data_path).expanduser()
    if not root.is_dir():
        raise UserError(f"data_path: {root} is not a folder; give the one that holds the images or volumes")
    volume = next((file for file in _walk(root) if file.name.lower().endswith((".nii", ".nii.gz"))), None)
    if volume:
        raise UserError(
            f"data_path: {root} holds NIfTI files ({volume.name}); prepare them first: "
            f"python prepare_data.py --source {root} --dest Training_Data/{root.resolve().name}, which --data_path "
            "then names"
        )
    return Cases(root, size, slices, cache_path, on_bad, level)


def is_data_set(folder: Path) -> bool:
    """Whether a folder is one data set and not a tree of them: it holds cases, or its dataset.yaml, itself."""
    names = [entry.name for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith(".")]
    return "dataset.yaml" in names or any(without_suffix(name) != name for name in names)


class SliceFeatures(NamedTuple):
    """Frozen features of n slices, stack after stack."""

    pooled: Tensor  # [n, C4] global average of the last stage
    multi_scale: Tensor  # [n, C1 + C2 + C3 + C4] of all stages, each of unit length
    stack: Tensor  # [n] position of the slice's stack in the list that was asked for


@torch.no_grad()
def encode_slices(
    encoder: GreyResNet, cases: Cases, indices: Sequence[int], device: torch.device | str = "cpu"
) -> SliceFeatures:
    """f_intra of every slice of the stacks at `indices`, on the CPU; the encoder is put in eval mode.

    Raises UserError where a feature is not finite.
    """
    encoder.eval().to(device)
    stacks = [cases.stacks[i] for i in indices]
    items = np.concatenate(stacks)
    last, scales = [], []
    for first in range(0, len(items), SLICES_AT_ONCE):
        images = torch.from_numpy(cases.read_slices(items[first : first + SLICES_AT_ONCE]))
        stages = encoder(images.unsqueeze(1).to(device))
        last.append(pooled(stages).cpu())
        scales.append(multi_scale(stages).cpu())
        _require_finite(last[-1])
    owner = torch.arange(len(stacks)).repeat_interleave(torch.tensor([len(stack) for stack in stacks]))
    return SliceFeatures(torch.cat(last), torch.cat(scales), owner)


def mean_of_stacks(features: Tensor, stack: Tensor) -> Tensor:
    """Mean over the slices of each stack: [n, C] and stack [n] -> [stacks, C]."""
    count = int(stack.max()) + 1
    sums = features.new_zeros(count, features.shape[1]).index_add_(0, stack, features)
    return sums / torch.bincount(stack, minlength=count).unsqueeze(1)


@torch.no_grad()
def encode_volumes(encoder: JointEncoder, slices: SliceFeatures, batch_size: int = 16) -> Tensor:
    """f_inter, the holistic embedding of each stack, from its slices in order: [stacks, d], unit length, on the CPU.

    Stacks of different lengths share a batch, padded; the padding is masked and changes nothing.
    """
    encoder.eval()
    device = encoder.projection.weight.device
    parts = slices.multi_scale.split(torch.bincount(slices.stack).tolist())
    embeddings = []
    for first in range(0, len(parts), batch_size):
        batch, mask = pad([part.to(device) for part in parts[first : first + batch_size]])
        tokens = encoder.projection(batch) * mask.unsqueeze(-1)
        embeddings.append(encoder.holistic(tokens, mask).cpu())
        _require_finite(embeddings[-1])
    return torch.cat(embeddings)


def frozen_features(
    encoder: GreyResNet | JointEncoder,
    cases: Cases,
    indices: Sequence[int],
    features: Literal["pooled", "multi_scale"],
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """[stacks, C]: the mean over slices of f_intra and, from a joint encoder, its volume embedding behind it."""
    joint = isinstance(encoder, JointEncoder)
    encoder.to(device)
    slices = encode_slices(encoder.encoder if joint else encoder, cases, indices, device)
    parts = [mean_of_stacks(getattr(slices, features), slices.stack)]
    if joint:
        parts.append(encode_volumes(encoder, slices))
    return torch.cat(parts, dim=1).numpy()


def pad(stacks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stacks [D_i, ...] of different lengths -> batch [B, D, ...] with zeros at the end, mask [B, D]: True if real."""
    lengths = torch.tensor([len(stack) for stack in stacks])
    batch = pad_sequence(list(stacks), batch_first=True)
    return batch, (torch.arange(batch.shape[1]) < lengths.unsqueeze(1)).to(batch.device)


def vote(train: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: int, k: int) -> np.ndarray:
    """Shares [n, classes] of the k nearest training features by cosine similarity, each weighted by exp(s / 0.07).

    Features are centred on the training mean first: pooled features are all positive, and their common mean would hide
    the differences. Source of the weights: Wu et al. 2018 (instance discrimination), as k-NN evaluations use them.
    """
    from sklearn.neighbors import KNeighborsClassifier

    mean, k = train.mean(axis=0), min(k, len(train))
    model = KNeighborsClassifier(k, weights=lambda distance: np.exp(-distance / 0.07), metric="cosine")
    return _probabilities(model.fit(train - mean, labels), test - mean, classes)


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

    def fitted(cost: float) -> Any:
        regression = LogisticRegression(C=cost, class_weight="balanced", max_iter=5000)
        return make_pipeline(StandardScaler(), regression).fit(*train)

    if not len(validation[1]):
        return _probabilities(fitted(1.0), test, classes), 1.0
    models = {cost: fitted(cost) for cost in COSTS}
    scores = {
        cost: validation_score(validation[1], _probabilities(models[cost], validation[0], classes)) for cost in COSTS
    }
    best = max(COSTS, key=scores.get)
    return _probabilities(models[best], test, classes), float(best)


def _probabilities(model: Any, x: np.ndarray, classes: int) -> np.ndarray:
    """[n, classes] of a scikit-learn model that has not seen all classes; 0 for these."""
    result = np.zeros((len(x), classes))
    result[:, model.classes_] = model.predict_proba(x)
    return result


def _require_finite(features: Tensor) -> None:
    if not features.isfinite().all():
        raise UserError("weights: they give features that are NaN or Inf; the file is of a training that diverged")


def _walk(root: Path) -> Iterator[Path]:
    """All files but hidden ones and those in folders of labels."""
    for parent, folders, names in os.walk(root):
        folders[:] = [n for n in folders if not n.startswith(".") and n.lower() not in LABEL_FOLDERS]
        yield from (Path(parent, name) for name in sorted(names) if not name.startswith("."))

"""Does stage 2 know more of hidden slices than its simple rivals? On volumes that it has not seen.

    python -m experiments.skill --weights runs/experiments/recipes/mask_swav_.../weights.pth \\
        --seen runs/experiments/data/pretrain_volumes --unseen runs/experiments/data/tasks

Mean squared error of the hidden slices' embeddings, as a share of what their average leaves, by the transformer, by
linear interpolation between the nearest visible slices, and by ridge regression on these, which is fitted to the
volumes that were seen. Prints a line for each data set; skill is 1 - the transformer's error / the best rival's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveInt
from sklearn.linear_model import RidgeCV
from torch import Tensor

from datasets.loaders import canvas_size, draw_masks
from datasets.store import prepare
from objectives.learners import MaskedSlices
from objectives.masked import interpolate_masked
from training import loading, weights
from utils import config as options
from utils.errors import UserError

ALPHAS = tuple(10.0**k for k in range(-2, 6))  # of the ridge regression, chosen by leaving one out
DRAWS = 4  # of hidden slices, in every volume


@dataclass
class Config:
    weights: str
    """file of mask_*.py, with its record beside it"""
    seen: str
    """data tree that the rival regression is fitted to"""
    unseen: str
    """data tree that is scored"""
    volumes: PositiveInt = 100
    """at most, of each tree, evenly spaced"""
    seed: int = 0
    """of the hidden slices"""


class Hidden(NamedTuple):
    """The hidden slices of one draw in one volume: [m, d] each, `sides` [m, 4 d] of the nearest visible ones."""

    dataset: str
    truth: Tensor
    model: Tensor
    interpolation: Tensor
    sides: Tensor


def main(cfg: Config) -> None:
    learner, record = load(Path(cfg.weights))
    seen, unseen = (list(hidden_slices(learner, record, path, cfg)) for path in (cfg.seen, cfg.unseen))
    inputs, outputs = (torch.cat([getattr(one, name) for one in seen]).numpy() for name in ("sides", "truth"))
    ridge = RidgeCV(ALPHAS).fit(inputs, outputs)
    for dataset, rows in errors(unseen, ridge).items():
        average, *others = rows
        model, interpolation, regression = (error / average for error in others)
        skill = 1 - model / min(1.0, interpolation, regression)
        print(
            f"{dataset}: transformer {model:.3f}, interpolation {interpolation:.3f}, ridge {regression:.3f} of the "
            f"average's error; skill {skill:+.3f}",
            flush=True,
        )


def load(path: Path) -> tuple[MaskedSlices, dict]:
    """Stage 2's learner and the options that it was trained with. Raises UserError for other files."""
    record = loading.read_record(path)
    if not record or record["config"].get("mask_ratio") is None:
        raise UserError(f"weights: {path}: no .json beside it says that it is of mask_*.py; give a file of stage 2")
    learner = MaskedSlices(weights.load_joint(path))
    weights.load_head(learner, path)
    return learner.eval(), record["config"]


@torch.inference_mode()
def hidden_slices(learner: MaskedSlices, made_with: dict, path: str, cfg: Config) -> Iterator[Hidden]:
    """From the middle of every volume as many slices as in training."""
    depth, *size = made_with["target_shape"]
    store = prepare(path, canvas_size(*size), None, "skip", 1, target_shape=made_with["target_shape"])
    volumes = [i for i, sample in enumerate(store.samples) if sample.slices > 2]
    chosen = np.unique(np.linspace(0, len(volumes) - 1, min(cfg.volumes, len(volumes))).astype(int))
    for i in (volumes[k] for k in chosen):
        count = min(depth, store.samples[i].slices)
        first = (store.samples[i].slices - count) // 2
        pixels = torch.from_numpy(store.read(i, first, first + count)).unsqueeze(1).float()
        tokens = learner.encoder.slices(F.interpolate(pixels, size, mode="bilinear", antialias=True))[1][None]
        mask = torch.ones(1, count, dtype=torch.bool)
        for draw in range(DRAWS):
            how = made_with["mask_ratio"], made_with["mask_style"], cfg.seed, draw, 1, count
            hidden = draw_masks(torch.tensor([count]), torch.tensor([i]), *how)
            shown = torch.where(hidden[..., None], learner.mask_token, tokens)
            model = learner.decoder(learner.encoder.transformer(shown, mask))
            between = interpolate_masked(tokens, mask & ~hidden)
            sides = nearest_visible(tokens[0], ~hidden[0])
            parts = (part[hidden] for part in (tokens, model, between, sides[None]))
            yield Hidden(store.samples[i].dataset, *parts)


def nearest_visible(tokens: Tensor, visible: Tensor) -> Tensor:
    """[D, 4 d]: the nearest visible slice on either side of every slice, both plain and weighted by nearness."""
    places = torch.arange(len(tokens))
    there = places[visible]
    right = torch.searchsorted(there, places).clamp(max=len(there) - 1)
    left = (torch.searchsorted(there, places, right=True) - 1).clamp(min=0)
    a, b = there[left], there[right]
    weight = ((places - a).abs() / ((places - a).abs() + (places - b).abs()).clamp(min=1))[:, None]
    return torch.cat([tokens[a], tokens[b], (1 - weight) * tokens[a], weight * tokens[b]], dim=1)


def errors(found: list[Hidden], ridge: RidgeCV) -> dict[str, np.ndarray]:
    """Data set -> mean squared errors of the average (0), the transformer, interpolation and the regression."""
    sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(5))
    for one in found:
        regression = torch.from_numpy(np.atleast_2d(ridge.predict(one.sides.numpy())))
        guesses = (torch.zeros_like(one.truth), one.model, one.interpolation, regression)
        sums[one.dataset] += [*(float((guess - one.truth).square().sum()) for guess in guesses), one.truth.numel()]
    return {dataset: row[:4] / row[4] for dataset, row in sums.items()}


if __name__ == "__main__":
    options.main(main, Config, __doc__)

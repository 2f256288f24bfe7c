"""Which items a prototype attracts, which volumes resemble each other, and where all of them lie in two dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from reporting.embed import Level

MapMethod = Literal["pca", "tsne"]
FEWEST_TO_MAP = 5


@dataclass
class Prototype:
    """One prototype and the items that it is shown by: (item, cosine), best first, or least typical first."""

    index: int
    members: list[int]  # items that are closer to it than to any other prototype
    nearest: list[tuple[int, float]]  # of all items
    farthest: list[tuple[int, float]]  # of its members, those that are not among the nearest


def prototypes_of(level: Level, head: int, shown: int, pictures: int) -> tuple[list[Prototype], int, int]:
    """(the `shown` prototypes with most members, of those with any; how many there are; how many have none)."""
    cosines = level.z @ level.prototypes[head].T  # [N, K]
    assigned = cosines.argmax(dim=1)
    counts = torch.bincount(assigned, minlength=cosines.shape[1])
    order = torch.argsort(counts, descending=True, stable=True)[:shown].tolist()
    found = [_prototype(k, cosines[:, k], assigned == k, pictures) for k in order if counts[k]]
    return found, cosines.shape[1], int((counts == 0).sum())


def _prototype(k: int, cosines: Tensor, is_member: Tensor, pictures: int) -> Prototype:
    nearest = torch.argsort(cosines, descending=True, stable=True)[:pictures].tolist()
    members = is_member.nonzero()[:, 0].tolist()
    others = sorted(set(members) - set(nearest), key=lambda i: float(cosines[i]))[:pictures]
    return Prototype(k, members, *([(i, float(cosines[i])) for i in part] for part in (nearest, others)))


def neighbours(level: Level, query: int, count: int) -> list[tuple[int, float]]:
    """The `count` nearest items of other files than an item's and their cosines, nearest first."""
    sample = torch.tensor([item.index for item in level.items])
    cosines = (level.z @ level.z[query]).masked_fill(sample == sample[query], -2)
    best = torch.argsort(cosines, descending=True, stable=True)[:count].tolist()
    return [(i, float(cosines[i])) for i in best if cosines[i] > -2]


def flatten(z: Tensor, method: MapMethod, seed: int) -> tuple[np.ndarray, str]:
    """[N, d], N >= FEWEST_TO_MAP -> (places [N, 2], what the axes are, in words)."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    x = z.double().numpy()
    if method == "pca":
        model = PCA(2, svd_solver="full")
        places = model.fit_transform(x)
        first, second = 100 * np.nan_to_num(model.explained_variance_ratio_)
        return places, f"principal components; they hold {first:.0f} % and {second:.0f} % of the variance"
    perplexity = min(30.0, (len(x) - 1) / 3)
    places = TSNE(2, perplexity=perplexity, init="random", metric="cosine", random_state=seed).fit_transform(x)
    return places, f"t-SNE of cosine distances, perplexity {perplexity:.0f}; distances between groups mean nothing"

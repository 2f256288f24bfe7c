"""What a run's network makes of data as they are, without augmentation, and which of them it finds alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.batch import Counts
from datasets.index import Sample, volumes
from datasets.loaders import ImageLoader, Slices, VolumeLoader, draw_masks
from datasets.store import SliceStore
from models.resnet import pooled
from models.transformer import AttentionMaps
from objectives.learners import Learner
from objectives.masked import interpolate_masked
from reporting.runs import RunFolder
from utils.checkpoint import explained
from utils.distributed import Run

AT_ONCE = 32  # slices in a forward pass
FEWEST_TO_MAP = 5
Loader = ImageLoader | VolumeLoader
MapMethod = Literal["pca", "tsne"]


class Item(NamedTuple):
    """Slices start..stop-1 of a file: an image, a slice of a volume, or a window of it."""

    store: SliceStore
    index: int
    start: int
    stop: int

    @property
    def sample(self) -> Sample:
        return self.store.samples[self.index]

    @property
    def slices(self) -> int:
        return self.stop - self.start

    @property
    def label(self) -> str:
        if self.sample.kind == "image":
            return self.sample.name
        where = f"slice {self.start}" if self.slices == 1 else f"slices {self.start}-{self.stop - 1}"
        return f"{self.sample.name} {where}"

    def read(self) -> np.ndarray:
        """[slices, S, S] in 0..1."""
        return self.store.read(self.index, self.start, self.stop)

    def spread(self, count: int) -> list[Item]:
        """`count` of its slices, evenly spaced, or all of them where there are fewer."""
        places = spread(self.start, self.stop, min(count, self.slices))
        return [self._replace(start=s, stop=s + 1) for s in places]


def spread(start: int, stop: int, count: int) -> list[int]:
    """Centres of `count` equal parts of start..stop-1."""
    return [int(start + (k + 0.5) * (stop - start) / count) for k in range(count)]


@dataclass
class Level:
    """Embeddings of one kind of items: `intra` (slices and images) or `inter` (volumes)."""

    name: str
    z: Tensor  # [N, d], unit length
    items: list[Item]
    prototypes: list[Tensor]  # unit length [K, d], of every head; none in stage 2

    @property
    def datasets(self) -> list[str]:
        """The data set of every item."""
        return [item.sample.dataset for item in self.items]


def open_data(run: RunFolder, data_path: str | None, cache_path: str | None, workers: int) -> Loader:
    """The loader that the run trains with, or its like for other data. Raises UserError as the scripts' `data` does."""
    changes: dict[str, Any] = {"workers": workers, "cache_path": cache_path or run.config.cache_path}
    if data_path:
        changes |= {"data_path": data_path, "batch_size": 1}  # however few they are
    processes = run.state["processes"] if run.state and not data_path else 1
    return run.script.data(replace(run.config, **changes), Run(0, processes, torch.device("cpu")))


class Network:
    """A run's learner as its checkpoint holds it, in evaluation mode, and the data that it is shown.

    seed: of the choice of items.  Raises UserError where the checkpoint does not fit the run's options.
    """

    def __init__(self, run: RunFolder, loader: Loader, seed: int = 0) -> None:
        self.config, self.stage, self.seed = run.config, run.stage, seed
        self.store: SliceStore = loader.dataset.store
        with explained(run.path):
            self.learner: Learner = run.script.model(run.config, Counts(*run.state["counts"])).eval()
            self.learner.load_state_dict(run.state["learner"])
        # Height and width in pixels that the ResNet was trained on; stage 1: of the large crops.
        self.size = (run.config.size_crops[0],) * 2 if self.stage == 1 else tuple(run.config.target_shape[1:])

    def prototypes(self, level: str) -> list[Tensor]:
        objective = dict(self.learner.objectives()).get(level)
        return [F.normalize(head.weight.detach(), dim=1) for head in objective.prototypes.heads] if objective else []

    def pixels(self, item: Item) -> Tensor:
        """[n, 1, H, W] of an item, resized without augmentation."""
        slices = torch.from_numpy(item.read()).unsqueeze(1)
        return F.interpolate(slices, self.size, mode="bilinear", antialias=True).clamp(0, 1)

    @torch.inference_mode()
    def slices(self, count: int) -> Level | None:
        """`count` slices and images through head and intra prototypes; None where the run has none of these."""
        prototypes = self.prototypes("intra")
        if not prototypes:
            return None
        dataset = Slices(self.store, self.config.slices_per_volume if self.stage == 1 else 0)
        chosen = choose(dataset.groups, count, self.seed)
        items = [Item(self.store, i, s, s + 1) for i, s in dataset.items[chosen].tolist()]
        parts = []
        for start in range(0, len(items), AT_ONCE):
            images = torch.cat([self.pixels(item) for item in items[start : start + AT_ONCE]])
            parts.append(F.normalize(self.learner.head(pooled(self.learner.resnet(images))), dim=1))
        return Level("intra", torch.cat(parts), items, prototypes)

    @torch.inference_mode()
    def volumes(self, count: int) -> Level | None:
        """The middle windows of `count` volumes through the transformer; None in stage 1."""
        items = self.windows(count)
        if not items:
            return None
        z = torch.cat([self.learner.encoder.holistic(*self.tokens(item)) for item in items])
        return Level("inter", z, items, self.prototypes("inter"))

    def windows(self, count: int) -> list[Item]:
        """The middle `target_shape[0]` slices of `count` volumes; none in stage 1, which knows no volumes."""
        if self.stage == 1:
            return []
        samples, items = self.store.samples, []
        where = volumes(samples)
        for k in choose([samples[i].dataset for i in where], count, self.seed):
            total = samples[where[k]].slices
            length = min(total, self.config.target_shape[0])
            start = (total - length) // 2
            items.append(Item(self.store, where[k], start, start + length))
        return items

    def tokens(self, item: Item) -> tuple[Tensor, Tensor]:
        """Slice embeddings [1, D, d] and mask [1, D] of one volume, which needs no padding alone."""
        parts = self.pixels(item).split(AT_ONCE)
        tokens = torch.cat([self.learner.encoder.slices(part)[1] for part in parts]).unsqueeze(0)
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool)

    @torch.inference_mode()
    def attention(self, count: int) -> Iterator[tuple[Item, list[AttentionMaps]]]:
        """What the transformer looks at in `count` volumes, per layer; nothing where attention is not deformable."""
        for item in self.windows(count):
            if maps := self.learner.encoder.transformer.maps(*self.tokens(item)):
                yield item, maps

    @torch.inference_mode()
    def masked_errors(self, count: int) -> Iterator[tuple[Item, pd.DataFrame]]:
        """The mean squared error of every slice of `count` volumes when it is masked, and that of interpolation.

        Slices are masked together as in training, until each was masked at least once. Columns: slice, transformer,
        interpolation. Nothing for runs that predict no masked slices.
        """
        decoder = getattr(self.learner, "decoder", None)  # stage 3 has one where lambda_mask is above 0
        for item in self.windows(count):
            D, how = item.slices, (self.config.mask_ratio, self.config.mask_style, self.seed)
            if decoder is None or D < 2:
                continue
            tokens, mask = self.tokens(item)
            sums, draw = torch.zeros(3, D), 0  # errors of the transformer, of interpolation, times masked
            while not bool(sums[2].all()):
                masked = draw_masks(torch.tensor([D]), torch.tensor([item.index]), *how, draw, 1, D)
                inside = torch.where(masked.unsqueeze(-1), self.learner.mask_token, tokens)
                predicted = decoder(self.learner.encoder.transformer(inside, mask))
                guessed = interpolate_masked(tokens, mask & ~masked)
                errors = [(x - tokens).square().mean(dim=2) * masked for x in (predicted, guessed)]
                sums += torch.cat([*errors, masked])
                draw += 1
            transformer, interpolation = (sums[:2] / sums[2]).numpy()
            slices = range(item.start, item.stop)
            yield item, pd.DataFrame({"slice": slices, "transformer": transformer, "interpolation": interpolation})


class Prototype(NamedTuple):
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
    found = []
    for k in torch.argsort(counts, descending=True, stable=True)[:shown].tolist():
        order = torch.argsort(cosines[:, k], descending=True, stable=True).tolist()
        others = [i for i in reversed(order[pictures:]) if assigned[i] == k][:pictures]
        nearest, farthest = ([(i, float(cosines[i, k])) for i in part] for part in (order[:pictures], others))
        members = (assigned == k).nonzero()[:, 0].tolist()
        found += [Prototype(k, members, nearest, farthest)] if members else []
    return found, len(counts), int((counts == 0).sum())


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


def choose(groups: list[str], count: int, seed: int) -> list[int]:
    """Up to `count` indices, in order: as many of every group as possible, each group in a random order of its own."""
    shuffled = pd.Series(groups).sample(frac=1, random_state=seed)
    turns = shuffled.groupby(shuffled).cumcount().sort_values(kind="stable")
    return sorted(turns.index[:count].tolist())


def attention_over_slices(maps: AttentionMaps, slices: int) -> Tensor:
    """[D, D] of one volume: how much of each row's attention reads each slice, mean over the heads; rows sum to 1.

    A sampled point reads its two neighbouring slices by linear interpolation, so its weight is divided among them.
    """
    positions, weights = maps.positions[0], maps.weights[0]  # [G, n], [heads, D, n]
    hats = (1 - (positions.unsqueeze(-1) - torch.arange(slices)).abs()).clamp(min=0)  # [G, n, D]
    return (weights @ hats.repeat_interleave(len(weights) // len(hats), dim=0)).mean(dim=0)

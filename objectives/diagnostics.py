"""What the clusters are doing, measured on what training computes anyway, and said in words when it goes wrong.

docs/TRAINING.md defines every quantity and says what is healthy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from utils.distributed import all_max, all_sum, rank, world_size

KEPT = 1024  # embeddings per level that spectrum and neighbours are computed from: milliseconds, once per epoch
NEIGHBOURS = 5  # of the vote on the data set of origin
NAN = float("nan")


class Diagnostics:
    """Observes the first head of one objective: what it gets in every training step, summed up once per epoch.

    samples: N, the number of global indices.  prototypes: K.  dim: d.  temperature: of the softmax over prototypes.
    origins: the data set of every index, for the vote; None: no vote.

    Nothing waits for the device before `finish`. All that is kept is joined over the processes there and in `state`,
    so figures depend neither on the number of processes nor on interruptions. Memory: 16 bytes per sample and
    KEPT * d * 4 bytes on the device. A sample that stands in an epoch twice counts with its last place.
    """

    def __init__(
        self,
        samples: int,
        prototypes: int,
        dim: int,
        temperature: float,
        device: torch.device,
        origins: Sequence[str] | None = None,
    ) -> None:
        self.samples, self.prototypes, self.temperature = samples, prototypes, temperature
        self.places = torch.from_numpy(np.linspace(0, samples - 1, min(KEPT, samples)).astype(np.int64)).to(device)
        of_places = [""] if origins is None else [origins[i] for i in self.places.tolist()]
        names, labels = np.unique(of_places, return_inverse=True)
        self.origins = torch.from_numpy(labels.astype(np.int64)).to(device) if len(names) > 1 else None
        # The last row of each takes what does not count: a sample that is not finite or whose embedding is not kept.
        # Step's place in the epoch * K + prototype: the newest is the largest, on one process and over all of them.
        self.latest = torch.full((samples + 1,), -1, dtype=torch.long, device=device)
        self.before = torch.full((samples,), -1, dtype=torch.long, device=device)  # prototypes in the last epoch
        self.kept = torch.zeros(len(self.places) + 1, dim, device=device)
        self.used = torch.zeros(prototypes + 1, dtype=torch.long, device=device)
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # samples, agreeing, entropies
        self.seen = 0  # samples of this epoch, over all processes

    @torch.no_grad()
    def __call__(
        self, z: Tensor, scores: Tensor, index: Tensor, counts: list[int] | None = None, codes: Tensor | None = None
    ) -> None:
        """z [V, B, d] unit length and scores [V, B, K] cosines, of which the first two views count; index [B] global.

        counts: B of every process, None when it is the same on each.  codes: [B, K] soft assignments of one view;
        None: the targets are hard.
        """
        z, scores = z[:2], scores[:2]
        B = len(index)
        fine = z.isfinite().all(dim=2).all(dim=0)
        hard = scores.argmax(dim=2)  # [views, B]
        self.used.index_add_(0, hard.where(fine, self.prototypes).flatten(), torch.ones_like(hard).flatten())
        of_prediction = entropy((scores[0].float() / self.temperature).softmax(dim=1))
        of_target = torch.zeros_like(of_prediction) if codes is None else entropy(codes)
        parts = [torch.ones_like(of_target), (hard[0] == hard[-1]).to(of_target), of_target, of_prediction]
        self.sums += torch.stack(parts).where(fine, 0).double().sum(dim=1)

        first = sum(counts[: rank()]) if counts else B * rank()
        value = (torch.arange(B, device=z.device) + (self.seen + first)) * self.prototypes + hard[0]
        self.latest.scatter_reduce_(0, index.where(fine, self.samples), value, "amax")
        self.seen += sum(counts) if counts else B * world_size()
        slot = torch.searchsorted(self.places, index).clamp(max=len(self.places) - 1)
        keep = fine & (self.places[slot] == index) & (self.latest[index] == value)
        self.kept.index_copy_(0, slot.where(keep, len(self.places)), z[0].to(self.kept))

    def _joint(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Over all processes: latest [N], kept [KEPT, d], used [K], sums [4]."""
        own = self.latest[self.places]
        latest = all_max(self.latest[:-1].clone())
        newest = latest[self.places]
        # After a resume several processes hold the same row: the first of them gives it.
        claim = torch.where((own == newest) & (own >= 0), world_size() - rank(), 0)
        mine = (all_max(claim.clone()) == claim) & (claim > 0)
        kept = all_sum(self.kept[:-1].where(mine.unsqueeze(1), 0))
        return latest, kept, all_sum(self.used[:-1].clone()), all_sum(self.sums.clone())

    @torch.no_grad()
    def finish(self) -> dict[str, float]:
        """The epoch's figures, equal on all processes, which call it together; the next epoch starts from nothing.

        nan: not defined, e.g. the vote with one data set. Waits for the device.
        """
        latest, kept, used, sums = self._joint()
        now = torch.where(latest >= 0, latest % self.prototypes, -1)
        samples, agreeing, of_target, of_prediction = sums.tolist()
        log_k = math.log(self.prototypes)
        per_sample = 1 / (samples * log_k) if samples and log_k else NAN
        there = latest[self.places] >= 0
        z = kept[there]
        labels = None if self.origins is None else self.origins[there]
        figures = {
            "usage": perplexity(used) / self.prototypes,
            "dead": float((used == 0).sum()) if samples else NAN,
            "target_entropy": of_target * per_sample,
            "prediction_entropy": of_prediction * per_sample,
            "agreement": agreeing / samples if samples else NAN,
            "positives": pairs_alike(now[now >= 0]),
            "nmi": normalized_mutual_information(self.before, now),
            "std": spread(z),
            "rank": rankme(z),
            "origin": neighbour_vote(z, labels),
            "origin_chance": largest_share(labels),
        }
        self.before = now
        self._clear()
        return figures

    def _clear(self) -> None:
        self.latest.fill_(-1)
        self.kept.zero_()
        self.used.zero_()
        self.sums.zero_()
        self.seen = 0

    def state(self) -> dict[str, Tensor]:
        """On the CPU, for any number of processes, which call it together."""
        latest, kept, used, sums = self._joint()
        parts = {"latest": latest, "before": self.before, "kept": kept, "used": used, "sums": sums}
        return {name: part.cpu() for name, part in parts.items()} | {"seen": torch.tensor(self.seen)}

    def load(self, state: dict[str, Tensor]) -> None:
        """From `state`. Raises KeyError or RuntimeError when it does not fit."""
        self._clear()
        self.before.copy_(state["before"])
        self.latest[:-1].copy_(state["latest"])
        self.kept[:-1].copy_(state["kept"])
        if rank() == 0:  # what is summed over the processes exists once
            self.used[:-1].copy_(state["used"])
            self.sums.copy_(state["sums"])
        self.seen = int(state["seen"])


def entropy(p: Tensor) -> Tensor:
    """Rows [B, K] that sum to 1 -> [B] in nats; 0 log 0 = 0."""
    return torch.special.entr(p).sum(dim=1)


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of counts [K]: K when all are equal, 1 when one has all; nan when all are 0."""
    total = int(counts.sum())
    return math.exp(float(torch.special.entr(counts.double() / total).sum())) if total else NAN


def pairs_alike(labels: Tensor) -> float:
    """Share of the pairs of different entries of labels [n] that are equal; nan below two entries."""
    n = len(labels)
    counts = torch.unique(labels, return_counts=True)[1].double()
    return float((counts * (counts - 1)).sum() / (n * (n - 1))) if n > 1 else NAN


def normalized_mutual_information(a: Tensor, b: Tensor) -> float:
    """2 I(a; b) / (H(a) + H(b)) of two labellings [N] over the samples that both label (>= 0).

    0: independent, 1: the same up to names. nan where no sample is labelled twice, or each puts all into one cluster.
    """
    both = (a >= 0) & (b >= 0)
    a, b = a[both], b[both]
    if not len(a):
        return NAN
    joint = torch.stack([a, b], dim=1).unique(dim=0, return_counts=True)[1].double() / len(a)
    h_a, h_b = (torch.special.entr(x.unique(return_counts=True)[1].double() / len(a)).sum() for x in (a, b))
    shared = h_a + h_b - torch.special.entr(joint).sum()
    return float(2 * shared.clamp(min=0) / (h_a + h_b)) if h_a + h_b > 0 else NAN


def spread(z: Tensor) -> float:
    """Mean standard deviation per dimension of unit vectors [n, d], times sqrt(d); nan below two of them.

    1: spread over the whole sphere; 0: all the same. Source: Chen and He 2021 (SimSiam), section 4.1.
    """
    return float(z.std(dim=0, correction=0).mean() * z.shape[1] ** 0.5) if len(z) > 1 else NAN


def rankme(z: Tensor, epsilon: float = 1e-7) -> float:
    """exp of the entropy of the singular values of [n, d], as shares: at most min(n, d); nan below two rows.

    Source: Garrido et al. 2023 (RankMe), equation 2. Departs: singular values by the smaller Gram matrix in float64.
    """
    if len(z) < 2:
        return NAN
    z = z.double()
    gram = z.T @ z if len(z) > z.shape[1] else z @ z.T
    sizes = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = sizes / sizes.sum().clamp(min=1e-300) + epsilon
    return math.exp(float(torch.special.entr(p).sum()))


def neighbour_vote(z: Tensor, labels: Tensor | None, k: int = NEIGHBOURS) -> float:
    """Share of unit vectors [n, d] whose label [n] most of their k nearest (cosine; itself left out) have.

    Among equal votes the smallest label wins. nan without labels, with fewer than two of them, or with n <= k.
    """
    if labels is None or len(z) <= k or not bool((labels != labels[0]).any()):
        return NAN
    nearest = (z @ z.T).fill_diagonal_(-torch.inf).topk(k, dim=1).indices
    votes = torch.zeros(len(z), int(labels.max()) + 1, device=z.device)
    votes.scatter_add_(1, labels[nearest], torch.ones_like(nearest, dtype=votes.dtype))
    return float((votes.argmax(dim=1) == labels).double().mean())


def largest_share(labels: Tensor | None) -> float:
    """Of the entries of labels, that of the most frequent one: what always saying it would score. nan without any."""
    if labels is None or not len(labels):
        return NAN
    return int(labels.unique(return_counts=True)[1].max()) / len(labels)

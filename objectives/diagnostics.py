"""What the clusters are doing, measured on what training computes anyway, and said in words when it goes wrong.

docs/DIAGNOSTICS.md defines every quantity and says what is healthy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from objectives.deepcluster import DeepClusterV2
from objectives.learners import Learner
from objectives.sizes import CROWDED
from objectives.swav import SwAV
from utils.distributed import all_max, all_sum, rank, world_size
from utils.profile import span

KEPT = 1024  # embeddings per level that spectrum and neighbours are computed from: milliseconds, once per epoch
NEIGHBOURS = 5  # of the vote on the data set of origin
NAN = float("nan")

# When a figure is a warning. Healthy runs stay far from all of them (docs/DIAGNOSTICS.md has what was measured).
AT_CHANCE = 0.99  # loss / ln K: within 1 % of guessing
UNIFORM = 0.9  # target entropy / ln K: the targets themselves say next to nothing
SAME_POINT = 0.1  # embedding spread: a tenth of the sphere's
SAME_LINE = 1.5  # effective rank: one direction and little else
FEW_SAMPLES = 10  # of an epoch, below which a low rank may be all there is
ONE_PROTOTYPE = 1.5  # perplexity of the usage, in prototypes
JUMP = 0.2  # rise of the loss over an epoch, in ln K
DOMINATES = 0.9  # share of the largest of several data sets among the samples of an epoch
STALE = 2  # epochs that a queue spans: every sample stands in it twice, once as weights of the epoch before saw it
LASTING = ("_collapse", "_chance")  # conditions that must hold for two epochs in a row: one bad epoch often passes
SETTLING_EPOCHS = 1  # after the warm-up, before what takes time to learn is judged
SETTLING_STEPS = 100  # and steps, with prototypes that move: a demonstration of a few steps has learnt little, and may
TRANSIENT_STEPS = 30  # at first a high rate folds the embeddings together, and they unfold again


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
        with span("diagnostics"):
            self._observe(z[:2], scores[:2], index, counts, codes)

    def _observe(
        self, z: Tensor, scores: Tensor, index: Tensor, counts: list[int] | None, codes: Tensor | None
    ) -> None:
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


def origins(loader: Any) -> dict[str, Sequence[str]]:
    """Level -> the data set of every global index of it, for loaders of clustering stages."""
    groups = list(loader.dataset.groups)
    if not hasattr(loader, "slice_offsets"):
        return {"intra": groups}
    slices = np.repeat(np.array(groups, dtype=object), np.diff(loader.slice_offsets.numpy()))
    pictures = loader.image_dataset.groups if loader.image_dataset is not None else []
    return {"inter": groups, "intra": np.concatenate([slices, np.array(pictures, dtype=object)])}


@dataclass(frozen=True)
class Level:
    """What is constant about an objective, in the words of the script's options."""

    name: str  # intra or inter
    prototypes: int  # of the first head
    chance: float  # ln K, mean over heads: the loss of guessing
    batch: int  # embeddings per view and forward pass, over all processes
    queue: int  # embeddings per view
    samples: int  # embeddings per view and epoch
    swav: bool
    ending: str  # of the options of this level

    def option(self, name: str) -> str:
        return f"--{name}{self.ending}"


class Monitor:
    """Attaches `Diagnostics` to every objective of a learner; once per epoch, its figures and its warnings."""

    def __init__(self, core: Learner, loader: Any, config: Any, device: torch.device) -> None:
        self.config, self.loader = config, loader
        self.levels: dict[str, Level] = {}
        self.observers: dict[str, Diagnostics] = {}
        for name, objective in core.objectives():
            self.levels[name] = level(name, objective, loader, config)
            origin = origins(loader)[name]
            head = objective.prototypes.heads[0]
            objective.observer = self.observers[name] = Diagnostics(
                len(origin), head.out_features, head.in_features, objective.temperature, device, origin
            )
        self.raised: list[str] = []  # conditions that hold and were reported
        self.suspected: list[str] = []  # those of the epoch before that count when they last
        self.losses: dict[str, float] = {}  # of the epoch before

    @property
    def chance(self) -> dict[str, float]:
        """Name of a loss -> what guessing scores, where that is known."""
        found = {name: level.chance for name, level in self.levels.items()}
        return {"loss": found["intra"], **found} if self._alone else found

    @property
    def _alone(self) -> bool:
        """Stage 1, whose `loss` is that of its only level."""
        return not hasattr(self.loader, "slice_offsets") and "intra" in self.levels

    def finish(self, epoch: int, means: dict[str, float]) -> tuple[dict[str, float], list[tuple[str, str]]]:
        """Columns for metrics.csv, and (condition, text) of what became wrong; all processes call it together."""
        columns: dict[str, float] = {}
        found: dict[str, str] = {}
        for name, observer in self.observers.items():
            figures = observer.finish()
            columns |= {f"{name}_{key}": value for key, value in figures.items()}
            columns[f"{name}_chance"] = self.levels[name].chance
            loss = means.get("loss" if self._alone else name, NAN)
            found |= self._judge(self.levels[name], epoch, loss, figures)
            self.losses[name] = loss
        if "interpolation" in means:
            loss = means["mask"] if "mask" in means else means["loss"]
            columns["mask_skill"] = 1 - loss / means["interpolation"] if means["interpolation"] else NAN
            if self._settled(epoch) and columns["mask_skill"] <= 0:
                found["masked"] = (
                    f"masked prediction is no better than interpolation between neighbours (error {loss:.3g} against "
                    f"{means['interpolation']:.3g}, skill {columns['mask_skill']:.2f}): train longer, raise "
                    "--mask_ratio or take --mask_style span, which interpolation cannot solve"
                )
        found |= dominating(self.loader)
        lasting = [name for name in found if name.endswith(LASTING)]
        held = {n: text for n, text in found.items() if n not in lasting or n in self.suspected}
        new = [(name, text) for name, text in held.items() if name not in self.raised]
        self.raised, self.suspected = list(held), lasting
        return columns, new

    def _settled(self, epoch: int) -> bool:
        steps = (epoch + 1) * self.loader.steps - getattr(self.config, "freeze_prototypes_niters", 0)
        return epoch >= self.config.warmup_epochs + SETTLING_EPOCHS and steps >= SETTLING_STEPS

    def _judge(self, level: Level, epoch: int, loss: float, figures: dict[str, float]) -> dict[str, str]:
        K, found = level.prototypes, {}
        if self._settled(epoch) and loss > AT_CHANCE * level.chance:
            if figures["target_entropy"] > UNIFORM:
                why = f"the targets are almost uniform (entropy {figures['target_entropy']:.2f} ln K): lower --epsilon"
            else:
                why = "raise --base_lr if it was low, lower it if the loss had been falling, or use fewer prototypes"
            found["chance"] = f"the loss {loss:.4f} is no better than guessing, ln K = {level.chance:.4f}; {why}"
        used = figures["usage"] * K
        signs = []
        if figures["std"] < SAME_POINT:
            signs.append(f"spread {figures['std']:.3f} (1: whole sphere, 0: one point)")
        if figures["rank"] < SAME_LINE and level.samples >= FEW_SAMPLES:
            signs.append(f"effective rank {figures['rank']:.2f}")
        if used < min(ONE_PROTOTYPE, (1 + K) / 2):
            signs.append(f"as few as {used:.2f} of {K} prototypes in use")
        if signs and (epoch + 1) * self.loader.steps >= TRANSIENT_STEPS:
            found["collapse"] = (
                f"the embeddings are collapsing: {', '.join(signs)}; start again with a lower --base_lr, "
                + ("a lower --epsilon or --temperature" if level.swav else "or fewer prototypes")
                + (f", or without a queue ({level.option('queue_length')} 0)" if level.queue else "")
            )
        if level.swav and (level.batch + level.queue) * CROWDED < K:
            found["few"] = (
                f"{level.batch} embeddings per step + a queue of {level.queue} are far fewer than {K} prototypes, "
                "which cannot all be used equally: "
                f"{level.option('queue_length')} {2 * K - level.batch} or fewer prototypes"
            )
        if level.queue > STALE * level.samples:
            found["stale"] = (
                f"the queue of {level.queue} embeddings is {level.queue / level.samples:.1f} epochs long: its oldest "
                f"are {level.queue // level.batch} steps old and from other weights; "
                f"{level.option('queue_length')} {level.samples}, fewer prototypes or more data"
            )
        before = self.losses.get(level.name, NAN)
        if loss - before > JUMP * level.chance:
            found["jump"] = (
                f"the loss rose from {before:.3f} to {loss:.3f} over an epoch: the learning rate may be too high; "
                "lower --base_lr or lengthen --warmup_epochs"
            )
        return {f"{level.name}_{name}": f"{level.name}: {text}" for name, text in found.items()}

    def state(self) -> dict[str, Any]:
        """For the checkpoint; all processes call it together."""
        observers = {name: observer.state() for name, observer in self.observers.items()}
        told = {"raised": list(self.raised), "suspected": list(self.suspected), "losses": dict(self.losses)}
        return {"observers": observers, **told}

    def load(self, state: dict[str, Any]) -> None:
        for name, observer in self.observers.items():
            observer.load(state["observers"][name])
        self.raised, self.suspected = list(state["raised"]), list(state["suspected"])
        self.losses = dict(state["losses"])


def level(name: str, objective: SwAV | DeepClusterV2, loader: Any, config: Any) -> Level:
    sizes = [head.out_features for head in objective.prototypes.heads]
    is_swav = isinstance(objective, SwAV)
    batch = getattr(loader, f"joint_batch_{name}", loader.batches.joint)
    return Level(
        name=name,
        prototypes=sizes[0],
        chance=sum(map(math.log, sizes)) / len(sizes),
        batch=batch,
        queue=objective.queue.shape[1] if is_swav else 0,
        samples=loader.samples * batch // loader.batches.joint,
        swav=is_swav,
        ending=f"_{name}" if hasattr(config, f"nmb_prototypes_{name}") else "",
    )


def dominating(loader: Any) -> dict[str, str]:
    """Whether one of several data sets gives nearly all samples of an epoch."""
    quotas = loader.batches.quotas
    share = max(quotas) / sum(quotas)
    if len(quotas) < 2 or share <= DOMINATES:
        return {}
    largest = loader.batches.members[quotas.index(max(quotas))][0]
    name = getattr(loader, "volumes", loader).dataset.groups[largest]
    return {
        "dominating": f"data set {name} gives {share:.0%} of the samples of an epoch, {len(quotas) - 1} other(s) the "
        "rest: --sampling_temperature 2 or more draws small data sets more often"
    }

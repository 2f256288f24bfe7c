"""When what the clusters do is wrong, said in words with numbers and a remedy.

docs/TRAINING.md defines every quantity and says what is healthy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from objectives.deepcluster import DeepClusterV2
from objectives.diagnostics import NAN, Diagnostics
from objectives.learners import Learner
from objectives.sizes import CROWDED
from objectives.swav import SwAV
from utils.options import of_level

# When a figure is a warning. Healthy runs stay far from all of them (docs/TRAINING.md has what was measured).
AT_CHANCE = 0.99  # loss / ln K: within 1 % of guessing
UNIFORM = 0.9  # target entropy / ln K: the targets themselves say next to nothing
SAME_POINT = 0.1  # embedding spread: a tenth of the sphere's
SAME_LINE = 1.5  # effective rank: one direction and little else
FEW_SAMPLES = 10  # of an epoch, below which a low rank may be all there is
ONE_PROTOTYPE = 1.5  # perplexity of the usage, in prototypes
FEW_USED = 0.1  # usage, after the warm-up: what is left of the prototypes
DEAD = 0.75  # share of the prototypes that no view is assigned to, after the warm-up
FALLEN = 0.2  # effective rank, as a share of the highest so far: said beside other signs
JUMP = 0.2  # rise of the loss over an epoch, in ln K
DOMINATES = 0.9  # share of the largest of several data sets among the samples of an epoch
STALE = 2  # epochs that a queue spans: every sample stands in it twice, once as weights of the epoch before saw it
LASTING = (
    "_collapse",
    "_chance",
    "_dead",
)  # conditions that must hold for two epochs in a row: one bad epoch often passes
SETTLING_EPOCHS = 1  # after the warm-up, before what takes time to learn is judged
SETTLING_STEPS = 100  # and steps, with prototypes that move: a demonstration of a few steps has learnt little, and may
TRANSIENT_STEPS = 30  # at first a high rate folds the embeddings together, and they unfold again


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
            head, groups = objective.prototypes.heads[0], loader.groups[name]
            self.observers[name] = Diagnostics(
                len(groups), head.out_features, head.in_features, objective.temperature, device, groups
            )
        core.observe(self.observers)
        self.raised: list[str] = []  # conditions that hold and were reported
        self.suspected: list[str] = []  # those of the epoch before that count when they last
        self.losses: dict[str, float] = {}  # of the epoch before
        self.ranks: dict[str, float] = {}  # the highest so far
        self.only = core.stage == 1  # there is one level, whose loss may be the whole loss

    def finish(self, epoch: int, means: dict[str, float]) -> tuple[dict[str, float], list[tuple[str, str]]]:
        """Columns for metrics.csv, and (condition, text) of what became wrong; all processes call it together."""
        columns: dict[str, float] = {}
        found: dict[str, str] = {}
        for name, observer in self.observers.items():
            figures = observer.finish()
            columns |= {f"{name}_{key}": value for key, value in figures.items()}
            columns[f"{name}_chance"] = self.levels[name].chance
            loss = means.get(name, means["loss"] if self.only else NAN)
            found |= self._judge(self.levels[name], epoch, loss, figures)
            self.losses[name] = loss
        if "interpolation" in means:
            loss, simple = means["mask"], min(means["interpolation"], means["average"])
            columns["mask_skill"] = 1 - loss / simple if simple else NAN
            if self._settled(epoch) and columns["mask_skill"] <= 0:
                found["masked"] = (
                    f"masked prediction is no better than interpolation or the average (error {loss:.3g} against "
                    f"{simple:.3g}): train longer, raise --mask_ratio or take --mask_style span, which interpolation "
                    "cannot solve"
                )
        found |= dominating(self.loader)
        lasting = [name for name in found if name.endswith(LASTING)]
        held = {n: text for n, text in found.items() if n not in lasting or n in self.suspected}
        new = [(name, text) for name, text in held.items() if name not in self.raised]
        self.raised, self.suspected = list(held), lasting
        return columns, new

    def _settled(self, epoch: int) -> bool:
        """Whether what takes time to learn may be judged."""
        steps = (epoch + 1) * self.loader.steps - getattr(self.config, "freeze_prototypes_niters", 0)
        return epoch >= self.config.warmup_epochs + SETTLING_EPOCHS and steps >= SETTLING_STEPS

    def _judge(self, level: Level, epoch: int, loss: float, figures: dict[str, float]) -> dict[str, str]:
        """Condition -> what is said of it."""
        before, targets, rank = self.losses.get(level.name, NAN), figures["target_entropy"], figures["rank"]
        self.ranks[level.name] = highest = max(self.ranks.get(level.name, 0.0), rank)  # 0 where it is not defined
        warm = epoch >= self.config.warmup_epochs + SETTLING_EPOCHS
        signs = _collapse(level, figures, FEW_USED if warm else 0)
        if signs and rank < FALLEN * highest:
            signs.append(f"effective rank fallen from {highest:.1f} to {rank:.1f}")
        if targets > UNIFORM:
            why = f"the targets are almost uniform (entropy {targets:.2f} ln K): lower --epsilon"
        else:
            why = "raise --base_lr if it was low, lower it if the loss had been falling, or use fewer prototypes"
        cure = "a lower --epsilon or --temperature" if level.swav else "or fewer prototypes"
        cure += f", or without a queue ({level.option('queue_length')} 0)" if level.queue else ""
        conditions = [
            (
                "few",
                level.swav and (level.batch + level.queue) * CROWDED < level.prototypes,
                f"{level.batch} embeddings per step + a queue of {level.queue} are far fewer than {level.prototypes} "
                "prototypes, which cannot all be used equally: "
                f"{level.option('queue_length')} {2 * level.prototypes - level.batch} or fewer prototypes",
            ),
            (
                "stale",
                level.queue > STALE * level.samples,
                f"the queue of {level.queue} embeddings is {level.queue / level.samples:.1f} epochs long: its oldest "
                f"are {level.queue // level.batch} steps old and from other weights; "
                f"{level.option('queue_length')} {level.samples}, fewer prototypes or more data",
            ),
            (
                "chance",
                self._settled(epoch) and loss > AT_CHANCE * level.chance,
                f"the loss {loss:.4f} is no better than guessing, ln K = {level.chance:.4f}; {why}",
            ),
            (
                "collapse",
                signs and (epoch + 1) * self.loader.steps >= TRANSIENT_STEPS,
                f"the embeddings are collapsing: {', '.join(signs)}; start again with a lower --base_lr, {cure}",
            ),
            (
                "dead",
                warm and not signs and figures["dead"] > DEAD * level.prototypes,
                f"{figures['dead']:.0f} of {level.prototypes} prototypes have no sample: fewer prototypes, or a lower "
                "--base_lr",
            ),
            (
                "jump",
                loss - before > JUMP * level.chance,
                f"the loss rose from {before:.3f} to {loss:.3f} over an epoch: the learning rate may be too high; "
                "lower --base_lr or lengthen --warmup_epochs",
            ),
        ]
        return {f"{level.name}_{name}": f"{level.name}: {text}" for name, holds, text in conditions if holds}

    def state(self) -> dict[str, Any]:
        """For the checkpoint; all processes call it together."""
        observers = {name: observer.state() for name, observer in self.observers.items()}
        told = {name: getattr(self, name).copy() for name in ("raised", "suspected", "losses", "ranks")}
        return {"observers": observers, **told}

    def load(self, state: dict[str, Any]) -> None:
        for name, observer in self.observers.items():
            observer.load(state["observers"][name])
        self.raised, self.suspected, self.losses = state["raised"], state["suspected"], state["losses"]
        self.ranks = state.get("ranks", {})  # of runs that began before they were kept


def level(name: str, objective: SwAV | DeepClusterV2, loader: Any, config: Any) -> Level:
    sizes = [head.out_features for head in objective.prototypes.heads]
    is_swav = isinstance(objective, SwAV)
    batch = loader.counts.of(name)[1]
    return Level(
        name=name,
        prototypes=sizes[0],
        chance=sum(map(math.log, sizes)) / len(sizes),
        batch=batch,
        queue=objective.queue.shape[1] if is_swav else 0,
        samples=loader.samples * batch // loader.batches.global_batch,
        swav=is_swav,
        ending=of_level(config, "nmb_prototypes", name)[0].removeprefix("nmb_prototypes"),
    )


def _collapse(level: Level, figures: dict[str, float], few_used: float) -> list[str]:
    """Signs of embeddings or assignments that fall together. few_used: usage that counts as one."""
    K, used, signs = level.prototypes, figures["usage"] * level.prototypes, []
    if figures["std"] < SAME_POINT:
        signs.append(f"spread {figures['std']:.3f} (1: whole sphere, 0: one point)")
    if figures["rank"] < SAME_LINE and level.samples >= FEW_SAMPLES:
        signs.append(f"effective rank {figures['rank']:.2f}")
    if used < min(ONE_PROTOTYPE, (1 + K) / 2) or figures["usage"] < few_used:
        signs.append(f"as few as {used:.2f} of {K} prototypes in use ({figures['dead']:.0f} have no sample)")
    return signs


def dominating(loader: Any) -> dict[str, str]:
    """Whether one of several data sets gives nearly all samples of an epoch."""
    quotas = loader.batches.quotas
    share = max(quotas) / sum(quotas)
    if len(quotas) < 2 or share <= DOMINATES:
        return {}
    largest = loader.batches.members[quotas.index(max(quotas))][0]
    name = loader.dataset.groups[largest]
    return {
        "dominating": f"data set {name} gives {share:.0%} of the samples of an epoch, {len(quotas) - 1} other(s) the "
        "rest: --sampling_temperature 2 or more draws small data sets more often"
    }

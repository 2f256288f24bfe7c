"""What benchmarks of training share: options, volumes, steps as `training.train` makes them, where time goes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import nn
from torch.optim import Optimizer

from benchmarks.data import write_raw
from datasets.augment import VolumeViews
from datasets.loaders import VolumeLoader, VolumeWindows, canvas_size
from datasets.store import prepare
from models.encoder import JointEncoder
from models.heads import ProjectionHead
from objectives import JointClustering, SwAV
from training import train
from training.monitor import Monitor
from utils import distributed, guards, optim, profile
from utils.distributed import Run
from utils.precision import Precision

DISTINCT = 8  # volumes of a tree that differ


@dataclass
class Options:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where"""
    arch: str = "resnet50"
    """torchvision ResNet"""
    target_shape: tuple[PositiveInt, PositiveInt, PositiveInt] = (64, 128, 128)
    """slices, height and width of a view"""
    batch_size: PositiveInt = 1
    """volumes per step; a GPU wants 16"""
    workers: NonNegativeInt = 0
    """data-loading processes"""


def file_name(name: str, cfg: Options) -> str:
    """Of a results' file: another network or other views do not replace the usual ones."""
    shape = tuple(cfg.target_shape)
    if (cfg.arch, shape) == (Options.arch, Options.target_shape):
        return name
    return f"{name}_{cfg.arch}_{'x'.join(map(str, shape))}"


def write_volumes(root: Path, shape: tuple[int, int, int], count: int) -> None:
    """`count` volumes below `root`, most of them further names (hard links) of the first few.

    With so many that an epoch does not end within what is measured, data-loading processes never start anew there.
    """
    write_raw(root, shape, "int16", min(count, DISTINCT))
    for i in range(DISTINCT, count):
        os.link(root / "Raw" / f"{i % DISTINCT}.npy", root / "Raw" / f"{i}.npy")


def volume_loader(root: Path, cfg: Options, run: Run, **kinds: Any) -> VolumeLoader:
    """Volumes below `root`.  kinds: what `VolumeLoader` gives beside their views (`mask_ratio`, `intra_slices`)."""
    slices, height, width = cfg.target_shape
    samples, store = prepare(root, canvas_size(height, width), workers=max(1, cfg.workers), progress=False)
    views = VolumeViews(height, width, "strong", 0)
    return VolumeLoader(VolumeWindows(samples, store, slices, 0), views, cfg.batch_size, cfg.workers, 0, run, **kinds)


def joint_learner(arch: str, intra: int, inter: int) -> JointClustering:
    """The learner of stage 3 with SwAV and so many prototypes."""
    encoder = JointEncoder(arch)
    d_model = encoder.projection.out_features
    head = ProjectionHead(encoder.encoder.num_features)
    return JointClustering(encoder, head, SwAV(128, [intra]), SwAV(d_model, [inter]))


class Training:
    """Steps of stage 1 or 3 with all that `training.train.fit` does in one, its observers too; the parts are its spans.

    Without what fit does between steps: progress bar, log, checkpoints.
    """

    def __init__(self, learner: nn.Module, loader: Any, precision: str, run: Run) -> None:
        self.learner, self.loader, self.run = distributed.wrap(learner, run).train(), loader, run
        self.precision = Precision(precision, run.device)
        self.optimizer: Optimizer = optim.LARC(optim.parameter_groups(self.learner, 1e-6), 0.3)
        self.core = core = distributed.unwrap(self.learner)
        Monitor(core, loader, None, run.device)  # attaches observers; its options are for the end of an epoch
        self.statistics = guards.BatchNormStatistics(core)
        self.done, self.sums = 0, {}
        for views in {"views", "crops"} & vars(loader).keys():
            setattr(loader, views, profile.spanned("augment", getattr(loader, views)))
        self.batches = self._batches()
        self.batch = next(self.batches)

    def _batches(self) -> Iterator[dict[str, Any]]:
        epoch = 0
        while True:
            yield from self.loader.epoch(epoch)
            epoch += 1

    def step(self, joined: bool = True) -> None:
        """joined: with the gradients of the other processes, as always in training."""
        with profile.span("other"):
            self.statistics.remember()
            train.seed_dropout(0, self.done, self.run.rank)
            with distributed.gradients_stay_local(self.learner, not joined):
                with self.precision.autocast(), profile.span("forward"):
                    losses = self.learner(**self.batch)
                with profile.span("backward"):
                    self.precision.backward(losses["loss"])
            self.core.cancel_gradients(self.done)
            samples = sum(self.batch["counts"])
            totals = {name: value.detach().float() * samples for name, value in losses.items()}
            with profile.span("data"):
                self.batch = next(self.batches)
            means = {name: value / samples for name, value in totals.items()}
            with profile.span("optimizer"):
                agreed = train._agree(means, guards.gradients_are_finite(self.optimizer), False, self.run)
                if agreed.finite and (agreed.gradients_finite or self.precision.may_overflow()):
                    self.precision.step(self.optimizer)
                    for name, value in agreed.means.items():
                        self.sums[name] = self.sums.get(name, 0.0) + value * samples
                else:
                    self.statistics.restore()
                self.optimizer.zero_grad(set_to_none=True)
            self.done += 1


def recorded(step: Callable[[], object], device: torch.device) -> tuple[Callable[[], None], list[dict[str, float]]]:
    """The step, and a list to which each of its calls adds the seconds of its parts (spans of `utils.profile`)."""
    calls: list[dict[str, float]] = []

    def work() -> None:
        with profile.recording(device) as spans:
            step()
        calls.append(spans.seconds())

    return work, calls


def shares(calls: Sequence[dict[str, float]]) -> dict[str, float]:
    """Part -> its share of the time of these calls."""
    total = sum(sum(parts.values()) for parts in calls)
    return {part: sum(parts[part] for parts in calls) / total for part in sorted(calls[0])}

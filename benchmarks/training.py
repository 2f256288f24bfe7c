"""What benchmarks of training share: options, volumes, steps as `utils.train` makes them, and where their time goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import nn
from torch.optim import Optimizer

from datasets.augment import VolumeViews
from datasets.loaders import VolumeLoader, VolumeWindows, canvas_size
from datasets.store import prepare
from models.encoder import JointEncoder
from models.heads import ProjectionHead
from objectives import JointClustering, SwAV
from utils import distributed, guards, optim, profile
from utils.distributed import Run
from utils.precision import Precision


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


def volume_loader(root: Path, cfg: Options, run: Run, **kinds: Any) -> VolumeLoader:
    """Volumes below `root`.  kinds: what `VolumeLoader` gives beside their views (`mask_ratio`, `intra_slices`)."""
    slices, height, width = cfg.target_shape
    samples, store = prepare(root, canvas_size(height, width), progress=False)
    views = VolumeViews(height, width, "strong", 0)
    return VolumeLoader(VolumeWindows(samples, store, slices, 0), views, cfg.batch_size, cfg.workers, 0, run, **kinds)


def joint_learner(arch: str, intra: int, inter: int) -> JointClustering:
    """The learner of stage 3 with SwAV and so many prototypes."""
    encoder = JointEncoder(arch)
    d_model = encoder.projection.out_features
    head = ProjectionHead(encoder.encoder.num_features)
    return JointClustering(encoder, head, SwAV(128, [intra]), SwAV(d_model, [inter]))


class Training:
    """Steps of stage 1 or 3 as `utils.train` makes them, without its log and checkpoints; the parts are spans."""

    def __init__(self, learner: nn.Module, loader: Any, precision: str, run: Run) -> None:
        self.learner, self.loader = distributed.wrap(learner, run).train(), loader
        self.precision = Precision(precision, run.device)
        self.optimizer: Optimizer = optim.LARC(optim.parameter_groups(self.learner, 1e-6), 0.3)
        core = distributed.unwrap(self.learner)
        if isinstance(core, JointClustering):
            core.encoder.slices = profile.spanned("f_intra", core.encoder.slices)
            core.encoder.holistic = profile.spanned("f_inter", core.encoder.holistic)
        else:
            core.embed = profile.spanned("f_intra", core.embed)  # the head, within, is the objective's
        core.head.forward = profile.spanned("objective", core.head.forward)
        for views in {"views", "crops"} & vars(loader).keys():
            setattr(loader, views, profile.spanned("augmentation", getattr(loader, views)))
        self.batches = self._batches()
        self.batch = next(self.batches)

    def _batches(self) -> Iterator[dict[str, Any]]:
        epoch = 0
        while True:
            yield from self.loader.epoch(epoch)
            epoch += 1

    def step(self) -> None:
        with profile.span("other"):
            with self.precision.autocast():
                loss = self.learner(**self.batch)["loss"]
            with profile.span("backward"):
                self.precision.backward(loss)
            with profile.span("data wait"):
                self.batch = next(self.batches)
            with profile.span("optimiser"):
                if bool(guards.gradients_are_finite(self.optimizer)):
                    self.precision.step(self.optimizer)
                self.optimizer.zero_grad(set_to_none=True)


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

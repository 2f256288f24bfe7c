"""What benchmarks of training share: volumes on disk, a script's own updates on them, and where their time goes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse.typing import NonNegativeInt, PositiveInt

from datasets.loaders import OneAhead
from training import scripts
from training.train import Training
from utils import profile
from utils.distributed import Run

DISTINCT = 8  # volumes of a tree that differ; the others are further names (hard links) of these


@dataclass
class Options:
    """Options of every benchmark of training."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to measure"""
    arch: str = "resnet50"
    """torchvision ResNet"""
    target_shape: tuple[PositiveInt, PositiveInt, PositiveInt] = (64, 128, 128)
    """slices, height and width of a view"""
    batch_size: PositiveInt = 1
    """volumes per step; a GPU wants 16"""
    workers: NonNegativeInt = 0
    """data-loading processes"""
    precisions: tuple[Literal["fp32", "bf16"], ...] = ()
    """number formats; none: fp32, and bf16 where the device computes in it"""


def write_volumes(root: Path, shape: tuple[int, int, int], count: int, dtype: str = "int16") -> None:
    """Volumes H x W x slices below `root` as a scanner might give them: smooth structures and noise."""
    (root / "Raw").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        file = root / "Raw" / f"{i}.npy"
        if i >= DISTINCT:
            os.link(file.with_name(f"{i % DISTINCT}.npy"), file)
            continue
        coarse = torch.from_numpy(rng.normal(0, 300, (1, 1, 12, 12, 8)))
        volume = F.interpolate(coarse, size=shape, mode="trilinear")[0, 0].numpy() + rng.normal(0, 20, shape)
        np.save(file, volume.astype(dtype))


def config_of(script: str, data: Path, device: torch.device, **options: Any) -> Any:
    """A script's own options but for these, from random weights."""
    module = scripts.load(script)
    values = {"data_path": str(data), "dump_path": str(data.with_name("run")), "resnet_pretrained": "none"}
    if module.Config.stage == 3:
        values["trans_pretrained"] = "none"
    return module.Config(**values | {"device": device.type} | options)


def training_of(script: str, data: Path, run: Run, **options: Any) -> Training:
    """What a script trains with on the volumes below `data`."""
    module, cfg = scripts.load(script), config_of(script, data, run.device, **options)
    torch.manual_seed(cfg.seed)
    loader = module.data(cfg, run)
    return Training(module.model(cfg, loader.counts), loader, cfg, run)


class Updates:
    """A training's updates, one per call, as they follow each other within its epochs."""

    def __init__(self, training: Training) -> None:
        self.training, self.done = training, 0
        training.core.begin_epoch(0)
        training.learner.train()
        self.batches = OneAhead(batch for epoch in itertools.count() for batch in training.loader.epoch(epoch))

    def __call__(self) -> None:
        with profile.span("other"):
            self.training.update(self.batches, self.done)
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

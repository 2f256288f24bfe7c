"""What benchmarks of training share: volumes on disk, a script's own updates on them, and where their time goes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from datasets.loaders import OneAhead
from training import scripts
from training.train import Training
from utils import profile
from utils.distributed import Run

DISTINCT = 8  # volumes of a tree that differ; the others are further names (hard links) of these


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


def split(step: Callable[[], object], repeats: int, device: torch.device) -> dict[str, float]:
    """Part of a step -> its share of the time of so many of them (spans of `utils.profile`)."""
    with profile.recording(device) as spans:
        for _ in range(repeats):
            step()
    seconds = spans.seconds()
    return {part: seconds[part] / sum(seconds.values()) for part in sorted(seconds)}

"""Augmentation alone: seven views of a volume, one by each transform of policy `paper`, ours and TorchIO's.

    python -m benchmarks.augmentation                  # CPU
    python -m benchmarks.augmentation --device cuda    # views per second on the GPU

Ours starts from half-precision canvases on the device, as training does, and ends with float32 views; drawing the
parameters is included. TorchIO, which works on the CPU alone, starts from the cropped float32 volume; both draw their
parameters anew from the same ranges, and take turns. Then both policies as training uses them: two views of a volume,
and the crops of an image.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt

from benchmarks import plain, timing
from datasets.augment import PAPER_TRANSFORMS, MultiCrop, VolumeViews
from datasets.loaders import canvas_size
from utils import config as options
from utils import distributed

CROPS = {"sizes": [(224, 224), (96, 96)], "counts": [2, 6], "scales": [(0.3, 1.0), (0.05, 0.3)]}


@dataclass
class Config:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to augment"""
    target_shape: tuple[PositiveInt, PositiveInt, PositiveInt] = (64, 128, 128)
    """slices, height and width of a view"""
    batch_size: NonNegativeInt = 0
    """volumes or images per call; 0: 1 on a CPU, which works on one at a time anyway, 32 on a GPU"""
    repeats: PositiveInt = 15
    """measurements of each kind"""


def main(cfg: Config) -> None:
    device = distributed.start(cfg.device).device
    samples = cfg.batch_size or (32 if device.type == "cuda" else 1)
    print(f"{samples} sample(s) a call, {timing.device_name(device)}")
    views = timing.compare(seven_views(cfg, samples, device), cfg.repeats, device=device)
    policies = timing.compare(both_policies(cfg, samples, device), cfg.repeats, device=device, pairs=[])
    for name, record in policies.items():
        record["per_second"] = samples * (2 if name.startswith("views") else 1) / record["median_s"]
        print(f"  {name}: {record['per_second']:,.1f} {'views' if name.startswith('views') else 'images'} per second")
    results = {"view": list(cfg.target_shape), "samples": samples, "seven views": views, "policies": policies}
    timing.write(timing.file_name("augmentation", cfg, "target_shape"), results, device)


def seven_views(cfg: Config, samples: int, device: torch.device) -> dict[str, Callable[[], object]]:
    depth, height, width = cfg.target_shape
    ours, canvases, epochs = (
        VolumeViews(height, width, "paper", seed=0),
        volumes(cfg, samples, device),
        itertools.count(),
    )
    work: dict[str, Callable[[], object]] = {
        "ours": lambda: ours(*canvases, next(epochs), views=len(PAPER_TRANSFORMS)),
    }
    if plain.installed("torchio"):
        theirs, crop = plain.released_transforms(), torch.rand(1, depth, height, width)
        work["TorchIO"] = lambda: [transform(crop) for transform in theirs for _ in range(samples)]
    return work


def both_policies(cfg: Config, samples: int, device: torch.device) -> dict[str, Callable[[], object]]:
    canvases, epochs = volumes(cfg, samples, device), itertools.count()
    side = canvas_size(*CROPS["sizes"][0])
    images = torch.rand(samples, side, side, device=device).half()
    extents, index = torch.full((samples, 2), int(0.9 * side)), torch.arange(samples)
    work: dict[str, Callable[[], object]] = {}
    for policy in ("paper", "strong"):
        views = VolumeViews(*cfg.target_shape[1:], policy, seed=0)
        crops = MultiCrop(**CROPS, policy=policy, seed=0)
        work[f"views {policy}"] = lambda views=views: views(*canvases, next(epochs))
        work[f"crops {policy}"] = lambda crops=crops: crops(images, extents, index, next(epochs))
    return work


def volumes(cfg: Config, samples: int, device: torch.device) -> tuple[Any, ...]:
    """Canvases on the device, mask, extents and indices, as the loader hands them over."""
    slices, *sides = cfg.target_shape
    side = canvas_size(*sides)
    x = torch.rand(samples, slices, side, side, device=device).half()
    mask = torch.ones(samples, slices, dtype=torch.bool)
    return x, mask, torch.full((samples, 2), int(0.9 * side)), torch.arange(samples)


if __name__ == "__main__":
    options.main(main, Config, __doc__)

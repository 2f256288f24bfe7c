"""From files to augmented views: volumes per second of a loader, then views and crops per second of augmentation.

    python -m benchmarks.data                                    # minutes on two cores
    python -m benchmarks.data --parts [views] --device cuda      # augmentation on the GPU

loader  Epochs, from the second on, of mask_swav.py's loader with policy `paper`, without and with loading processes.
        Always on the CPU. The temporary folder (TMPDIR) holds 1.5 GB meanwhile.
views   Two views of a volume and the crops of an image, with each policy, from half-precision canvases on the device,
        as training has them; drawing the parameters is included.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt

from benchmarks import common
from benchmarks.common import config_of, write_volumes
from datasets.augment import MultiCrop, VolumeViews
from datasets.loaders import canvas_size
from training import scripts
from utils import config as options
from utils import distributed
from utils.distributed import Run

BATCH = 4  # volumes that the loaders yield at a time
RAW = {"512 x 512 x 200 int16": ((512, 512, 200), "int16"), "240 x 240 x 155 float64": ((240, 240, 155), "float64")}
CROPS = {"sizes": [(224, 224), (96, 96)], "counts": [2, 6], "scales": [(0.3, 1.0), (0.05, 0.3)]}


@dataclass
class Config(common.Options):
    parts: tuple[Literal["loader", "views"], ...] = ("loader", "views")
    """what to measure"""
    target_shape: tuple[PositiveInt, PositiveInt, PositiveInt] = (64, 128, 128)
    """slices, height and width of a view"""
    volumes: PositiveInt = 8
    """loader: raw volumes of each kind"""
    workers: tuple[NonNegativeInt, ...] = (0, 2)
    """loader: loading processes, one measurement each"""


def main(cfg: Config) -> None:
    device = distributed.start(cfg.device).device
    results: dict[str, Any] = {"view": list(cfg.target_shape)}
    if "loader" in cfg.parts:
        results["loader"] = measure_loaders(cfg)
    if "views" in cfg.parts:
        results["views"] = measure_views(cfg, device)
    common.write(results, device)


def measure_loaders(cfg: Config) -> dict[str, Any]:
    found: dict[str, Any] = {"volumes": cfg.volumes}
    device, numbers = torch.device("cpu"), itertools.count()
    with tempfile.TemporaryDirectory(prefix="benchmark_data_") as folder:
        for name, (shape, dtype) in RAW.items():
            root, work = Path(folder, name), {}
            write_volumes(root, shape, cfg.volumes, dtype)
            print(f"\nan epoch of {cfg.volumes} volumes {name}, two views each")
            for workers in cfg.workers:
                chosen = {"target_shape": cfg.target_shape, "batch_size": BATCH, "workers": workers, "policy": "paper"}
                script_config = config_of("mask_swav", root, device, **chosen)
                loader = scripts.load("mask_swav").data(script_config, Run(0, 1, device))
                work[f"{workers} workers"] = lambda loader=loader: [None for _ in loader.epoch(next(numbers))]
            found[name] = rates(work, cfg, device, cfg.volumes)
    return found


def measure_views(cfg: Config, device: torch.device) -> dict[str, Any]:
    samples = 32 if device.type == "cuda" else 1  # a CPU works on one at a time anyway
    print(f"\n{samples} sample(s) a call, {common.device_name(device)}")
    canvases = canvases_of(cfg.target_shape, samples, device)
    images, _, *places = canvases_of((1, *CROPS["sizes"][0]), samples, device)
    epochs, work = itertools.count(), {}
    for policy in ("paper", "strong"):
        views, crops = VolumeViews(*cfg.target_shape[1:], policy, seed=0), MultiCrop(**CROPS, policy=policy, seed=0)
        work[f"two views, {policy}"] = lambda views=views: views(*canvases, next(epochs))
        work[f"crops, {policy}"] = lambda crops=crops: crops(images[:, 0], *places, next(epochs))
    return {"samples": samples} | rates(work, cfg, device, samples)


def rates(work: dict[str, Callable[[], object]], cfg: Config, device: torch.device, samples: int) -> dict[str, Any]:
    """Times of each piece, and how many of its samples that is a second."""
    found = common.compare(work, cfg.repeats, device)
    for name, record in found.items():
        record["samples_per_second"] = samples / record["median_s"]
        print(f"  {name}: {record['samples_per_second']:,.1f} per second")
    return found


def canvases_of(shape: tuple[int, int, int], samples: int, device: torch.device) -> tuple[Any, ...]:
    """Canvases on the device, mask, extents and indices, as the loader hands them over."""
    slices, side = shape[0], canvas_size(*shape[1:])
    x = torch.rand(samples, slices, side, side, device=device).half()
    mask = torch.ones(samples, slices, dtype=torch.bool)
    return x, mask, torch.full((samples, 2), int(0.9 * side)), torch.arange(samples)


if __name__ == "__main__":
    options.main(main, Config, __doc__)

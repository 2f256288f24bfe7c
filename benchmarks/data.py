"""From files to augmented views: our loader beside a plain pipeline written with TorchIO, then augmentation alone.

    python -m benchmarks.data                                    # about 10 minutes on two cores
    python -m benchmarks.data --parts [views] --device cuda      # views per second on the GPU

loader  Epochs from the second on take turns, over the same files in the same process. Plain: np.load of the whole file,
        CropOrPad, two views by one random TorchIO transform each. Ours: the loader of mask_swav.py with policy `paper`.
        With `workers`, reading (plain: everything) is done by that many processes. Always on the CPU. The temporary
        folder (TMPDIR) holds 1.5 GB meanwhile.
views   Seven views of a volume, one by each transform of policy `paper`, ours and TorchIO's. Ours starts from
        half-precision canvases on the device, as training does, and ends with float32 views; drawing the parameters is
        included. TorchIO, which works on the CPU alone, starts from the cropped float32 volume. Then both policies as
        training uses them: two views of a volume, and the crops of an image.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch.utils.data import DataLoader, Dataset

from benchmarks import common, plain
from benchmarks.common import config_of, write_volumes
from datasets.augment import PAPER_TRANSFORMS, MultiCrop, VolumeViews
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


class PlainVolumes(Dataset):
    """The plain way: index -> [2, 1, H, W, D], everything per sample and on the CPU."""

    def __init__(self, root: Path, cfg: Config) -> None:
        import torchio as tio

        slices, height, width = cfg.target_shape
        self.files = sorted((root / "Raw").glob("*.npy"))
        self.crop, self.augment = tio.CropOrPad((height, width, slices)), tio.OneOf(plain.released_transforms())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        volume = self.crop(torch.from_numpy(np.load(self.files[index])).float()[None])
        return torch.stack([self.augment(volume), self.augment(volume)])


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
    with tempfile.TemporaryDirectory(prefix="benchmark_data_") as folder:
        for name, (shape, dtype) in RAW.items():
            write_volumes(Path(folder, name), shape, cfg.volumes, dtype)
            for workers in cfg.workers:
                print(f"\nan epoch of {cfg.volumes} volumes {name}, two views each, {workers} workers")
                work = epochs(Path(folder, name), workers, cfg)
                found[f"{name}, {workers} workers"] = common.compare(work, cfg.repeats)
    return found


def epochs(root: Path, workers: int, cfg: Config) -> common.Work:
    chosen = {"target_shape": cfg.target_shape, "batch_size": BATCH, "workers": workers, "policy": "paper"}
    device = torch.device("cpu")
    ours = scripts.load("mask_swav").data(config_of("mask_swav", root, device, **chosen), Run(0, 1, device))
    numbers = itertools.count()
    work: dict[str, Callable[[], object]] = {"ours": lambda: [None for _ in ours.epoch(next(numbers))]}
    if plain.installed("torchio"):
        theirs = DataLoader(PlainVolumes(root, cfg), BATCH, True, num_workers=workers, persistent_workers=workers > 0)
        work["plain"] = lambda: [None for _ in theirs]
    return work


def measure_views(cfg: Config, device: torch.device) -> dict[str, Any]:
    slices, height, width = cfg.target_shape
    samples = 32 if device.type == "cuda" else 1  # a CPU works on one at a time anyway
    print(f"\n{samples} sample(s) a call, {common.device_name(device)}")
    canvases = canvases_of(cfg.target_shape, samples, device)
    images, _, *places = canvases_of((1, *CROPS["sizes"][0]), samples, device)
    epochs, ours = itertools.count(), VolumeViews(height, width, "paper", seed=0)
    seven: dict[str, Callable[[], object]] = {"ours": lambda: ours(*canvases, next(epochs), len(PAPER_TRANSFORMS))}
    if plain.installed("torchio"):
        theirs, crop = plain.released_transforms(), torch.rand(1, slices, height, width)
        seven["TorchIO"] = lambda: [transform(crop) for transform in theirs for _ in range(samples)]
    found: dict[str, Any] = {"samples": samples, "seven": common.compare(seven, cfg.repeats, device=device)}
    policies: dict[str, Callable[[], object]] = {}
    for policy in ("paper", "strong"):
        views, crops = VolumeViews(height, width, policy, seed=0), MultiCrop(**CROPS, policy=policy, seed=0)
        policies[f"views {policy}"] = lambda views=views: views(*canvases, next(epochs))
        policies[f"crops {policy}"] = lambda crops=crops: crops(images[:, 0], *places, next(epochs))
    found["policies"] = common.compare(policies, cfg.repeats, device=device, pairs=[])
    for name, record in found["policies"].items():
        each, what = (2, "views") if name.startswith("views") else (1, "images")
        record["per_second"] = samples * each / record["median_s"]
        print(f"  {name}: {record['per_second']:,.1f} {what} per second")
    return found


def canvases_of(shape: tuple[int, int, int], samples: int, device: torch.device) -> tuple[Any, ...]:
    """Canvases on the device, mask, extents and indices, as the loader hands them over."""
    slices, side = shape[0], canvas_size(*shape[1:])
    x = torch.rand(samples, slices, side, side, device=device).half()
    mask = torch.ones(samples, slices, dtype=torch.bool)
    return x, mask, torch.full((samples, 2), int(0.9 * side)), torch.arange(samples)


if __name__ == "__main__":
    options.main(main, Config, __doc__)

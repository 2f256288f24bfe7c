"""From files to two augmented views: our loader beside a plain pipeline written with TorchIO.

    python -m benchmarks.data                      # about 10 minutes on two cores

Epochs from the second on take turns, over the same files in the same process. Plain: np.load of the whole file,
CropOrPad, two views by one random TorchIO transform each. Ours: the loader of mask_swav.py with policy `paper`. With
`workers`, reading (plain: everything) is done by that many processes.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch.utils.data import DataLoader, Dataset

from benchmarks import plain, timing
from benchmarks.training import config_of, write_volumes
from training import scripts
from utils import config as options
from utils.distributed import Run

SCRIPT = "mask_swav"
BATCH = 4
RAW = {"512 x 512 x 200 int16": ((512, 512, 200), "int16"), "240 x 240 x 155 float64": ((240, 240, 155), "float64")}


@dataclass
class Config:
    target_shape: tuple[PositiveInt, PositiveInt, PositiveInt] = (64, 128, 128)
    """slices, height and width of a view"""
    volumes: PositiveInt = 8
    """raw volumes of each kind"""
    repeats: PositiveInt = 5
    """timed epochs of each pipeline"""
    workers: tuple[NonNegativeInt, ...] = (0, 2)
    """loading processes, one measurement each"""
    folder: str | None = None
    """where to put the data (1.5 GB, removed afterwards); null: the system's temporary folder"""


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
    results: dict[str, Any] = {"view": list(cfg.target_shape), "volumes": cfg.volumes}
    with tempfile.TemporaryDirectory(prefix="benchmark_data_", dir=cfg.folder) as folder:
        for name, (shape, dtype) in RAW.items():
            write_volumes(Path(folder, name), shape, cfg.volumes, dtype)
            for workers in cfg.workers:
                print(f"\nan epoch of {cfg.volumes} volumes {name}, two views each, {workers} workers")
                work = epochs(Path(folder, name), workers, cfg)
                results[f"{name}, {workers} workers"] = timing.compare(work, cfg.repeats)
    timing.write(timing.file_name("data", cfg, "target_shape"), results)


def epochs(root: Path, workers: int, cfg: Config) -> dict[str, Callable[[], object]]:
    chosen = {"target_shape": cfg.target_shape, "batch_size": BATCH, "workers": workers, "policy": "paper"}
    device = torch.device("cpu")
    ours = scripts.load(SCRIPT).data(config_of(SCRIPT, root, device, **chosen), Run(0, 1, device))
    numbers = itertools.count()
    work: dict[str, Callable[[], object]] = {"ours": lambda: [None for _ in ours.epoch(next(numbers))]}
    if plain.installed("torchio"):
        theirs = DataLoader(PlainVolumes(root, cfg), BATCH, True, num_workers=workers, persistent_workers=workers > 0)
        work["plain"] = lambda: [None for _ in theirs]
    return work


if __name__ == "__main__":
    options.main(main, Config, __doc__)

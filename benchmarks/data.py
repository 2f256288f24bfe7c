"""What a sample costs from the raw tree to two augmented views, beside a plain pipeline written with TorchIO.

    python -m benchmarks.data                      # all of it, about 10 minutes on two cores
    python -m benchmarks.data --parts [cache]      # or: pipeline, start

pipeline  an epoch from the second on. Plain: np.load of the whole file, CropOrPad, two views by one random TorchIO
          transform each. Ours: the loader of mask_swav.py with policy `paper`. Same files, same process, in turns. With
          `workers`, reading (plain: everything) is done by that many processes.
cache     building it, beside only reading the same files and resizing them: the least that any cache must do.
start     from the options to the first batch: the first time, and with a finished cache, for many small files.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch.utils.data import DataLoader, Dataset

from benchmarks import plain, timing
from benchmarks.training import config_of, write_volumes
from datasets.loaders import VolumeLoader, canvas_size
from training import scripts
from utils import config as options
from utils.distributed import Run

SCRIPT = "mask_swav"
VIEW = (64, 128, 128)  # slices, height, width
BATCH = 4
RAW = {"512 x 512 x 200 int16": ((512, 512, 200), "int16"), "240 x 240 x 155 float64": ((240, 240, 155), "float64")}
PARTS = ("pipeline", "cache", "start")


@dataclass
class Config:
    parts: tuple[Literal[PARTS], ...] = PARTS
    """what to measure"""
    volumes: PositiveInt = 8
    """raw volumes of each kind"""
    repeats: PositiveInt = 5
    """timed epochs of each pipeline, and builds of the cache"""
    workers: tuple[NonNegativeInt, ...] = (0, 2)
    """loading processes of the pipelines, one measurement each"""
    files: tuple[PositiveInt, ...] = (1_000, 10_000)
    """files of the data sets that differ in size only"""
    folder: str | None = None
    """where to put the data (1.5 GB, removed afterwards); null: the system's temporary folder"""


def main(cfg: Config) -> None:
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="benchmark_data_", dir=cfg.folder) as folder:
        for part in cfg.parts:
            results[part] = {"pipeline": pipeline, "cache": cache, "start": start}[part](Path(folder, part), cfg)
    timing.write(timing.file_name("data", cfg, "parts"), results)


def our_loader(root: Path, **options: Any) -> VolumeLoader:
    """The loader of stage 2."""
    device = torch.device("cpu")
    values = {"target_shape": VIEW, "batch_size": BATCH, "workers": 0, "policy": "paper"}
    return scripts.load(SCRIPT).data(config_of(SCRIPT, root, device, **values | options), Run(0, 1, device))


class PlainVolumes(Dataset):
    """The plain way: index -> [2, 1, 128, 128, 64], everything per sample and on the CPU."""

    def __init__(self, root: Path) -> None:
        import torchio as tio

        self.files = sorted((root / "Raw").glob("*.npy"))
        self.crop, self.augment = tio.CropOrPad((*VIEW[1:], VIEW[0])), tio.OneOf(plain.released_transforms())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        volume = self.crop(torch.from_numpy(np.load(self.files[index])).float()[None])
        return torch.stack([self.augment(volume), self.augment(volume)])


def pipeline(root: Path, cfg: Config) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (shape, dtype) in RAW.items():
        write_volumes(root / name, shape, cfg.volumes, dtype)
        for workers in cfg.workers:
            print(f"\nan epoch of {cfg.volumes} volumes {name}, two views each, {workers} workers")
            ours, epochs = our_loader(root / name, workers=workers), itertools.count()
            work: dict[str, Callable[[], object]] = {
                "ours": lambda ours=ours, epochs=epochs: [None for _ in ours.epoch(next(epochs))],
            }
            if plain.installed("torchio"):
                dataset = PlainVolumes(root / name)
                theirs = DataLoader(dataset, BATCH, True, num_workers=workers, persistent_workers=workers > 0)
                work["plain"] = lambda theirs=theirs: [None for _ in theirs]
            found[f"{name}, {workers} workers"] = timing.compare(work, cfg.repeats)
    return found


def read_and_resize(files: list[Path]) -> None:
    """Each file read whole and its slices resized to the canvas, on as many threads as the cache is built by."""
    side = canvas_size(*VIEW[1:])

    def one(file: Path) -> None:
        torch.set_num_threads(1)
        slices = torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.load(file), 2, 0)))
        for part in slices.split(32):
            F.interpolate(part.float()[:, None], size=(side, side), mode="bilinear", antialias=True).half()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, files))


def cache(root: Path, cfg: Config) -> dict[str, Any]:
    found = {}
    for name, (shape, dtype) in RAW.items():
        write_volumes(root / name, shape, cfg.volumes, dtype)
        files = sorted((root / name / "Raw").glob("*.npy"))

        def build(raw: Path = root / name) -> None:
            with tempfile.TemporaryDirectory(dir=root) as folder:
                our_loader(raw, cache_path=folder, workers=2)

        print(f"\n{cfg.volumes} volumes {name}, two threads")
        work = {"read and resize": lambda files=files: read_and_resize(files), "cache": build}
        found[name] = timing.compare(work, cfg.repeats)
    return found


def start(root: Path, cfg: Config) -> dict[str, Any]:
    """Seconds, with volumes of 16 x 16 x 8."""
    found = {}
    for count in cfg.files:
        folder = root / str(count) / "Set"
        folder.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for i in range(count):
            np.save(folder / f"{i}.npy", rng.integers(0, 1000, (16, 16, 8), dtype=np.int16))

        def first_batch(tree: Path = folder.parent) -> None:
            next(our_loader(tree, target_shape=(8, 16, 16), workers=2).epoch(0))

        print(f"\nfrom the options to the first batch, {count} small files")
        first = timing.compare({"first time": first_batch}, repeats=1, warmup=0)
        found[str(count)] = first | timing.compare({"with a cache": first_batch}, cfg.repeats, warmup=0)
    return found


if __name__ == "__main__":
    options.main(main, Config, __doc__)

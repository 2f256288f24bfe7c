"""What a sample costs from the raw tree to two augmented views, beside a plain pipeline written with TorchIO.

    python -m benchmarks.data                    # all of it, about 15 minutes on two cores
    python -m benchmarks.data --parts [cache]      # or: pipeline, memory, cache, entries

pipeline  samples per second from the second epoch on. Plain: np.load of the whole file, CropOrPad, two views by one
          random TorchIO transform each. Ours: the slice store, two `paper` views on whole batches. Same files, same
          process, epochs taken in turns. With `workers`, reading (plain: everything) is done by that many processes.
memory    resident memory that one loading process gains at its peak, and from the second to the last epoch.
cache     building it, beside only reading the same files and resizing them: the least that any cache must do.
entries   cost per sample, and start-up with a finished cache, of data sets of 100 to 100,000 small files.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from benchmarks import timing
from datasets.augment import VolumeViews
from datasets.index import scan
from datasets.loaders import VolumeLoader, VolumeWindows, canvas_size
from datasets.store import SliceStore, prepare
from utils import config as options
from utils.distributed import Run

VIEW = (64, 128, 128)  # slices, height, width
CANVAS = canvas_size(*VIEW[1:])
RAW = {"512 x 512 x 200 int16": ((512, 512, 200), np.int16), "240 x 240 x 155 float64": ((240, 240, 155), np.float64)}
HERE = Run(0, 1, torch.device("cpu"))


@dataclass
class Config:
    parts: list[Literal["pipeline", "memory", "cache", "entries"]] = field(
        default_factory=lambda: ["pipeline", "memory", "cache", "entries"]
    )
    """what to measure"""
    volumes: int = 8
    """raw volumes of each kind"""
    epochs: int = 5
    """timed epochs of each pipeline"""
    workers: list[int] = field(default_factory=lambda: [0, 2])
    """loading processes, one measurement each"""
    entries: list[int] = field(default_factory=lambda: [100, 1_000, 10_000, 100_000])
    """files of the data sets that differ in size only"""
    folder: str | None = None
    """where to put the data (1.5 GB, removed afterwards); null: the system's temporary folder"""


def main(cfg: Config) -> None:
    root = Path(tempfile.mkdtemp(prefix="benchmark_data_", dir=cfg.folder))
    results: dict[str, Any] = {}
    try:
        if set(cfg.parts) - {"entries"}:
            for name, (shape, dtype) in RAW.items():
                write_raw(root / name, shape, dtype, cfg.volumes)
        for part in cfg.parts:
            results[part] = PARTS[part](root, cfg)
    finally:
        shutil.rmtree(root)
    print(f"\nwrote {timing.write('data', results)}")


# ------------------------------------------------------------------------------------------------------------ the data


def write_raw(root: Path, shape: tuple[int, ...], dtype: type, count: int) -> None:
    """Volumes H x W x C as a scanner might give them: smooth structures, air around them, noise."""
    (root / "Raw").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = torch.from_numpy(rng.normal(0, 300, (1, 1, 12, 12, 8)))
        volume = F.interpolate(coarse, size=shape, mode="trilinear")[0, 0].numpy() + rng.normal(0, 20, shape)
        np.save(root / "Raw" / f"{i}.npy", volume.astype(dtype))


def write_small(root: Path, count: int) -> None:
    """`count` volumes of 16 x 16 x 8."""
    rng = np.random.default_rng(0)
    for i in range(count):
        folder = root / f"Set_{i // 10_000}"
        if i % 10_000 == 0:
            folder.mkdir(parents=True)
        np.save(folder / f"{i}.npy", rng.integers(0, 1000, (16, 16, 8), dtype=np.int16))


# ------------------------------------------------------------------------------------------------------- the pipelines


def released_transforms() -> Callable:
    """One of TorchIO's seven at a time, as the method's released code draws them for a view."""
    import torchio as tio

    return tio.OneOf(
        [
            tio.RandomFlip(axes=(0, 1, 2), flip_probability=1),
            tio.RandomAffine(),
            tio.RandomAnisotropy(),
            tio.RandomBlur(),
            tio.RandomNoise(),
            tio.RandomBiasField(),
            tio.RandomGamma(),
        ]
    )


class PlainVolumes(Dataset):
    """The plain way: index -> [2, 1, 128, 128, 64], everything per sample and on the CPU."""

    def __init__(self, root: Path) -> None:
        import torchio as tio

        self.files = sorted((root / "Raw").glob("*.npy"))
        height, width = VIEW[1:]
        self.crop = tio.CropOrPad((height, width, VIEW[0]))
        self.augment = released_transforms()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        volume = self.crop(torch.from_numpy(np.load(self.files[index])).float()[None])
        return torch.stack([self.augment(volume), self.augment(volume)])


def plain_epochs(root: Path, workers: int) -> Callable[[], int]:
    dataset = PlainVolumes(root)
    loader = DataLoader(dataset, 4, shuffle=True, num_workers=workers, persistent_workers=workers > 0)

    def epoch() -> int:
        return sum(batch.shape[0] for batch in loader)

    return epoch


def our_epochs(root: Path, workers: int) -> Callable[[], int]:
    samples, store = prepare(root, CANVAS, workers=2, progress=False)
    views = VolumeViews(*VIEW[1:], "paper", seed=0)
    loader = VolumeLoader(VolumeWindows(samples, store, VIEW[0], seed=0), views, 4, workers, 0, HERE)
    numbers = iter(range(10**9))

    def epoch() -> int:
        return sum(batch["views"].shape[1] for batch in loader.epoch(next(numbers)))

    return epoch


def pipeline(root: Path, cfg: Config) -> dict[str, Any]:
    print(f"\nsamples per second, {' x '.join(map(str, VIEW))}, two views, epochs 2 to {cfg.epochs + 1}")
    print(f"{'raw volumes':26s}{'workers':>8s}{'plain':>10s}{'ours':>10s}{'ratio':>8s}")
    found = {}
    for name in RAW:
        for workers in cfg.workers:
            work = {"plain": plain_epochs(root / name, workers), "ours": our_epochs(root / name, workers)}
            times = timing.measure(work, repeats=cfg.epochs, warmup=1)
            rate = {who: cfg.volumes / t.median for who, t in times.items()}
            ratio = times["plain"].over(times["ours"])
            print(f"{name:26s}{workers:8d}{rate['plain']:10.2f}{rate['ours']:10.2f}{ratio:8.1f}", flush=True)
            found[f"{name}, {workers} workers"] = {
                **{f"{who}_samples_per_s": r for who, r in rate.items()},
                **{f"{who}_epoch": t.record() for who, t in times.items()},
                "ratio": ratio,
            }
    return found


# ---------------------------------------------------------------------------------------------------------- its memory


class Watched(Dataset):
    """key -> resident memory of the loading process in MiB after reading that sample: (peak since its start, now)."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> tuple[float, float]:
        self.dataset[key]
        return resident("VmHWM"), resident("VmRSS")


def resident(what: str) -> float:
    """MiB, by the kernel's account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {what} in /proc/self/status")


def worker_memory(dataset: Dataset, keys: list[list[Any]]) -> tuple[float, list[float]]:
    """(peak gain in MiB of one loading process, its gain after each epoch); keys: what each epoch reads."""
    start: list[float] = []

    def begin(_: int) -> None:
        torch.set_num_threads(1)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        shared.fill_(resident("VmRSS"))

    shared = torch.zeros(1).share_memory_()
    flat = [key for epoch in keys for key in epoch]
    peaks, now = [], []
    for peak, rss in DataLoader(Watched(dataset), sampler=flat, batch_size=None, num_workers=1, worker_init_fn=begin):
        start = start or [float(shared)]
        peaks.append(peak - start[0])
        now.append(rss - start[0])
    ends = np.cumsum([len(epoch) for epoch in keys]) - 1
    return max(peaks), [now[end] for end in ends]


def memory(root: Path, cfg: Config) -> dict[str, Any]:
    epochs = 6
    print(f"\nMiB that one loading process gains, {epochs} epochs of {cfg.volumes} volumes")
    print(f"{'raw volumes':26s}{'plain':>10s}{'ours':>10s}{'share':>8s}   ours after each epoch")
    found = {}
    for name in RAW:
        samples, store = prepare(root / name, CANVAS, workers=2, progress=False)
        n = range(len(samples))
        plain, _ = worker_memory(PlainVolumes(root / name), [list(n)] * epochs)
        windows = VolumeWindows(samples, store, VIEW[0], seed=0)
        ours, after = worker_memory(windows, [[(epoch, i) for i in n] for epoch in range(epochs)])
        shown = " ".join(f"{value:.1f}" for value in after)
        print(f"{name:26s}{plain:10.1f}{ours:10.1f}{ours / plain:8.2f}   {shown}", flush=True)
        found[name] = {"plain_peak_mib": plain, "ours_peak_mib": ours, "ours_after_each_epoch_mib": after}
    return found


# ---------------------------------------------------------------------------------------------------- building a cache


def read_and_resize(files: list[Path]) -> None:
    """Each file read whole and its slices resized to the canvas, on as many threads as the cache is built by."""

    def one(file: Path) -> None:
        torch.set_num_threads(1)
        slices = torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.load(file), 2, 0)))
        for part in slices.split(32):
            F.interpolate(part.float()[:, None], size=(CANVAS, CANVAS), mode="bilinear", antialias=True).half()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, files))


def cache(root: Path, cfg: Config) -> dict[str, Any]:
    print("\nMB of raw files per second, two threads")
    print(f"{'raw volumes':26s}{'read+resize':>12s}{'cache':>10s}{'share':>8s}")
    found = {}
    for name in RAW:
        files = sorted((root / name / "Raw").glob("*.npy"))
        samples = scan(root / name)

        def build(samples: list[Any] = samples) -> None:
            with tempfile.TemporaryDirectory(dir=root) as folder:
                SliceStore(samples, CANVAS, folder).build(workers=2, progress=False)

        times = timing.measure({"least": partial(read_and_resize, files), "ours": build}, repeats=3, warmup=1)
        size = sum(file.stat().st_size for file in files) / 1e6
        share = 1 / times["ours"].over(times["least"])
        rate = {who: size / t.median for who, t in times.items()}
        print(f"{name:26s}{rate['least']:12.0f}{rate['ours']:10.0f}{share:8.2f}", flush=True)
        found[name] = {**{who: t.record() for who, t in times.items()}, "share_of_least": share}
    return found


# ------------------------------------------------------------------------------------------- data sets of another size


START = """
import sys, time
began = time.perf_counter()
from benchmarks.data import small_loader
loader = small_loader(sys.argv[1])
next(loader.epoch(0))
print(time.perf_counter() - began)
"""


def small_loader(root: str | Path) -> VolumeLoader:
    samples, store = prepare(root, 20, workers=2, progress=False)
    return VolumeLoader(VolumeWindows(samples, store, 8, seed=0), VolumeViews(16, 16, "paper", 0), 8, 0, 0, HERE)


def entries(root: Path, cfg: Config) -> dict[str, Any]:
    print("\nsmall files: cost per sample, first use (cache built) and start with a finished cache, to the first batch")
    print(f"{'entries':>9s}{'ms per sample':>15s}{'first use s':>13s}{'start s':>10s}")
    found = {}
    for count in cfg.entries:
        tree = root / f"entries_{count}"
        write_small(tree, count)
        began = time.perf_counter()
        loader = small_loader(tree)
        first = time.perf_counter() - began

        def steps(loader: VolumeLoader = loader, numbers: Iterator[int] = iter(range(1, 10**9))) -> None:  # noqa: B008
            for step, _ in enumerate(loader.epoch(next(numbers))):
                if step == 11:  # of 8 samples each; an epoch of 100 samples has 13
                    break

        steps()
        times = timing.measure({"ours": steps}, repeats=10, warmup=1)["ours"]
        done = subprocess.run([sys.executable, "-c", START, str(tree)], capture_output=True, text=True, check=True)
        start = float(done.stdout.split()[-1])
        print(f"{count:9d}{times.median / 96 * 1000:15.2f}{first:13.1f}{start:10.1f}", flush=True)
        found[str(count)] = {"ms_per_sample": times.median / 96 * 1000, "first_use_s": first, "start_s": start}
        shutil.rmtree(tree)
    return found


PARTS: dict[str, Callable[[Path, Config], dict[str, Any]]] = {
    "pipeline": pipeline,
    "memory": memory,
    "cache": cache,
    "entries": entries,
}


if __name__ == "__main__":
    options.main(main, Config, __doc__)

"""What benchmarks share: fair timing, the file of results, volumes on disk, and a script's own updates on them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveInt

from datasets.workers import OneAhead
from training import scripts
from training.train import Training
from utils import files, profile
from utils.config import commit
from utils.distributed import Run, rank, world_size
from utils.precision import Precision

RESULTS = Path(__file__).parent / "results"
PACKAGES = {"torch", "torchvision", "numpy", "faiss-cpu", "torchio", "SimpleITK", "deformable-attention"}
DISTINCT = 8  # volumes of a tree that differ; the others are further names (hard links) of these
Work = Mapping[str, Callable[[], object]]  # pieces of work that are compared


@dataclass
class Options:
    """Options of every benchmark."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to measure"""
    repeats: PositiveInt = 5
    """measurements of each piece"""


def compare(
    work: Work, repeats: int, device: torch.device | str = "cpu", pairs: Sequence[tuple[str, str]] = ()
) -> dict[str, Any]:
    """Times of each piece of work, as records and printed, and the ratio of every pair.

    The pieces take turns (ABAB...), the first turn not counted, so that what else the machine does meets all of them
    alike. A ratio is the median of the ratios of repetitions that were taken side by side.
    """
    taken: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(1 + repeats):
        for name, function in work.items():
            wait(device)
            began = time.perf_counter()
            function()
            wait(device)
            taken[name].append(time.perf_counter() - began)
    seconds = {name: np.array(all_turns[1:]) for name, all_turns in taken.items()}
    result: dict[str, Any] = {}
    for name, own in seconds.items():
        low, median, high = np.quantile(own, (0.25, 0.5, 0.75)).tolist()
        result[name] = {"median_s": median, "iqr_s": high - low, "repeats": repeats}
        say(f"  {name:20s} {median * 1e3:10.2f} ms  (IQR {(high - low) * 1e3:.2f})")
    for name, other in pairs:
        result[f"{name} over {other}"] = ratio = float(np.median(seconds[name] / seconds[other]))
        say(f"  {name} takes {ratio:.2f} x {other}")
    return result


def say(text: str) -> None:
    """Print, once for all processes."""
    if rank() == 0:
        print(text, flush=True)


def wait(device: torch.device | str) -> None:
    """Return when the device has done all that it was asked to do."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def added_gib(work: Work, device: torch.device) -> dict[str, float]:
    """What each piece of work allocates at its peak beside what is there, printed; on GPUs, where torch tells."""
    found = {}
    for name, function in work.items() if device.type == "cuda" else ():
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        found[name] = (torch.cuda.max_memory_allocated(device) - before) / 2**30
        say(f"  {name} adds {found[name]:.2f} GiB")
    return found


def formats(device: torch.device) -> tuple[str, ...]:
    """Number formats worth a measurement: float32, and bf16 where the device computes in it."""
    return ("fp32",) + ("bf16",) * (Precision("auto", device).name == "bf16")


def device_name(device: torch.device | str) -> str:
    """The model of the CPU or of the graphics card."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, TypeError):
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1].strip()
    return platform.machine()


def environment(device: torch.device | str) -> dict[str, Any]:
    """What a figure depends on beside the code: machine, threads, load, versions, commit."""
    found = {
        "device": device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {own.name: own.version for own in metadata.distributions() if own.name in PACKAGES},
        "commit": commit(),
        "date_utc": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }
    if torch.device(device).type == "cuda":
        products, convolutions = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        found |= {"cuda": torch.version.cuda, "tf32": {"products": products, "convolutions": convolutions}}
    return found


def write(results: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
    """Results and environment into the file of this machine, in place of older ones of the same command."""
    if rank():
        return
    path = RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', device_name(device).lower()).strip('-')}.json"
    command = " ".join([Path(sys.argv[0]).stem, *sys.argv[1:]])
    command += f" ({world_size()} processes)" if world_size() > 1 else ""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content[command] = {"environment": environment(device), "results": results}
    files.write_json(content, path)
    print(f"\nwrote {os.path.relpath(path)}")


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

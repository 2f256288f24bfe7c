"""What benchmarks share: fair timing, the environment that a figure belongs to, and the file it is written to."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from utils.errors import UserError
from utils.versions import commit

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchvision", "numpy", "scipy", "faiss-cpu", "torchio", "SimpleITK", "deformable-attention")


@dataclass(frozen=True)
class Timing:
    """Seconds of every repetition of one piece of work, in the order in which they were taken.

    cpu_seconds: what this process computed meanwhile, over all its threads. On a machine that others use as well, and
    with one thread, it says more than the clock on the wall; threads that wait for each other count, too.
    """

    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def iqr(self) -> float:
        return spread(self.seconds)

    def ratios(self, other: Timing) -> tuple[float, ...]:
        """How many times as long as `other` this takes, of repetitions taken side by side."""
        return tuple(a / b for a, b in zip(self.seconds, other.seconds, strict=True))

    def over(self, other: Timing) -> float:
        """Median of `ratios`."""
        return statistics.median(self.ratios(other))

    def record(self) -> dict[str, float | int]:
        """For the results file."""
        cpu = statistics.median(self.cpu_seconds)
        return {"median_s": self.median, "iqr_s": self.iqr, "cpu_median_s": cpu, "repeats": len(self.seconds)}


def spread(values: Sequence[float]) -> float:
    """Inter-quartile range; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def measure(
    work: Mapping[str, Callable[[], object]],
    repeats: int = 20,
    warmup: int = 3,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Seconds that each piece of work takes, waiting for the device before and after every repetition.

    The pieces take turns (ABAB...), so that what else the machine does meets all of them alike.
    """
    for function in work.values():
        for _ in range(warmup):
            function()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, function in work.items():
            wait(device)
            start, cpu_start = time.perf_counter(), time.process_time()
            function()
            wait(device)
            taken[name].append((time.perf_counter() - start, time.process_time() - cpu_start))
    return {name: Timing(*zip(*pairs, strict=True)) for name, pairs in taken.items()}


def wait(device: torch.device | str) -> None:
    """Return when the device has done all that it was asked to do."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a figure depends on beside the code: machine, threads, load, versions, commit."""
    return {
        "device": device_name(device),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        **({"processes": int(os.environ["WORLD_SIZE"])} if "WORLD_SIZE" in os.environ else {}),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        **(_gpu_settings() if torch.device(device).type == "cuda" else {}),
        "commit": commit(),
        "command": " ".join(["python -m benchmarks." + Path(sys.argv[0]).stem, *sys.argv[1:]]),
        "date_utc": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }


def _gpu_settings() -> dict[str, Any]:
    """Float32 convolutions are TF32 by default, whose products have ten bits of precision."""
    convolutions = "tf32" if torch.backends.cudnn.allow_tf32 else "float32"
    products = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "float32"
    return {"cuda": torch.version.cuda, "float32_convolutions": convolutions, "float32_products": products}


def device_name(device: torch.device | str) -> str:
    """`cpu`, or the name of the graphics card."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def write(
    name: str, results: Mapping[str, Any], device: torch.device | str = "cpu", assumed: Sequence[str] = ()
) -> Path:
    """Results and environment as `results/<name>_<device>.json`, replacing an older file; returns its path.

    assumed: what of the results was not measured.
    """
    RESULTS.mkdir(exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    path = RESULTS / f"{name}_{slug}.json"
    content = {
        "environment": environment(device),
        **({"assumed": list(assumed)} if assumed else {}),
        "results": results,
    }
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def of_parts(name: str, parts: Sequence[str], usual: Sequence[str]) -> str:
    """Name of a results' file: some parts alone do not replace all of them. Raises UserError where there is none."""
    chosen = [part for part in usual if part in parts]
    if not chosen:
        raise UserError(f"nothing is to be measured; name one or more of {', '.join(usual)}")
    return name if len(chosen) == len(usual) else "_".join([name, *chosen]).replace(" ", "_")


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

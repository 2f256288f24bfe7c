"""What benchmarks share: fair timing, the environment that a figure belongs to, and the file it is written to."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from training.cost import peak_memory
from utils import files
from utils.config import commit
from utils.distributed import rank
from utils.precision import Precision

RESULTS = Path(__file__).parent / "results"
PEAK_RESET = Path("/proc/self/clear_refs")  # Linux
PACKAGES = ("torch", "torchvision", "numpy", "faiss-cpu", "torchio", "SimpleITK", "deformable-attention")


class Timing(NamedTuple):
    """Seconds of every repetition of one piece of work, in the order in which they were taken."""

    seconds: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Inter-quartile range; 0 of a single repetition."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return high - low

    def over(self, other: Timing) -> float:
        """How many times as long as `other` this takes: median over repetitions taken side by side."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def measure(
    work: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1, device: torch.device | str = "cpu"
) -> dict[str, Timing]:
    """Seconds that each piece of work takes, waiting for the device before and after every repetition.

    The pieces take turns (ABAB...), so that what else the machine does meets all of them alike.
    """
    taken: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(-warmup, repeats):
        for name, function in work.items():
            wait(device)
            began = time.perf_counter()
            function()
            wait(device)
            if repeat >= 0:
                taken[name].append(time.perf_counter() - began)
    return {name: Timing(seconds) for name, seconds in taken.items()}


def compare(
    work: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    pairs: Sequence[tuple[str, str]] | None = None,
) -> dict[str, Any]:
    """`measure`, as records and printed, with the ratio of every pair; by default of all others over the first."""
    times = measure(work, repeats, warmup, device)
    first, *others = times
    result: dict[str, Any] = {}
    for name, t in times.items():
        result[name] = {"median_s": t.median, "iqr_s": t.spread, "repeats": repeats}
        say(f"  {name:20s} {t.median * 1e3:10.2f} ms  (IQR {t.spread * 1e3:.2f})")
    for name, other in [(name, first) for name in others] if pairs is None else pairs:
        result[f"{name} over {other}"] = ratio = times[name].over(times[other])
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


def added_bytes(work: Callable[[], object], device: torch.device) -> float:
    """What the work allocates at its peak beside what is there: on a GPU by torch, on a CPU what becomes resident.

    nan where the system does not tell.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    if not PEAK_RESET.exists():
        return math.nan
    with contextlib.suppress(AttributeError):  # other C libraries keep less
        ctypes.CDLL(None).malloc_trim(0)  # else freed blocks would be used again unseen
    PEAK_RESET.write_text("5")  # the peak is what is resident now
    before = peak_memory(device)
    work()
    return peak_memory(device) - before


def formats(device: torch.device) -> list[str]:
    """Number formats worth a measurement: float32, and bf16 where the device computes in it."""
    return ["fp32"] + ["bf16"] * (Precision("auto", device).name == "bf16")


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a figure depends on beside the code: machine, threads, load, versions, commit."""
    found = {
        "device": device_name(device),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": commit(),
        "command": " ".join(["python -m benchmarks." + Path(sys.argv[0]).stem, *sys.argv[1:]]),
        "date_utc": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }
    if torch.device(device).type == "cuda":
        products, convolutions = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        found |= {"cuda": torch.version.cuda, "tf32": {"products": products, "convolutions": convolutions}}
    return found


def device_name(device: torch.device | str) -> str:
    """`cpu`, or the name of the graphics card."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def write(name: str, results: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
    """Results and environment as `results/<name>_<device>.json`, replacing an older file."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    path = RESULTS / f"{name}_{slug}.json"
    files.write_json({"environment": environment(device), "results": results}, path)
    print(f"\nwrote {os.path.relpath(path)}")


def file_name(name: str, cfg: Any, *options: str) -> str:
    """Of a results file: with the values of these options where they are not the defaults.

    Measurements of something else do not replace the usual ones.
    """
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        value = tuple(value) if isinstance(value, list) else value  # from the command line
        if field.name in options and value != field.default:
            name += f"_{field.name}" if value is True else "_" + re.sub(r"[^\w-]+", "_", str(value)).strip("_")
    return name


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

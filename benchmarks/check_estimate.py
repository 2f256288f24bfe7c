"""Predicted against measured: whole runs of the entry scripts on the bundled phantoms, constants measured just before.

    python -m benchmarks.check_estimate                       # constants and four runs: about 10 minutes, quiet machine
    python -m benchmarks.check_estimate --runs [stage3]       # one of them
    python -m benchmarks.check_estimate --quick true          # tiny runs and quick constants, to try it

Seconds are those of the whole command: imports, cache, training, k-means, checkpoints. Memory is the most that the
process had resident. The goal is an error below 20 % of what was measured.
"""

from __future__ import annotations

import csv
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import estimate
from benchmarks import constants, timing
from datasets.index import Sample, scan
from utils import config as options
from utils import distributed

ROOT = Path(__file__).parents[1]
GOAL = 0.2
OUTSIDE = ("start", "cache", "projection", "filling the bank", "k-means", "checkpoints")  # of an epoch's seconds
# Different stages, sizes, networks and methods. A minute or so of each: of shorter runs, starting is the larger part.
RUNS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "stage1": (1, "swav", {"arch": "resnet18", "size_crops": [96, 48], "slices_per_volume": 4, "epochs": 8}),
    "stage2": (2, "swav", {"arch": "resnet50", "target_shape": [24, 64, 64], "epochs": 15}),
    "stage2 cached": (2, "swav", {"arch": "resnet50", "target_shape": [24, 64, 64], "epochs": 40, "cached_views": 4}),
    "stage3": (3, "deepcluster", {"arch": "resnet18", "target_shape": [24, 80, 80], "epochs": 8}),
}


@dataclass
class Config:
    runs: list[Literal[tuple(RUNS)]] = field(default_factory=lambda: list(RUNS))
    """which of the runs; not all of them: results go to a file of their own"""
    data_path: str = "Training_Data"
    """volumes and images to train on"""
    constants: str | None = None
    """file of an earlier python -m benchmarks.constants; null: measure now"""
    quick: bool = False
    """one epoch at 32 pixels each, quick constants"""


def main(cfg: Config) -> None:
    run = distributed.start("cpu")
    name = timing.of_parts("check_estimate_quick" if cfg.quick else "check_estimate", cfg.runs, list(RUNS))
    if cfg.constants:
        machine = estimate.Machine.read(cfg.constants)
    else:
        of = constants.Config(sides=[32, 64, 128])
        if cfg.quick:
            of.archs, of.sides, of.repeats = ["resnet18"], [32, 64], 1
        machine = estimate.Machine(constants.constants(of, run))
    data = collection(scan(cfg.data_path))
    results: dict[str, Any] = {"data": vars(data), "constants": machine.constants}
    for one in cfg.runs:
        stage, method, changes = RUNS[one]
        if cfg.quick:
            changes = changes | {"arch": "resnet18", "epochs": 1}
            changes |= {"size_crops": [32, 16]} if stage == 1 else {"target_shape": [8, 32, 32]}
        results[one] = compare(stage, method, changes, cfg.data_path, data, machine)
        print(f"{one:14s} {shown(results[one])}", flush=True)
    errors = [results[one]["seconds"]["error"] for one in cfg.runs]
    print(f"largest error in time {max(map(abs, errors)):.0%}, goal {GOAL:.0%}")
    print(f"wrote {timing.write(name, results)}")


def collection(samples: Sequence[Sample]) -> estimate.Data:
    """The tree as equal volumes and equal images: of mean slices, height and width."""

    def mean(of: Sequence[Sample]) -> tuple[int, int, int]:
        return tuple(round(statistics.mean(getattr(s, a) for s in of)) for a in ("height", "width", "slices"))

    volumes = [s for s in samples if s.kind == "volume"]
    images = [s for s in samples if s.kind == "image"]
    return estimate.Data(len(volumes), mean(volumes), len(images), mean(images)[:2] if images else (1, 1))


def compare(
    stage: int, method: str, changes: dict[str, Any], data_path: str, data: estimate.Data, machine: estimate.Machine
) -> dict[str, Any]:
    """Run the entry script in a temporary folder -> predicted, measured and relative error of seconds and memory."""
    folder = Path(tempfile.mkdtemp(prefix="check_estimate_"))
    values = {
        "data_path": data_path,
        "cache_path": str(folder / "cache"),
        "dump_path": str(folder / "run"),
        "pretrained_path": str(folder / "weights"),
        "resnet_pretrained": "none",
        "device": "cpu",
        "workers": 0,
        "warmup_epochs": 0,
        **({"trans_pretrained": "none"} if stage == 3 else {}),
        **changes,
    }
    of = estimate.stage_config(stage, method, values)
    predicted = estimate.predict(stage, method, of, data, machine)
    try:
        options.save_yaml(values, folder / "run.yaml")
        script = ROOT / f"{type(of).__module__}.py"
        with open(folder / "said", "w+") as said:
            began = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, str(script), "--config", str(folder / "run.yaml")], stdout=said, stderr=said
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            took = time.perf_counter() - began
            if process.returncode:
                said.seek(0)
                raise RuntimeError(f"{script.name} failed:\n{said.read()}")
        with open(folder / "run" / "metrics.csv", newline="") as file:
            epochs = sum(float(row["seconds"]) for row in csv.DictReader(file))
        saved = (folder / "run" / "checkpoint.pth").stat().st_size
        cached = sum(f.stat().st_size for f in (folder / "cache").rglob("*.npy"))
    finally:
        shutil.rmtree(folder)
    outside = sum(s for name, s in predicted.seconds.items() if name in OUTSIDE)
    return {
        "options": changes | {"method": method},
        "seconds": against(predicted.total, took),
        "epochs": against(predicted.total - outside, epochs),
        "memory": against(predicted.memory, usage.ru_maxrss * 1024),
        "checkpoint": against(predicted.checkpoint, saved),
        "cache": against(predicted.cache, cached),
        "parts": predicted.seconds,
        "load_average_1min": os.getloadavg()[0],
    }


def against(predicted: float, measured: float) -> dict[str, float]:
    return {"predicted": predicted, "measured": measured, "error": predicted / measured - 1 if measured else math.nan}


def shown(result: dict[str, Any]) -> str:
    s, m, c, d = (result[name] for name in ("seconds", "memory", "checkpoint", "cache"))
    return (
        f"{s['predicted']:6.1f} s predicted, {s['measured']:6.1f} measured ({s['error']:+.0%}); memory "
        f"{m['predicted'] / 2**30:.2f}, {m['measured'] / 2**30:.2f} GiB ({m['error']:+.0%}); checkpoint "
        f"{c['error']:+.1%}; cache {d['error']:+.1%}"
    )


if __name__ == "__main__":
    options.main(main, Config, __doc__)

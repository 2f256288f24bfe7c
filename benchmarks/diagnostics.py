"""What the diagnostics and the log cost: steps of stage 3 with and without observers, and the end of an epoch.

    python -m benchmarks.diagnostics                                 # CPU, ResNet-50: about a minute
    python -m benchmarks.diagnostics --device cuda --batch_size 16 --target_shape [64,128,128]

Steps of one training take turns with its observers on and off (ABAB); `with_over_without` is the median ratio of
neighbours. A small difference of large times is mostly noise, so `observers` is the observers' own time within these
steps. `epoch_end`: the figures of both levels and the epoch's line in metrics.csv, once per `volumes`. `share` is what
an epoch gets longer: (observers + epoch_end / steps of an epoch) / step without them. Views are half as deep as those
of training unless --target_shape says otherwise; with deeper ones steps take longer, and the share is smaller.
"""

from __future__ import annotations

import io
import math
import shutil
import statistics
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveInt

import estimate
from benchmarks import timing
from benchmarks.training import Options, Training, joint_learner, recorded, volume_loader, write_volumes
from datasets.loaders import canvas_size
from objectives import SwAV
from objectives.diagnostics import Diagnostics
from objectives.sizes import prototype_counts
from utils import config as options
from utils import distributed
from utils.distributed import Run
from utils.log import Log


@dataclass
class Config(Options):
    target_shape: tuple[PositiveInt, PositiveInt, PositiveInt] = (32, 128, 128)
    """slices, height and width of a view"""
    volumes: PositiveInt = 1000
    """of an epoch: prototypes and the cost of an epoch's end follow from them"""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """as in training"""
    repeats: PositiveInt = 7
    """steps with observers, and as many without"""


def main(cfg: Config) -> None:
    run = distributed.start(cfg.device)
    root = Path(tempfile.mkdtemp(prefix="benchmark_diagnostics_"))
    try:
        results = measure(root, cfg, run)
    finally:
        shutil.rmtree(root)
    path = timing.write("diagnostics", results, run.device)
    for name in ("with", "without", "observers", "epoch_end"):
        print(f"{name:10s} {1e3 * results[name]['median_s']:9.2f} ms  (IQR {1e3 * results[name]['iqr_s']:.2f})")
    ratio, iqr = (results[f"with_over_without{ending}"] for ending in ("", "_iqr"))
    print(f"with / without {ratio:.4f} (IQR {iqr:.4f}); share of an epoch {results['share']:.2%}\nwrote {path}")


def measure(root: Path, cfg: Config, run: Run) -> dict[str, Any]:
    slices, height, width = cfg.target_shape
    samples = {"intra": cfg.volumes * slices, "inter": cfg.volumes}
    prototypes = {name: prototype_counts(0, n, name)[0] for name, n in samples.items()}
    torch.manual_seed(0)
    learner = joint_learner(cfg.arch, **prototypes)
    steps = 2 * (2 + cfg.repeats + cfg.workers)  # with and without, warmed up; and what workers read ahead
    side = canvas_size(height, width)
    write_volumes(root / "data", (side, side, slices), min(cfg.volumes, cfg.batch_size * steps))
    loader = volume_loader(root / "data", cfg, run, intra_slices=8)
    training = Training(learner, loader, cfg.precision, run)
    levels = dict(learner.objectives())  # whose observers are replaced below: by those of so many samples, or none
    observers = {name: observer(levels[name], n, run.device) for name, n in samples.items()}

    def step(observed: bool) -> Callable[[], None]:
        def work() -> None:
            for name, objective in levels.items():
                objective.observer = observers[name] if observed else None
            training.step()

        return work

    observed, calls = recorded(step(True), run.device)
    unobserved, _ = recorded(step(False), run.device)
    times = timing.measure({"with": observed, "without": unobserved}, cfg.repeats, warmup=1, device=run.device)
    own = [parts["diagnostics"] for parts in calls[1:]]  # without the warm-up
    end = epoch_end(root, levels, observers, run)
    steps = math.ceil(cfg.volumes / cfg.batch_size)
    return {
        "volumes": cfg.volumes,
        "target_shape": list(cfg.target_shape),
        "batch_size": cfg.batch_size,
        "arch": cfg.arch,
        "precision": training.precision.name,
        "prototypes": prototypes,
        **{name: t.record() for name, t in times.items()},
        "observers": {"median_s": statistics.median(own), "iqr_s": timing.spread(own), "repeats": len(own)},
        "epoch_end": end.record(),
        "with_over_without": times["with"].over(times["without"]),
        "with_over_without_iqr": timing.spread(times["with"].ratios(times["without"])),
        "share": (statistics.median(own) + end.median / steps) / times["without"].median,
    }


def observer(objective: SwAV, samples: int, device: torch.device) -> Diagnostics:
    """As a run attaches it to an objective, here with two data sets of origin, so that the vote takes part."""
    head = objective.prototypes.heads[0]
    origins = ["first"] * (samples // 2) + ["second"] * (samples - samples // 2)
    return Diagnostics(samples, head.out_features, head.in_features, objective.temperature, device, origins)


def epoch_end(root: Path, levels: dict[str, SwAV], observers: dict[str, Diagnostics], run: Run) -> timing.Timing:
    """Seconds of the figures and the log after an epoch of random embeddings, the last of a run of the usual length."""
    config = estimate.stage_config(3, "swav", {"pretrained_path": str(root / "weights")})
    log = Log(root / "run", config, run, 0)

    @torch.no_grad()
    def epoch() -> None:
        for name, watching in observers.items():
            prototypes = levels[name].prototypes.heads[0].weight
            for index in torch.arange(watching.samples, device=run.device).split(4096):
                z = F.normalize(torch.randn(2, len(index), prototypes.shape[1], device=run.device), dim=2)
                watching(z, z @ prototypes.T, index)

    def figures() -> dict[str, float]:
        return {f"{name}_{key}": value for name, level in observers.items() for key, value in level.finish().items()}

    def write(at: int, found: dict[str, float]) -> None:
        log.row(at, {"loss": 1.0, "intra": 1.0, "inter": 1.0}, 0.1, 1.0, 0.0, 1, 0, found)
        log.warn(at, [])

    last = config.epochs - 1
    with redirect_stdout(io.StringIO()):
        epoch()
        found = figures()
        for at in range(last):
            write(at, found)
        ends = timing.measure({"epoch": epoch, "end": lambda: write(last, figures())}, 5, warmup=1, device=run.device)
    return ends["end"]


if __name__ == "__main__":
    options.main(main, Config, __doc__)

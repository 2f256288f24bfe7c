"""The largest batch for graphics cards of 8 to 141 GB: memory of real steps on this machine, and the line through it.

    python -m benchmarks.memory                                     # CPU, ResNet-50, (64, 128, 128): 15 minutes
    python -m benchmarks.memory --arch resnet18 --target_shape [16,64,64] --batches [1,2,4]    # to try it
    python -m benchmarks.memory --device cuda --precisions [fp32,bf16] --batches [4,8,16]

Every point is three training steps (forward, backward, optimiser, the next batch's augmentation) in a process of its
own, see utils/memory.py. A batch size is marked `measured` where a step of that size was run or lies between two that
were; `extrapolated` where the line through the points says so.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import PositiveInt

import estimate
from benchmarks import timing
from benchmarks.data import write_raw
from utils import config as options
from utils import distributed, memory

CARDS = (8, 16, 24, 40, 80, 141)  # GiB, as they are sold
STAGES = {"stage1": 1, "stage2": 2, "stage3": 3}


@dataclass
class Config:
    stages: list[Literal["stage1", "stage2", "stage3"]] = field(default_factory=lambda: list(STAGES))
    """which stages, all with SwAV (DeepCluster-v2 needs its memory bank beside: docs/SCALING.md)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where"""
    arch: str = "resnet50"
    """torchvision ResNet"""
    target_shape: tuple[PositiveInt, PositiveInt, PositiveInt] = (64, 128, 128)
    """slices, height and width of a view; stage 1 keeps its crops of 224 and 96 pixels"""
    precisions: list[Literal["fp32", "bf16"]] = field(default_factory=lambda: ["fp32"])
    """number formats; bf16 on a CPU without bf16 units takes long, and its memory is that of the CPU's kernels"""
    recompute: list[bool] = field(default_factory=lambda: [False, True])
    """of stages 1 and 3"""
    batches: list[PositiveInt] = field(default_factory=lambda: [1, 2, 3])
    """volumes of the measured points, two at least; stage 1 runs 8 times as many images"""


def main(cfg: Config) -> None:
    run = distributed.start(cfg.device)
    root = Path(tempfile.mkdtemp(prefix="benchmark_memory_"))
    results: dict[str, Any] = {"arch": cfg.arch, "view": list(cfg.target_shape), "cards_gib": CARDS}
    try:
        write_raw(root / "data", (160, 160, cfg.target_shape[0]), "int16", max(8, max(cfg.batches)))
        for name in cfg.stages:
            for precision in cfg.precisions:
                for recompute in cfg.recompute if name != "stage2" else [False]:
                    title = f"{name} {precision}" + (" recompute" if recompute else "")
                    results[title] = one(STAGES[name], precision, recompute, cfg, root, run.device)
                    print(f"{title:24s} {shown(results[title])}", flush=True)
    finally:
        shutil.rmtree(root)
    print(f"wrote {timing.write('memory', results, run.device)}")


def one(stage: int, precision: str, recompute: bool, cfg: Config, root: Path, device: torch.device) -> dict[str, Any]:
    """Measured points of a stage, the line through them, and the largest batch for every card."""
    values: dict[str, Any] = {
        "data_path": str(root / "data"),
        "pretrained_path": str(root / "weights"),
        "resnet_pretrained": "none",
        "arch": cfg.arch,
        "precision": precision,
        "device": device.type,
        "workers": 0,
        "fit_batch": 1.0,
    }
    values |= {"slices_per_volume": 0} if stage == 1 else {"target_shape": list(cfg.target_shape)}
    values |= {"trans_pretrained": "none"} if stage == 3 else {}
    values |= {"recompute": recompute} if stage != 2 else {}
    of = estimate.stage_config(stage, "swav", values)
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else 0
    points: dict[int, int] = {}
    for batch in cfg.batches:
        size = batch * (8 if stage == 1 else 1)
        of.batch_size = size
        if len(points) > 1:
            base, each = memory.line(points)
            if base + each * size > memory.SPARE * memory.free_memory(device):
                break
        used = memory.measure(of, size, free)
        if used is None:
            break
        points[size] = used
        print(f"  batch {size}: {used / memory.GIB:.2f} GiB", flush=True)
    base, each = memory.line(points)
    cards = {}
    for gib in CARDS:
        batch = max(0, int((gib * memory.GIB - base) / each)) if each else None
        how = "measured" if batch is not None and min(points) <= batch <= max(points) else "extrapolated"
        cards[gib] = {"batch_size": batch, "how": how}
    return {"points_bytes": points, "base_bytes": base, "bytes_per_sample": each, "cards": cards}


def shown(result: dict[str, Any]) -> str:
    measured = ", ".join(f"{b}: {used / memory.GIB:.2f}" for b, used in result["points_bytes"].items())
    cards = ", ".join(f"{gib}: {c['batch_size']}{'' if c['how'] == 'measured' else '*'}"
                      for gib, c in result["cards"].items())  # fmt: skip
    return f"GiB at batch {measured}; largest batch for cards of GiB (* extrapolated) {cards}"


if __name__ == "__main__":
    options.main(main, Config, __doc__)

"""What this machine does per second: the constants that `estimate.py` predicts with.

    python -m benchmarks.constants                    # 1 to 5 minutes on two quiet cores
    python -m benchmarks.constants --quick true       # one repetition, ResNet-18 alone: to try it

Run it with as many threads (OMP_NUM_THREADS) and on as idle a machine as the training will have. One process.
"""

from __future__ import annotations

import csv
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

import estimate
from benchmarks import timing
from benchmarks.data import write_raw
from datasets.augment import MultiCrop, VolumeViews
from datasets.loaders import canvas_size
from datasets.store import prepare
from models.encoder import JointEncoder
from models.folding import CHUNK_PIXELS, FrozenSlices
from models.resnet import GreyResNet, pooled
from models.transformer import SliceTransformer
from objectives.kmeans import assign, fast_products, kmeans_torch
from objectives.sinkhorn import sinkhorn
from utils import checkpoint, distributed, memory, optim
from utils import config as options
from utils.distributed import Run
from utils.precision import Precision

ROOT = Path(__file__).parents[1]
RANKS = 2  # processes that join their gradients


@dataclass
class Config:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where"""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """number format of training"""
    archs: list[str] = ("resnet18", "resnet50")
    """torchvision ResNets to measure; others are taken to be like ResNet-50"""
    sides: list[int] = (32, 64, 128, 224)
    """of slices, in pixels"""
    repeats: int = 3
    """of each measurement, of which the median counts"""
    quick: bool = False
    """one repetition, ResNet-18 at 32 and 64 pixels"""


def main(cfg: Config) -> None:
    run = distributed.start(cfg.device)
    if cfg.quick:
        cfg.archs, cfg.sides, cfg.repeats = ["resnet18"], [32, 64], 1
    alone = run.device.type == "cuda" and torch.cuda.device_count() < RANKS
    found = constants(cfg, run, alone)
    assumed = ["all_reduce: 100 GB/s between cards, as there is only one here"] if alone else []
    print(f"wrote {timing.write('constants_quick' if cfg.quick else 'constants', found, run.device, assumed)}")


def constants(cfg: Config, run: Run, alone: bool) -> dict[str, Any]:
    """alone: there is no second card to talk to."""
    number = Precision(cfg.precision, run.device)
    half = number.dtype != torch.float32
    found: dict[str, Any] = {"precision": number.name, "bytes_per_value": 2 if half else 4}
    found |= {"overlaps": run.device.type == "cuda", "chunk_bytes": 64 * CHUNK_PIXELS[run.device.type]}
    root = Path(tempfile.mkdtemp(prefix="benchmark_constants_"))
    began = time.perf_counter()

    def measured(name: str, values: dict[str, Any]) -> None:
        print(f"{name:12s} {time.perf_counter() - began:5.0f} s  {values}", flush=True)
        found.update(values)

    try:
        measured("networks", networks(cfg, run, number))
        measured("augmentation", augmentation(cfg, run))
        measured("objectives", objectives(cfg, run, half))
        measured("optimiser", optimiser(cfg, run))
        measured("data", data(cfg, root))
        measured("checkpoint", saving(cfg, root))
        measured("all-reduce", {"all_reduce": 1e11} if alone else all_reduce(cfg, run, root))
        measured("whole steps", whole_steps(cfg, run, root, found))
    finally:
        shutil.rmtree(root)
    return found


def seconds(work: Callable[[], object], cfg: Config, run: Run, warmup: int = 1) -> float:
    return timing.measure({"": work}, cfg.repeats, warmup, run.device)[""].median


def networks(cfg: Config, run: Run, number: Precision) -> dict[str, Any]:
    """Operations per second: ResNet forward and backward, folded forward, transformer, one large matrix product."""
    train: dict[str, dict[str, float]] = {}
    forward: dict[str, dict[str, float]] = {}
    gpu = run.device.type == "cuda"
    for arch in cfg.archs:
        resnet = GreyResNet(arch).to(run.device).train()
        joint = JointEncoder(arch, 640, 1).to(run.device).eval()
        train[arch], forward[arch] = {}, {}
        for side in cfg.sides:
            count = images_of(side, gpu)
            images = torch.rand(count, 1, side, side, device=run.device)

            def step(images: torch.Tensor = images, resnet: nn.Module = resnet) -> None:
                with number.autocast():
                    loss = pooled(resnet(images)).float().square().mean()
                loss.backward()
                resnet.zero_grad(set_to_none=True)

            took = seconds(step, cfg, run)
            train[arch][str(side)] = count * estimate.resnet_flops(arch, side, side, True) / took
            frozen, mask = FrozenSlices(joint), torch.ones(1, count, dtype=torch.bool, device=run.device)

            def encode(images: torch.Tensor = images, frozen: FrozenSlices = frozen, mask: torch.Tensor = mask) -> None:
                with number.autocast():
                    frozen(images.transpose(0, 1), mask)

            took = seconds(encode, cfg, run)
            forward[arch][str(side)] = count * estimate.resnet_flops(arch, side, side, False) / took
    transformer: dict[str, float] = {}
    for width in (64, 128, 640):
        volumes, slices, layers = (64 if gpu else 4), 64, 2
        net = SliceTransformer(width, layers).to(run.device)
        x, mask = torch.randn(volumes, slices, width, device=run.device), torch.ones(volumes, slices).bool()
        mask = mask.to(run.device)

        def attend(net: nn.Module = net, x: torch.Tensor = x, mask: torch.Tensor = mask) -> None:
            with number.autocast():
                loss = net(x, mask).float().square().mean()
            loss.backward()

        took = seconds(attend, cfg, run)
        transformer[str(width)] = volumes * estimate.transformer_flops(width, layers, slices) / took
    a = torch.randn(1024, 2048, device=run.device)
    b = torch.randn(2048, 2048, device=run.device)

    def product() -> None:
        with number.autocast():
            a @ b

    dense = 2 * 1024 * 2048 * 2048 / seconds(product, cfg, run)
    return {"train_flops": train, "forward_flops": forward, "transformer_flops": transformer, "dense_flops": dense}


def images_of(side: int, gpu: bool) -> int:
    """Enough to keep the device busy; a ResNet-50 in training then keeps at most 28 GiB in bf16, on a CPU 1 GiB."""
    return min(2048, 2**24 // side**2) if gpu else max(16, min(128, 2**19 // side**2))


def augmentation(cfg: Config, run: Run) -> dict[str, Any]:
    """[seconds per view, seconds per pixel of it] of volumes (all their slices) and of crops of images."""

    def volumes(side: int, depth: int) -> float:
        size, B = canvas_size(side, side), 2
        x = torch.rand(B, depth, size, size, device=run.device).half()
        views, mask = VolumeViews(side, side, "strong", 0), torch.ones(B, depth, dtype=torch.bool)
        extent, index = torch.full((B, 2), size), torch.arange(B)
        return seconds(lambda: views(x, mask, extent, index, 0), cfg, run) / (2 * B)

    def crops(side: int) -> float:
        size, B = canvas_size(side), 8
        x = torch.rand(B, size, size, device=run.device).half()
        make = MultiCrop([(side, side)], [2], [(0.25, 1.0)], "strong", 0)
        extent, index = torch.full((B, 2), size), torch.arange(B)
        return seconds(lambda: make(x, extent, index, 0), cfg, run) / (2 * B)

    def pair(small: tuple[float, float], large: tuple[float, float]) -> list[float]:
        """Line through two (pixels, seconds)."""
        each = (large[1] - small[1]) / (large[0] - small[0])
        return [max(0.0, small[1] - each * small[0]), each]

    return {
        "augment_volumes": pair((16 * 64 * 64, volumes(64, 16)), (64 * 128 * 128, volumes(128, 64))),
        "augment_crops": pair((48 * 48, crops(48)), (224 * 224, crops(224))),
    }


def objectives(cfg: Config, run: Run, half: bool) -> dict[str, Any]:
    """k-means with the assignment at its end: products N * K * d per second by d and K, and seconds per clustering
    beside; Sinkhorn: seconds per score. half: whether training computes in half precision."""
    rates: dict[str, dict[str, float]] = {}
    N, iterations = 20_000, 10  # as many as training does by default: the last assignment, in float32, costs more
    for d in (128, 640):  # of slices and of volumes
        points = F.normalize(torch.randn(N, d, device=run.device), dim=1)
        rates[str(d)] = {}
        for K in (30, 300) if cfg.quick else (30, 300, 3000):

            def cluster(K: int = K, points: torch.Tensor = points) -> None:
                products = fast_products(N * K, run.device) if half else None
                assign(points, kmeans_torch(points, points[:K], iterations, products=products))

            rates[str(d)][str(K)] = N * K * d * (iterations + 1) / seconds(cluster, cfg, run)
    few = F.normalize(torch.randn(64, 128, device=run.device), dim=1)
    fixed = seconds(lambda: kmeans_torch(few, few[:8], 10), cfg, run)
    scores = torch.randn(2000, 500, device=run.device).clamp(-3, 3) / 3
    took = seconds(lambda: sinkhorn(scores, 0.02, 3), cfg, run)
    return {"kmeans": rates, "kmeans_head": fixed, "sinkhorn": took / scores.numel()}


def optimiser(cfg: Config, run: Run) -> dict[str, float]:
    """Seconds per parameter of LARC's step, gradients present."""
    net = GreyResNet("resnet18" if cfg.quick else "resnet50").to(run.device)
    larc = optim.LARC(optim.parameter_groups(net, 1e-6), 0.1)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    return {"optimiser": seconds(larc.step, cfg, run) / sum(p.numel() for p in net.parameters())}


def data(cfg: Config, root: Path) -> dict[str, float]:
    """Building the cache, seconds per file and per voxel; reading it, seconds per sample and per byte."""
    shapes = {"small": ((24, 24, 12), 60), "large": ((256, 256, 64), 4)}
    built, read = {}, {}
    for name, (shape, count) in shapes.items():
        folder = root / name
        write_raw(folder, shape, "int16", count)
        began = time.perf_counter()
        store = prepare(folder, canvas_size(128), progress=False)[1]
        built[name] = (time.perf_counter() - began) / count
        slices = shape[2]
        spent = [time.perf_counter()]
        for _ in range(cfg.repeats):
            for i in range(count):
                store.read(i, 0, slices, half=True)
            spent.append(time.perf_counter())
        read[name] = statistics.median(b - a for a, b in pairwise(spent)) / count
    sizes = {name: int(np.prod(shape)) for name, (shape, _) in shapes.items()}
    voxel = max(0.0, built["large"] - built["small"]) / (sizes["large"] - sizes["small"])
    of_bytes = {name: 2 * shape[2] * canvas_size(128) ** 2 for name, (shape, _) in shapes.items()}
    byte = max(0.0, read["large"] - read["small"]) / (of_bytes["large"] - of_bytes["small"])
    return {
        "cache_voxel": voxel,
        "cache_file": max(0.0, built["small"] - voxel * sizes["small"]),
        "read_byte": byte,
        "read_sample": max(0.0, read["small"] - byte * of_bytes["small"]),
    }


def saving(cfg: Config, root: Path) -> dict[str, float]:
    """Bytes per second of a checkpoint, flushed to the disk and with its checksum."""
    state = {"learner": {str(i): torch.randn(2**18) for i in range(100)}}
    began = time.perf_counter()
    for _ in range(cfg.repeats):
        checkpoint.save(state, root / "saved")
    return {"checkpoint": cfg.repeats * 100 * 2**20 / (time.perf_counter() - began)}


def all_reduce(cfg: Config, run: Run, root: Path) -> dict[str, float]:
    """Bytes per second that a process sends while two of them join 64 MiB (2 (g - 1) / g times the payload)."""
    mp.spawn(_reduce, (RANKS, str(root / "meeting"), str(root / "rate"), run.device.type, cfg.repeats), nprocs=RANKS)
    return {"all_reduce": float((root / "rate").read_text())}


def _reduce(rank: int, ranks: int, meeting: str, out: str, kind: str, repeats: int) -> None:
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, f"file://{meeting}", rank=rank, world_size=ranks)
    payload = torch.ones(2**24, device=torch.device(kind, rank) if kind == "cuda" else "cpu")
    dist.all_reduce(payload)
    spent = []
    for _ in range(max(3, repeats)):
        began = time.perf_counter()
        dist.all_reduce(payload)
        timing.wait(payload.device)
        spent.append(time.perf_counter() - began)
    if rank == 0:
        Path(out).write_text(str(estimate.ring(payload.nbytes, ranks) / statistics.median(spent)))
    dist.destroy_process_group()


def whole_steps(cfg: Config, run: Run, root: Path, found: dict[str, Any]) -> dict[str, float]:
    """What is left of a small real run when the parts are taken away: a start, and overhead per step; memory."""
    write_raw(root / "tiny", (48, 48, 16), "int16", 16)
    values = {
        "data_path": str(root / "tiny"),
        "dump_path": str(root / "run"),
        "pretrained_path": str(root / "weights"),
        "resnet_pretrained": "none",
        "trans_pretrained": "none",
        "arch": cfg.archs[0],
        "target_shape": [16, 32, 32],
        "device": run.device.type,
        "precision": cfg.precision,
        "workers": 0,
        "epochs": 3,
        "warmup_epochs": 0,
        "batch_size": 2,
    }
    options.save_yaml(values, root / "tiny.yaml")
    began = time.perf_counter()
    command = [sys.executable, str(ROOT / "ssl_swav3D.py"), "--config", str(root / "tiny.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    took = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"ssl_swav3D.py failed:\n{done.stderr}")
    with open(root / "run" / "metrics.csv", newline="") as file:
        epochs = [float(row["seconds"]) for row in csv.DictReader(file)]
    of = estimate.stage_config(3, "swav", values)
    case = estimate.Data(16, (48, 48, 16))
    blank = {"step": 0.0, "start": 0.0, "process_bytes": 0.0, "memory_slack": 1.0}
    parts = estimate.predict(3, "swav", of, case, estimate.Machine(found | blank))
    outside = {"checkpoints", "cache", "start"}
    inside = sum(s for name, s in parts.seconds.items() if name not in outside) / 3 / parts.steps
    step = max(0.0, statistics.median(epochs) / parts.steps - inside)
    start = took - sum(epochs) - sum(parts.seconds[name] for name in outside)

    # Two sizes give what a program needs without data, and how much more than the parts it takes.
    of.fit_batch = 1.0
    used, counted = {}, {}
    of.target_shape = [16, 64, 64]
    before = torch.cuda.mem_get_info()[0] if run.device.type == "cuda" else 0
    for batch in (2, 16):
        of.batch_size = batch
        used[batch] = memory.measure(of, batch, before)
        counted[batch] = estimate.predict(3, "swav", of, case, estimate.Machine(found | blank)).memory
    slack = max(1.0, (used[16] - used[2]) / (counted[16] - counted[2]))
    program = max(0.0, used[2] - slack * counted[2])
    return {"step": step, "start": max(0.0, start), "process_bytes": program, "memory_slack": slack}


if __name__ == "__main__":
    options.main(main, Config, __doc__)

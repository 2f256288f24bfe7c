"""A training step of stages 1 and 3: against the plain way to write it, against the bare ResNet, and where time goes.

    python -m benchmarks.step                                        # CPU, (64, 128, 128), 2 views: about 6 minutes
    python -m benchmarks.step --device cuda --batch_size 16 --workers 8 --volumes 640

Pieces that take turns in the same process:
  ours       an update of ssl_swav3D.py or ssl_swav2D.py with all that training does in one, its diagnostics too
  bare       torchvision's three-channel ResNet, forward and backward on the same number of slices, tuned the same way
             (channels-last, the same precision): what trains a ResNet on these slices can hardly be faster
  reference  the plain way with public packages (benchmarks/plain.py). On a CPU in a process of its own, whose memory is
             handled as usual (ours keeps freed blocks). Where a package is missing, the reference goes without it,
             which the results name.
`split` says where the time of our steps goes: the observers of the clusters are its `diagnostics`. `ranks` compares two
processes that train together (gloo, a core each) with two that know nothing of each other. Peak memory (GPU): weights,
inputs and all else, ours and bare each begun with nothing allocated.
The volumes' cache takes 4 MB for each of `volumes` below the temporary folder.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torchvision
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from benchmarks import plain, timing
from benchmarks.training import Options, Updates, recorded, shares, training_of, write_volumes
from utils import config as options
from utils import distributed, profile
from utils.distributed import Run
from utils.precision import Precision

PARTS = ("stage3", "stage1", "ranks")


@dataclass
class Config(Options):
    parts: tuple[Literal[PARTS], ...] = PARTS
    """what to measure"""
    images: PositiveInt = 16
    """images per step of stage 1; a GPU wants 128"""
    volumes: PositiveInt = 16
    """volumes of an epoch"""
    compile: bool = False
    """ours and bare with torch.compile"""
    reference: bool = True
    """whether to measure the plain way, too"""
    repeats: PositiveInt = 3
    """measurements of each piece"""
    steps: NonNegativeInt = 0
    """steps of an end-to-end run, for slices per second and data wait; 0: none"""


def main(cfg: Config) -> None:
    run = distributed.start(cfg.device)
    cfg.precisions = cfg.precisions or timing.formats(run.device)
    results: dict[str, Any] = {"arch": cfg.arch, "view": list(cfg.target_shape), "compile": cfg.compile}
    with tempfile.TemporaryDirectory(prefix="benchmark_step_") as folder:
        data = Path(folder, "data")
        write_volumes(data, (160, 160, 72), cfg.volumes)
        for part in cfg.parts:
            print(f"\n{part}, {timing.device_name(run.device)}")
            results[part] = {"stage3": stage3, "stage1": stage1, "ranks": ranks}[part](data, cfg, run)
    timing.write(timing.file_name("step", cfg, "arch", "target_shape", "parts", "compile"), results, run.device)


def stage3(data: Path, cfg: Config, run: Run) -> dict[str, Any]:
    slices, *side = cfg.target_shape
    sizes = [(2 * cfg.batch_size * slices, side)]
    result: dict[str, Any] = {"slices": sizes[0][0]}
    if run.device.type == "cuda":  # before anything else is on it
        result["peak_gib"] = {p: peaks(data, cfg, p, sizes, run) for p in cfg.precisions}
    ours = {f"ours {p}": ours_of_stage3(data, cfg, p, run) for p in cfg.precisions}
    if cfg.reference:
        result["reference without"] = plain.missing()
        for package, instead in plain.missing().items():
            print(f"the reference goes without {package}: {instead} (pip install -r requirements-dev.txt)")
    result |= compare(ours, sizes, plain.volumes_step, cfg, run.device)
    if cfg.steps:
        result["end to end"] = {name: end_to_end(one, cfg, result["slices"], run.device) for name, one in ours.items()}
    return result


def ours_of_stage3(data: Path, cfg: Config, precision: str, run: Run) -> Updates:
    chosen = {name: getattr(cfg, name) for name in ("arch", "target_shape", "batch_size", "workers", "compile")}
    prototypes = {"nmb_prototypes": plain.PROTOTYPES, "nmb_prototypes_intra": plain.INTRA_PROTOTYPES}
    return Updates(training_of("ssl_swav3D", data, run, precision=precision, **chosen, **prototypes))


def stage1(data: Path, cfg: Config, run: Run) -> dict[str, Any]:
    side = cfg.target_shape[1]
    chosen = {name: getattr(cfg, name) for name in ("arch", "workers", "compile")}
    crops = {"size_crops": [side, side // 2], "nmb_crops": [2, 4]}
    crops |= {"min_scale_crops": [0.3, 0.05], "max_scale_crops": [1.0, 0.3]}
    chosen |= {"batch_size": cfg.images, "nmb_prototypes": plain.INTRA_PROTOTYPES} | crops
    ours = {f"ours {p}": Updates(training_of("ssl_swav2D", data, run, precision=p, **chosen)) for p in cfg.precisions}
    sizes = [(2 * cfg.images, [side, side]), (4 * cfg.images, [side // 2, side // 2])]
    return {"images": cfg.images, "crops": sizes, **compare(ours, sizes, plain.images_step, cfg, run.device)}


def compare(
    ours: dict[str, Updates], sizes: list[tuple[int, list[int]]], reference: Callable, cfg: Config, device: torch.device
) -> dict[str, Any]:
    """Times and ratios of pieces that take turns; where the time of our steps goes."""
    work, parts, pairs = {}, {}, []
    for name, updates in ours.items():
        precision = name.split()[-1]
        work[name], parts[name] = recorded(updates, device)
        work[f"bare {precision}"] = bare_resnet(cfg, sizes, precision, device)
        pairs.append((name, f"bare {precision}"))
    if cfg.reference:
        work["reference"] = plain.apart(reference, cfg, device)
        pairs += [("reference", name) for name in ours]
    result = timing.compare(work, cfg.repeats, device=device, pairs=pairs)
    for name, calls in parts.items():
        result[f"{name} split"] = split = shares(calls[1:])  # without the warm-up
        print(f"  {name}: " + ", ".join(f"{part} {share:.1%}" for part, share in split.items()))
    return result


def bare_resnet(
    cfg: Config, sizes: list[tuple[int, list[int]]], precision: str, device: torch.device
) -> Callable[[], None]:
    """Forward and backward of torchvision's network on random images, (number, side) of each size, tuned as ours."""
    net = torchvision.models.get_model(cfg.arch, weights=None)
    net.fc = nn.Identity()
    net = net.to(device, memory_format=torch.channels_last).train()
    images: list[Tensor] = [torch.rand(n, 3, *side, device=device) for n, side in sizes]
    images = [x.contiguous(memory_format=torch.channels_last) for x in images]
    if cfg.compile:
        net.compile()
    number = Precision(precision, device)

    def step() -> None:
        with number.autocast():
            loss = sum(net(x).float().square().mean() for x in images)
        loss.backward()
        net.zero_grad(set_to_none=True)

    return step


def peaks(data: Path, cfg: Config, precision: str, sizes: list[tuple[int, list[int]]], run: Run) -> dict[str, float]:
    """GiB allocated at most during a step, ours and bare, and their ratio."""
    found = {}
    makers = {"bare": lambda: bare_resnet(cfg, sizes, precision, run.device)}
    makers["ours"] = lambda: ours_of_stage3(data, cfg, precision, run)
    for name, make in makers.items():
        gc.collect()  # what was measured before, loading processes too
        torch.cuda.empty_cache()
        step = make()
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        found[name] = torch.cuda.max_memory_allocated() / 2**30
        del step
    found["ours over bare"] = found["ours"] / found["bare"]
    print(f"  peak memory {precision}: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()))
    return found


def end_to_end(updates: Updates, cfg: Config, slices: int, device: torch.device) -> dict[str, float]:
    """Slices per second of `steps` steps in a row, from the cache on, and the share of time that data made it wait."""
    for _ in range(1 + 2 * cfg.workers):  # what workers have read ahead is used up
        updates()
    timing.wait(device)
    began = time.perf_counter()
    with profile.recording(device) as spans:
        for _ in range(cfg.steps):
            updates()
        timing.wait(device)
    seconds = time.perf_counter() - began
    figures = {"slices_per_second": slices * cfg.steps / seconds, "data_wait": shares([spans.seconds()])["data"]}
    print("  end to end: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    return figures


def ranks(data: Path, cfg: Config, run: Run) -> dict[str, Any]:
    """Median step of two processes that train one model, over that of two that train one each; a core each.

    Times are those of the slower process, and of the faster of two runs.
    """
    if run.device.type != "cpu":
        print("  compares processes on CPU cores, not run on a GPU")
        return {}
    cfg = replace(cfg, workers=0)  # a core each
    found: dict[str, list[float]] = {"apart": [], "together": []}
    for _ in range(2):
        for name, seconds in found.items():
            with tempfile.TemporaryDirectory() as folder:
                torch.multiprocessing.spawn(_one_rank, (data, cfg, name == "together", folder), nprocs=2)
                seconds.append(max(float(file.read_text()) for file in Path(folder).glob("seconds*")))
    best = {name: min(seconds) for name, seconds in found.items()}
    ratio = best["together"] / best["apart"]
    print(f"  {cfg.precisions[-1]}: together {best['together']:.2f} s, apart {best['apart']:.2f} s, {ratio:.2f} x")
    return {"precision": cfg.precisions[-1], "seconds": found, "together over apart": ratio}


def _one_rank(rank: int, data: Path, cfg: Config, together: bool, folder: str) -> None:
    torch.set_num_threads(1)
    run = distributed.start("cpu")
    if together:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
        run = Run(rank, 2, run.device)
    times = timing.measure({"step": ours_of_stage3(data, cfg, cfg.precisions[-1], run)}, cfg.repeats)
    Path(folder, f"seconds{rank}").write_text(str(times["step"].median))
    distributed.stop()


if __name__ == "__main__":
    options.main(main, Config, __doc__)

"""A training step of stages 1 and 3: against the bare ResNet and the plain way to write it, and where time goes.

    python -m benchmarks.step                                        # CPU, (64, 128, 128), 2 views: about 6 minutes
    python -m benchmarks.step --device cuda --batch_size 16 --workers 8 --volumes 640

Pieces that take turns in the same process:
  ours       an update of ssl_swav3D.py or ssl_swav2D.py with all that training does in one, its diagnostics too
  bare       torchvision's three-channel ResNet, forward and backward on the same number of slices, tuned the same way
             (channels-last, the same precision): what trains a ResNet on these slices can hardly be faster
  reference  the plain way with public packages (benchmarks/plain.py), stage 3 alone
`split` says where the time of our steps goes; what the observers of the clusters cost is its `diagnostics`.
`added_gib` is what a step allocates at its peak beside weights and optimiser, with `--recompute true` as well.
`ranks` compares two processes that train together (gloo, a core each) with two that know nothing of each other.
The volumes' cache takes 4 MB for each of `volumes` below the temporary folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torchvision
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn

from benchmarks import plain, timing
from benchmarks.training import Options, Updates, recorded, shares, training_of, write_volumes
from utils import config as options
from utils import distributed
from utils.distributed import Run
from utils.precision import Precision

PARTS = ("stage3", "stage1", "ranks")
Sizes = list[tuple[int, list[int]]]  # number, height and width of images


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


def main(cfg: Config) -> None:
    run = distributed.start(cfg.device)
    cfg.precisions = cfg.precisions or timing.formats(run.device)
    results: dict[str, Any] = {"arch": cfg.arch, "view": list(cfg.target_shape), "compile": cfg.compile}
    with tempfile.TemporaryDirectory(prefix="benchmark_step_") as folder:
        data = Path(folder, "data")
        write_volumes(data, (160, 160, 72), cfg.volumes)
        for part in cfg.parts:
            print(f"\n{part}, {timing.device_name(run.device)}", flush=True)
            results[part] = {"stage3": stage3, "stage1": stage1, "ranks": ranks}[part](data, cfg, run)
    timing.write(timing.file_name("step", cfg, "arch", "target_shape", "parts", "compile"), results, run.device)


def updates_of(stage: int, data: Path, cfg: Config, run: Run, **options: Any) -> Updates:
    """Updates of SwAV's script of a stage."""
    chosen = {name: getattr(cfg, name) for name in ("arch", "workers", "compile")} | options
    if stage == 3:
        chosen |= {"target_shape": cfg.target_shape, "batch_size": cfg.batch_size}
        return Updates(training_of("ssl_swav3D", data, run, **chosen))
    side = cfg.target_shape[1]
    crops = {"size_crops": [side, side // 2], "nmb_crops": [2, 4]}
    crops |= {"min_scale_crops": [0.3, 0.05], "max_scale_crops": [1.0, 0.3]}
    return Updates(training_of("ssl_swav2D", data, run, batch_size=cfg.images, **chosen, **crops))


def stage3(data: Path, cfg: Config, run: Run) -> dict[str, Any]:
    slices, height, width = cfg.target_shape
    reference = None
    if cfg.reference and plain.installed("torchio", "deformable_attention"):
        reference = plain.step_of(cfg.arch, cfg.target_shape, cfg.batch_size, run.device)
    return compare(3, data, [(2 * cfg.batch_size * slices, [height, width])], reference, cfg, run)


def stage1(data: Path, cfg: Config, run: Run) -> dict[str, Any]:
    side = cfg.target_shape[1]
    return compare(1, data, [(2 * cfg.images, [side] * 2), (4 * cfg.images, [side // 2] * 2)], None, cfg, run)


def compare(
    stage: int, data: Path, sizes: Sizes, reference: Callable[[], None] | None, cfg: Config, run: Run
) -> dict[str, Any]:
    """Times and ratios of pieces that take turns, their memory, and where the time of our steps goes."""
    work, calls, pairs, device = {}, {}, [], run.device
    for precision in cfg.precisions:
        ours, bare = f"ours {precision}", f"bare {precision}"
        work[ours], calls[ours] = recorded(updates_of(stage, data, cfg, run, precision=precision), device)
        work[bare] = bare_resnet(cfg, sizes, precision, device)
        pairs.append((ours, bare))
    if reference:
        pairs += [("reference", ours) for ours in calls]
        work["reference"] = reference
    result = {"images": sizes, **timing.compare(work, cfg.repeats, device=device, pairs=pairs)}
    result["split"] = {name: shares(parts[1:]) for name, parts in calls.items()}  # without the warm-up
    for name, split in result["split"].items():
        print(f"  {name}: " + ", ".join(f"{part} {share:.1%}" for part, share in split.items()), flush=True)
    for precision in cfg.precisions:
        work[f"recompute {precision}"] = updates_of(stage, data, cfg, run, precision=precision, recompute=True)
        work[f"recompute {precision}"]()
    result["added_gib"] = {name: timing.added_bytes(step, device) / 2**30 for name, step in work.items()}
    print("  GiB added: " + ", ".join(f"{name} {gib:.2f}" for name, gib in result["added_gib"].items()), flush=True)
    return result


def bare_resnet(cfg: Config, sizes: Sizes, precision: str, device: torch.device) -> Callable[[], None]:
    """Forward and backward of torchvision's network on random images, tuned as ours."""
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
    times = timing.measure({"step": updates_of(3, data, cfg, run, precision=cfg.precisions[-1])}, cfg.repeats)
    Path(folder, f"seconds{rank}").write_text(str(times["step"].median))
    distributed.stop()


if __name__ == "__main__":
    options.main(main, Config, __doc__)

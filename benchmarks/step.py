"""A training step of stages 1 and 3: against the plain way to write it, against the bare ResNet, and where time goes.

    python -m benchmarks.step                                        # CPU, (64, 128, 128), 2 views: about 6 minutes
    python -m benchmarks.step --device cuda --batch_size 16 --workers 8

Pieces that take turns in the same process:
  ours       loader's augmentation, both views through f_intra and f_inter, SwAV at both levels, backward, LARC
  bare       torchvision's three-channel ResNet-50, forward and backward on the same number of slices, tuned the same
             way (channels-last, the same precision): what trains a ResNet-50 on these slices can hardly be faster
  reference  the plain way with public packages: that ResNet channels-first in float32, four layers of the
             `deformable-attention` package along the feature axis (as the method's released code calls it), TorchIO on
             the CPU, SwAV's swapped prediction, LARC with a loop over parameters. On a CPU in a process of its own,
             whose memory is handled as usual (ours keeps freed blocks). Where a package is missing, the reference goes
             without it, which the results name; where a GPU has not the memory, it adds up gradients over parts.
`ranks` compares two processes that train together (gloo, a core each) with two that know nothing of each other. What
gradients cost on the way is the time of their backward pass with reduction less that without.
Peak memory (GPU): weights, inputs and all else, ours and bare each begun with nothing allocated.
The volumes' cache takes 4 MB for each of an epoch's volumes below the temporary folder: with --steps 30 and eight
workers, 4 GB; those workers hold as much again in shared memory (/dev/shm).
"""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.data import released_transforms
from benchmarks.training import (
    Options,
    Training,
    file_name,
    joint_learner,
    recorded,
    shares,
    volume_loader,
    write_volumes,
)
from datasets.augment import MultiCrop
from datasets.loaders import ImageLoader, Slices, canvas_size
from datasets.store import prepare
from models.heads import ProjectionHead
from models.resnet import GreyResNet
from objectives import ImageClustering, SwAV
from utils import config as options
from utils import distributed, profile
from utils.distributed import Run
from utils.precision import Precision

PROTOTYPES = 16  # few: the phantoms are few, and their cost does not show beside a ResNet
INTRA_PROTOTYPES = 300
PARTS = ("stage3", "stage1", "ranks")
PER_VOLUME = 32  # slices of a volume that stage 1 takes
WITHOUT = {  # package -> what the reference of stage 3 does without it
    "torchio": "views are not augmented",
    "deformable_attention": "four layers of ordinary attention along the slices",
}


@dataclass
class Config(Options):
    parts: list[Literal[PARTS]] = PARTS
    """what to measure; not all of it: results go to a file of their own"""
    images: PositiveInt = 16
    """images per step of stage 1; a GPU wants 128"""
    precisions: list[Literal["fp32", "bf16"]] = ("fp32", "bf16")
    """number formats; a CPU without bf16 units is better off with fp32 alone"""
    compile: bool = False
    """ours and bare with torch.compile; results go to a file of their own"""
    reference: bool = True
    """whether to measure the plain way, too"""
    repeats: PositiveInt = 3
    """measurements of each piece"""
    steps: NonNegativeInt = 0
    """steps of an end-to-end run with all that training does, for slices per second and data wait; 0: none"""


def main(cfg: Config) -> None:
    run = distributed.start(cfg.device)
    name = file_name(timing.of_parts("step_compiled" if cfg.compile else "step", cfg.parts, PARTS), cfg)
    root = Path(tempfile.mkdtemp(prefix="benchmark_step_"))
    results: dict[str, Any] = {"arch": cfg.arch, "view": list(cfg.target_shape), "compile": cfg.compile}
    try:
        write_volumes(root / "data", (160, 160, 72), volumes_of_an_epoch(cfg, run.device))
        for part in cfg.parts:
            print(f"\n{part}, {timing.device_name(run.device)}")
            results[part] = {"stage3": stage3, "stage1": stage1, "ranks": ranks}[part](root / "data", cfg, run)
    finally:
        shutil.rmtree(root)
    print(f"\nwrote {timing.write(name, results, run.device)}")


def volumes_of_an_epoch(cfg: Config, device: torch.device) -> int:
    """So many that all steps of a `Training` lie within its first epoch, and that its workers read on to the end."""
    of_ranks = "ranks" in cfg.parts and device.type == "cpu"
    steps = 1 + (1 + cfg.repeats) * (2 if of_ranks else 1)  # the batch ahead; two kinds of steps there
    steps += (warm_up(cfg) + cfg.steps if cfg.steps else 0) + 2 * cfg.workers
    return steps * max(cfg.batch_size * (2 if of_ranks else 1), math.ceil(cfg.images / PER_VOLUME))


def warm_up(cfg: Config) -> int:
    """Steps before a run's end-to-end figures: what workers have read ahead is used up."""
    return 1 + 2 * cfg.workers


# ---------------------------------------------------------------------------------------------------------- the pieces


def ours_of_stage3(root: Path, cfg: Config, precision: str, run: Run) -> Training:
    torch.manual_seed(0)
    learner = joint_learner(cfg.arch, INTRA_PROTOTYPES, PROTOTYPES)
    if cfg.compile:
        learner.encoder.encoder.compile()
    return Training(learner, volume_loader(root, cfg, run, intra_slices=8), precision, run)


def bare_resnet(cfg: Config, images: list[Tensor], precision: str, device: torch.device) -> Callable[[], None]:
    """Forward and backward of torchvision's network on images [n, 3, H, W] of each size, tuned as ours."""
    net = torchvision.models.get_model(cfg.arch, weights=None)
    net.fc = nn.Identity()
    net = net.to(device, memory_format=torch.channels_last).train()
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


def compare(
    work: dict[str, Callable[[], object]], ours: dict[str, Training], cfg: Config, device: torch.device
) -> dict[str, Any]:
    """Times and ratios of pieces that take turns; where the time of our steps goes."""
    work, parts = dict(work), {}
    for name, one in ours.items():
        work[name], parts[name] = recorded(one.step, device)
    times = timing.measure(work, cfg.repeats, warmup=1, device=device)
    result: dict[str, Any] = {name: t.record() for name, t in times.items()}
    for name, t in times.items():
        line = f"{name:16s} {t.median:8.3f} s"
        against = {"bare": f"bare {name.split()[-1]}", "reference": "reference"} if name.startswith("ours") else {}
        for what, other in against.items():
            if other in times:
                ratio = t.over(times[other]) if what == "bare" else times[other].over(t)
                result[f"{name} over bare" if what == "bare" else f"reference over {name}"] = ratio
                line += f", {ratio:.2f} x bare" if what == "bare" else f"; the reference takes {ratio:.2f} x as long"
        print(line, flush=True)
    for name, calls in parts.items():
        result[f"{name} split"] = split = shares(calls[1:])  # without the warm-up
        print(f"  {name}: " + ", ".join(f"{part} {share:.1%}" for part, share in split.items()))
    return result


# --------------------------------------------------------------------------------------------------------------- parts


def stage3(root: Path, cfg: Config, run: Run) -> dict[str, Any]:
    slices, height, width = cfg.target_shape
    count = 2 * cfg.batch_size * slices

    def bare(precision: str) -> Callable[[], None]:
        images = torch.rand(count, 3, height, width, device=run.device)
        return bare_resnet(cfg, [images], precision, run.device)

    result: dict[str, Any] = {"slices": count}
    if run.device.type == "cuda":  # before anything else is on it
        result["peak_gib"] = {}
        for precision in cfg.precisions:
            of = {"bare": peak(lambda p=precision: bare(p))}
            of["ours"] = peak(lambda p=precision: ours_of_stage3(root, cfg, p, run).step)
            result["peak_gib"][precision] = of
            result[f"memory over bare {precision}"] = ratio = of["ours"] / of["bare"]
            print(f"peak memory {precision}: ours {of['ours']:.2f} GiB, bare {of['bare']:.2f} GiB, {ratio:.2f} x")
    ours, work = {}, {}
    for precision in cfg.precisions:
        ours[f"ours {precision}"] = one = ours_of_stage3(root, cfg, precision, run)
        work |= {f"ours {precision}": one.step, f"bare {precision}": bare(precision)}
    if cfg.reference:
        result["reference without"] = without = missing()
        for package, instead in without.items():
            print(f"the reference goes without {package}: {instead} (pip install -r requirements-dev.txt)")
        make = partial(plain_step, without=set(without))
        work["reference"], result["reference in parts"] = in_parts(make, cfg, run.device)
    result |= compare(work, ours, cfg, run.device)
    if cfg.steps:
        result["end to end"] = {name: end_to_end(one, cfg, count, run.device) for name, one in ours.items()}
    return result


def end_to_end(one: Training, cfg: Config, slices: int, device: torch.device) -> dict[str, float]:
    """Slices per second of `steps` steps in a row, from the cache on, and the share of time that data made it wait."""
    for _ in range(warm_up(cfg)):
        one.step()
    timing.wait(device)
    began = time.perf_counter()
    with profile.recording(device) as spans:
        for _ in range(cfg.steps):
            one.step()
        timing.wait(device)
        seconds = time.perf_counter() - began
    figures = {
        "slices_per_second": slices * cfg.steps / seconds,
        "data_wait": shares([spans.seconds()])["data"],
    }
    print(f"end to end, {one.precision.name}: {figures['slices_per_second']:.0f} slices/s, "
          f"data wait {figures['data_wait']:.1%}")  # fmt: skip
    return figures


def stage1(root: Path, cfg: Config, run: Run) -> dict[str, Any]:
    large, small = cfg.target_shape[1], cfg.target_shape[1] // 2
    samples, store = prepare(root, canvas_size(large, small), progress=False)
    ours, work = {}, {}
    for precision in cfg.precisions:
        torch.manual_seed(0)
        crops = MultiCrop([(large, large), (small, small)], [2, 4], [(0.3, 1.0), (0.05, 0.3)], "strong", 0)
        loader = ImageLoader(Slices(samples, store, PER_VOLUME), crops, cfg.images, cfg.workers, 0, run)
        encoder = GreyResNet(cfg.arch)
        if cfg.compile:
            encoder.compile()
        learner = ImageClustering(encoder, ProjectionHead(encoder.num_features), SwAV(128, [INTRA_PROTOTYPES]))
        one = Training(learner, loader, precision, run)
        sizes = [(2 * cfg.images, large), (4 * cfg.images, small)]
        images = [torch.rand(n, 3, side, side, device=run.device) for n, side in sizes]
        ours[f"ours {precision}"] = one
        work |= {f"ours {precision}": one.step, f"bare {precision}": bare_resnet(cfg, images, precision, run.device)}
    if cfg.reference:
        work["reference"] = plainly(partial(plain_images, sizes=sizes), cfg, run.device)
    return {"images": cfg.images, "crops": sizes, **compare(work, ours, cfg, run.device)}


def peak(make: Callable[[], Callable[[], object]]) -> float:
    """GiB allocated at most during a step that `make` gives, weights and what belongs to the step included."""
    gc.collect()  # what was measured before
    torch.cuda.empty_cache()
    step = make()
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    most = torch.cuda.max_memory_allocated() / 2**30
    del step
    gc.collect()  # its loader's processes, too
    return most


# ------------------------------------------------------------------------------------------------------- the plain way


def missing() -> dict[str, str]:
    """Packages that the reference of stage 3 has to go without -> what it does instead."""
    return {package: instead for package, instead in WITHOUT.items() if importlib.util.find_spec(package) is None}


def plainly(make: Callable, cfg: Config, device: torch.device) -> Callable[[], object]:
    """The step that `make(cfg, device)` gives; on a CPU in a process of its own, whose memory is handled as usual."""
    if device.type == "cuda":
        return make(cfg, device)
    context = torch.multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=_serve, args=(make, cfg, theirs), daemon=True).start()
    theirs.close()  # so that the end of that process is noticed

    def step() -> None:
        ours.send(None)
        ours.recv()

    return step


def in_parts(make: Callable, cfg: Config, device: torch.device) -> tuple[Callable[[], object], int]:
    """As `plainly`, in as many parts (see `plain_step`) as it takes for a GPU's memory; and their number."""
    parts = 1
    while True:
        step = plainly(partial(make, parts=parts), cfg, device)
        if device.type == "cpu":
            return step, parts
        try:
            step()
            return step, parts
        except torch.OutOfMemoryError:
            if parts == cfg.batch_size:
                raise
        step, parts = None, min(2 * parts, cfg.batch_size)
        gc.collect()
        torch.cuda.empty_cache()


def _serve(make: Callable, cfg: Config, connection: Connection) -> None:
    step = make(cfg, torch.device("cpu"))
    with suppress(EOFError):  # the benchmark has ended
        while True:
            connection.recv()
            step()
            connection.send(None)


def plain_larc(parameters: list[nn.Parameter], lr: float) -> Callable[[], None]:
    """LARC and momentum as a loop over parameters."""
    momenta = [torch.zeros_like(p) for p in parameters]

    def step() -> None:
        with torch.no_grad():
            for p, m in zip(parameters, momenta, strict=True):
                w, g = p.norm(), p.grad.norm()
                rate = 0.001 * w / (g + 1e-6 * w + 1e-8) if w > 0 and g > 0 else 1.0
                m.mul_(0.9).add_((p.grad + 1e-6 * p) * rate)
                p.add_(m, alpha=-lr)
                p.grad = None

    return step


def plain_swav(scores: Tensor) -> Tensor:
    """scores [2, B, K] -> the swapped prediction of two views, three Sinkhorn iterations."""
    with torch.no_grad():
        codes = torch.exp(scores / 0.05)
        for _ in range(3):
            codes = codes / codes.sum(dim=1, keepdim=True) / codes.shape[2]
            codes = codes / codes.sum(dim=2, keepdim=True) / codes.shape[1]
        codes = codes * codes.shape[1]
    return -0.5 * sum((codes[i] * F.log_softmax(scores[1 - i] / 0.1, dim=1)).sum(dim=1).mean() for i in range(2))


def plain_step(cfg: Config, device: torch.device, without: set[str], parts: int = 1) -> Callable[[], None]:
    """The step of stage 3 with public packages, less those in `without`.

    parts: of the batch, one after the other before the update, so that memory suffices.
    """
    slices, height, width = cfg.target_shape
    augment = (lambda volume: volume) if "torchio" in without else released_transforms()
    volumes = torch.rand(cfg.batch_size, 1, height, width, slices)
    net = torchvision.models.get_model(cfg.arch, weights=None)
    features = net.fc.in_features
    net.fc = nn.Identity()
    project, intra_head = nn.Linear(features, 640), ProjectionHead(features)
    attention = nn.ModuleList(plain_attention(slices, "deformable_attention" in without) for _ in range(4))
    inter, intra = nn.Linear(640, PROTOTYPES, bias=False), nn.Linear(128, INTRA_PROTOTYPES, bias=False)
    modules = nn.ModuleList([net, project, intra_head, attention, inter, intra]).to(device).train()
    update = plain_larc(list(modules.parameters()), 0.3)

    def forward(volumes: Tensor) -> Tensor:
        views = torch.stack([torch.stack([augment(v) for v in volumes]) for _ in range(2)]).to(device)
        images = views.squeeze(2).permute(0, 1, 4, 2, 3).flatten(0, 2).unsqueeze(1).repeat(1, 3, 1, 1)
        pooled = net(images)
        tokens = project(pooled).view(2 * len(volumes), slices, 640)
        for layer in attention:
            tokens = layer(tokens) + tokens
        z = F.normalize(tokens.mean(dim=1), dim=1)
        w = F.normalize(intra_head(pooled), dim=1).view(2, -1, 128)[:, : 8 * len(volumes)]
        return plain_swav(inter(z).view(2, len(volumes), -1)) + plain_swav(intra(w))

    def step() -> None:
        for part in volumes.chunk(parts):
            forward(part).backward()
        update()

    return step


def plain_attention(slices: int, ordinary: bool) -> nn.Module:
    """A layer on tokens [B, slices, 640]: the package's, or torch's own."""
    if ordinary:
        return OrdinaryAttention(640, 8, batch_first=True)
    from deformable_attention import DeformableAttention1D

    return DeformableAttention1D(dim=slices, downsample_factor=4, offset_scale=2, offset_kernel_size=6)


class OrdinaryAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x, need_weights=False)[0]


def plain_images(cfg: Config, device: torch.device, sizes: list[tuple[int, int]]) -> Callable[[], None]:
    """The step of stage 1 in float32, channels first, without augmentation, on (number, side) images of each size."""
    images = [torch.rand(n, 3, side, side, device=device) for n, side in sizes]
    net = torchvision.models.get_model(cfg.arch, weights=None)
    head, net.fc = ProjectionHead(net.fc.in_features), nn.Identity()
    prototypes = nn.Linear(128, INTRA_PROTOTYPES, bias=False)
    parts = nn.ModuleList([net, head, prototypes]).to(device).train()
    update = plain_larc(list(parts.parameters()), 0.3)

    def step() -> None:
        z = F.normalize(head(torch.cat([net(x) for x in images])), dim=1)
        plain_swav(prototypes(z)[: 2 * cfg.images].view(2, cfg.images, -1)).backward()
        update()

    return step


# --------------------------------------------------------------------------------------------------------------- ranks


def ranks(root: Path, cfg: Config, run: Run) -> dict[str, Any]:
    """Median step of two processes that train one model, over that of two that train one each; a core each.

    Of the two together also the backward pass with and without (`no_sync`) the reduction of gradients. Both hold
    BatchNorm's collectives. Times are those of the slower process, and of the faster of two runs.
    """
    if run.device.type != "cpu":
        print("ranks: compares processes on CPU cores, not run on a GPU")
        return {}
    found: dict[str, list[float]] = {}
    cfg = replace(cfg, workers=0)  # a core each
    for together in (False, True, False, True):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_one_rank, (root, cfg, together, folder), nprocs=2)
            each = [json.loads(Path(folder, str(r)).read_text()) for r in range(2)]
        for name in each[0]:
            found.setdefault(name, []).append(max(seconds[name] for seconds in each))
    best = {name: min(values) for name, values in found.items()}
    ratio = best["together"] / best["apart"]
    reduced, alone = best.pop("backward"), best.pop("backward alone")
    print(
        f"two processes, {cfg.precisions[-1]}: together {best['together']:.2f} s a step, apart {best['apart']:.2f} s, "
        f"{ratio:.2f} x (the rest is communication and waiting for each other); backward pass {reduced:.3f} s with "
        f"reduction of the gradients, {alone:.3f} s without"
    )
    backward = {"with_reduction_s": reduced, "alone_s": alone, "communication_s": reduced - alone}
    seconds = {name: found[name] for name in best}
    return {"precision": cfg.precisions[-1], "seconds": seconds, "together over apart": ratio, "backward": backward}


def _one_rank(rank: int, root: Path, cfg: Config, together: bool, folder: str) -> None:
    torch.set_num_threads(1)
    run = distributed.start("cpu")
    if together:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
        run = Run(rank, 2, run.device)
    one = ours_of_stage3(root, cfg, cfg.precisions[-1], run)
    step, parts = recorded(one.step, run.device)
    work, parts_alone = {"step": step}, []
    if together:
        work["alone"], parts_alone = recorded(partial(one.step, joined=False), run.device)
    seconds = timing.measure(work, cfg.repeats, warmup=1)["step"].median
    measured = {"together" if together else "apart": seconds}
    if together:
        for name, calls in (("backward", parts), ("backward alone", parts_alone)):
            measured[name] = statistics.median(call["backward"] for call in calls[1:])  # without the warm-up
    Path(folder, str(rank)).write_text(json.dumps(measured))
    distributed.stop()


if __name__ == "__main__":
    options.main(main, Config, __doc__)

"""A training step of each stage: against the bare ResNet and the plain way to write it, and where time goes.

    python -m benchmarks.step                                        # CPU, (64, 128, 128), 2 views: about 10 minutes
    python -m benchmarks.step --device cuda --batch_size 16 --workers 8 --volumes 640
    python -m benchmarks.step --parts [stage2] --arch resnet18 --target_shape [16,64,64]     # to try it: seconds

Pieces that take turns in the same process:
  ours       an update of SwAV's script of that stage with all that training does in one, its diagnostics too
  bare       torchvision's three-channel ResNet, forward and backward on the same number of slices, tuned the same way
             (channels-last, the same precision): what trains a ResNet on these slices can hardly be faster
  reference  the plain way with public packages (benchmarks/plain.py), stages 2 and 3; in stage 2 it trains the same
             transformer on the same views, but the frozen ResNet is not folded, in float32, channels first, and gets
             gradients that nobody uses, as in the method's released code
  cached     stage 2 from embeddings that an epoch before left on disk (`cached_views`)
`split` says where the time of our steps goes; what the observers of the clusters cost is its `diagnostics`.
`added_gib` is what a step allocates on a GPU at its peak beside weights and optimiser.
With `torchrun --nproc_per_node=2 -m benchmarks.step` ours trains on both processes together, a core each on a CPU; what
that costs is the ratio to the same command by python with OMP_NUM_THREADS=1.
The volumes' cache takes 4 MB for each of `volumes` below the temporary folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from benchmarks import common, plain
from benchmarks.common import Updates, split, training_of, write_volumes
from datasets.embeddings import EmbeddingLoader
from training.train import Training
from utils import config as options
from utils import distributed
from utils.distributed import Run
from utils.precision import Precision

PARTS = ("stage3", "stage2", "stage1")
SCRIPTS = {1: "ssl_swav2D", 2: "mask_swav", 3: "ssl_swav3D"}
Sizes = list[tuple[int, list[int]]]  # number, height and width of images


@dataclass
class Config(common.Options):
    parts: tuple[Literal[PARTS], ...] = PARTS
    """what to measure"""
    arch: str = "resnet50"
    """torchvision ResNet"""
    target_shape: tuple[PositiveInt, PositiveInt, PositiveInt] = (64, 128, 128)
    """slices, height and width of a view"""
    batch_size: PositiveInt = 1
    """volumes per step; a GPU wants 16"""
    images: PositiveInt = 16
    """images per step of stage 1; a GPU wants 128"""
    volumes: PositiveInt = 16
    """volumes of an epoch"""
    workers: NonNegativeInt = 0
    """data-loading processes"""
    precisions: tuple[Literal["fp32", "bf16"], ...] = ()
    """number formats; none: fp32, and bf16 where the device computes in it"""
    compile: bool = False
    """ours and bare with torch.compile, stages 1 and 3"""
    reference: bool = True
    """whether to measure the plain way, too"""
    repeats: PositiveInt = 3
    """measurements of each piece"""


def main(cfg: Config) -> None:
    run = distributed.start(cfg.device)
    cfg.precisions = cfg.precisions or common.formats(run.device)
    results: dict[str, Any] = {"arch": cfg.arch, "view": list(cfg.target_shape), "compile": cfg.compile}
    with tempfile.TemporaryDirectory(prefix="benchmark_step_") as folder:
        data = Path(distributed.broadcast_object(folder, 0), "data")
        distributed.on_main(lambda: write_volumes(data, (160, 160, 72), cfg.volumes))
        for part in cfg.parts:
            common.say(f"\n{part}, {common.device_name(run.device)}, {run.world_size} process(es)")
            results[part] = {"stage3": stage3, "stage2": stage2, "stage1": stage1}[part](data, cfg, run)
        distributed.everywhere(lambda: None)  # no process goes before the others, and the volumes with the first
    common.write(results, run.device)
    distributed.stop()


def training_on(stage: int, data: Path, cfg: Config, run: Run, **options: Any) -> Training:
    """What SwAV's script of a stage trains with."""
    chosen = {"arch": cfg.arch, "workers": cfg.workers}
    if stage == 1:
        side = cfg.target_shape[1]
        chosen |= {"size_crops": [side, side // 2], "nmb_crops": [2, 4], "batch_size": cfg.images}
        chosen |= {"min_scale_crops": [0.3, 0.05], "max_scale_crops": [1.0, 0.3]}
    else:
        chosen |= {"target_shape": cfg.target_shape, "batch_size": cfg.batch_size}
    if stage != 2:
        chosen |= {"compile": cfg.compile}
    return training_of(SCRIPTS[stage], data, run, **chosen, **options)


def stage3(data: Path, cfg: Config, run: Run) -> dict[str, Any]:
    slices, height, width = cfg.target_shape
    reference = None
    if cfg.reference and plain.installed("torchio", "deformable_attention"):
        reference = plain.step_of(cfg.arch, cfg.target_shape, cfg.batch_size, run.device)
    return compare(3, data, [(2 * cfg.batch_size * slices, [height, width])], reference, cfg, run)


def stage1(data: Path, cfg: Config, run: Run) -> dict[str, Any]:
    side = cfg.target_shape[1]
    return compare(1, data, [(2 * cfg.images, [side] * 2), (4 * cfg.images, [side // 2] * 2)], None, cfg, run)


def stage2(data: Path, cfg: Config, run: Run) -> dict[str, Any]:
    """Steps from views, from cached embeddings and the plain way."""
    work: dict[str, Callable[[], object]] = {}
    if cfg.reference:
        theirs = training_on(2, data, cfg, run, precision="fp32")
        theirs = Training(plain.PlainMasked(theirs.config), theirs.loader, theirs.config, run)
        theirs.core.plain.requires_grad_(True)  # not to be trained, but to be differentiated
        work["reference"] = Updates(theirs)
    for precision in cfg.precisions:
        work[f"ours {precision}"] = Updates(training_on(2, data, cfg, run, precision=precision))
        from_disk = training_on(2, data, cfg, run, precision=precision, cached_views=1)
        work[f"cached {precision}"] = Updates(cached(from_disk))
    pairs = [("reference", name) for name in work if name != "reference"] if cfg.reference else []
    return common.compare(work, cfg.repeats, run.device, pairs)


def cached(training: Training) -> Training:
    """The same from embeddings on disk, as mask_swav.py builds it, and with all of them there."""
    loader = EmbeddingLoader(training.loader, training.core, training.config)
    for _ in loader.epoch(0):
        pass
    return Training(training.core, loader, training.config, training.run)


def compare(
    stage: int, data: Path, sizes: Sizes, reference: Callable[[], None] | None, cfg: Config, run: Run
) -> dict[str, Any]:
    """Times and ratios of pieces that take turns, their memory, and where the time of our steps goes."""
    work, pairs, device = {}, [], run.device
    for precision in cfg.precisions:
        ours, bare = f"ours {precision}", f"bare {precision}"
        work[ours] = Updates(training_on(stage, data, cfg, run, precision=precision))
        work[bare] = bare_resnet(cfg, sizes, precision, device)
        pairs.append((ours, bare))
    if reference:
        pairs += [("reference", ours) for ours, _ in pairs]
        work["reference"] = reference
    result = {"images": sizes, **common.compare(work, cfg.repeats, device, pairs)}
    result["split"] = {f"ours {of}": split(work[f"ours {of}"], cfg.repeats, device) for of in cfg.precisions}
    for name, parts in result["split"].items():
        common.say(f"  {name}: " + ", ".join(f"{part} {share:.1%}" for part, share in parts.items()))
    return result | {"added_gib": common.added_gib(work, device)}


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


if __name__ == "__main__":
    options.main(main, Config, __doc__)

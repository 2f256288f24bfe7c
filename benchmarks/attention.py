"""One layer of deformable attention, forward and backward, beside the `deformable-attention` package.

    python -m benchmarks.attention                   # CPU
    python -m benchmarks.attention --device cuda     # GPU
    python -m benchmarks.attention --batches [2] --repeats 3

ours      attention along the slices, [B, 64, 640], as models/transformer.py runs it in training.
package   DeformableAttention1D as the method's released code calls it: the same numbers with slices as channels, so it
          attends along the 640 features (dim 64, downsample_factor 4, offset_scale 2, offset_kernel_size 6).
ordinary  nn.MultiheadAttention along the slices, the least that attention costs.

The three take turns. The package keeps about 0.13 GiB per volume for the backward pass: batches above `package_up_to`
are left out for it.
On a CPU all is measured twice: with memory allocated as in a plain script, which is how the package is used, and as in
this project's training, where glibc keeps freed memory. The package, which needs much of it, gains most from that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import nn

from benchmarks import common, plain
from models.transformer import DeformableAttention1D
from utils import config as options
from utils import distributed
from utils.precision import Precision

HEADS = 8


@dataclass
class Config(common.Options):
    batches: tuple[PositiveInt, ...] = (2, 8, 16, 64)
    """volumes of a batch, each view counted"""
    slices: PositiveInt = 64
    """slices of a volume"""
    d_model: PositiveInt = 640
    """features of a slice"""
    precisions: tuple[Literal["fp32", "bf16", "fp16"], ...] = ()
    """number formats; none: fp32, and bf16 where the device computes in it"""
    package_up_to: NonNegativeInt = 0
    """largest batch that the package gets; 0: 8 on a CPU, 64 on a GPU"""


def main(cfg: Config) -> None:
    results: dict[str, Any] = {"slices": cfg.slices, "d_model": cfg.d_model}
    if cfg.device == "cpu" or not torch.cuda.is_available():
        results["memory as in a plain script"] = measure_all(cfg, torch.device("cpu"))
    device = distributed.start(cfg.device).device  # from here on, a CPU's memory is kept
    results["memory as in training"] = measure_all(cfg, device)
    common.write(results, device)


def measure_all(cfg: Config, device: torch.device) -> dict[str, Any]:
    """All precisions and batches under one way of allocating memory."""
    package = plain.installed("deformable_attention")
    up_to = cfg.package_up_to or (64 if device.type == "cuda" else 8)
    found = {}
    for precision in cfg.precisions or common.formats(device):
        for batch in cfg.batches:
            print(f"\n{batch} volumes of {cfg.slices} slices, {precision}, {common.device_name(device)}")
            work = layers(cfg, precision, batch, device, package and batch <= up_to)
            found[f"{precision}, {batch} volumes"] = common.compare(work, cfg.repeats, warmup=2, device=device)
    return found


def layers(cfg: Config, precision: str, batch: int, device: torch.device, with_package: bool) -> common.Work:
    """Forward and backward of each kind of attention on the same batch."""
    torch.manual_seed(0)
    x = torch.randn(batch, cfg.slices, cfg.d_model, device=device, requires_grad=True)
    mask = torch.ones(batch, cfg.slices, dtype=torch.bool, device=device)
    ours = DeformableAttention1D(cfg.d_model, heads=HEADS, groups=HEADS).to(device)
    ordinary = nn.MultiheadAttention(cfg.d_model, HEADS, batch_first=True).to(device)
    kinds: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: ours(x, mask),
        "ordinary": lambda: ordinary(x, x, x, key_padding_mask=~mask, need_weights=False)[0],
    }
    if with_package:
        package = plain.released_attention(cfg.slices).to(device)
        kinds["package"] = lambda: package(x)
    number = Precision(precision, device)

    def step(attend: Callable[[], torch.Tensor]) -> None:
        with number.autocast():
            out = attend()
        out.sum().backward()

    return {name: lambda attend=attend: step(attend) for name, attend in kinds.items()}


if __name__ == "__main__":
    options.main(main, Config, __doc__)

"""One layer of deformable attention, forward and backward, beside the `deformable-attention` package.

    python -m benchmarks.attention                   # CPU, fp32 and bf16
    python -m benchmarks.attention --device cuda     # GPU
    python -m benchmarks.attention --batches [2] --repeats 3

ours      attention along the slices, [B, 64, 640], as models/transformer.py runs it in training.
package   DeformableAttention1D as the method's released code calls it: the same numbers with slices as channels, so it
          attends along the 640 features (dim 64, downsample_factor 4, offset_scale 2, offset_kernel_size 6).
ordinary  nn.MultiheadAttention along the slices, the least that attention costs.

The three take turns. `kept` is what a forward pass keeps for the backward pass beside weights. The package keeps about
0.13 GiB per volume; batches above `package_up_to` are left out for it.
On a CPU all is measured twice: with memory allocated as in a plain script, which is how the package is used, and as in
this project's training, where glibc keeps freed memory. The package, which needs much of it, gains most from that.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from benchmarks import timing
from models.transformer import DeformableAttention1D
from utils import config as options
from utils import distributed
from utils.precision import Precision

HEADS = 8


@dataclass
class Config:
    device: str = "auto"
    """auto, cpu or cuda"""
    batches: tuple[PositiveInt, ...] = (2, 8, 16, 64)
    """volumes, each view counted"""
    slices: PositiveInt = 64
    """of a volume"""
    d_model: PositiveInt = 640
    """features of a slice"""
    precisions: tuple[Literal["fp32", "bf16", "fp16"], ...] = ("fp32", "bf16")
    """formats to measure with, as in training"""
    package_up_to: NonNegativeInt = 0
    """largest batch that the package gets; 0: 8 on a CPU, 64 on a GPU"""
    repeats: PositiveInt = 7
    """measurements of each"""
    threads: NonNegativeInt = 0
    """CPU threads; 0: as torch chooses"""


def main(cfg: Config) -> None:
    package = importlib.util.find_spec("deformable_attention") is not None
    if not package:
        print("the package is left out: pip install deformable-attention")
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    rows: list[dict[str, Any]] = []
    if cfg.device == "cpu" or not torch.cuda.is_available():
        rows += measure_all(cfg, "plain", torch.device("cpu"), package)
    device = distributed.start(cfg.device).device  # from here on, a CPU's memory is kept
    rows += measure_all(cfg, "training", device, package)
    results = {
        "slices": cfg.slices,
        "d_model": cfg.d_model,
        "versions": {"deformable-attention": metadata.version("deformable-attention")} if package else {},
        "rows": rows,
    }
    print(f"\nwritten to {timing.write('attention', results, device)}")


def measure_all(cfg: Config, allocation: str, device: torch.device, package: bool) -> list[dict[str, Any]]:
    """All precisions and batches under one way of allocating memory."""
    threads = torch.get_num_threads()
    print(f"\n{timing.device_name(device)}, {threads} thread(s), memory as in {allocation} use,", end=" ")
    print(f"{cfg.slices} slices of {cfg.d_model}\n")
    print(f"{'':13} {'volumes':>7} {'ms':>9} {'IQR':>7} {'kept MiB':>9} {'over ours':>9}")
    up_to = cfg.package_up_to or (64 if device.type == "cuda" else 8)
    rows = []
    for precision in cfg.precisions:
        for batch in cfg.batches:
            found = measure(cfg, precision, batch, device, with_package=package and batch <= up_to)
            rows += [{"allocation": allocation, **row} for row in found]
    return rows


def measure(cfg: Config, precision: str, batch: int, device: torch.device, with_package: bool) -> list[dict[str, Any]]:
    """One row for each kind of attention, printed as well."""
    torch.manual_seed(0)
    x = torch.randn(batch, cfg.slices, cfg.d_model, device=device, requires_grad=True)
    mask = torch.ones(batch, cfg.slices, dtype=torch.bool, device=device)
    kinds = attentions(cfg, with_package, device)
    autocast = Precision(precision, device).autocast

    def step(attend: Callable[[Tensor, Tensor], Tensor]) -> None:
        with autocast():
            out = attend(x, mask)
        out.sum().backward()

    with autocast():
        kept = {name: kept_bytes(lambda attend=attend: attend(x, mask)) for name, attend in kinds.items()}
    work = {name: lambda attend=attend: step(attend) for name, attend in kinds.items()}
    times = timing.measure(work, cfg.repeats, warmup=2, device=device)
    rows = []
    for name, t in times.items():
        ratio, mib = t.over(times["ours"]), kept[name] / 2**20
        row = {"attention": name, "precision": precision, "volumes": batch}
        rows.append(row | t.record() | {"kept_mib": mib, "over_ours": ratio})
        ms, iqr = t.median * 1e3, t.iqr * 1e3
        print(f"{name:8} {precision} {batch:7} {ms:9.2f} {iqr:7.2f} {mib:9.1f} {ratio:9.2f}", flush=True)
    return rows


def attentions(cfg: Config, with_package: bool, device: torch.device) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Name -> attention of x [B, D, d], mask [B, D]."""
    ours = DeformableAttention1D(cfg.d_model, heads=HEADS, groups=HEADS).to(device)
    ordinary = nn.MultiheadAttention(cfg.d_model, HEADS, batch_first=True).to(device)
    kinds: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "ours": ours,
        "ordinary": lambda x, mask: ordinary(x, x, x, key_padding_mask=~mask, need_weights=False)[0],
    }
    if with_package:
        from deformable_attention import DeformableAttention1D as Package

        theirs = Package(dim=cfg.slices, downsample_factor=4, offset_scale=2, offset_kernel_size=6).to(device)
        kinds["package"] = lambda x, mask: theirs(x)
    return kinds


def kept_bytes(forward: Callable[[], Tensor]) -> int:
    """What autograd keeps of a forward pass, each piece of memory once, without the leaves of the graph."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if not (t.is_leaf and t.requires_grad):
            storage = t.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward()
    del out
    return sum(kept.values())


if __name__ == "__main__":
    options.main(main, Config, __doc__)

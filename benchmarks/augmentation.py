"""Augmentation alone: time per view of each of the seven transforms and of each policy, against TorchIO.

    python -m benchmarks.augmentation                  # CPU, with 1 and with 2 threads
    python -m benchmarks.augmentation --device cuda    # views per second on the GPU

Ours starts from a half-precision canvas on the device, as training does, and ends with a float32 view; drawing the
parameters is included. TorchIO, which works on the CPU alone, starts from the cropped float32 volume; both draw their
parameters anew from the same ranges. The two take turns. TorchIO is left out where it is not installed.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import PositiveInt

from benchmarks import timing
from datasets import augment
from datasets.augment import PAPER_TRANSFORMS, MultiCrop, VolumeViews
from utils import config as options
from utils import distributed

CROPS = {"sizes": [(224, 224), (96, 96)], "counts": [2, 6], "scales": [(0.3, 1.0), (0.05, 0.3)]}
CROP_CANVAS = 280
CONTENT = 0.9  # of a canvas' side


@dataclass
class Config:
    device: str = "auto"
    """auto, cpu or cuda"""
    target_shape: tuple[PositiveInt, PositiveInt, PositiveInt] = (64, 128, 128)
    """slices, height and width of a view"""
    canvas: PositiveInt = 160
    """side of the slices that views are cut from"""
    batch_size: PositiveInt = 32
    """volumes or images per call on a GPU; a CPU works on one at a time anyway and gets 4"""
    threads: tuple[PositiveInt, ...] = (1, 2)
    """numbers of CPU threads to measure with"""
    repeats: PositiveInt = 15
    """measurements of each kind"""


def main(cfg: Config) -> None:
    device = distributed.start(cfg.device).device
    results: dict[str, Any] = {"view": list(cfg.target_shape), "canvas": cfg.canvas}
    for threads in cfg.threads if device.type == "cpu" else (torch.get_num_threads(),):
        with using(threads):
            print(f"\n{timing.device_name(device)}, {threads} thread(s)")
            results[f"threads_{threads}"] = run(cfg, device)
    print(f"\nwritten to {timing.write('augmentation', results, device)}")


def run(cfg: Config, device: torch.device) -> dict[str, Any]:
    """Figures of all transforms and policies, printed as they come."""
    per_transform = {name: measure_transform(cfg, name, device) for name in PAPER_TRANSFORMS}
    result: dict[str, Any] = {"transforms": per_transform, "policies": measure_policies(cfg, device)}
    # Each view gets one of the seven, so their mean is what a view costs.
    for clock, name in (("median_s", "wall"), ("cpu_median_s", "cpu")):
        mean = {
            side: sum(record[side][clock] / record[side]["views"] for record in per_transform.values()) * 1e3 / 7
            for side in ("ours", "torchio")
            if all(side in record for record in per_transform.values())
        }
        result[f"mean_{name}_ms_per_view"] = mean
        if "torchio" in mean:
            result[f"torchio_over_ours_{name}"] = ratio = mean["torchio"] / mean["ours"]
            print(
                f"mean of the seven, {name} time: ours {mean['ours']:.2f} ms, TorchIO {mean['torchio']:.2f} ms a view, "
                f"{ratio:.1f} times as long"
            )
    return result


def measure_transform(cfg: Config, name: str, device: torch.device) -> dict[str, Any]:
    """One transform of policy `paper`, ours and TorchIO's."""
    views, samples = volume_views(cfg, "paper"), samples_per_call(cfg, device)
    canvas, _, extents, _ = volumes(cfg, device, samples)
    depth, height, width = cfg.target_shape
    kind, epochs = np.full(samples, PAPER_TRANSFORMS.index(name)), itertools.count()
    content, slices = extents.numpy().astype(float), np.full(samples, depth)
    out = torch.empty(samples, depth, height, width, device=device)

    def ours() -> None:
        u = augment.Uniforms(0, next(epochs), range(samples), 1)
        augment._transform(canvas, views._draw_paper(u, kind, cfg.canvas, content, slices), out)

    work: dict[str, Callable[[], object]] = {"ours": ours}
    if (theirs := torchio_transform(name)) is not None:
        crop = torch.rand(1, depth, height, width)
        work["torchio"] = lambda: theirs(crop)
    times = timing.measure(work, cfg.repeats, device=device)
    count = {"ours": samples, "torchio": 1}
    record: dict[str, Any] = {side: {"views": count[side], **t.record()} for side, t in times.items()}
    line = f"{name:12s} ours {times['ours'].median / samples * 1e3:7.3f} ms a view"
    if "torchio" in times:
        record["torchio_over_ours"] = ratio = times["torchio"].over(times["ours"]) * samples
        line += f", TorchIO {times['torchio'].median * 1e3:7.2f} ms, {ratio:5.1f} times as long"
    print(line, flush=True)
    return record


def measure_policies(cfg: Config, device: torch.device) -> dict[str, Any]:
    """Two views of volumes, and the multi-crop of images, under both policies."""
    samples, epochs = samples_per_call(cfg, device, at_least=4), itertools.count()
    volume_batch, image_batch = volumes(cfg, device, samples), images(device, samples)
    work, count = {}, {}
    for policy in ("paper", "strong"):
        views, crops = volume_views(cfg, policy), MultiCrop(**CROPS, policy=policy, seed=0)
        work[f"views_{policy}"] = lambda views=views: views(*volume_batch, next(epochs))
        work[f"crops_{policy}"] = lambda crops=crops: crops(*image_batch, next(epochs))
        count[f"views_{policy}"], count[f"crops_{policy}"] = 2 * samples, samples
    record = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # of single transforms, before
    for name, t in timing.measure(work, cfg.repeats, device=device).items():
        each = t.median / count[name]
        record[name] = {"per_second": 1 / each, "per_call": count[name], **t.record()}
        what = "a view" if name.startswith("views") else f"an image ({sum(CROPS['counts'])} crops)"
        print(f"{name:12s} {each * 1e3:7.3f} ms {what}, {1 / each:,.0f} per second", flush=True)
    if device.type == "cuda":
        record["peak_memory_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    return record


def volume_views(cfg: Config, policy: augment.Policy) -> VolumeViews:
    return VolumeViews(*cfg.target_shape[1:], policy, seed=0)


def volumes(cfg: Config, device: torch.device, samples: int) -> tuple[torch.Tensor, ...]:
    """Volumes on the device, mask, extents and indices, as the loader hands them over."""
    slices = cfg.target_shape[0]
    x = torch.rand(samples, slices, cfg.canvas, cfg.canvas, device=device).half()
    mask = torch.ones(samples, slices, dtype=torch.bool)
    return x, mask, torch.full((samples, 2), int(CONTENT * cfg.canvas)), torch.arange(samples)


def images(device: torch.device, samples: int) -> tuple[torch.Tensor, ...]:
    """Images on the device, extents and indices."""
    x = torch.rand(samples, CROP_CANVAS, CROP_CANVAS, device=device).half()
    return x, torch.full((samples, 2), int(CONTENT * CROP_CANVAS)), torch.arange(samples)


def samples_per_call(cfg: Config, device: torch.device, at_least: int = 1) -> int:
    return cfg.batch_size if device.type == "cuda" else at_least


def torchio_transform(name: str) -> Callable | None:
    """The random transform of TorchIO with its defaults, always applied; None without TorchIO."""
    if importlib.util.find_spec("torchio") is None:
        return None
    import torchio as tio

    if name == "flip":
        return tio.RandomFlip(axes=(1, 2), flip_probability=1)
    return getattr(tio, "Random" + "".join(word.capitalize() for word in name.split("_")))()


@contextmanager
def using(threads: int) -> Iterator[None]:
    """This number of threads for torch and for SimpleITK, which TorchIO calls."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    if importlib.util.find_spec("SimpleITK") is not None:
        import SimpleITK

        SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    options.main(main, Config, __doc__)

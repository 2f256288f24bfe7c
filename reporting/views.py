"""The augmented views that a training script gets, pixel by pixel, beside the originals.

    python report.py --data ssl_swav3D --data_path Training_Data --policy paper
    python report.py --data runs/swav3D --epoch 3     # as that run saw them in epoch 3

After --data come any of the options of the script; docs/REPORT.md says how to read the page.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor

from datasets.augment import MultiCrop
from datasets.batch import Batch
from datasets.loaders import Slices, VolumeLoader
from reporting import page
from reporting.embed import Loader, spread
from reporting.runs import script_of
from training import scripts
from utils.distributed import Run

SIDE = 128  # pixels on the screen of the longer side of a large view


@dataclass
class Stack:
    """Slices of an original or of one of its views, side by side."""

    title: str
    done: list[str]  # what is shown, or was drawn for it
    slices: Tensor  # [n, H, W] in 0..1
    captions: list[str]
    masked: Sequence[bool] = ()
    side: int = SIDE  # pixels on the screen of the longer side

    def pictures(self, thumbs: page.Thumbnails) -> list[dict[str, Any]]:
        width = round(self.side * self.slices.shape[2] / max(self.slices.shape[1:]))
        masked = self.masked or [False] * len(self.slices)
        return [
            {"thumb": thumbs.pixels(pixels.numpy()), "width": width, "caption": caption, "marked": marked}
            for pixels, caption, marked in zip(self.slices, self.captions, masked, strict=True)
        ]


@dataclass
class DataPage:
    """Options beside those of the script."""

    data: str = ""
    """training script whose views are shown (ssl_swav2D, mask_swav, ssl_swav3D, ...), or folder of a run"""
    epoch: NonNegativeInt = 0
    """epoch whose views are shown, the first is 0"""
    samples: PositiveInt = 4
    """volumes, or slices and images, to show: the first of the epoch"""
    slices: PositiveInt = 6
    """slices of every volume to show"""
    output: str = "inspect.html"
    """the page to write"""


def options_of(source: str) -> tuple[type, list[str]]:
    """(options of the page and the script, arguments that precede those of the user: a run's own options).

    Raises UserError where `source` is neither a training script nor the folder of a run.
    """
    if Path(source).expanduser().is_dir():
        script, path = script_of(Path(source).expanduser())
        given = ["--config", str(path)]
    else:
        script, given = scripts.load(source), []
    return dataclass(type("Options", (DataPage, script.Config), {"script": script})), given


def main(cfg: Any) -> None:
    output = page.check_output(cfg.output)
    loader = cfg.script.data(cfg, Run(0, 1, torch.device("cpu")))
    thumbs = page.Thumbnails()
    shown = itertools.islice(samples_of(loader, cfg), cfg.samples)
    page.render(
        "inspect.html",
        output,
        title=f"{cfg.script.__name__}, epoch {cfg.epoch}",
        cfg=cfg,
        shape=" and ".join(map(str, cfg.size_crops)) if cfg.stage == 1 else " x ".join(map(str, cfg.target_shape)),
        samples=[(name, [(stack, stack.pictures(thumbs)) for stack in stacks]) for name, stacks in shown],
        thumbs=thumbs.uris,
    )


def samples_of(loader: Loader, cfg: Any) -> Iterator[tuple[str, list[Stack]]]:
    """(name relative to the data tree, pictures) of the epoch's samples, in the order of training."""
    root = loader.dataset.samples[0].data_path
    for batch in loader.epoch(cfg.epoch):
        if cfg.stage == 1:
            crops = [crop for kind in batch.crops for crop in kind]
            stacks = of_images(loader.dataset, batch.index.tolist(), crops, loader.crops, cfg.epoch)
        else:
            stacks = of_volumes(loader, batch, cfg.epoch, cfg.slices)
            if batch.images is not None:
                index, views = (batch.image_index - loader.total_slices).tolist(), loader.image_views
                more = of_images(loader.image_dataset, index, [*batch.images], views, cfg.epoch)
                stacks = itertools.chain(stacks, more)
        for name, of_sample in zip(loader.names(batch.index, batch.image_index), stacks, strict=True):
            yield name.removeprefix(f"{root}/"), of_sample


def of_images(
    dataset: Slices, index: list[int], crops: list[Tensor], made_by: MultiCrop, epoch: int
) -> Iterator[list[Stack]]:
    """Images and their crops [B, H, W] each."""
    items, canvas = [dataset[epoch, i] for i in index], dataset.store.size
    draws = list(made_by.draws(canvas, _contents(items), index, epoch))
    largest = max(max(crop.shape[1:]) for crop in crops)
    for b, item in enumerate(items):
        stacks = [Stack("original", [f"working copy of {canvas} x {canvas} px"], item["image"][None].float(), [""])]
        for number, (crop, drawn) in enumerate(zip(crops, draws, strict=True), start=1):
            side = round(SIDE * max(crop.shape[1:]) / largest)
            stacks.append(Stack(f"crop {number}", describe(drawn, b, canvas), crop[b][None], [""], side=side))
        yield stacks


def of_volumes(loader: VolumeLoader, batch: Batch, epoch: int, slices: int) -> Iterator[list[Stack]]:
    """The same slices of every window and of each of its views."""
    dataset, canvas, index = loader.dataset, loader.dataset.store.size, batch.index.tolist()
    windows = [dataset[epoch, i] for i in index]
    draws = list(loader.views.draws(canvas, _contents(windows), batch.mask.sum(dim=1).numpy(), index, epoch))
    for b, window in enumerate(windows):
        start, length, total = window["start"], window["length"], dataset.samples[dataset.items[index[b]]].slices
        places = spread(0, length, min(slices, length))
        captions = [f"slice {start + place}" for place in places]
        about = [f"slices {start} to {start + length - 1} of {total}"]
        about += [f"{dataset.slices - length} of padding"] if length < dataset.slices else []
        stacks = [Stack("original", about, window["volume"][places].float(), captions)]
        for v, drawn in enumerate(draws):
            masked = [] if batch.masked is None else batch.masked[v, b, places].tolist()
            view = batch.views[v, b, places]
            stacks.append(Stack(f"view {v + 1}", describe(drawn, b, canvas), view, captions, masked))
        yield stacks


def _contents(items: list[dict[str, Any]]) -> np.ndarray:
    """[B, 2] height and width of the content of each canvas."""
    return np.array([item["extent"].tolist() for item in items], dtype=float)


def describe(draws: dict[str, np.ndarray], b: int, canvas: int) -> list[str]:
    """What was done to sample b of a batch for one view, in the order in which it is done. canvas: side in pixels."""
    own = {name: values[b] for name, values in draws.items()}
    (across, _, _), (up, down, _) = own["theta"]
    mirrored = [name for name, flipped in (("top and bottom", down < 0), ("left and right", across < 0)) if flipped]
    sides = [canvas * math.hypot(*own["theta"][:, axis]) for axis in (1, 0)]
    degrees = math.degrees(math.atan2(math.copysign(1, across) * up, abs(across)))
    said = [f"window {sides[0]:.0f} x {sides[1]:.0f} of {canvas} px"]
    said += [f"turned by {degrees:+.1f}°"] if abs(degrees) > 0.05 else []
    said += [f"mirrored {' and '.join(mirrored)}"] if mirrored else []
    axes = zip(("slices", "rows", "columns"), own.get("downsampling", ()), strict=False)
    said += [f"{axis} coarser by {factor:.1f}" for axis, factor in axes if factor > 1]
    blur = [f"{std:.1f}" for std in own["blur_std"]]
    said += [f"blur of std {', '.join(blur)} voxels"] if own["blur_std"].any() else []
    said += ["bias field"] if own["bias"].any() else []
    for name in ("brightness", "contrast"):
        said += [f"{name} {own[name]:+.0%}"] if own.get(name, 0) else []
    said += [f"gamma {math.exp(own['log_gamma']):.2f}"] if own["log_gamma"] else []
    said += [f"noise of std {own['noise_std']:.2f}"] if own["noise_std"] else []
    return said

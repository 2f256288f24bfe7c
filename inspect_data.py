"""See what the network really sees: augmented views beside the originals, the very pixels that training gets.

    python inspect_data.py runs/swav3D --epoch 3                                # as that run saw them in epoch 3
    python inspect_data.py ssl_swav2D --options.data_path Training_Data --options.policy paper

First comes the folder of a run or the name of a training script, then options; --options.NAME is any option of the
script. docs/REPORT.md has more.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor

from datasets.cache import shown_size
from datasets.loaders import ImageLoader, Slices, VolumeLoader, VolumeWindows, canvas_size
from datasets.store import prepare
from reporting import page, views
from reporting.runs import method_of, stage_of
from utils import config as options
from utils.errors import UserError

SCRIPTS = ("ssl_swav2D", "ssl_deepcluster2D", "mask_swav", "mask_deepcluster", "ssl_swav3D", "ssl_deepcluster3D")
SIDE = 128  # pixels on the screen of the longer side of a large view
BOX = 168  # pixels on the screen for a crop and what was done to it


@dataclass
class Config:
    source: str
    """folder of a run, or a training script: ssl_swav2D, mask_swav, ssl_swav3D, ssl_deepcluster2D, ..."""
    options: dict[str, Any] = field(default_factory=dict)
    """options of the training script, over its defaults or those of the run: --options.policy paper"""
    epoch: NonNegativeInt = 0
    """epoch whose views are shown, the first is 0"""
    samples: PositiveInt = 4
    """volumes, or slices and images, to show: the first of the epoch"""
    slices: PositiveInt = 6
    """slices of every volume to show"""
    output: str = "inspect.html"
    """the page to write"""
    workers: PositiveInt = 2
    """threads that prepare data which no run has prepared yet"""


def main(cfg: Config) -> None:
    output = Path(cfg.output).expanduser()
    if not output.parent.is_dir():
        raise UserError(f"output: {output.parent} is not a folder; create it, or name another file")
    script, own = training_options(cfg)
    loader = open_loader(own, cfg.workers)
    thumbs = page.Thumbnails()
    shown: list[dict[str, Any]] = []
    for batch in loader.epoch(cfg.epoch):
        shown += list(about_batch(loader, batch, cfg, thumbs))
        if len(shown) >= cfg.samples:
            break
    sides = getattr(own, "size_crops", None) or own.target_shape
    size = page.render(
        "inspect.html",
        output,
        title=f"{script}, epoch {cfg.epoch}",
        script=script,
        epoch=cfg.epoch,
        seed=own.seed,
        policy=own.policy,
        shape=" x ".join(map(str, sides)) if hasattr(own, "target_shape") else " and ".join(map(str, sides)),
        marks="slices that are hidden from the transformer" if getattr(loader, "mask_ratio", 0) else "",
        samples=shown[: cfg.samples],
        thumbs=thumbs.uris,
    )
    print(f"wrote {output} ({shown_size(size)}): {', '.join(s['name'] for s in shown[: cfg.samples])}", flush=True)


def training_options(cfg: Config) -> tuple[str, Any]:
    """(name of the training script, its checked configuration)."""
    values: dict[str, Any] = {}
    script = cfg.source.removesuffix(".py")
    if script not in SCRIPTS:
        path = Path(cfg.source).expanduser() / "config.yaml"
        if not path.is_file():
            raise UserError(f"source: {cfg.source} is neither the folder of a run nor one of {', '.join(SCRIPTS)}")
        values = options.read_yaml(path)
        if not isinstance(values, dict) or "data_path" not in values:
            raise UserError(f"{path}: is not the configuration of a training script")
        method = "deepcluster" if method_of(values) == "DeepCluster-v2" else "swav"
        script = {1: f"ssl_{method}2D", 2: f"mask_{method}", 3: f"ssl_{method}3D"}[stage_of(values)]
    args = []
    for name, value in (values | cfg.options).items():
        args += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    own = options.parse(importlib.import_module(script).Config, None, args)
    options.check(own)
    return script, own


def open_loader(own: Any, workers: int) -> ImageLoader | VolumeLoader:
    """What the script with these options trains on."""
    sides = own.size_crops if hasattr(own, "size_crops") else own.target_shape[1:]
    samples, store = prepare(own.data_path, canvas_size(*sides), own.cache_path, own.on_bad, workers, progress=False)
    return views.loader_of(own, samples, store)


def about_batch(
    loader: ImageLoader | VolumeLoader, batch: dict[str, Any], cfg: Config, thumbs: page.Thumbnails
) -> Iterator[dict[str, Any]]:
    """What the page shows of every sample of a batch."""
    if isinstance(loader, ImageLoader):
        for b, index in enumerate(batch["index"].tolist()):
            original = loader.dataset[cfg.epoch, index]["image"].float()
            yield about_image(_name(loader.dataset, index), original, batch["crops"], loader.crops.drawn, b, thumbs)
        return
    for b, index in enumerate(batch["index"].tolist()):
        yield about_volume(loader, batch, b, index, cfg, thumbs)
    for b, index in enumerate(batch.get("image_index", [])):
        place = int(index) - loader.total_slices
        original = loader.image_dataset[cfg.epoch, place]["image"].float()
        name = _name(loader.image_dataset, place)
        yield about_image(name, original, [batch["images"]], loader.image_views.drawn, b, thumbs)


def about_image(
    name: str, original: Tensor, kinds: list[Tensor], drawn: list[views.Draws], b: int, thumbs: page.Thumbnails
) -> dict[str, Any]:
    """kinds: one [count, B, H, W] per crop size."""
    largest = max(kinds[0].shape[-2:])
    pictures = [_picture(thumbs, original, SIDE, "original")]
    crops = [crop[b] for kind in kinds for crop in kind]
    for number, (crop, draws) in enumerate(zip(crops, drawn, strict=True), start=1):
        done = " · ".join(views.describe(draws, b, original.shape[-1]))
        side = round(SIDE * max(crop.shape) / largest)
        pictures.append(_picture(thumbs, crop, side, f"crop {number}: {done}") | {"box": BOX})
    rows = [{"title": "", "done": [], "pictures": pictures}]
    return {"name": name, "about": f"working copy of {' x '.join(map(str, original.shape))} px", "rows": rows}


def about_volume(
    loader: VolumeLoader, batch: dict[str, Any], b: int, index: int, cfg: Config, thumbs: page.Thumbnails
) -> dict[str, Any]:
    """The same slices of the window and of each of its views."""
    window = loader.dataset[cfg.epoch, index]
    start, length = window["start"], window["length"]
    places = sorted(set(page.spread(0, length, cfg.slices)))
    stacks = [("original", [], window["volume"].float())]
    for number, draws in enumerate(loader.views.drawn, start=1):
        done = views.describe(draws, b, loader.dataset.store.size)
        stacks.append((f"view {number}", done, batch["views"][number - 1, b]))
    rows = []
    for number, (title, done, stack) in enumerate(stacks):
        hidden = batch["hidden"][number - 1, b] if number and "hidden" in batch else None
        pictures = [
            _picture(thumbs, stack[place], SIDE, f"slice {start + place}", hidden is not None and bool(hidden[place]))
            for place in places
        ]
        rows.append({"title": title, "done": done, "pictures": pictures})
    total = loader.dataset.samples[loader.dataset.items[index]].slices
    padded = loader.dataset.slices - length
    about = f"slices {start} to {start + length - 1} of {total}" + (f", then {padded} of padding" if padded else "")
    return {"name": _name(loader.dataset, index), "about": about, "rows": rows}


def _name(dataset: Slices | VolumeWindows, index: int) -> str:
    """Relative to the data tree."""
    return dataset.name(index).removeprefix(f"{dataset.samples[0].data_path}/")


def _picture(
    thumbs: page.Thumbnails, picture: Tensor, side: int, caption: str = "", marked: bool = False
) -> dict[str, Any]:
    width = round(side * picture.shape[1] / max(picture.shape))
    return {"thumb": thumbs.array(picture.numpy()), "width": width, "box": width, "caption": caption, "marked": marked}


def arguments(given: list[str]) -> list[str]:
    """What stands before the first option is the option `source`."""
    return [f"--source={given[0]}", *given[1:]] if given and not given[0].startswith("-") else given


if __name__ == "__main__":
    options.main(main, Config, __doc__, arguments(sys.argv[1:]))

"""The batches of a training script, with what was drawn for every view of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from datasets.augment import MultiCrop, VolumeViews
from datasets.index import Sample
from datasets.loaders import ImageLoader, Slices, VolumeLoader, VolumeWindows
from datasets.store import SliceStore
from utils.distributed import Run

ALONE = Run(0, 1, torch.device("cpu"))
Draws = dict[str, np.ndarray]


class RecordedViews(VolumeViews):
    """The same views, and in `drawn` the parameters of each."""

    drawn: list[Draws]

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.drawn = []
        return super().__call__(*args, **kwargs)

    def _draw_paper(self, *args: Any) -> Draws:
        self.drawn.append(super()._draw_paper(*args))
        return self.drawn[-1]

    def _draw_strong(self, *args: Any) -> Draws:
        self.drawn.append(super()._draw_strong(*args))
        return self.drawn[-1]


class RecordedCrops(MultiCrop):
    """The same crops, and in `drawn` the parameters of each."""

    drawn: list[Draws]

    def __call__(self, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        self.drawn = []
        return super().__call__(*args, **kwargs)

    def _draw(self, *args: Any) -> Draws:
        self.drawn.append(super()._draw(*args))
        return self.drawn[-1]


def loader_of(config: Any, samples: list[Sample], store: SliceStore) -> ImageLoader | VolumeLoader:
    """The loader that the script of these options trains with, for one process on the CPU."""
    if hasattr(config, "size_crops"):
        crops = RecordedCrops(
            sizes=[(side, side) for side in config.size_crops],
            counts=config.nmb_crops,
            scales=list(zip(config.min_scale_crops, config.max_scale_crops, strict=True)),
            policy=config.policy,
            seed=config.seed,
        )
        images = Slices(samples, store, config.slices_per_volume)
        return ImageLoader(images, crops, config.batch_size, 0, config.seed, ALONE, config.sampling_temperature)
    slices, height, width = config.target_shape
    joint = hasattr(config, "lambda_inter")
    more = {}
    if joint:
        scales = [(config.min_scale_images, 1.0)]
        more = {
            "intra_slices": config.intra_slices,
            "images_per_step": config.images_per_step if config.lambda_intra else 0,
            "image_views": RecordedCrops([(height, width)], [2], scales, config.policy, config.seed),
        }
    return VolumeLoader(
        VolumeWindows(samples, store, slices, config.seed),
        RecordedViews(height, width, config.policy, config.seed),
        config.batch_size,
        0,
        config.seed,
        ALONE,
        mask_ratio=config.mask_ratio if not joint or config.lambda_mask else 0,
        mask_style=config.mask_style,
        sampling_temperature=config.sampling_temperature,
        **more,
    )


def describe(draws: Draws, b: int, canvas: int) -> list[str]:
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

"""The fixed slice projection that makes stage 2's targets, from the data's own slices."""

from __future__ import annotations

import numpy as np
import torch

from datasets.loaders import VolumeWindows
from models.encoder import JointEncoder, init_pca
from models.folding import fold_batch_norm
from models.resnet import multi_scale
from utils.distributed import Run, gather_objects


@torch.no_grad()
def fit_projection(
    encoder: JointEncoder, volumes: VolumeWindows, size: tuple[int, int], run: Run, slices: int = 4096
) -> float:
    """Set the slice projection to the principal components of the frozen ResNet's features of the data's own slices.

    Up to `slices` slices, evenly spaced over all volumes and resized to `size` without augmentation; the processes
    share them. Returns the share of variance that d_model components keep, and prints it.
    """
    counts = [volumes.samples[i].slices for i in volumes.items]
    every = [(i, s) for i, count in zip(volumes.items, counts, strict=True) for s in range(count)]
    chosen = [every[int(k)] for k in np.linspace(0, len(every) - 1, min(slices, len(every)))]
    encoder.eval().to(run.device)
    resnet = fold_batch_norm(encoder.encoder)
    features = []
    for start in range(run.rank * 32, len(chosen), run.world_size * 32):
        part = [volumes.store.read(i, s, s + 1) for i, s in chosen[start : start + 32]]
        images = torch.from_numpy(np.stack(part)).to(run.device)
        images = torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
        features.append((start, multi_scale(resnet(images)).cpu()))
    joint = sorted((part for parts in gather_objects(features) for part in parts), key=lambda part: part[0])
    kept = init_pca(encoder.projection, torch.cat([part for _, part in joint]).to(run.device))
    if run.is_main:
        print(
            f"slice projection: {encoder.projection.out_features} principal components of {len(chosen)} slices "
            f"keep {kept:.1%} of the variance of their features",
            flush=True,
        )
    return kept

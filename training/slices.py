"""What stage 2 takes from the data before it trains: the slice projection, and the clusters that it predicts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.loaders import VolumeWindows
from models.encoder import init_pca
from models.folding import fold_batch_norm
from models.resnet import multi_scale
from objectives.kmeans import kmeans_torch
from objectives.learners import MaskedSlices
from utils.distributed import Run, gather_objects
from utils.seeding import KMEANS, stream

SAMPLE = 4096  # slices, evenly spaced over all volumes


@torch.no_grad()
def fit(learner: MaskedSlices, volumes: VolumeWindows, cfg: Any, run: Run) -> None:
    """Principal components of the frozen ResNet's slice features as the projection (`projection_init: pca`), and the
    centroids of spherical k-means over the projected slices as the clusters."""
    features = slice_features(learner, volumes, cfg.target_shape[1:], run)
    said = f"{len(features)} slices of the data: "
    if cfg.projection_init == "pca":
        kept = init_pca(learner.encoder.projection, features)
        width = learner.encoder.projection.out_features
        said += f"{width} principal components keep {kept:.1%} of the variance of their features, "
    points = F.normalize(learner.encoder.projection(features), dim=1)
    rng = stream(cfg.seed, 0, 0, 0, KMEANS)
    start = np.sort(rng.choice(len(points), min(len(learner.clusters), len(points)), replace=False))
    own = points[run.rank :: run.world_size]
    centroids = kmeans_torch(own, points[torch.from_numpy(start).to(points.device)])
    learner.clusters[: len(centroids)] = centroids
    if run.is_main:
        print(f"{said}{len(centroids)} clusters to predict", flush=True)


def slice_features(learner: MaskedSlices, volumes: VolumeWindows, size: tuple[int, int], run: Run) -> Tensor:
    """[n, C] multi-scale features of SAMPLE slices resized to `size`, not augmented; the processes share the work."""
    counts = [volumes.samples[i].slices for i in volumes.items]
    every = [(i, s) for i, count in zip(volumes.items, counts, strict=True) for s in range(count)]
    chosen = [every[int(k)] for k in np.linspace(0, len(every) - 1, min(SAMPLE, len(every)))]
    learner.encoder.eval().to(run.device)
    resnet = fold_batch_norm(learner.resnet)
    features = []
    for start in range(run.rank * 32, len(chosen), run.world_size * 32):
        part = [volumes.store.read(i, s, s + 1) for i, s in chosen[start : start + 32]]
        images = torch.from_numpy(np.stack(part)).to(run.device)
        images = F.interpolate(images, size, mode="bilinear", antialias=True)
        features.append((start, multi_scale(resnet(images)).cpu()))
    joint = sorted((part for parts in gather_objects(features) for part in parts), key=lambda part: part[0])
    return torch.cat([part for _, part in joint]).to(run.device)

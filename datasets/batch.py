"""What a loader hands to a learner: how many samples there are, and batches of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """One step's samples of this process, on its device.

    B volumes or images, V views (2 of volumes), D slices of H x W pixels.
    Stage 1 has crops; stage 2 views or targets, mask, rows and masked; stage 3 views, mask, rows, picked, slice_index,
    and images with image_index where the data hold images, masked where L_mask is on, hidden where L_recon is. Stages 1
    and 3 also have place and group of what L_intra clusters.
    """

    index: Tensor  # [B] of the samples over all data sets
    counts: list[int] | None = None  # samples of every process in the global batch; None: the same on each
    crops: list[Tensor] | None = None  # per crop size [count, B, H, W], large crops first
    views: Tensor | None = None  # [V, B, D, H, W] in 0..1
    mask: Tensor | None = None  # [B, D] True for real slices, which come first
    rows: Tensor | None = None  # [n] places of the real slices in the flattened mask
    picked: Tensor | None = None  # [B, S] real slices that enter L_intra, repeated where a volume has fewer than S
    slice_index: Tensor | None = None  # [B * S] their index over all slices of all volumes
    images: Tensor | None = None  # [V, M, H, W] 2D images beside the volumes; M is the same on every process
    image_index: Tensor | None = None  # [M] their index, which goes on where that of the slices ends
    masked: Tensor | None = None  # [V, B, D] slices whose embeddings are to be predicted
    place: Tensor | None = None  # [n] relative position in the volume, 0 to 1; inf: an image
    group: Tensor | None = None  # [n] number of the data set within which positions correspond
    hidden: Tensor | None = None  # [B, D, H / block, W / block] blocks of the first view that L_recon restores
    targets: Tensor | None = None  # [V, B, D, d] frozen slice embeddings, where they are known already

    @property
    def intra_index(self) -> Tensor:
        """[n] of what L_intra clusters in stage 3: the picked slices, then the images."""
        return self.slice_index if self.image_index is None else torch.cat([self.slice_index, self.image_index])


class Counts(NamedTuple):
    """What the size of an objective depends on: samples of each level, and embeddings of a global batch per view."""

    slices: int  # and images: stage 1's samples, or all slices of all volumes and the images beside them
    slice_batch: int
    volumes: int = 0
    volume_batch: int = 0
    places: Tensor | None = None  # [slices] relative position of each in its volume, 0 to 1; inf: an image

    def of(self, level: str) -> tuple[int, int]:
        """(samples, batch) of the level `intra` or `inter`."""
        return (self.volumes, self.volume_batch) if level == "inter" else (self.slices, self.slice_batch)

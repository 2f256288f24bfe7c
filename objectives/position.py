"""Positional contrast: slices of other patients at the same place of the anatomy are positives.

Source: Zeng et al., "Positional Contrastive Learning for Volumetric Medical Image Segmentation" (MICCAI 2021): InfoNCE
in which all slices of aligned volumes are positives whose relative positions differ by less than a threshold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from datasets.batch import Batch
from models.heads import ProjectionHead, projected
from utils.distributed import all_gather, gather_embeddings, global_loss

VIEWS = 2  # of a slice that are compared: in stage 1, the large crops


class PositionContrast(nn.Module):
    """forward: slice features [V, n, C], and the batch that they are of -> scalar, the loss of the global batch.

    A projection head of its own gives embeddings z of the first two views.

    mean over the slices i of volumes, in both views, of
    -1 / |P(i)| sum over p in P(i) of log softmax_j!=i(z_i . z_j / temperature)[p];
    P(i): its other view, and the slices of the same `group` whose `place` is nearer than `threshold`. Images, which
    have no place, are negatives only.
    """

    def __init__(self, head: nn.Module, threshold: float, temperature: float) -> None:
        super().__init__()
        self.head, self.threshold, self.temperature = head, threshold, temperature

    @classmethod
    def of(cls, cfg: Any, features: int) -> PositionContrast | None:
        """From a script's options; None where `position_threshold` is 0."""
        if not cfg.position_threshold:
            return None
        return cls(ProjectionHead(features, cfg.hidden_mlp, cfg.feat_dim), cfg.position_threshold, cfg.temperature)

    def forward(self, features: Tensor, batch: Batch, counts: list[int] | None) -> Tensor:
        views = min(VIEWS, len(features))
        z = projected(self.head, features[:views]).transpose(0, 1)
        z = gather_embeddings(z, counts).flatten(0, 1)  # [N * V, d]
        place, group = (all_gather(x, counts).repeat_interleave(views) for x in (batch.place, batch.group))
        sample = torch.arange(len(z), device=z.device) // views
        near = (group[:, None] == group) & ((place[:, None] - place).abs() < self.threshold)  # inf is near nothing
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        positive = (near | (sample[:, None] == sample)) & ~itself
        scores = (z @ z.T / self.temperature).masked_fill(itself, float("-inf"))
        log_p = scores.log_softmax(dim=1).masked_fill(~positive, 0)
        each = -log_p.sum(dim=1) / positive.sum(dim=1)
        slices = place.isfinite()
        return global_loss((each * slices).sum() / slices.sum().clamp(min=1))

"""What stands between an encoder and an objective."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.resnet import wide


class ProjectionHead(nn.Sequential):
    """MLP of SwAV and DeepCluster-v2: [N, in_dim] -> [N, feat_dim], not normalised."""

    def __init__(self, in_dim: int, hidden: int = 2048, feat_dim: int = 128) -> None:
        super().__init__(
            nn.Linear(in_dim, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, feat_dim),
        )


class Prototypes(nn.Module):
    """One bias-free linear layer per head: unit embeddings [N, d] -> list of cosine scores [N, K_h].

    Call `normalize_` before a step: the scores are cosines only while every prototype has unit length.
    """

    def __init__(self, dim: int, sizes: list[int], trainable: bool = True) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(dim, size, bias=False) for size in sizes)
        self.requires_grad_(trainable)
        self.normalize_()

    @torch.no_grad()
    def normalize_(self) -> None:
        for head in self.heads:
            head.weight.copy_(F.normalize(head.weight, dim=1))

    def forward(self, z: Tensor) -> list[Tensor]:
        return [head(z) for head in self.heads]


def projected(head: nn.Module, features: Tensor) -> Tensor:
    """features [V, n, C] -> z [V, n, d], unit length."""
    return F.normalize(wide(head(features.flatten(0, 1))), dim=1).unflatten(0, features.shape[:2])

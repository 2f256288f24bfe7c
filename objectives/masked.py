"""Masked slice-embedding prediction: the guess to beat."""

from __future__ import annotations

import torch
from torch import Tensor


def interpolate_masked(tokens: Tensor, visible: Tensor) -> Tensor:
    """Linear interpolation along the slices between the nearest visible neighbours; at the ends, the nearest one.

    tokens [B, D, d], visible [B, D] bool with at least one True per row -> [B, D, d], visible slices unchanged.
    """
    D = tokens.shape[1]
    place = torch.arange(D, device=tokens.device)
    left = torch.where(visible, place, -1).cummax(dim=1).values
    right = torch.where(visible, place, D).flip(1).cummin(dim=1).values.flip(1)
    nearest_left = torch.where(left < 0, right, left)
    nearest_right = torch.where(right >= D, left, right)
    gap = (nearest_right - nearest_left).clamp(min=1)
    weight = ((place - nearest_left).clamp(min=0).to(tokens.dtype) / gap).clamp(max=1).unsqueeze(-1)
    before = tokens.gather(1, nearest_left.unsqueeze(-1).expand_as(tokens))
    after = tokens.gather(1, nearest_right.unsqueeze(-1).expand_as(tokens))
    return before * (1 - weight) + after * weight

"""Masked slice-embedding prediction: which slices are hidden, and what interpolation would have scored."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from datasets.seeding import MASKED_SLICES, stream


def draw_masks(
    lengths: Tensor, index: Tensor, ratio: float, style: str, seed: int, epoch: int, view: int, slices: int
) -> Tensor:
    """[B, slices] bool, True where a slice is hidden: ceil(ratio * length) real slices of every volume.

    lengths [B] real slices, index [B] global sample index. style: `random` (anywhere) or `span` (one contiguous run).
    At least one slice stays visible. A pure function of (seed, epoch, index, view).
    """
    hidden = torch.zeros(len(lengths), slices, dtype=torch.bool)
    for b, (length, i) in enumerate(zip(lengths.tolist(), index.tolist(), strict=True)):
        rng = stream(seed, epoch, i, view, MASKED_SLICES)
        # The small step down keeps 0.1 * 30 = 3.0000000000000004 from being rounded up to 4.
        count = min(max(1, int(np.ceil(ratio * length - 1e-9))), length - 1)
        if style == "span":
            start = int(rng.integers(length - count + 1))
            hidden[b, start : start + count] = True
        else:
            hidden[b, torch.from_numpy(rng.permutation(length)[:count])] = True
    return hidden


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
    weight = ((place - nearest_left).clamp(min=0) / gap).clamp(max=1).unsqueeze(-1).to(tokens.dtype)
    before = tokens.gather(1, nearest_left.unsqueeze(-1).expand_as(tokens))
    after = tokens.gather(1, nearest_right.unsqueeze(-1).expand_as(tokens))
    return before * (1 - weight) + after * weight

"""Which slices of a view are masked: their embeddings are to be predicted."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from utils.seeding import MASKED_SLICES, stream


def draw_masks(
    lengths: Tensor, index: Tensor, ratio: float, style: str, seed: int, epoch: int, view: int, slices: int
) -> Tensor:
    """[B, slices] bool, True where a slice is masked: ceil(ratio * length) real slices of every volume.

    lengths [B] real slices, index [B] global sample index. style: `random` (anywhere) or `span` (one contiguous run).
    At least one slice stays visible. A pure function of (seed, epoch, index, view).
    """
    masked = torch.zeros(len(lengths), slices, dtype=torch.bool)
    for b, (length, i) in enumerate(zip(lengths.tolist(), index.tolist(), strict=True)):
        rng = stream(seed, epoch, i, view, MASKED_SLICES)
        # The small step down keeps 0.1 * 30 = 3.0000000000000004 from being rounded up to 4.
        count = min(max(1, int(np.ceil(ratio * length - 1e-9))), length - 1)
        if style == "span":
            start = int(rng.integers(length - count + 1))
            masked[b, start : start + count] = True
        else:
            masked[b, torch.from_numpy(rng.permutation(length)[:count])] = True
    return masked

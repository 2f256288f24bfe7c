"""Soft assignments under the constraint that every prototype is used equally."""

from __future__ import annotations

import torch
from torch import Tensor

from utils.distributed import all_max, all_sum


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3, taking_part: Tensor | None = None) -> Tensor:
    """Sinkhorn-Knopp codes of the global batch of all processes.

    scores: [B, K] cosines, this process's share (B may differ between processes, even 0).  epsilon: > 0, smaller is
    harder.  taking_part: [B] bool, rows that there are; the others get codes of 0 and change nothing. None: all.
    Returns [B, K], rows sum to 1, in the dtype of the scores but at least float32.
    Raises ValueError unless scores is 2D and epsilon > 0.

    Source: Caron et al. 2020 (SwAV), section 3.1 and appendix A. Departs: the global maximum is subtracted first and
    the iteration runs in float64, so nothing overflows and, for cosines, nothing underflows down to epsilon 0.003
    (in float32 a row of low scores becomes 0 / 0 below epsilon 0.02). exp runs once, so float64 costs little.
    """
    if scores.dim() != 2 or epsilon <= 0:
        raise ValueError(f"scores must be [B, K] and epsilon > 0, got {tuple(scores.shape)} and {epsilon}")
    out_dtype = torch.promote_types(scores.dtype, torch.float32)
    logits = scores.double() / epsilon
    if taking_part is not None:
        logits = logits.masked_fill(~taking_part.unsqueeze(1), -torch.inf)
    largest = logits.max() if logits.numel() else logits.new_full((), -torch.inf)
    Q = torch.exp(logits - all_max(largest))
    for _ in range(iterations):
        Q /= all_sum(Q.sum(dim=0, keepdim=True))  # every prototype gets the same mass
        given = Q.sum(dim=1, keepdim=True)
        if taking_part is not None:
            given = given.where(taking_part.unsqueeze(1), 1)  # not 0 / 0
        Q /= given  # every embedding gives away exactly one
    return Q.to(out_dtype)

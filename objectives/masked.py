"""Masked slice-embedding prediction: its loss, and the guess to beat."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.batch import Batch
from models.resnet import wide
from utils.distributed import all_sum, world_size
from utils.profile import span


def masked_loss(
    transformer: nn.Module,
    mask_token: Tensor,
    decoder: nn.Module,
    targets: Tensor,
    batch: Batch,
    classifier: nn.Module | None = None,
    clusters: Tensor | None = None,
) -> dict[str, Tensor]:
    """targets [V, B, D, d] -> `mask`: mean squared error over the masked slices of the global batch, and what the two
    guesses to beat score there: `interpolation` between visible neighbours, `average` (0: targets are centred).

    With clusters [K, d] unit length also `cluster`: cross-entropy of their classifier's logits against the nearest
    cluster of every masked slice, in place of its exact embedding (as CAPI does, Darcet et al. 2025).
    """
    mask, masked = batch.mask.repeat(len(targets), 1), batch.masked.flatten(0, 1)
    targets, only = wide(targets.flatten(0, 1)), masked.unsqueeze(-1)
    tokens = torch.where(only, mask_token.to(targets.dtype), targets)
    with span("f_inter"):
        context = transformer(tokens, mask)
        predicted = wide(decoder(context))
    guessed = interpolate_masked(targets, mask & ~masked)
    # Volumes of different length mask different numbers of slices; every masked slice of all processes counts once.
    share = world_size() / all_sum(masked.sum().float()).clamp(min=1)
    found = {
        name: ((guess - targets) * only).square().sum() * share / targets.shape[-1]
        for name, guess in (("mask", predicted), ("interpolation", guessed), ("average", torch.zeros_like(targets)))
    }
    if classifier is not None:
        nearest = (targets @ clusters.T).argmax(dim=-1)
        each = F.cross_entropy(wide(classifier(context)).flatten(0, 1), nearest.flatten(), reduction="none")
        found["cluster"] = (each * masked.flatten()).sum() * share
    return found


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

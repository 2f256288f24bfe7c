"""Masked slice-embedding prediction: its loss, and the guess to beat."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from datasets.batch import Batch
from models.resnet import wide
from utils.distributed import all_sum, world_size
from utils.profile import span


def masked_loss(
    transformer: nn.Module, mask_token: Tensor, decoder: nn.Module, targets: Tensor, batch: Batch
) -> dict[str, Tensor]:
    """targets [V, B, D, d] -> `loss` and `interpolation`: means over the masked slices of the global batch."""
    mask, masked = batch.mask.repeat(len(targets), 1), batch.masked.flatten(0, 1)
    targets, only = wide(targets.flatten(0, 1)), masked.unsqueeze(-1)
    tokens = torch.where(only, mask_token.to(targets.dtype), targets)
    with span("f_inter"):
        predicted = wide(decoder(transformer(tokens, mask)))
    guessed = interpolate_masked(targets, mask & ~masked)
    # Volumes of different length mask different numbers of slices; every masked slice of all processes counts once.
    share = world_size() / (all_sum(masked.sum().float()).clamp(min=1) * targets.shape[-1])
    loss = ((predicted - targets) * only).square().sum() * share
    interpolation = ((guessed - targets) * only).square().sum() * share
    return {"loss": loss, "interpolation": interpolation}


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

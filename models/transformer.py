"""f_inter: a transformer over the slices of a volume with deformable attention in one dimension.

Source: Z. Xia et al., "Vision Transformer with Deformable Attention" (CVPR 2022), equations 5-9, carried from two
dimensions to one. Departs: the relative position bias is a small network of the signed logarithm of the distance
(as in Swin v2) rather than an interpolated table, so any number of slices works.

The attention runs along the slices. (The method's released code passes the tensor transposed, so there it runs
along the feature axis and its weights are tied to one slice count.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AttentionMaps(NamedTuple):
    """What one deformable attention layer looked at; n = ceil(D / stride) sampled points."""

    positions: Tensor  # [B, groups, n] sampled positions in slices
    weights: Tensor  # [B, heads, D, n] attention of every slice over the sampled points


class DeformableAttention1D(nn.Module):
    """Every slice attends to n = ceil(D / stride) points whose positions along the slices are learned.

    forward: x [B, D, d], mask [B, D] bool, True for real slices, which come first -> [B, D, d].
    Offsets dp = offset_scale * tanh(theta(q)), in slices, come from a depthwise convolution over the queries, one
    set per group; keys and values are x sampled linearly at p + dp. Padded slices are never sampled and do not
    change what real slices get. heads must be a multiple of groups, and d of both; otherwise ValueError.
    """

    def __init__(
        self,
        d_model: int,
        heads: int = 8,
        groups: int = 8,
        stride: int = 4,
        kernel: int = 6,
        offset_scale: float = 4.0,
        bias_hidden: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if d_model % heads or heads % groups:
            raise ValueError(
                f"d_model ({d_model}) must be a multiple of heads ({heads}), and heads of groups ({groups})"
            )
        if kernel < stride or (kernel - stride) % 2:
            raise ValueError(f"kernel ({kernel}) must be stride ({stride}) plus an even number")
        self.heads, self.groups, self.stride, self.offset_scale = heads, groups, stride, offset_scale
        width = d_model // groups
        self.to_q = nn.Linear(d_model, d_model)
        self.to_kv = nn.Linear(d_model, 2 * d_model)
        self.to_out = nn.Linear(d_model, d_model)
        self.offset_conv = nn.Conv1d(d_model, d_model, kernel, stride, padding=(kernel - stride) // 2, groups=d_model)
        self.offset_head = nn.Conv1d(d_model, groups, 1, groups=groups)
        self.bias = nn.Sequential(nn.Linear(1, bias_hidden), nn.ReLU(), nn.Linear(bias_hidden, heads // groups))
        self.dropout = nn.Dropout(dropout)
        self.scale = (d_model // heads) ** -0.5
        self.width = width

    def sample_positions(self, q: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """q [B, D, d] (zero at padded slices), lengths [B] -> positions [B, G, n] in slices, valid [B, n]."""
        D = q.shape[1]
        q = F.pad(q, (0, 0, 0, -D % self.stride)).transpose(1, 2)  # [B, d, n * stride]
        offsets = self.offset_head(F.gelu(self.offset_conv(q)))  # [B, G, n]
        centres = torch.arange(offsets.shape[2], device=q.device) * self.stride
        offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32))  # positions never in half precision
        positions = centres + (self.stride - 1) / 2 + self.offset_scale * torch.tanh(offsets)
        last = (lengths - 1).view(-1, 1, 1).to(positions.dtype)
        positions = torch.minimum(positions.clamp(min=0), last)
        return positions, centres < lengths.view(-1, 1)

    def forward(self, x: Tensor, mask: Tensor, return_maps: bool = False) -> Tensor | tuple[Tensor, AttentionMaps]:
        B, D, d = x.shape
        lengths = mask.sum(dim=1)
        q = self.to_q(x) * mask.unsqueeze(-1)
        positions, valid = self.sample_positions(q, lengths)  # [B, G, n], [B, n]

        # Linear sampling is a product with hat functions max(0, 1 - |p - j|): deterministic and easy to differentiate.
        slices = torch.arange(D, device=x.device)
        hats = (1 - (positions.unsqueeze(-1) - slices).abs()).clamp(min=0).to(x.dtype)  # [B, G, n, D]
        grouped = x.view(B, D, self.groups, self.width).transpose(1, 2)  # [B, G, D, d / G]
        sampled = (hats @ grouped).transpose(1, 2).reshape(B, -1, d)  # [B, n, d]

        k, v = self.to_kv(sampled).chunk(2, dim=-1)
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v)
        )  # [B, heads, D or n, d / heads]
        distance = slices.view(-1, 1) - positions.unsqueeze(2)  # [B, G, D, n]
        signed_log = distance.sign() * torch.log1p(distance.abs())
        bias = self.bias(signed_log.unsqueeze(-1).to(x.dtype))  # [B, G, D, n, heads / G]
        bias = bias.permute(0, 1, 4, 2, 3).flatten(1, 2)  # [B, heads, D, n]
        scores = (q @ k.transpose(-1, -2)).to(positions.dtype) * self.scale + bias.to(positions.dtype)
        weights = scores.masked_fill(~valid.view(B, 1, 1, -1), float("-inf")).softmax(dim=-1)
        out = self.dropout(weights).to(v.dtype) @ v  # [B, heads, D, d / heads]
        out = self.to_out(out.transpose(1, 2).flatten(2))
        return (out, AttentionMaps(positions, weights)) if return_maps else out


class Layer(nn.Module):
    """Local mixing, deformable attention, GELU MLP, each added to its input: x [B, D, d], mask [B, D] -> [B, D, d].

    Departs from the method's "attention, add & norm": normalisation stands before the branches, and a depthwise
    convolution over three slices comes first (DAT++'s local perception unit). Keys and values are sampled every
    `stride` slices, so without it a slice hardly sees its direct neighbours; docs/DECISIONS.md has the measurement.
    """

    def __init__(self, d_model: int, hidden: int, dropout: float, heads: int) -> None:
        super().__init__()
        self.local = nn.Conv1d(d_model, d_model, 3, padding=1, groups=d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.attention = DeformableAttention1D(d_model, heads=heads, groups=heads)
        self.norm2 = nn.LayerNorm(d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, d_model))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor, return_maps: bool = False) -> Tensor | tuple[Tensor, AttentionMaps]:
        x = x + self.local(x.transpose(1, 2)).transpose(1, 2)  # padded slices are zero, as is the convolution's border
        attended = self.attention(self.norm1(x), mask, return_maps)
        attended, maps = attended if return_maps else (attended, None)
        x = x + self.dropout(attended)
        x = x + self.dropout(self.mlp(self.norm2(x)))
        return (x, maps) if return_maps else x


class SliceTransformer(nn.Module):
    """f_inter: slice embeddings [B, D, d] and mask [B, D] (real slices first) -> contextual slice embeddings [B, D, d].

    Outputs at padded slices are zero. With return_maps, also a list of `AttentionMaps`, one per layer.
    """

    def __init__(
        self, d_model: int = 640, layers: int = 4, hidden: int = 720, dropout: float = 0.1, heads: int = 8
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(d_model, hidden, dropout, heads) for _ in range(layers))

    def forward(
        self, x: Tensor, mask: Tensor, return_maps: bool = False
    ) -> Tensor | tuple[Tensor, list[AttentionMaps]]:
        x = x * mask.unsqueeze(-1)
        maps = []
        for layer in self.layers:
            if return_maps:
                x, seen = layer(x, mask, return_maps=True)
                maps.append(seen)
            else:
                x = layer(x, mask)
            x = x * mask.unsqueeze(-1)
        return (x, maps) if return_maps else x

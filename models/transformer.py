"""f_inter: a transformer over the slices of a volume with deformable attention in one dimension.

Source: Z. Xia et al., "Vision Transformer with Deformable Attention" (CVPR 2022), equations 5-9, carried from two
dimensions to one. Departs: the relative position bias is a small network of the signed logarithm of the distance
(as in Swin v2) rather than an interpolated table, so any number of slices works.

The attention runs along the slices. (The method's released code passes the tensor transposed, so there it runs
along the feature axis and its weights are tied to one slice count.)
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Attention = Literal["deformable", "ordinary", "mean"]


class AttentionMaps(NamedTuple):
    """What one deformable attention layer looked at; n = ceil(D / stride) sampled points."""

    positions: Tensor  # [B, groups, n] sampled positions in slices
    weights: Tensor  # [B, heads, D, n] attention of every slice over the sampled points


class _ScalarNetwork(torch.autograd.Function):
    """W2 relu(W1 s + b1) + b2 of many scalars: s [1, N], W1 and b1 [H, 1], W2 [O, H], b2 [O, 1] -> [O, N].

    What `nn.Sequential` computes, but the H hidden values of a scalar exist only while its block is computed, and are
    computed again for the gradient. Kept, they would be H times as large as s, and a CPU would spend most of the
    attention's time on moving them. Not in half precision, which gains nothing here.
    """

    @staticmethod
    def blocks(x: Tensor, hidden: int) -> tuple[Tensor, ...]:
        """x [rows, N] in parts whose hidden values fit a core's cache (1 MiB), or a GPU's memory (256 MiB)."""
        return x.split((2**18 if x.device.type == "cpu" else 2**26) // hidden, dim=1)

    @staticmethod
    def forward(ctx: Any, s: Tensor, W1: Tensor, b1: Tensor, W2: Tensor, b2: Tensor) -> Tensor:
        ctx.save_for_backward(s, W1, b1, W2)
        with torch.autocast(s.device.type, enabled=False):
            parts = _ScalarNetwork.blocks(s, len(W1))
            return torch.cat([torch.addmm(b2, W2, torch.addmm(b1, W1, part).relu_()) for part in parts], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        s, W1, b1, W2 = ctx.saved_tensors
        of_s, of_W1, of_b1, of_W2 = torch.empty_like(s), W1.new_zeros(()), b1.new_zeros(()), W2.new_zeros(())
        with torch.autocast(s.device.type, enabled=False):
            parts = (_ScalarNetwork.blocks(x, len(W1)) for x in (s, grad, of_s))
            for part, of_out, of_part in zip(*parts, strict=True):
                hidden = torch.addmm(b1, W1, part).relu_()
                of_W2 = of_W2 + of_out @ hidden.T
                of_hidden = (W2.T @ of_out).mul_(hidden.sign_())  # the sign of what ReLU lets pass is 1, else 0
                torch.mm(W1.T, of_hidden, out=of_part)
                of_W1, of_b1 = of_W1 + of_hidden @ part.T, of_b1 + of_hidden.sum(dim=1, keepdim=True)
        return of_s, of_W1, of_b1, of_W2, grad.sum(dim=1, keepdim=True)


class DeformableAttention1D(nn.Module):
    """Every slice attends to n = ceil(D / stride) points whose positions along the slices are learned.

    forward: x [B, D, d], mask [B, D] bool, True for real slices, which come first -> [B, D, d].
    Offsets dp = offset_scale * tanh(theta(q)), in slices, come from a depthwise convolution over the queries, one
    set per group; keys and values are x sampled linearly at p + dp. Padded slices are never sampled and do not
    change what real slices get. heads must be a multiple of groups, and d of both; otherwise ValueError.
    """

    stride, kernel = 4, 6  # of the sampled points and of the convolution that moves them, in slices
    offset_scale = 4.0
    bias_hidden = 32

    def __init__(self, d_model: int, heads: int = 8, groups: int = 8) -> None:
        super().__init__()
        if d_model % heads or heads % groups:
            raise ValueError(
                f"d_model ({d_model}) must be a multiple of heads ({heads}), and heads of groups ({groups})"
            )
        self.heads, self.groups, self.width = heads, groups, d_model // groups
        self.to_q = nn.Linear(d_model, d_model)
        self.to_kv = nn.Linear(d_model, 2 * d_model)
        self.to_out = nn.Linear(d_model, d_model)
        padding = (self.kernel - self.stride) // 2
        self.offset_conv = nn.Conv1d(d_model, d_model, self.kernel, self.stride, padding, groups=d_model)
        self.offset_head = nn.Conv1d(d_model, groups, 1, groups=groups)
        hidden, per_group = self.bias_hidden, heads // groups
        self.bias = nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, per_group))
        self.scale = (d_model // heads) ** -0.5

    def sample_positions(self, q: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """q [B, D, d] (zero at padded slices), lengths [B] -> positions [B, G, n] in slices, valid [B, n]."""
        D = q.shape[1]
        q = F.pad(q, (0, 0, 0, -D % self.stride)).transpose(1, 2)  # [B, d, n * stride]
        with torch.autocast(q.device.type, enabled=False):  # small: half precision costs accuracy and gains no time
            offsets = self.offset_head(F.gelu(self.offset_conv(q.to(self.offset_conv.weight.dtype))))  # [B, G, n]
        centres = torch.arange(offsets.shape[2], device=q.device) * self.stride
        offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32))  # positions never in half precision
        positions = centres + (self.stride - 1) / 2 + self.offset_scale * torch.tanh(offsets)
        last = (lengths - 1).view(-1, 1, 1).to(positions.dtype)
        positions = torch.minimum(positions.clamp(min=0), last)
        return positions, centres < lengths.view(-1, 1)

    def position_bias(self, signed_log: Tensor) -> Tensor:
        """`bias` of every entry: signed_log [B, G, D, n] -> [B, heads, D, n]."""
        if torch.compiler.is_compiling():  # torch.compile fuses it itself, torch.export wants no number of blocks
            return self.bias(signed_log.unsqueeze(-1)).permute(0, 1, 4, 2, 3).flatten(1, 2)
        first, _, last = self.bias
        flat = signed_log.to(first.weight.dtype).reshape(1, -1)
        out = _ScalarNetwork.apply(flat, first.weight, first.bias.unsqueeze(1), last.weight, last.bias.unsqueeze(1))
        return out.view(-1, *signed_log.shape).permute(1, 2, 0, 3, 4).flatten(1, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.attend(x, mask)[0]

    def attend(self, x: Tensor, mask: Tensor) -> tuple[Tensor, AttentionMaps]:
        """What `forward` returns, and what it looked at."""
        B, D, d = x.shape
        lengths = mask.sum(dim=1)
        q = self.to_q(x) * mask.unsqueeze(-1)
        positions, valid = self.sample_positions(q, lengths)  # [B, G, n], [B, n]

        # Linear sampling is a product with hat functions max(0, 1 - |p - j|): deterministic and easy to differentiate.
        distance = torch.arange(D, device=x.device).view(-1, 1) - positions.unsqueeze(2)  # [B, G, D, n]
        far = distance.abs()
        hats = (1 - far).clamp(min=0).to(x.dtype)
        grouped = x.view(B, D, self.groups, self.width).transpose(1, 2)  # [B, G, D, d / G]
        sampled = (hats.transpose(-1, -2) @ grouped).transpose(1, 2).reshape(B, -1, d)  # [B, n, d]

        k, v = self.to_kv(sampled).chunk(2, dim=-1)
        # [B, heads, D or n, d / heads]
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        signed_log = distance.detach().sign() * torch.log1p(far)
        bias = self.position_bias(signed_log)
        scores = (q @ k.transpose(-1, -2)).to(positions.dtype) * self.scale + bias.to(positions.dtype)
        weights = scores.masked_fill(~valid.view(B, 1, 1, -1), float("-inf")).softmax(dim=-1)
        out = weights.to(v.dtype) @ v  # [B, heads, D, d / heads]
        return self.to_out(out.transpose(1, 2).flatten(2)), AttentionMaps(positions, weights)


class OrdinaryAttention1D(nn.Module):
    """Every slice attends to every real slice: x [B, D, d], mask [B, D] bool, True for real slices -> [B, D, d].

    What deformable attention is compared with: the same projections under the same names, without offsets, sampling
    and position bias. heads must divide d; otherwise ValueError.
    """

    def __init__(self, d_model: int, heads: int = 8) -> None:
        super().__init__()
        if d_model % heads:
            raise ValueError(f"d_model ({d_model}) must be a multiple of heads ({heads})")
        self.heads = heads
        self.to_q = nn.Linear(d_model, d_model)
        self.to_kv = nn.Linear(d_model, 2 * d_model)
        self.to_out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.to_q(x), *self.to_kv(x).chunk(2, -1))
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])  # [B, heads, D, d / heads]
        return self.to_out(out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Local mixing, attention, GELU MLP, each added to its input: x [B, D, d], mask [B, D] -> [B, D, d].

    Departs from the method's "attention, add & norm": normalisation stands before the branches, and a depthwise
    convolution over three slices comes first (DAT++'s local perception unit). Keys and values are sampled every
    `stride` slices, so without it a slice hardly sees its direct neighbours; docs/DECISIONS.md has the measurement.
    """

    def __init__(self, d_model: int, hidden: int, dropout: float, heads: int, deformable: bool = True) -> None:
        super().__init__()
        self.local = nn.Conv1d(d_model, d_model, 3, padding=1, groups=d_model)
        self.norm1 = nn.LayerNorm(d_model)
        kind = partial(DeformableAttention1D, groups=heads) if deformable else OrdinaryAttention1D
        self.attention = kind(d_model, heads=heads)
        self.norm2 = nn.LayerNorm(d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, d_model))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.local(x.transpose(1, 2)).transpose(1, 2)  # padded slices are zero, as is the convolution's border
        x = x + self.dropout(self.attention(self.norm1(x), mask))
        return x + self.dropout(self.mlp(self.norm2(x)))


class SliceTransformer(nn.Module):
    """f_inter: slice embeddings [B, D, d] and mask [B, D] (real slices first) -> contextual slice embeddings [B, D, d].

    Outputs at padded slices are zero.
    attention: `deformable`, `ordinary`, or `mean`: no layers at all, so that the mean over slices is that of the slice
    embeddings themselves.
    """

    def __init__(
        self,
        d_model: int = 640,
        layers: int = 4,
        hidden: int = 720,
        dropout: float = 0.1,
        heads: int = 8,
        attention: Attention = "deformable",
    ) -> None:
        super().__init__()
        count = 0 if attention == "mean" else layers
        deformable = attention == "deformable"
        self.layers = nn.ModuleList(Layer(d_model, hidden, dropout, heads, deformable) for _ in range(count))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x * mask.unsqueeze(-1)
        for layer in self.layers:
            x = layer(x, mask) * mask.unsqueeze(-1)
        return x

    def maps(self, x: Tensor, mask: Tensor) -> list[AttentionMaps]:
        """What each deformable layer looks at."""
        found: list[AttentionMaps] = []

        def look(attention: DeformableAttention1D, given: tuple[Tensor, Tensor], _: Tensor) -> None:
            found.append(attention.attend(*given)[1])

        deformable = [part for part in self.modules() if isinstance(part, DeformableAttention1D)]
        hooks = [attention.register_forward_hook(look) for attention in deformable]
        self(x, mask)
        for hook in hooks:
            hook.remove()
        return found

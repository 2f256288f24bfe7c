"""f_intra and f_inter together: from a volume's slices to slice embeddings and one volume embedding."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.resnet import GreyResNet, multi_scale, pooled, wide
from models.transformer import Attention, SliceTransformer


class JointEncoder(nn.Module):
    """ResNet over slices (`encoder`), linear slice projection (`projection`), transformer over them (`transformer`).

    The names of the three parts are the prefixes of the exported weights.
    """

    def __init__(
        self,
        arch: str = "resnet50",
        d_model: int = 640,
        layers: int = 4,
        dropout: float = 0.1,
        recompute: bool = False,
        attention: Attention = "deformable",
    ) -> None:
        super().__init__()
        self.encoder = GreyResNet(arch, recompute)
        self.projection = nn.Linear(sum(self.resnet.stage_features), d_model)
        self.transformer = SliceTransformer(d_model, layers, dropout=dropout, attention=attention)
        init_orthogonal(self.projection)

    @property
    def resnet(self) -> GreyResNet:
        return self.encoder

    def slices(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 1, H, W] in 0..1 -> last-stage features [N, C4] and slice embeddings [N, d]: four stages, projected."""
        stages = self.resnet(images)
        return pooled(stages), self.projection(multi_scale(stages))

    def tokens(self, volumes: Tensor, mask: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[B, D, H, W] and mask [B, D] -> features of the real slices [n, C4] and slice embeddings [B, D, d].

        Padded slices never enter the ResNet, so they cost nothing and do not touch BatchNorm; their embedding is 0.
        rows: `real_rows(mask)`, for callers that know it without waiting for the device.
        """
        rows = real_rows(mask) if rows is None else rows
        features, embedded = self.slices(volumes.flatten(0, 1)[rows].unsqueeze(1))
        return features, spread(embedded, rows, mask.shape)

    def cells(self, stages: list[Tensor], rows: Tensor, mask: Tensor) -> Tensor:
        """What the slices around it show, for every cell of the last stage: f_inter along the slices, cell by cell.

        stages: of the slices `rows` of volumes with real slices `mask` [B, D].  -> [n, h, w, d] of the n slices.
        """
        h, w = stages[-1].shape[-2:]
        means = [F.normalize(wide(F.adaptive_avg_pool2d(stage, (h, w))), dim=1) for stage in stages]
        embedded = self.projection(torch.cat(means, dim=1).permute(0, 2, 3, 1))  # [n, h, w, d]
        tokens = spread(embedded.flatten(1), rows, mask.shape).unflatten(2, (h * w, -1))  # [B, D, cells, d]
        context = self.transformer(tokens.transpose(1, 2).flatten(0, 1), mask.repeat_interleave(h * w, dim=0))
        context = context.unflatten(0, (-1, h * w)).transpose(1, 2)  # [B, D, cells, d]
        return context.flatten(0, 1)[rows].unflatten(1, (h, w))

    def holistic(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Slice embeddings [B, D, d] -> the volume's embedding [B, d], unit length."""
        context = wide(self.transformer(tokens, mask))
        mean = context.sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return F.normalize(mean, dim=1)


def real_rows(mask: Tensor) -> Tensor:
    """mask [..., D] bool -> where it is True [n], counted through the flattened mask."""
    return mask.flatten().nonzero().squeeze(1)


def spread(embedded: Tensor, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Embeddings [n, d] to their places among `shape` slices [*shape, d]; 0 elsewhere. The opposite of picking rows."""
    return embedded.new_zeros(math.prod(shape), embedded.shape[1]).index_copy(0, rows, embedded).view(*shape, -1)


@torch.no_grad()
def init_orthogonal(projection: nn.Linear) -> None:
    """Semi-orthogonal weights up to one factor, no bias.

    Inputs are four joined unit vectors (squared length 4); the factor brings the outputs' mean square near 1.
    """
    nn.init.orthogonal_(projection.weight)
    projection.weight.mul_((projection.in_features / 4) ** 0.5)
    nn.init.zeros_(projection.bias)


@torch.no_grad()
def init_pca(projection: nn.Linear, features: Tensor) -> float:
    """Principal components of slice features [n, in_features]; returns the share of variance that they keep.

    Centred on the mean feature, components by falling variance, one common factor so that the outputs' mean square
    is 1. Where n - 1 < out_features, the remaining rows are an orthogonal complement: they see nothing of these
    slices but keep the projection semi-orthogonal.
    """
    features = features.double()
    mean = features.mean(dim=0)
    centred = features - mean
    _, singular, components = torch.linalg.svd(centred, full_matrices=False)
    d = projection.out_features
    rank = int((singular > singular[0] * 1e-7).sum()) if singular[0] > 0 else 0
    basis = components[: min(rank, d)]
    if basis.shape[0] < d:
        # Gaussian rows made orthogonal to the basis, from a fixed seed: equal on every process.
        generator = torch.Generator().manual_seed(0)
        extra = torch.randn(d - basis.shape[0], projection.in_features, generator=generator, dtype=torch.double)
        rows = torch.cat([basis, extra.to(basis.device)])[: projection.in_features]
        rows = torch.linalg.qr(rows.T).Q.T
        rows[: basis.shape[0]] = basis  # QR may turn signs
        basis = F.pad(rows, (0, 0, 0, d - rows.shape[0]))
    variance = singular.square().sum()
    kept = singular[:d].square().sum()
    spread = kept / (features.shape[0] * d)
    # Slices without variance give no scale: fall to that of `init_orthogonal`.
    flat = bool(spread <= 1e-12 * features.square().mean())
    factor = (features.new_tensor(projection.in_features / 4) if flat else 1 / spread).sqrt()
    projection.weight.copy_(basis * factor)
    projection.bias.copy_(-(basis * factor) @ mean)
    return float(kept / variance.clamp(min=1e-12))

"""The plain way to write training steps of stages 2 and 3: what `benchmarks.step` compares ours with.

torchvision's three-channel ResNet, channels first in float32; four layers of the `deformable-attention` package along
the feature axis, as the method's released code calls it; TorchIO on the CPU. Objectives are ours, and the optimiser is
plain SGD: beside a ResNet they take no time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from models.encoder import JointEncoder
from models.heads import ProjectionHead
from models.resnet import multi_scale
from objectives import MaskedSlices, SwAV

D_MODEL, FEAT_DIM, INTRA_SLICES = 640, 128, 8
PROTOTYPES, INTRA_PROTOTYPES = 16, 300  # few: their cost does not show beside a ResNet


def installed(*packages: str) -> bool:
    """Whether all of these are; what is missing is said."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        print(f"left out, as it needs packages that are not installed: {', '.join(missing)} (requirements-dev.txt)")
    return not missing


def step_of(arch: str, shape: tuple[int, int, int], batch_size: int, device: torch.device) -> Callable[[], None]:
    """A step on random volumes; shape: slices, height, width of a view."""
    import torchio as tio
    from deformable_attention import DeformableAttention1D

    slices, height, width = shape
    kinds = "Affine", "Anisotropy", "Blur", "Noise", "BiasField", "Gamma"
    others = [getattr(tio, f"Random{kind}")() for kind in kinds]
    augment = tio.OneOf([tio.RandomFlip(axes=(0, 1, 2), flip_probability=1), *others])
    volumes = torch.rand(batch_size, 1, height, width, slices)
    net = torchvision.models.get_model(arch, weights=None)
    features, net.fc = net.fc.in_features, nn.Identity()
    project, head = nn.Linear(features, D_MODEL), ProjectionHead(features)
    options = {"dim": slices, "downsample_factor": 4, "offset_scale": 2, "offset_kernel_size": 6}
    layers = nn.ModuleList(DeformableAttention1D(**options) for _ in range(4))
    inter, intra = SwAV(D_MODEL, [PROTOTYPES]), SwAV(FEAT_DIM, [INTRA_PROTOTYPES])
    modules = nn.ModuleList([net, project, head, layers, inter, intra]).to(device).train()
    optimizer = torch.optim.SGD(modules.parameters(), 0.3, 0.9)

    def step() -> None:
        views = torch.stack([torch.stack([augment(v) for v in volumes]) for _ in range(2)]).to(device)
        pooled = net(views.squeeze(2).permute(0, 1, 4, 2, 3).flatten(0, 2).unsqueeze(1).repeat(1, 3, 1, 1))
        tokens = project(pooled).view(2 * batch_size, slices, D_MODEL)
        for layer in layers:
            tokens = layer(tokens) + tokens
        z = F.normalize(tokens.mean(dim=1), dim=1)
        w = F.normalize(head(pooled), dim=1).view(2, -1, FEAT_DIM)[:, : INTRA_SLICES * batch_size]
        (inter(z.view(2, batch_size, -1)) + intra(w)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class PlainMasked(MaskedSlices):
    """Stage 2: the frozen network unfolded, in one graph with the transformer, whose part alone is used."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(JointEncoder(cfg.arch, cfg.d_model))
        resnet = torchvision.models.get_model(cfg.arch, weights=None)
        self.plain = create_feature_extractor(resnet, [f"layer{k}" for k in (1, 2, 3, 4)]).requires_grad_(False)

    def train(self, mode: bool = True) -> PlainMasked:
        super().train(mode)
        self.plain.eval()
        return self

    def targets(self, views: Tensor, mask: Tensor, rows: Tensor | None = None) -> Tensor:
        self.plain.zero_grad(set_to_none=True)
        stages = self.plain(views.flatten(0, 2).unsqueeze(1).repeat(1, 3, 1, 1))
        return self.encoder.projection(multi_scale([*stages.values()])).unflatten(0, views.shape[:3])

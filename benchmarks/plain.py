"""The plain way to write a training step of stage 3 with public packages: what `benchmarks.step` compares ours with.

torchvision's three-channel ResNet, channels first in float32; four layers of the `deformable-attention` package along
the feature axis, as the method's released code calls it; TorchIO on the CPU; SwAV's swapped prediction; LARC with a
loop over parameters.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from models.heads import ProjectionHead

D_MODEL, FEAT_DIM, INTRA_SLICES = 640, 128, 8
PROTOTYPES, INTRA_PROTOTYPES = 16, 300  # few: their cost does not show beside a ResNet


def installed(*packages: str) -> bool:
    """Whether all of these are; what is missing is said."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        print(f"left out, as it needs packages that are not installed: {', '.join(missing)} (requirements-dev.txt)")
    return not missing


def released_transforms() -> Sequence[Callable[[Tensor], Tensor]]:
    """TorchIO's seven, of which the method's released code draws one for a view."""
    import torchio as tio

    return (
        tio.RandomFlip(axes=(0, 1, 2), flip_probability=1),
        tio.RandomAffine(),
        tio.RandomAnisotropy(),
        tio.RandomBlur(),
        tio.RandomNoise(),
        tio.RandomBiasField(),
        tio.RandomGamma(),
    )


def released_attention(slices: int) -> nn.Module:
    """Deformable attention on [B, slices, d] as the method's released code calls it."""
    from deformable_attention import DeformableAttention1D

    return DeformableAttention1D(dim=slices, downsample_factor=4, offset_scale=2, offset_kernel_size=6)


def larc(parameters: list[nn.Parameter], lr: float) -> Callable[[], None]:
    """LARC and momentum as a loop over parameters."""
    momenta = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def update() -> None:
        for p, m in zip(parameters, momenta, strict=True):
            w, g = p.norm(), p.grad.norm()
            rate = 0.001 * w / (g + 1e-6 * w + 1e-8) if w > 0 and g > 0 else 1.0
            m.mul_(0.9).add_((p.grad + 1e-6 * p) * rate)
            p.add_(m, alpha=-lr)
            p.grad = None

    return update


def swav(scores: Tensor) -> Tensor:
    """scores [2, B, K] -> the swapped prediction of two views, three Sinkhorn iterations."""
    with torch.no_grad():
        codes = torch.exp(scores / 0.05)
        for _ in range(3):
            codes = codes / codes.sum(dim=1, keepdim=True) / codes.shape[2]
            codes = codes / codes.sum(dim=2, keepdim=True) / codes.shape[1]
        codes = codes * codes.shape[1]
    return -0.5 * sum((codes[i] * F.log_softmax(scores[1 - i] / 0.1, dim=1)).sum(dim=1).mean() for i in range(2))


def step_of(arch: str, shape: tuple[int, int, int], batch_size: int, device: torch.device) -> Callable[[], None]:
    """A step on random volumes; shape: slices, height, width of a view."""
    import torchio as tio

    slices, height, width = shape
    augment = tio.OneOf(released_transforms())
    volumes = torch.rand(batch_size, 1, height, width, slices)
    net = torchvision.models.get_model(arch, weights=None)
    features, net.fc = net.fc.in_features, nn.Identity()
    project, head = nn.Linear(features, D_MODEL), ProjectionHead(features)
    layers = nn.ModuleList(released_attention(slices) for _ in range(4))
    inter, intra = nn.Linear(D_MODEL, PROTOTYPES, bias=False), nn.Linear(FEAT_DIM, INTRA_PROTOTYPES, bias=False)
    modules = nn.ModuleList([net, project, head, layers, inter, intra]).to(device).train()
    update = larc(list(modules.parameters()), 0.3)

    def step() -> None:
        views = torch.stack([torch.stack([augment(v) for v in volumes]) for _ in range(2)]).to(device)
        pooled = net(views.squeeze(2).permute(0, 1, 4, 2, 3).flatten(0, 2).unsqueeze(1).repeat(1, 3, 1, 1))
        tokens = project(pooled).view(2 * batch_size, slices, D_MODEL)
        for layer in layers:
            tokens = layer(tokens) + tokens
        z = F.normalize(tokens.mean(dim=1), dim=1)
        w = F.normalize(head(pooled), dim=1).view(2, -1, FEAT_DIM)[:, : INTRA_SLICES * batch_size]
        (swav(inter(z).view(2, batch_size, -1)) + swav(intra(w))).backward()
        update()

    return step

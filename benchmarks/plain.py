"""The plain way to write a training step with public packages: what `benchmarks.step` compares ours with.

torchvision's three-channel ResNet, channels first in float32; four layers of the `deformable-attention` package along
the feature axis, as the method's released code calls it; TorchIO on the CPU; SwAV's swapped prediction; LARC with a
loop over parameters.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from models.heads import ProjectionHead

D_MODEL, FEAT_DIM = 640, 128
PROTOTYPES, INTRA_PROTOTYPES, INTRA_SLICES = 16, 300, 8  # few: their cost does not show beside a ResNet
WITHOUT = {  # package -> what the step of stage 3 does without it
    "torchio": "views are not augmented",
    "deformable_attention": "four layers of ordinary attention along the slices",
}


def missing() -> dict[str, str]:
    """Packages that the step of stage 3 has to go without -> what it does instead."""
    return {package: instead for package, instead in WITHOUT.items() if importlib.util.find_spec(package) is None}


def released_transforms() -> Callable[[Tensor], Tensor]:
    """One of TorchIO's seven at a time, as the method's released code draws them for a view."""
    import torchio as tio

    return tio.OneOf(
        [
            tio.RandomFlip(axes=(0, 1, 2), flip_probability=1),
            tio.RandomAffine(),
            tio.RandomAnisotropy(),
            tio.RandomBlur(),
            tio.RandomNoise(),
            tio.RandomBiasField(),
            tio.RandomGamma(),
        ]
    )


def package_attention(slices: int) -> nn.Module:
    """Deformable attention on [B, slices, d] as the method's released code calls it."""
    from deformable_attention import DeformableAttention1D

    return DeformableAttention1D(dim=slices, downsample_factor=4, offset_scale=2, offset_kernel_size=6)


class OrdinaryAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x, need_weights=False)[0]


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


def volumes_step(cfg: Any, device: torch.device) -> Callable[[], None]:
    """The step of stage 3, without the packages that are `missing`."""
    without = missing()
    slices, height, width = cfg.target_shape
    augment = (lambda volume: volume) if "torchio" in without else released_transforms()
    volumes = torch.rand(cfg.batch_size, 1, height, width, slices)
    net = torchvision.models.get_model(cfg.arch, weights=None)
    features, net.fc = net.fc.in_features, nn.Identity()
    project, head = nn.Linear(features, D_MODEL), ProjectionHead(features)
    ordinary = "deformable_attention" in without
    layers = nn.ModuleList(
        OrdinaryAttention(D_MODEL, 8, batch_first=True) if ordinary else package_attention(slices) for _ in range(4)
    )
    inter, intra = nn.Linear(D_MODEL, PROTOTYPES, bias=False), nn.Linear(FEAT_DIM, INTRA_PROTOTYPES, bias=False)
    modules = nn.ModuleList([net, project, head, layers, inter, intra]).to(device).train()
    update = larc(list(modules.parameters()), 0.3)

    def step() -> None:
        views = torch.stack([torch.stack([augment(v) for v in volumes]) for _ in range(2)]).to(device)
        pooled = net(views.squeeze(2).permute(0, 1, 4, 2, 3).flatten(0, 2).unsqueeze(1).repeat(1, 3, 1, 1))
        tokens = project(pooled).view(2 * len(volumes), slices, D_MODEL)
        for layer in layers:
            tokens = layer(tokens) + tokens
        z = F.normalize(tokens.mean(dim=1), dim=1)
        w = F.normalize(head(pooled), dim=1).view(2, -1, FEAT_DIM)[:, : INTRA_SLICES * len(volumes)]
        (swav(inter(z).view(2, len(volumes), -1)) + swav(intra(w))).backward()
        update()

    return step


def images_step(cfg: Any, device: torch.device) -> Callable[[], None]:
    """The step of stage 1, without augmentation."""
    side = cfg.target_shape[1]
    shapes = [(2 * cfg.images, side), (4 * cfg.images, side // 2)]
    images = [torch.rand(n, 3, side, side, device=device) for n, side in shapes]
    net = torchvision.models.get_model(cfg.arch, weights=None)
    head, net.fc = ProjectionHead(net.fc.in_features), nn.Identity()
    prototypes = nn.Linear(FEAT_DIM, INTRA_PROTOTYPES, bias=False)
    modules = nn.ModuleList([net, head, prototypes]).to(device).train()
    update = larc(list(modules.parameters()), 0.3)

    def step() -> None:
        z = F.normalize(head(torch.cat([net(x) for x in images])), dim=1)
        swav(prototypes(z)[: 2 * cfg.images].view(2, cfg.images, -1)).backward()
        update()

    return step


def apart(make: Callable, cfg: Any, device: torch.device) -> Callable[[], object]:
    """The step that `make(cfg, device)` gives; on a CPU in a process of its own, whose memory is handled as usual."""
    if device.type == "cuda":
        return make(cfg, device)
    context = torch.multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=_serve, args=(make, cfg, theirs), daemon=True).start()
    theirs.close()  # so that the end of that process is noticed

    def step() -> None:
        ours.send(None)
        ours.recv()

    return step


def _serve(make: Callable, cfg: Any, connection: Connection) -> None:
    step = make(cfg, torch.device("cpu"))
    with suppress(EOFError):  # the benchmark has ended
        while True:
            connection.recv()
            step()
            connection.send(None)

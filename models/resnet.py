"""The slice encoder's backbone: any torchvision ResNet, folded to one grey input channel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from utils.errors import UserError
from utils.options import ARCHITECTURES

GREY_MEAN, GREY_STD = 0.449, 0.226  # ImageNet's means and deviations, averaged over the three channels
# On CPUs, torch's bf16 kernel (oneDNN, torch 2.14) leaves a part of the weight gradient unwritten where a 3 x 3
# convolution of stride 2 meets a map of width 1. That is the last stage's for images of up to this width.
NARROW = 16


def fold_grey(conv1: Tensor) -> Tensor:
    """[C, 3, k, k] weights of a colour stem -> [C, 1, k, k], the same function of a grey image repeated three times."""
    return conv1.sum(dim=1, keepdim=True)


def unfold_grey(conv1: Tensor) -> Tensor:
    """[C, 1, k, k] -> [C, 3, k, k] with a third of the weight per channel: `fold_grey` undoes it."""
    return (conv1 / 3).repeat(1, 3, 1, 1)


class GreyResNet(nn.Module):
    """A torchvision ResNet without its classifier, on grey images.

    forward: [N, 1, H, W] intensities in 0..1 -> stages, a list of four [N, C_i, H / 2^(i+2), W / 2^(i+2)] maps; with
    `stem`, the stem's [N, 64, H / 2, W / 2] before them.
    The stem normalises with ImageNet's statistics averaged over the channels, as pretrained weights expect.
    Parameter names are torchvision's; `conv1.weight` has one input channel (see `fold_grey`).
    recompute: keep only the input of each residual block for the backward pass, which then computes the rest again:
    a third more time, a fraction of the memory, the same gradients.
    Raises ValueError when `arch` is not one of `ARCHITECTURES`.
    """

    def __init__(self, arch: str = "resnet50", recompute: bool = False) -> None:
        super().__init__()
        if arch not in ARCHITECTURES:
            raise ValueError(f"arch: {arch!r} is not one of {', '.join(ARCHITECTURES)}")
        net = torchvision.models.get_model(arch, weights=None)
        net.conv1.weight = nn.Parameter(fold_grey(net.conv1.weight.detach()))
        net.conv1.in_channels = 1
        self.conv1, self.bn1, self.relu, self.maxpool = net.conv1, net.bn1, net.relu, net.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        self.arch, self.recompute = arch, recompute
        self.num_features = net.fc.in_features  # channels of the last stage, 2048 for ResNet-50
        expansion = self.num_features // 512
        self.stem_features = net.conv1.out_channels
        self.stage_features = tuple(width * expansion for width in (64, 128, 256, 512))
        self.to(memory_format=torch.channels_last)  # a quarter to a third faster on CPUs and on tensor cores

    def forward(self, images: Tensor, stem: bool = False) -> list[Tensor]:
        if images.device.type == "cpu" and torch.is_autocast_enabled("cpu") and images.shape[-1] <= NARROW:
            with torch.autocast("cpu", enabled=False):
                return self._stages(wide(images), stem)
        return self._stages(images, stem)

    def _stages(self, images: Tensor, stem: bool) -> list[Tensor]:
        x = (images - GREY_MEAN) / GREY_STD
        x = self.relu(self.bn1(self.conv1(x)))
        stages = [x] if stem else []
        x = self.maxpool(x)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer:
                x = self._again(block, x) if self.recompute and torch.is_grad_enabled() else block(x)
            stages.append(x)
        return stages

    @staticmethod
    def _again(block: nn.Module, x: Tensor) -> Tensor:
        def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
            return nullcontext(), statistics_stay(block)

        return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As of any module. Raises UserError with `recompute`, whose contexts torch.compile does not know."""
        if self.recompute:
            raise UserError("compile: does not work together with recompute; leave one of them out")
        super().compile(*args, **kwargs)

    def torchvision_state(self) -> dict[str, Tensor]:
        """Flat state dict in torchvision's layout with a three-channel stem and without `fc`, tensors contiguous."""
        state = {name: plain(value) for name, value in self.state_dict().items()}
        state["conv1.weight"] = unfold_grey(state["conv1.weight"])
        return state


@contextmanager
def statistics_stay(module: nn.Module) -> Iterator[None]:
    """BatchNorm's running statistics do not move: recomputation has moved them before, hidden pixels are not data."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    before = [(m.momentum, m.num_batches_tracked) for m in norms]
    for m in norms:
        m.momentum = 0.0
        if m.num_batches_tracked is not None:  # SyncBatchNorm on GPUs must have one to count on
            m.num_batches_tracked = m.num_batches_tracked.clone()
    try:
        yield
    finally:
        for m, (momentum, tracked) in zip(norms, before, strict=True):
            m.momentum, m.num_batches_tracked = momentum, tracked


def plain(value: Tensor) -> Tensor:
    """A contiguous copy on the CPU: weights are files for other programs, which need not know channels-last."""
    return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def wide(x: Tensor) -> Tensor:
    """x in float32 at least: norms, means and losses never in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _SpatialMean(torch.autograd.Function):
    """x [N, C, H, W] -> mean [N, C], float32 at least. torch's own would write a whole map of equal gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return x.mean(dim=(2, 3), dtype=torch.promote_types(x.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        each = gradient / (ctx.shape[2] * ctx.shape[3])
        return each.to(ctx.dtype)[:, :, None, None].expand(ctx.shape)  # added to the map's other gradient as it is


def pooled(stages: list[Tensor]) -> Tensor:
    """Global average of the last stage: [N, C4]."""
    return stages[-1].mean(dim=(2, 3))


def multi_scale(stages: list[Tensor]) -> Tensor:
    """Global averages of all stages, each of unit length, joined: [N, C1 + C2 + C3 + C4] (3840 for ResNet-50)."""
    if stages[0].requires_grad:
        means = [_SpatialMean.apply(stage) for stage in stages]
    else:  # the same without a node of ours in exported programs
        dtype = torch.promote_types(stages[0].dtype, torch.float32)
        means = [stage.mean(dim=(2, 3), dtype=dtype) for stage in stages]
    return torch.cat([F.normalize(mean, dim=1) for mean in means], dim=1)

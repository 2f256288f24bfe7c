"""BatchNorm over all processes, on GPUs and on CPUs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _JointBatchNorm(torch.autograd.Function):
    """Normalise with the global batch's mean and deviation, by torch's own kernels; no temporary wider than x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, n: float) -> Tensor:
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.n = n
        return _affine(x, mean, invstd, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd = ctx.saved_tensors
        # As if the statistics were constants: gradient * weight * invstd, sum(gradient * normalised), sum(gradient).
        if x.numel():
            by_x, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
                gradient, x, weight, mean, invstd.square().reciprocal(), mean, invstd, False, 0.0, [True] * 3
            )
        else:  # the kernel divides by the number of values
            by_x, by_weight, by_bias = torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(weight)
        joint = torch.stack((by_weight, by_bias))
        dist.all_reduce(joint)  # every process's loss depends on every process's input through the statistics
        along, shift = joint * (weight * invstd / ctx.n)
        return by_x.sub_(_affine(x, mean, invstd, along, shift)), by_weight, by_bias, None, None, None


def _affine(x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(x - mean) * invstd * weight + bias per channel, in x's format and memory layout."""
    if not x.numel():
        return torch.empty_like(x)
    return torch.native_batch_norm(x, weight, bias, mean, invstd.square().reciprocal(), False, 0.0, 0.0)[0]


def _joint_statistics(x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean, sum of squares around it [C] and values per channel, of all processes: equal on each, float32 or wider."""
    n = x.numel() // x.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, variance = (x.new_zeros(x.shape[1], dtype=dtype) for _ in range(2))
    if n == 1:
        mean.copy_(x.detach().flatten())  # the kernel below would divide by n - 1
    elif n:
        torch.batch_norm_update_stats(x.detach(), mean, variance, 1.0)  # momentum 1: writes the batch's own
    own = torch.cat((mean.new_tensor([n]), mean, variance * (n - 1)))
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    total, mean, squares = parts[0][0], *parts[0][1:].chunk(2)
    for part in parts[1:]:  # Chan, Golub and LeVeque 1979: squares around the joint mean, so nothing cancels
        m, (other_mean, other_squares) = part[0], part[1:].chunk(2)
        joint = (total + m).clamp(min=1)
        apart = other_mean - mean
        mean = mean + apart * (m / joint)
        squares = squares + other_squares + apart.square() * (total * m / joint)
        total = total + m
    return mean, squares, float(total)


class CPUSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """SyncBatchNorm for gloo: PyTorch's own accepts GPU tensors only.

    x [N, C, ...] -> same shape. Mean and variance are those of the global batch of all processes, which may bring
    different N. One collective forward and one backward, each of 2 C values.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions (N, C, ...), got {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        mean, squares, n = _joint_statistics(x)
        if self.track_running_stats:
            with torch.no_grad():
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
                momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(squares / max(1.0, n - 1), momentum)
        invstd = torch.rsqrt(squares / n + self.eps)
        weight = self.weight if self.affine else torch.ones_like(mean)
        bias = self.bias if self.affine else torch.zeros_like(mean)
        return _JointBatchNorm.apply(x, weight, bias, mean, invstd, n)


def convert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Replace every BatchNorm by its synchronised kind: PyTorch's on GPUs, `CPUSyncBatchNorm` elsewhere.

    Parameters and buffers are shared with the originals, so names in the state dict do not change.
    """
    if any(p.is_cuda for p in module.parameters()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            new = CPUSyncBatchNorm(
                child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
            )
            new.weight, new.bias = child.weight, child.bias
            new.running_mean, new.running_var = child.running_mean, child.running_var
            new.num_batches_tracked = child.num_batches_tracked
            new.train(child.training)
            setattr(module, name, new)
        else:
            convert_sync_batchnorm(child)
    return module

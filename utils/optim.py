"""SGD with layer-wise adaptive rates, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


class LARC(Optimizer):
    """SGD with momentum whose step per tensor is proportional to the tensor's own length.

    With w the tensor and g its gradient, when both norms are above 0:
        r = trust * |w| / (|g| + weight_decay * |w| + eps),  with clip: r = min(r / lr, 1),
        g <- r * (g + weight_decay * w)
    otherwise g is used as it is, without weight decay. Then m <- momentum * m + g and w <- w - lr * m.
    Groups with `adapt=False` do plain SGD with momentum and their own weight decay.
    Source: You, Gitman and Ginsburg 2017, "Large Batch Training of Convolutional Networks", as SwAV uses it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        trust: float = 0.001,
        clip: bool = False,
        eps: float = 1e-8,
    ) -> None:
        rates = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, rates | {"trust": trust, "clip": clip, "eps": eps, "adapt": True})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            # At once on a GPU, where every call has a price; one by one on a CPU, where a tensor stays in the cache.
            for part in [weights] if weights[0].is_cuda else [[w] for w in weights]:
                self._move(part, group)

    def _move(self, weights: list[torch.Tensor], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in weights]
        momenta = [self._momentum(w) for w in weights]
        torch._foreach_mul_(momenta, group["momentum"])
        if group["adapt"]:
            ratios, decays = self._adapt(weights, gradients, group)
            torch._foreach_addcmul_(momenta, gradients, ratios)
            torch._foreach_addcmul_(momenta, weights, decays)
        else:
            torch._foreach_add_(momenta, gradients)
            if group["weight_decay"]:
                torch._foreach_add_(momenta, weights, alpha=group["weight_decay"])
        torch._foreach_add_(weights, momenta, alpha=-group["lr"])

    def _momentum(self, weight: torch.Tensor) -> torch.Tensor:
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)  # so the first step is the gradient itself
        return state["momentum"]

    @staticmethod
    def _adapt(
        weights: list[torch.Tensor], gradients: list[torch.Tensor], group: dict[str, Any]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Scalars on the device, per tensor: r, and r * weight_decay. Nothing waits for it."""
        w_norm = torch.stack(torch._foreach_norm(weights))
        g_norm = torch.stack(torch._foreach_norm(gradients))
        decay = group["weight_decay"]
        ratio = group["trust"] * w_norm / (g_norm + decay * w_norm + group["eps"])
        if group["clip"] and group["lr"] > 0:
            ratio = (ratio / group["lr"]).clamp(max=1)
        moves = (w_norm > 0) & (g_norm > 0)
        decays = torch.where(moves, ratio * decay, 0)
        return list(torch.where(moves, ratio, 1).unbind()), list(decays.unbind())


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices and kernels adapt and decay; biases and norm gains do neither.

    A bias starts at 0, where the adaptive rate is undefined, and a bias near 0 would be held there for good by a step
    proportional to its own length (SimCLR and BYOL exclude these tensors for the same reason).
    """
    named = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in named if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in named if p.dim() <= 1], "weight_decay": 0.0, "adapt": False},
    ]


class WarmupCosine:
    """Learning rate of a step: linear from start_warmup to base_lr (both included), then a cosine towards final_lr.

    With T steps after the warm-up, step t of them has final + (base - final) / 2 * (1 + cos(pi t / T)).
    Plain floats: a checkpoint with numpy scalars in it could not be loaded with weights_only=True.
    """

    def __init__(
        self, base_lr: float, final_lr: float, start_warmup: float, warmup_steps: int, total_steps: int
    ) -> None:
        self.base_lr, self.final_lr, self.start_warmup = base_lr, final_lr, start_warmup
        self.warmup_steps, self.total_steps = warmup_steps, total_steps

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            share = step / (self.warmup_steps - 1) if self.warmup_steps > 1 else 1.0
            return self.start_warmup + (self.base_lr - self.start_warmup) * share
        t = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.final_lr + (self.base_lr - self.final_lr) / 2 * (1 + math.cos(math.pi * min(t, 1.0)))

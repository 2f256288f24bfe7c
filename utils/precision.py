"""Which number format a step computes in: one object, decided once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer


class Precision:
    """autocast and loss scaling for `auto`, `bf16`, `fp16` or `fp32`.

    auto: bf16 where the GPU or CPU computes in it, fp16 with a loss scaler on older GPUs, fp32 on older CPUs (where
    half precision is many times slower). Weights, optimiser, losses and Sinkhorn stay in float32 or above.
    """

    def __init__(self, wanted: str, device: torch.device) -> None:
        if wanted == "auto":
            wanted = _fastest(device)
        formats = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        self.name, self.dtype, self.device = wanted, formats[wanted], device
        self.scaler = torch.amp.GradScaler(device.type, enabled=wanted == "fp16")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def may_overflow(self) -> bool:
        """Whether gradients that are not finite may come from the loss scale, which `step` then lowers.

        fp16 only. Waits for the device, so ask after a failure, not in every step.
        """
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1

    def step(self, optimizer: Optimizer) -> None:
        self.scaler.step(optimizer)  # unscales first; skipped when the scaled gradients overflowed
        self.scaler.update()


def _fastest(device: torch.device) -> str:
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native and torch.backends.mkldnn.is_available() else "fp32"

"""What keeps a run from going wrong unnoticed: updates that must not be made, processes that drift apart."""

from __future__ import annotations

import csv
import hashlib
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.distributed import gather_objects, on_main, world_size
from utils.errors import UserError
from utils.files import writing

BAD_STEPS = "bad_steps.csv"  # in a run's folder: epoch, step, reason, files of every update that was skipped
NAMES_SHOWN = 16
OWN = ("data_path", "cache_path", "pretrained_path", "dump_path", "workers", "recompute", "compile")  # of each machine


def gradients_are_finite(optimizer: Optimizer) -> Tensor:
    """Scalar bool on the device: no NaN or Inf in what the optimiser is about to apply. Does not wait for the device.

    DistributedDataParallel has averaged the gradients already, so all processes find the same. A gradient whose norm
    is beyond float32 (1.8e19) is not finite either: LARC divides by that norm.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not gradients:
        return torch.tensor(True)
    return torch.stack(torch._foreach_norm(gradients)).isfinite().all()


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """All BatchNorm layers, of whatever kind."""
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


class BatchNormStatistics:
    """Running statistics of a network as they were before a step, which moves them in its forward pass."""

    def __init__(self, module: nn.Module) -> None:
        buffers = [b for m in batch_norms(module) for b in m.buffers()]
        by_type = [[b for b in buffers if b.is_floating_point() is floats] for floats in (True, False)]
        self.now = [part for part in by_type if part]  # copied at once
        self.saved = [[b.clone() for b in part] for part in self.now]

    @torch.no_grad()
    def remember(self) -> None:
        for saved, now in zip(self.saved, self.now, strict=True):
            torch._foreach_copy_(saved, now)

    @torch.no_grad()
    def restore(self) -> None:
        for saved, now in zip(self.saved, self.now, strict=True):
            torch._foreach_copy_(now, saved)


def report_bad_step(what: str, names: list[str], epoch: int, step: int, in_a_row: int, limit: int, folder: Path) -> str:
    """Say which files a step held that was not applied, and note them in BAD_STEPS; all processes call it together.

    names: files of this process's batch.  Returns what it said.
    """
    everyone = [name for part in gather_objects(names) for name in part]
    more = f" and {len(everyone) - NAMES_SHOWN} more" if len(everyone) > NAMES_SHOWN else ""
    text = (
        f"{what} is not finite at epoch {epoch} step {step}; this step was not applied "
        f"({in_a_row} in a row, max_bad_steps {limit}); the batch held: {', '.join(everyone[:NAMES_SHOWN])}{more}"
    )

    def note() -> None:
        path = folder / BAD_STEPS
        with writing(path), open(path, "a", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file)
            if not file.tell():
                writer.writerow(["epoch", "step", "not_finite", "files"])
            writer.writerow([epoch, step, what, "; ".join(everyone)])
        print(f"warning: {text}", flush=True)

    on_main(note)
    return text


def require_finite_weights(module: nn.Module) -> None:
    """Raises UserError where a weight is NaN or Inf: such a state must not replace a good checkpoint."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    named = [(name, p.detach()) for name, p in tensors if p.numel() and p.is_floating_point()]
    finite = torch.stack(torch._foreach_norm([p for _, p in named])).isfinite().tolist()
    if bad := [name for (name, _), good in zip(named, finite, strict=True) if not good]:
        raise UserError(
            f"{len(bad)} of {len(named)} weights are not finite ({bad[0]} is the first), so nothing was "
            "saved and the last good checkpoint stays; start again with a lower --base_lr or --precision fp32 "
            "(and another --dump_path)"
        )


def require_same_options(options: dict[str, Any]) -> None:
    """Raises UserError on all processes, naming those that were started with other options than the rest."""
    options = {name: value for name, value in options.items() if name not in OWN} | {"torch": torch.__version__}
    everyone = gather_objects((options, socket.gethostname()))
    usual = Counter(repr(own) for own, _ in everyone).most_common(1)[0][0]
    usual = next(own for own, _ in everyone if repr(own) == usual)
    differing = [
        f"process {rank} on {host} has {name}: {own.get(name)} instead of {usual.get(name)}"
        for rank, (own, host) in enumerate(everyone)
        for name in own | usual
        if own.get(name) != usual.get(name)
    ]
    if differing:
        more = f" (and {len(differing) - 3} more)" if len(differing) > 3 else ""
        raise UserError(f"{'; '.join(differing[:3])}{more}; start all processes with the same script and options")


def require_equal_weights(module: nn.Module, when: str) -> None:
    """Raises UserError on all processes, naming those whose weights or buffers differ in any bit from the others'."""
    if world_size() == 1:
        return
    names = list(module.state_dict())
    everyone = gather_objects((tuple(map(_digest, module.state_dict().values())), socket.gethostname()))
    usual = Counter(digests for digests, _ in everyone).most_common(1)[0][0]
    others = [rank for rank, (digests, _) in enumerate(everyone) if digests != usual]
    if not others:
        return
    differing = [name for name, a, b in zip(names, everyone[others[0]][0], usual, strict=True) if a != b]
    who = ", ".join(f"process {rank} on {everyone[rank][1]}" for rank in others)
    raise UserError(
        f"{who}: other weights than the rest {when} ({len(differing)} tensors, first {differing[0]}); nothing was "
        "saved. Processes that see the same gradients cannot drift apart unless hardware or software of a machine "
        "fails: check that machine, then run the same command to go on from the last checkpoint"
    )


def _digest(x: Tensor) -> bytes:
    return hashlib.sha256(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()).digest()[:8]

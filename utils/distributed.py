"""Processes: start them, and the few collectives that the rest of the project needs.

Every function works in a plain `python script.py` (one process, no launcher) as well as under torchrun.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils import signals
from utils.errors import UserError
from utils.norm import convert_sync_batchnorm


@dataclass(frozen=True)
class Run:
    """Where this process stands among the others."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(device: str = "auto", seed: int = 0, timeout_minutes: float = 10) -> Run:
    """Join the process group that torchrun describes in the environment, if any, choose a device, seed torch.

    device: `auto` (a GPU where there is one), `cpu` or `cuda`. NCCL on GPUs, gloo on CPUs.
    seed: the same on all processes, so that they build the same model.
    timeout_minutes: how long processes wait for one of them that does not answer. A process that dies is noticed at
    once; a machine that is cut off, only so. Its end is an error in all others, after which torchrun restarts them.
    """
    torch.manual_seed(seed)
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device: {device!r} is not one of auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for, but torch sees no GPU; use --device cpu or auto")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"torchrun started process {local_rank} on a machine with {torch.cuda.device_count()} GPU(s); "
            "lower --nproc_per_node or use --device cpu"
        )
    chosen = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(chosen)
    else:
        _keep_freed_memory()
    if "RANK" in os.environ and not dist.is_initialized():
        with signals.deadly():  # torchrun may want to start this process again while it still waits for the others
            dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=timeout_minutes))
    return Run(rank(), world_size(), chosen)


def _keep_freed_memory() -> None:
    """Let glibc hand large blocks from one step to the next instead of giving them back to the system and asking anew.

    New pages must be zeroed by the kernel: a quarter of a ResNet-50's step in float32 on two cores. Other C libraries
    have no such switch and stay as they are.
    """
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_max = -1, -4
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def all_sum(x: Tensor) -> Tensor:
    """Sum of x over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_max(x: Tensor) -> Tensor:
    """Elementwise maximum of x over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def all_gather(x: Tensor, counts: list[int] | None = None) -> Tensor:
    """x [n, ...] of every process, joined in rank order: [sum of n, ...]. No gradient.

    counts: n of every process; None when it is the same on each. Known beforehand, it costs no wait for the device.
    """
    if world_size() == 1:
        return x
    counts = counts or [len(x)] * world_size()
    if counts[rank()] != len(x):
        raise ValueError(f"process {rank()} has {len(x)} rows, counts says {counts}")
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


def gather_objects(x: Any) -> list[Any]:
    """A small picklable object of every process, in rank order, on every process."""
    if world_size() == 1:
        return [x]
    out: list[Any] = [None] * world_size()
    dist.all_gather_object(out, x)
    return out


def broadcast(x: Tensor) -> Tensor:
    """Rank 0's x on every process, in place."""
    if world_size() > 1:
        dist.broadcast(x, src=0)
    return x


def broadcast_object(x: Any, source: int) -> Any:
    """A picklable object of process `source`, on every process."""
    if world_size() == 1:
        return x
    box = [x]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def on_main(action: Callable[[], None]) -> None:
    """Do what only the first process does; its UserError is raised on all of them."""
    everywhere(action if rank() == 0 else lambda: None)


def everywhere(action: Callable[[], Any]) -> Any:
    """What `action` returns on this process; a UserError of any process is raised on all of them."""
    result = error = None
    try:
        result = action()
    except UserError as e:
        error = e
    raise_everywhere(error)
    return result


def raise_everywhere(error: UserError | None) -> None:
    """Raise the first error that any process brings, on all processes: none is left waiting for the others."""
    errors = [e for e in gather_objects(str(error) if error else None) if e]
    if errors:
        raise UserError(errors[0])


def wrap(module: nn.Module, run: Run) -> nn.Module:
    """Move a learner to the device and, with several processes, synchronise its BatchNorm and gradients.

    Buffers are not broadcast: BatchNorm statistics, queues and assignments are computed from global quantities and
    so are equal on every process already (tests/test_distributed.py), and the memory bank differs on purpose.
    """
    module = module.to(run.device)
    if run.world_size == 1:
        return module
    module = convert_sync_batchnorm(module)
    devices = [run.device] if run.device.type == "cuda" else None
    with warnings.catch_warnings():
        # Newer versions want another name for the option, which older ones do not have.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(
            module, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )


def gradients_stay_local(module: nn.Module, stay: bool) -> AbstractContextManager[None]:
    """A context whose backward passes add to this process's gradients only; the next pass outside joins them all."""
    return module.no_sync() if stay and isinstance(module, DistributedDataParallel) else nullcontext()


def unwrap(module: nn.Module) -> nn.Module:
    """The learner inside `wrap`."""
    return module.module if isinstance(module, DistributedDataParallel) else module

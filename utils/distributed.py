"""Processes: start them, the few collectives that the rest of the project needs, and BatchNorm over all of them.

Every function works in a plain `python script.py` (one process, no launcher) as well as under torchrun.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
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

GROUP = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun puts into the environment
APART = 0.5  # seconds between the processes of a machine that ask torchrun to end


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
    Raises UserError where the environment names half a group.
    """
    torch.manual_seed(seed)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for, but torch sees no GPU; use --device cpu or auto")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(chosen)
    else:
        _keep_freed_memory()
    if "RANK" in os.environ and not dist.is_initialized():
        _join("nccl" if on_gpu else "gloo", timedelta(minutes=timeout_minutes))
    return Run(rank(), world_size(), chosen)


def _join(backend: str, timeout: timedelta) -> None:
    """Form the group. Addresses stand under a name of this start: torchrun's store still holds those of the last."""
    if missing := [name for name in GROUP if name not in os.environ]:
        raise UserError(
            f"RANK: is set, but {', '.join(missing)} not, so there are no processes to join; start with torchrun, or "
            "remove RANK from the environment (unset RANK)"
        )
    if "TORCHELASTIC_RUN_ID" in os.environ:
        signals.end_with_parent()
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    start = f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)} of {world}"
    dist.init_process_group(backend, store=dist.PrefixStore(start, store), rank=rank, world_size=world, timeout=timeout)
    signals.together(world > 1)


def end_torchrun() -> None:
    """Ask the torchrun that started this process, if any, not to start it again: the same would only come once more."""
    tries = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) - int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if "TORCHELASTIC_RUN_ID" in os.environ and tries > 0:
        time.sleep(APART * int(os.environ["LOCAL_RANK"]))  # the first ends the others, too
        os.kill(os.getppid(), signal.SIGTERM)


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
    signals.together(False)
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


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


def gather_embeddings(z: Tensor, counts: list[int] | None = None) -> Tensor:
    """As `all_gather`, but with a gradient for the own rows: a loss of all rows, computed alike on every process, has
    the gradient of the global batch if it is multiplied by the number of processes (`global_loss`)."""
    if world_size() == 1:
        return z
    parts = list(all_gather(z.detach(), counts).split(counts or [len(z)] * world_size()))
    parts[rank()] = z
    return torch.cat(parts)


def global_loss(loss: Tensor) -> Tensor:
    """A loss that every process has computed of all embeddings, for gradients that are averaged over processes."""
    return loss.detach() + world_size() * (loss - loss.detach())


def gather_objects(x: Any) -> list[Any]:
    """A small picklable object of every process, in rank order, on every process; signals of any are obeyed here."""
    if world_size() == 1:
        return [x]
    out: list[Any] = [None] * world_size()
    dist.all_gather_object(out, (x, signals.caught()))
    found, stops = zip(*out, strict=True)
    signals.obey_together(stops)
    return list(found)


def obey_signals() -> None:
    """In work of minutes: several processes stop here together after a signal to any, where one stops at once."""
    gather_objects(None)


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
    """What `action` returns on this process; the first UserError of any is raised on all: none waits for the others."""
    result = error = None
    try:
        result = action()
    except UserError as raised:
        error = str(raised)
    if errors := [text for text in gather_objects(error) if text]:
        raise UserError(errors[0])
    return result


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


def convert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Replace every BatchNorm by its synchronised kind: PyTorch's on GPUs, `CPUSyncBatchNorm` elsewhere.

    Parameters and buffers are shared with the originals, so names in the state dict do not change.
    """
    if any(p.is_cuda for p in module.parameters()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            new = CPUSyncBatchNorm(child.num_features, child.eps, child.momentum).train(child.training)
            new.weight, new.bias, new.num_batches_tracked = child.weight, child.bias, child.num_batches_tracked
            new.running_mean, new.running_var = child.running_mean, child.running_var
            setattr(module, name, new)
        else:
            convert_sync_batchnorm(child)
    return module


class CPUSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """SyncBatchNorm for gloo: PyTorch's own accepts GPU tensors only.

    x [N, C, ...] -> same shape. Mean and variance are those of the global batch of all processes, which may bring
    different N. One collective forward and one backward, each of 2 C values.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        """Any number of dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and world_size() > 1):
            return super().forward(x)
        mean, squares, n = _joint_statistics(x)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(squares / max(1.0, n - 1), self.momentum)
        invstd = torch.rsqrt(squares / n + self.eps)
        return _JointBatchNorm.apply(x, self.weight, self.bias, mean, invstd, n)


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
    parts = [torch.empty_like(own) for _ in range(world_size())]
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

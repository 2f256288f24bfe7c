"""The memory bank: for every sample and assigning crop, the last embedding, spread over the processes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from utils.distributed import all_gather, rank, world_size

GATHERED_AT_ONCE = 2**24  # numbers of all processes that a device holds while the bank is gathered


class MemoryBank:
    """Embeddings [crops, N, d] of N samples; process r keeps the samples whose index leaves remainder r.

    Not a module: its content differs between processes on purpose, so DistributedDataParallel and `state_dict` must
    not see it. `state` gathers it into one tensor that any number of processes can load.
    Memory: crops * N * d * 4 bytes / processes; `state`, as much as the whole bank on the CPU of every process.
    """

    def __init__(self, samples: int, crops: int, dim: int) -> None:
        own = len(range(rank(), samples, world_size()))
        self.samples = samples
        # One row more than samples, for what a batch holds but this process does not keep: `write` then has the same
        # shapes in every step, so the host need not wait for the device to learn them.
        self._embeddings = torch.zeros(crops, own + 1, dim)
        self._seen = torch.zeros(own + 1, dtype=torch.bool)

    @property
    def embeddings(self) -> Tensor:
        """[crops, own samples, d]"""
        return self._embeddings[:, :-1]

    @property
    def seen(self) -> Tensor:
        """[own samples] bool, whether a sample has an embedding"""
        return self._seen[:-1]

    def to(self, device: torch.device) -> None:
        self._embeddings, self._seen = self._embeddings.to(device), self._seen.to(device)

    @torch.no_grad()
    def write(self, z: Tensor, index: Tensor, counts: list[int] | None = None) -> None:
        """z [crops, B, d] and index [B] of this process's batch; counts: B of every process, None when all are alike.

        A sample that stands in the batch twice keeps its first embedding, whatever the number of processes. What is
        not finite is not kept: the training loop does not apply such a step.
        """
        every_z = all_gather(z.detach().float().transpose(0, 1), counts).transpose(0, 1)  # [crops, global batch, d]
        every_index = all_gather(index, counts)
        ordered, order = every_index.sort(stable=True)
        kept = torch.ones_like(ordered, dtype=torch.bool)
        kept[1:] = ordered[1:] != ordered[:-1]  # the first of a sample that is repeated
        z = every_z[:, order].to(self._embeddings)
        kept &= (ordered % world_size() == rank()) & z.isfinite().all(dim=2).all(dim=0)
        rows = torch.where(kept, ordered // world_size(), len(self.seen))
        self._embeddings.index_copy_(1, rows, z)
        self._seen.index_fill_(0, rows, True)

    def seen_everywhere(self) -> Tensor:
        """[N] bool on the CPU, equal on every process."""
        return self.join(self.seen.unsqueeze(0))[0]

    def state(self) -> dict[str, Tensor]:
        """All processes call it together; each gets the whole bank on the CPU."""
        return {"embeddings": self.join(self.embeddings), "seen": self.seen_everywhere()}

    def load(self, state: dict[str, Tensor]) -> None:
        """From `state` of a run with any number of processes. Raises ValueError when the shape does not fit."""
        crops, _, dim = self.embeddings.shape
        if tuple(state["embeddings"].shape) != (crops, self.samples, dim):
            raise ValueError(
                f"memory bank of {tuple(state['embeddings'].shape)} does not fit {(crops, self.samples, dim)}"
            )
        self.embeddings.copy_(state["embeddings"][:, rank() :: world_size()])
        self.seen.copy_(state["seen"][rank() :: world_size()])

    def join(self, own: Tensor) -> Tensor:
        """[c, own rows, ...] of every process -> [c, N, ...] on the CPU, rows back in index order.

        Row by row of all processes, in blocks, so that the device needs no room for the whole.
        """
        world, each = world_size(), -(-self.samples // world_size())
        joint = torch.empty(own.shape[0], self.samples, *own.shape[2:], dtype=own.dtype)
        block = max(1, GATHERED_AT_ONCE // (world * own.shape[0] * math.prod(own.shape[2:])))
        for start in range(0, each, block):
            rows = min(block, each - start)
            part = own[:, start : start + rows].transpose(0, 1)
            if len(part) < rows:  # the last row, which this process does not have
                part = torch.cat([part, part.new_zeros(1, *part.shape[1:])])
            parts = all_gather(part.contiguous()).view(world, rows, *part.shape[1:])
            in_order = parts.transpose(0, 1).flatten(0, 1).transpose(0, 1)  # [c, rows * world, ...]
            target = joint[:, start * world : (start + rows) * world]
            target.copy_(in_order[:, : target.shape[1]])
        return joint
